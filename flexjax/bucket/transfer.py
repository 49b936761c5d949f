"""Bytes of objects on their way to and from Cloud Storage, compared with the CRC32C that the service states of them.

What was received is kept over a broken connection. A long upload goes in steps, so that memory holds a few of them whatever
the object's size.
"""

import functools
import io
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from etils import epath
from google.api_core import exceptions, retry
from google.cloud.storage import exceptions as media_exceptions

from flexjax import errors, workdir
from flexjax.bucket import attempts, objects

WHOLE_BYTES = 2**27  # an object up to this size is received and checked before its first byte is passed on


class _Received(io.BytesIO):
    """What a download has delivered so far; it stops one that is too slow or too long."""

    def __init__(self, generation: int) -> None:
        super().__init__()
        self.generation = generation
        self.deadline = attempts.Deadline()
        self.limit = 0

    def write(self, data: Any) -> int:
        if self.deadline.left() <= 0:
            raise TimeoutError
        if self.tell() + len(data) > self.limit:
            raise attempts.Corrupt("more bytes came than the object has")
        objects.moved.add(down=len(data))
        return super().write(data)


def _receive(path: epath.PathLike, into: _Received, start: int, size: int, deadline: attempts.Deadline) -> None:
    """Receives `size` bytes of an object from `start`, less those that have come before."""
    bucket, name = objects.locate(path)
    into.deadline, into.limit = deadline, size
    if into.tell() == size:
        return
    blob = bucket.blob(name, generation=into.generation)
    first, last = start + into.tell(), start + size - 1
    try:
        blob.download_to_file(
            into, start=first, end=last, raw_download=True, checksum=None, retry=None, timeout=deadline.timeouts()
        )
    except exceptions.NotFound:
        raise attempts.Corrupt("it was replaced while it was read") from None
    if into.tell() != size:
        raise attempts.Corrupt(f"{into.tell()} of {size} bytes came")


def read(path: epath.PathLike, size: int) -> bytes:
    """A whole object of exactly this size, equal to its checksum; raises as `storage.read`."""
    return _whole(path, lambda deadline: objects.source_of(path, size, deadline), size)


def read_small(path: epath.PathLike, limit: int) -> bytes:
    """A whole object of at most `limit` bytes; raises as `storage.read_small`."""

    def look(deadline: attempts.Deadline) -> Any:
        stated = objects.source_of(path, None, deadline)
        if stated.size > limit:
            raise errors.IntegrityError(f"{path} has {stated.size} bytes; no honest one has more than {limit}")
        return stated

    return _whole(path, look, 0)


def _whole(path: epath.PathLike, look: Callable[[attempts.Deadline], Any], size: int) -> bytes:
    """An object that `look` has found good, within the deadline for `size` bytes."""
    received: _Received | None = None

    def attempt(deadline: attempts.Deadline) -> bytes:
        nonlocal received
        stated = look(deadline)
        if received is None or received.generation != stated.generation:
            received = _Received(stated.generation)
        _receive(path, received, 0, stated.size, deadline)
        data = received.getvalue()
        if objects.crc32c(data) != objects.stated_crc32c(stated):
            received = None
            raise attempts.Corrupt("the bytes that came do not have the object's CRC32C")
        return data

    return attempts.tried(path, "read", attempt, size)


def blocks(path: epath.PathLike, size: int) -> Iterator[bytes]:
    """The same bytes, 4 MiB at a time. Those of an object above WHOLE_BYTES are compared with its checksum at the end only."""
    parts = _parts(path, size) if size > WHOLE_BYTES else iter([read(path, size)])
    for part in parts:
        for start in range(0, len(part), workdir.BLOCK_BYTES):
            yield part[start : start + workdir.BLOCK_BYTES]


def _parts(path: epath.PathLike, size: int) -> Iterator[bytes]:
    """The bytes of one generation of an object, a step at a time."""
    stated = attempts.tried(path, "read", lambda deadline: objects.source_of(path, size, deadline))
    crc = 0
    for start in range(0, size, attempts.STEP_BYTES):
        received = _Received(stated.generation)
        length = min(attempts.STEP_BYTES, size - start)
        attempts.tried(path, "read", functools.partial(_receive, path, received, start, length), length)
        crc = objects.crc32c(received.getvalue(), crc)
        yield received.getvalue()
    if crc != objects.stated_crc32c(stated):
        raise errors.StorageError(f"{path}: the bytes that came do not have the object's CRC32C; run again")


def write(path: epath.PathLike, pieces: Iterable[bytes]) -> None:
    """A new object; raises StorageError if there is one with other bytes, or as `storage.write`."""
    source, begun, size = iter(pieces), [], 0
    for piece in source:
        begun.append(piece)
        size += len(piece)
        if size > attempts.STEP_BYTES:
            _put_long(path, _Pieces(itertools.chain(begun, source)))
            return
    _put(path, b"".join(begun), 0)


def replace(path: epath.PathLike, data: bytes, generation: int | None) -> None:
    """Replaces an object of this generation (0: none, None: any); raises as `storage.replace`."""
    _put(path, data, generation)


def _put(path: epath.PathLike, data: bytes, expected: int | None) -> None:
    """Sends an object that memory holds, as often as it takes."""
    bucket, name = objects.locate(path)
    crc = objects.crc32c(data)

    def attempt(deadline: attempts.Deadline) -> None:
        nonlocal expected
        blob = bucket.blob(name)
        blob.crc32c = objects.encoded(crc)  # the service compares, and refuses other bytes
        objects.moved.add(up=len(data))
        try:
            blob.upload_from_string(
                data,
                content_type="application/octet-stream",
                if_generation_match=expected,
                checksum=None,
                timeout=deadline.timeouts(),
                retry=None,
            )
        except exceptions.PreconditionFailed:
            objects.settle(path, expected, len(data), crc, deadline)
            return
        if (blob.size, objects.stated_crc32c(blob)) != (len(data), crc):
            expected = None if expected is None else blob.generation  # ours, and wrong: to be replaced
            raise attempts.Corrupt("what was stored does not have the CRC32C of what was sent")

    attempts.tried(path, "written", attempt, len(data))


class _Pieces:
    """Pieces of unknown number as the file that the library reads an upload from; counts and sums what it passes on."""

    def __init__(self, pieces: Iterable[bytes]) -> None:
        self._pieces = iter(pieces)
        self._rest = b""
        self.size = self.crc = 0
        self.ended = False

    def tell(self) -> int:
        return self.size

    def read(self, count: int) -> bytes:
        taken, length = [self._rest], len(self._rest)
        while length < count and not self.ended:
            piece = next(self._pieces, None)
            self.ended = piece is None
            taken.append(piece or b"")
            length += len(taken[-1])
        data = b"".join(taken)
        data, self._rest = data[:count], data[count:]
        self.size += len(data)
        self.crc = objects.crc32c(data, self.crc)
        objects.moved.add(up=len(data))
        return data


def _put_long(path: epath.PathLike, source: _Pieces) -> None:
    """Sends an object of any size in steps of a resumable upload, each repeated by itself; memory holds one step."""
    bucket, name = objects.locate(path)
    blob = bucket.blob(name, chunk_size=attempts.STEP_BYTES)
    first, longest = attempts.pauses()
    deadline = attempts.Deadline()
    trouble = "answer of another object"
    again = retry.Retry(predicate=attempts.passing, initial=first, maximum=longest, multiplier=2, timeout=deadline.seconds)
    try:
        blob.upload_from_file(source, if_generation_match=0, checksum=None, timeout=deadline.timeouts(), retry=again)
        if (blob.size, objects.stated_crc32c(blob)) == (source.size, source.crc):
            return
    except errors.FlexjaxError:
        raise  # from where the pieces come
    except exceptions.RetryError as error:
        trouble = attempts.brief(error.cause or error)
    except (exceptions.GoogleAPICallError, media_exceptions.InvalidResponse, OSError, ValueError) as error:
        trouble = attempts.brief(error)  # ValueError: the service kept less of a step than was sent
    found = attempts.tried(path, "written", lambda deadline: objects.look(path, deadline))
    if not source.ended or found is None or (found.size, objects.stated_crc32c(found)) != (source.size, source.crc):
        raise errors.StorageError(f"{path} cannot be written ({trouble}); remove what is there and run again")
