"""Files that are whole and on disk once they count; a run's directory: one writer at a time, and enough space at the start."""

import fcntl
import hashlib
import json
import os
import shutil
import socket
import stat
import time
from collections.abc import Iterator
from concurrent import futures
from contextlib import contextmanager, suppress
from typing import Any

from etils import epath

from flexjax import distributed, errors

BLOCK_BYTES = 2**22
SYNC_THREADS = 16


def is_local(path: epath.PathLike) -> bool:
    """Whether a path lies on a file system, not in a bucket."""
    return "://" not in os.fspath(path)


def create(path: epath.PathLike) -> epath.Path:
    """Makes a directory and checks that it can be written; of several processes, process 0 does it for all."""
    directory = epath.Path(path)
    try:
        if distributed.is_main():
            directory.mkdir(parents=True, exist_ok=True)
        if distributed.is_main() and is_local(directory):
            probe = directory / f".probe-{os.getpid()}"
            _write_new(probe, b"")
            probe.unlink()
    except OSError as error:
        raise errors.StorageError(
            f"cannot write to {directory}: {error.strerror or error}; choose another --workdir or fix its permissions"
        ) from None
    distributed.barrier("create")
    return directory


@contextmanager
def lock(directory: epath.Path) -> Iterator[None]:
    """Holds a directory for this process; the kernel lets go when the process ends, however it ends.

    Raises:
      StorageError: another process holds it; the message names that process. Or `.lock` is a link or no regular file.
    """
    if not is_local(directory):
        yield
        return
    descriptor = _open_lock(directory / ".lock")
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            holder = os.pread(descriptor, 200, 0).decode(errors="replace").strip() or "another process"
            raise errors.StorageError(f"{directory} is in use by {holder}; wait for it or choose another --workdir") from None
        since = time.strftime("%Y-%m-%d %H:%M:%S", time.gmtime())
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, f"process {os.getpid()} on {socket.gethostname()} since {since} UTC\n".encode(), 0)
        yield
    finally:
        os.close(descriptor)


def _open_lock(path: epath.Path) -> int:
    """Opens a lock file, and makes it; the directory may be a stranger's, so no link is followed."""
    try:
        descriptor = os.open(os.fspath(path), os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK, 0o644)
    except OSError as error:
        raise errors.StorageError(
            f"cannot lock with {path}: {error.strerror}; remove it if it is a link, or fix permissions"
        ) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise errors.StorageError(f"cannot lock with {path}: it is no regular file; remove it")
    return descriptor


def write(path: epath.Path, content: bytes, temporary: str = "") -> None:
    """Replaces a small file, and makes its directory: nobody sees half of it, and it is on disk when this returns.

    Args:
      path, content: what is written.
      temporary: the name that the file has until it is whole; one of this process if not given. What has this name is
        removed first, never followed.

    Raises:
      StorageError: it cannot be written.
    """
    unfinished = path.parent / (temporary or f".{path.name}.{os.getpid()}.partial")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if is_local(path):
            with suppress(FileNotFoundError):
                os.unlink(unfinished)  # of a directory, this fails; a link is removed itself
            _write_new(unfinished, content)
        else:
            unfinished.write_bytes(content)
        unfinished.replace(path)
        sync(path.parent)
    except OSError as error:
        raise errors.StorageError(f"cannot write {path}: {error.strerror or error}; check space and permissions") from None


def _write_new(path: epath.Path, content: bytes) -> None:
    """Writes a file that must not exist, not even as a link; it is on disk when this returns."""
    descriptor = os.open(os.fspath(path), os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW, 0o666)
    with os.fdopen(descriptor, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(descriptor)


def write_json(path: epath.Path, value: Any) -> None:
    """Replaces a small JSON file, as `write` does."""
    write(path, (json.dumps(value, indent=1, sort_keys=True) + "\n").encode())


def sync(path: epath.PathLike) -> None:
    """Returns when a file, or the list of names in a directory, is on the disk itself; does nothing in a bucket."""
    if not is_local(path):
        return
    descriptor = os.open(os.fspath(path), os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_below(directory: epath.PathLike) -> None:
    """The same for a directory and all that it holds, however deep."""
    if not is_local(directory):
        return
    found = list(os.walk(os.fspath(directory)))
    files = [os.path.join(where, name) for where, _, names in found for name in names]
    with futures.ThreadPoolExecutor(SYNC_THREADS) as pool:  # the kernel commits at once what waits at the same time
        list(pool.map(sync, files))
        list(pool.map(sync, [where for where, _, _ in found]))


def blocks(path: epath.PathLike) -> Iterator[bytes]:
    """The bytes of a file, 4 MiB at a time."""
    with epath.Path(path).open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            yield block


def file_digest(path: epath.PathLike) -> str:
    """Hex SHA-256 of a file of any size."""
    digest = hashlib.sha256()
    for block in blocks(path):
        digest.update(block)
    return digest.hexdigest()


def read_json(path: epath.Path) -> Any:
    """Reads a JSON file of ours, or None if there is none."""
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise errors.IntegrityError(f"{path} is not valid JSON ({error}); restore it or remove the directory") from None


def need_space(directory: epath.Path, needed: int, purpose: str) -> None:
    """Raises StorageError if fewer than `needed` bytes are free where a directory lies."""
    if not is_local(directory):
        return
    free = shutil.disk_usage(directory).free
    if free < needed:
        raise errors.StorageError(
            f"{directory} has {free / 2**20:.0f} MiB free, {purpose} need {needed / 2**20:.0f}; make room or move --workdir"
        )
