"""Objects of Cloud Storage: what the service states of them, and all that is done without moving their bytes through here.

Whatever changes an object names the generation that it expects. So a request whose answer was lost is recognised when it is
repeated, and nobody's newer object is overwritten or deleted.
"""

import base64
import functools
import os
import threading
from collections.abc import Mapping
from typing import Any

import google_crc32c
from etils import epath
from google.api_core import exceptions
from google.auth import exceptions as auth_exceptions
from google.cloud import storage

from flexjax import errors
from flexjax.bucket import attempts

PAGE = 1000  # names per listing request


class _Counter:
    """Bytes of objects that went through this process."""

    def __init__(self) -> None:
        self.down = self.up = 0
        self._lock = threading.Lock()

    def add(self, down: int = 0, up: int = 0) -> None:
        with self._lock:
            self.down += down
            self.up += up


moved = _Counter()


def traffic() -> tuple[int, int]:
    """Bytes of objects received and sent since the process began, repeated ones included."""
    return moved.down, moved.up


def client() -> Any:
    """This process's client; STORAGE_EMULATOR_HOST leads it to another server, without credentials."""
    return _client(os.getpid(), os.environ.get("STORAGE_EMULATOR_HOST", ""))


@functools.cache
def _client(process: int, emulator: str) -> Any:
    os.environ.setdefault("DISABLE_GCS_PYTHON_CLIENT_OTEL_BUCKET_METADATA", "true")  # or a thread of its asks for the bucket
    try:
        return storage.Client(project=None)
    except auth_exceptions.GoogleAuthError as error:
        raise errors.StorageError(
            f"no credentials for Cloud Storage ({attempts.brief(error)}); run gcloud auth application-default login"
        ) from None


def locate(path: epath.PathLike) -> tuple[Any, str]:
    """The client's bucket and the object's name."""
    scheme, _, rest = os.fspath(path).partition("://")
    name, _, key = rest.partition("/")
    if scheme != "gs" or not name:
        raise errors.ConfigError(f"{path} is no path that can be used; expected gs://bucket/name or a local one")
    return client().bucket(name), key


def crc32c(data: bytes, before: int = 0) -> int:
    """The checksum of bytes, or of those that had checksum `before` with these behind them."""
    return int(google_crc32c.extend(before, data))


def encoded(crc: int) -> str:
    """A CRC32C as the service writes it: base64 of 4 big-endian bytes."""
    return base64.b64encode(crc.to_bytes(4, "big")).decode()


def stated_crc32c(blob: Any) -> int | None:
    """The CRC32C that the service states of an object; None if it states none that can be read."""
    try:
        return int.from_bytes(base64.b64decode(blob.crc32c or "", validate=True), "big") if blob.crc32c else None
    except ValueError:
        return None


def look(path: epath.PathLike, deadline: attempts.Deadline) -> Any:
    """What the service states of an object, or None if there is none."""
    bucket, name = locate(path)
    return bucket.get_blob(name, retry=None, timeout=deadline.timeouts()) if name else None


def source_of(path: epath.PathLike, size: int | None, deadline: attempts.Deadline) -> Any:
    """The same of an object that is to be read; raises IntegrityError if it is missing or has another size."""
    found = look(path, deadline)
    if found is None:
        raise errors.IntegrityError(f"{path} is missing; restore the file or fetch the directory again")
    if size is not None and found.size != size:
        raise errors.IntegrityError(f"{path} has {found.size} bytes, expected {size}; fetch it again")
    if stated_crc32c(found) is None:
        raise attempts.Corrupt("the service states no CRC32C of it")
    return found


def settle(path: epath.PathLike, expected: int | None, size: int, crc: int | None, deadline: attempts.Deadline) -> None:
    """Decides what a failed precondition means: our own write whose answer was lost, somebody else's, or nothing."""
    found = look(path, deadline)
    if found is not None and (found.size, stated_crc32c(found)) == (size, crc):
        return
    if expected in (None, 0 if found is None else found.generation):
        raise attempts.Corrupt("the service refused a precondition that holds")
    if expected == 0:
        raise errors.StorageError(f"{path} exists already with other bytes, it was to be new; remove it")
    raise errors.StorageError(f"{path} was changed meanwhile by somebody else; look at it and run again")


def copy(source: epath.PathLike, target: epath.PathLike, size: int) -> None:
    """Copies an object to a new one inside the service; raises as `storage.copy`."""
    bucket, name = locate(target)
    expected, token, begun = 0, None, 0

    def attempt(deadline: attempts.Deadline) -> None:
        nonlocal expected, token, begun
        origin = source_of(source, size, deadline)
        if origin.generation != begun:
            token, begun = None, origin.generation
        while True:
            blob = bucket.blob(name)
            try:
                token, _, _ = blob.rewrite(
                    origin, token=token, if_generation_match=expected, timeout=deadline.timeouts(working=True), retry=None
                )
            except exceptions.PreconditionFailed:
                settle(target, expected, size, stated_crc32c(origin), deadline)
                return
            if token is None:
                break
            if deadline.left() <= 0:
                raise TimeoutError
        if (blob.size, blob.crc32c) != (size, origin.crc32c):
            expected = blob.generation
            raise attempts.Corrupt("the copy does not have the CRC32C of the source")

    attempts.tried(target, f"copied from {source}", attempt, size)


def generation(path: epath.PathLike) -> int:
    """The generation of an object, 0 if there is none."""
    found = attempts.tried(path, "looked at", lambda deadline: look(path, deadline))
    return 0 if found is None else int(found.generation)


def files(directory: epath.PathLike) -> dict[str, tuple[int, int]]:
    """Size and generation of every object below a directory, by its relative name."""
    found = _listed(directory)
    if found.get("", (1, 0))[0] == 0:
        del found[""]  # an empty object that stands for the directory itself
    return found


def _listed(directory: epath.PathLike) -> dict[str, tuple[int, int]]:
    bucket, name = locate(directory)
    prefix = name.rstrip("/") + "/" if name else ""
    found: dict[str, tuple[int, int]] = {}
    token = ""

    def attempt(deadline: attempts.Deadline) -> None:
        nonlocal token
        while token is not None:
            listing = bucket.list_blobs(
                page_size=PAGE,
                page_token=token or None,
                prefix=prefix,
                fields="items(name,size,generation),nextPageToken",
                timeout=deadline.timeouts(),
                retry=None,
            )
            found.update({blob.name.removeprefix(prefix): (blob.size, blob.generation) for blob in next(listing.pages, [])})
            token = listing.next_page_token
            if token is not None and deadline.left() <= 0:
                raise TimeoutError

    attempts.tried(directory, "listed", attempt)
    return found


def delete(directory: epath.PathLike, generations: Mapping[str, int] | None) -> list[str]:
    """Deletes objects below a directory in the generations that were listed; returns names that were written anew meanwhile."""
    if generations is None:
        generations = {name: number for name, (_, number) in _listed(directory).items()}
    bucket, prefix = locate(directory)
    base = prefix.rstrip("/") + "/" if prefix else ""
    kept = []
    for name, number in sorted(generations.items()):
        where = f"gs://{bucket.name}/{base}{name}"

        def attempt(deadline: attempts.Deadline, where: str = where, key: str = base + name, number: int = number) -> bool:
            try:
                bucket.blob(key).delete(if_generation_match=number, timeout=deadline.timeouts(), retry=None)
            except exceptions.NotFound:
                return True
            except exceptions.PreconditionFailed:
                found = look(where, deadline)
                if found is not None and found.generation == number:
                    raise attempts.Corrupt("the service refused a precondition that holds") from None
                return found is None
            return True

        if not attempts.tried(where, "deleted", attempt):
            kept.append(name)
    return kept


def policies(path: epath.PathLike) -> dict[str, Any]:
    """What the bucket keeps of deleted bytes: `versioning`, and seconds of `soft_delete` and `retention` (0: none)."""
    bucket, _ = locate(path)
    attempts.tried(
        path, "asked for its bucket's policies", lambda deadline: bucket.reload(timeout=deadline.timeouts(), retry=None)
    )
    return {
        "versioning": bool(bucket.versioning_enabled),
        "soft_delete": int(bucket.soft_delete_policy.retention_duration_seconds or 0),
        "retention": int(bucket.retention_period or 0),
    }
