"""Files by their digest, and directories that appear whole or not at all."""

import contextlib
import errno
import hashlib
import os
import shutil
import socket
from collections.abc import Iterator
from typing import BinaryIO

from etils import epath

from flexjax import errors, workdir


def file_digest(path: epath.Path, copy: BinaryIO | None = None) -> str:
    """Returns the SHA-256 of a file, hexadecimal, and writes the same bytes to `copy`.

    Raises:
      DataError: the file cannot be read.
    """
    digest = hashlib.sha256()
    for block in _blocks(path):
        digest.update(block)
        if copy is not None:
            copy.write(block)
    return digest.hexdigest()


def _blocks(path: epath.Path) -> Iterator[bytes]:
    try:
        yield from workdir.blocks(path)
    except OSError as error:
        raise errors.DataError(f"{path}: cannot be read ({error.strerror or type(error).__name__})") from None


@contextlib.contextmanager
def published(directory: epath.Path) -> Iterator[epath.Path]:
    """Gives a temporary directory that takes the place of `directory` when the block ends well, else vanishes.

    A directory that stood there before counts as damaged; one that another process puts there meanwhile is kept. What a
    killed process of this host left behind is swept.

    Raises:
      StorageError: it cannot be written.
    """
    host = socket.gethostname()
    temporary = directory.parent / f".tmp-{directory.name[:16]}-{os.getpid()}-{host}"
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        for orphan in directory.parent.glob(f".tmp-*-{host}"):
            if orphan == temporary or not _is_alive(int(orphan.name.split("-")[2])):
                shutil.rmtree(orphan, ignore_errors=True)
        damaged = directory.exists()
        temporary.mkdir()
        yield temporary
        if damaged:
            shutil.rmtree(directory, ignore_errors=True)
        try:
            os.replace(temporary, directory)
        except OSError as error:
            if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
                raise
    except OSError as error:
        raise errors.StorageError(f"{directory}: the token cache cannot be written ({error.strerror})") from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _is_alive(pid: int) -> bool:
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
