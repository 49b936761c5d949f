"""Files of artefacts, on a file system or in a bucket (`gs://bucket/prefix`), through one small interface.

Artefacts come from strangers. On a file system no link below an artefact's directory is followed, nothing but regular files
is opened, and a file has exactly the size that was declared, on the descriptor it is read from. In a bucket every byte is
compared with the object's checksum, and whatever the network does ends in the same bytes or in one error.
"""

import dataclasses
import errno
import os
import shutil
import stat
import sys
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, BinaryIO

from etils import epath

from flexjax import errors, workdir

LINKED = (errno.ELOOP, errno.ENOTDIR)  # what the kernel says of a link where none may be
SPECIAL = (errno.EISDIR, errno.ENXIO)  # and of a directory or a socket
DIRECTORY = os.O_DIRECTORY | getattr(os, "O_PATH", os.O_RDONLY)


@dataclasses.dataclass(frozen=True)
class Entry:
    """One file of a listing: bytes, and the generation by which a bucket tells one content from the next (1 on a disk)."""

    size: int
    generation: int


@dataclasses.dataclass(frozen=True)
class Traffic:
    """Bytes of objects that went through this process since it began, from buckets (down) and into them (up)."""

    down: int
    up: int


def read(path: epath.Path, size: int, root: epath.Path | None = None) -> bytes:
    """Reads a file of exactly `size` bytes; between `root`, its artefact's directory, and the file no link is followed.

    Raises:
      IntegrityError: the file is missing, of another size, a link or below one, or no regular file.
      StorageError: it cannot be read; in a bucket, not within the deadline.
    """
    if not workdir.is_local(path):
        return bytes(_transfer().read(path, size))
    with _opened(path, root, size) as (file, _):
        return _exactly(path, file, size, last=True)


def read_small(path: epath.Path, limit: int, root: epath.Path | None = None) -> bytes:
    """Reads a file whose size is not known beforehand; raises as `read`, and IntegrityError above `limit` bytes."""
    if not workdir.is_local(path):
        return bytes(_transfer().read_small(path, limit))
    with _opened(path, root) as (file, length):
        if length > limit:
            raise errors.IntegrityError(f"{path} has {length} bytes; no honest one has more than {limit}")
        return _exactly(path, file, length, last=True)


def blocks(path: epath.Path, size: int, root: epath.Path | None = None) -> Iterator[bytes]:
    """Yields the bytes that `read` returns, 4 MiB at a time from one descriptor; raises as `read`, at the latest at the end."""
    if not workdir.is_local(path):
        yield from _transfer().blocks(path, size)
        return
    with _opened(path, root, size) as (file, _):
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_SEQUENTIAL)
        for start in range(0, max(size, 1), workdir.BLOCK_BYTES):
            left = size - start
            yield _exactly(path, file, min(left, workdir.BLOCK_BYTES), last=left <= workdir.BLOCK_BYTES)


def exists(path: epath.Path) -> bool:
    """Whether there is a file, or anything else of that name on a disk; a link counts, wherever it leads."""
    return generation(path) != 0


def files(directory: epath.Path) -> dict[str, Entry]:
    """Every file below a directory by its relative name, sorted; links and special files are listed, never followed or opened.

    A directory that does not exist has no files. Raises StorageError if it cannot be listed.
    """
    if not workdir.is_local(directory):
        return {name: Entry(*found) for name, found in sorted(_objects().files(directory).items())}
    found: dict[str, Entry] = {}
    waiting = [""]
    try:
        while waiting:
            prefix = waiting.pop()
            with os.scandir(os.path.join(directory, prefix)) as entries:
                for entry in entries:
                    if entry.is_dir(follow_symlinks=False):
                        waiting.append(f"{prefix}{entry.name}/")
                    else:
                        status = entry.stat(follow_symlinks=False)
                        found[prefix + entry.name] = Entry(status.st_size if stat.S_ISREG(status.st_mode) else -1, 1)
    except FileNotFoundError as error:
        if os.path.lexists(directory):
            raise errors.StorageError(f"{error.filename} vanished while {directory} was listed; run again") from None
        return {}
    except OSError as error:
        raise errors.StorageError(f"cannot list {error.filename}: {error.strerror}; check its permissions") from None
    return dict(sorted(found.items()))


def write(path: epath.Path, pieces: Iterable[bytes]) -> None:
    """Writes a new file of a directory that is not committed yet, and makes its parents.

    On a disk the bytes are durable after `workdir.sync_below`; in a bucket they are when this returns.

    Raises:
      StorageError: there is such a file already (in a bucket: with other bytes), or it cannot be written.
    """
    if not workdir.is_local(path):
        _transfer().write(path, pieces)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            for piece in pieces:
                file.write(piece)
    except FileExistsError as error:
        raise errors.StorageError(f"{error.filename} exists already, {path} was to be new; remove it") from None
    except OSError as error:
        raise errors.StorageError(f"cannot write {path}: {error.strerror or error}; check space and permissions") from None


def copy(source: epath.Path, target: epath.Path, size: int, root: epath.Path | None = None) -> None:
    """Copies one file to a new one: inside the object store if both are there, through this process otherwise.

    Raises:
      IntegrityError: as `read` of the source.
      StorageError: as `read` of the source and `write` of the target.
    """
    if workdir.is_local(source) or workdir.is_local(target):
        write(target, blocks(source, size, root))
    else:
        _objects().copy(source, target, size)


def generation(path: epath.Path) -> int:
    """Which content a file has: in a bucket the object's generation, on a disk 1; 0 if there is none."""
    return _presence(path) if workdir.is_local(path) else int(_objects().generation(path))


def replace(path: epath.Path, data: bytes, generation: int | None = None, temporary: str = "") -> None:
    """Replaces a small file at once, durably: readers see the old bytes or the new ones. This is how work is committed.

    Args:
      path, data: what is written.
      generation: the one that is to be replaced, 0 for a new file; None replaces whatever there is.
      temporary: on a disk, the name that the file has until it is whole (as `workdir.write`).

    Raises:
      StorageError: the file has another generation by now, or cannot be written.
    """
    if not workdir.is_local(path):
        _transfer().replace(path, data, generation)
        return
    if generation is not None and generation != _presence(path):
        raise errors.StorageError(f"{path} was changed meanwhile by somebody else; look at it and run again")
    workdir.write(path, data, temporary)


def delete(directory: epath.Path, entries: Mapping[str, Entry] | None = None) -> list[str]:
    """Removes a directory with all that it holds, or the listed files of it; what is gone already is no error.

    Links are removed, never followed. In a bucket an object goes only in the generation that was listed.

    Args:
      directory, entries: what is removed; `entries` as `files` returned them, None for all that is there now.

    Returns:
      Names of objects that somebody has written anew meanwhile: they are left alone. Always empty on a disk.

    Raises:
      StorageError: something cannot be removed.
    """
    if not workdir.is_local(directory):
        generations = None if entries is None else {name: entry.generation for name, entry in entries.items()}
        return list(_objects().delete(directory, generations))
    try:
        if entries is None:
            shutil.rmtree(directory)
        else:
            _remove(directory, entries)
    except FileNotFoundError:
        if entries is None and os.path.lexists(directory):
            raise errors.StorageError(f"{directory} changed while it was removed; run again") from None
    except OSError as error:
        where = error.filename or directory
        raise errors.StorageError(f"cannot remove {where}: {error.strerror or error}; check its permissions") from None
    return []


def policies(path: epath.Path) -> dict[str, Any]:
    """What a bucket keeps of deleted bytes: versioning, and seconds of soft deletion and of retention; {} on a disk."""
    return {} if workdir.is_local(path) else dict(_objects().policies(path))


def traffic() -> Traffic:
    """Bytes that this process has moved from and to buckets so far; the difference of two is what one operation moved."""
    return Traffic(*_objects().traffic()) if "flexjax.bucket.objects" in sys.modules else Traffic(0, 0)


def _objects() -> Any:
    """The module that talks to Cloud Storage, whose library is an extra."""
    try:
        from flexjax.bucket import objects
    except ImportError as error:
        raise errors.ConfigError(f"gs:// needs google-cloud-storage ({error}); run pip install -e '.[gcs]'") from None
    return objects


def _transfer() -> Any:
    _objects()  # or the error that says what to install
    from flexjax.bucket import transfer

    return transfer


def _presence(path: epath.Path) -> int:
    """The generation of a local file: 1 if it is there, a link too, and 0 if not."""
    try:
        os.lstat(path)
    except (FileNotFoundError, NotADirectoryError):
        return 0
    except OSError as error:
        raise errors.StorageError(f"cannot look at {path}: {error.strerror}; check its permissions") from None
    return 1


@contextmanager
def _opened(path: epath.Path, root: epath.Path | None, size: int | None = None) -> Iterator[tuple[BinaryIO, int]]:
    """An open regular file and its size; whatever the kernel says of it while it is open becomes an error of ours."""
    try:
        with open(path, "rb", buffering=0, opener=lambda *_: _descriptor(path, root or path.parent)) as file:
            status = os.fstat(file.fileno())
            if not stat.S_ISREG(status.st_mode):
                raise errors.IntegrityError(f"{path} is no regular file; refused")
            if size not in (None, status.st_size):
                raise errors.IntegrityError(f"{path} has {status.st_size} bytes, expected {size}; fetch it again")
            yield file, status.st_size
    except FileNotFoundError:
        raise errors.IntegrityError(f"{path} is missing; restore the file or fetch the directory again") from None
    except OSError as error:
        if error.errno in LINKED:
            raise errors.IntegrityError(f"{path} is a symbolic link or lies behind one; refused") from None
        if error.errno in SPECIAL:
            raise errors.IntegrityError(f"{path} is no regular file; refused") from None
        raise errors.StorageError(f"cannot read {path}: {error.strerror}; check its permissions and the disk") from None


def _descriptor(path: epath.Path, root: epath.Path) -> int:
    """Opens a file one directory after the other, starting at the root, so that none of them can be a link."""
    *directories, name = path.relative_to(root).parts
    if ".." in (*directories, name):
        raise errors.IntegrityError(f"{path} leads out of {root}; refused")
    current = os.open(root, DIRECTORY)
    try:
        for directory in directories:
            inner = os.open(directory, DIRECTORY | os.O_NOFOLLOW, dir_fd=current)
            os.close(current)
            current = inner
        return os.open(name, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK, dir_fd=current)  # a fifo does not block
    finally:
        os.close(current)


def _exactly(path: epath.Path, file: BinaryIO, size: int, *, last: bool) -> bytes:
    """The next `size` bytes, and after the last of them the end of the file."""
    data = file.read(size)
    while len(data) < size and (more := file.read(size - len(data))):  # a read may return less, above all beyond 2 GiB
        data += more
    if len(data) < size or (last and file.read(1)):
        raise errors.IntegrityError(f"{path} changed its size while it was read; fetch it again")
    return data


def _remove(directory: epath.Path, names: Iterable[str]) -> None:
    """Removes files of a directory, then the directories that are empty by that, the directory itself among them."""
    above = {""}
    for name in names:
        parent = os.path.dirname(name)
        if os.path.realpath(directory / parent) != os.path.join(os.path.realpath(directory), parent).rstrip("/"):
            raise errors.StorageError(f"{directory / parent} is a symbolic link or lies behind one; remove it by hand")
        (directory / name).unlink(missing_ok=True)
        while parent:
            above.add(parent)
            parent = os.path.dirname(parent)
    for parent in sorted(above, key=len, reverse=True):
        where = directory / parent
        if where.exists() and not os.listdir(where):
            where.rmdir()
