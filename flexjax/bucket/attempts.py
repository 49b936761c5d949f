"""Requests to Cloud Storage that are repeated until they succeed, fail for good, or their time is over.

Repeated with growing pauses is what may pass: 429, 5xx, a broken or stalled connection, bytes that differ from their CRC32C.
An operation has FLEXJAX_STORAGE_DEADLINE seconds (120 if that is not set) for each 32 MiB that it moves; then it ends in one
error that names the object, what happened last, and what to do.
"""

import http.client
import itertools
import os
import random
import time
from collections.abc import Callable

import requests
import urllib3.exceptions
from etils import epath
from google.api_core import exceptions
from google.auth import exceptions as auth_exceptions
from google.cloud.storage import exceptions as media_exceptions

from flexjax import errors

DEADLINE_SECONDS = 120.0
STEP_BYTES = 2**25  # what one deadline is for; an upload holds a few of these in memory
STALL_SECONDS = 30.0  # without a byte for so long, a connection counts as broken
PAUSE_SECONDS = (0.5, 16.0)  # between tries: the first, and the longest
PASSING = {408, 429, 500, 502, 503, 504}


class Corrupt(Exception):
    """Something came or was stored that the service itself contradicts: worth another try."""


class Deadline:
    """The time left to one operation."""

    def __init__(self, size: int = 0) -> None:
        self.seconds = deadline_seconds() * max(1, -(-size // STEP_BYTES))
        self._end = time.monotonic() + self.seconds

    def left(self) -> float:
        return self._end - time.monotonic()

    def timeouts(self, *, working: bool = False) -> tuple[float, float]:
        """Seconds to connect and send, and between received bytes; more where the service has to work before it answers."""
        left = max(self.left(), 0.01)
        return left / 2, left / 2 if working else min(STALL_SECONDS, deadline_seconds() / 4, left)


def deadline_seconds() -> float:
    """What FLEXJAX_STORAGE_DEADLINE says, else DEADLINE_SECONDS; raises ConfigError if it is no positive number."""
    stated = os.environ.get("FLEXJAX_STORAGE_DEADLINE", "")
    try:
        seconds = float(stated) if stated else DEADLINE_SECONDS
        if not 0 < seconds < float("inf"):
            raise ValueError
    except ValueError:
        raise errors.ConfigError(f"FLEXJAX_STORAGE_DEADLINE is '{stated[:20]}', expected seconds above 0") from None
    return seconds


def brief(error: BaseException) -> str:
    """One short line about an exception of the libraries, whose own messages hold URLs and pages of HTML."""
    code = _code(error)
    if code:
        return f"HTTP {code} {http.client.responses.get(code, '')}".strip()
    if isinstance(error, Corrupt | auth_exceptions.GoogleAuthError):
        return " ".join(str(error).split())[:120]
    return type(error).__name__


def _code(error: BaseException) -> int:
    """The HTTP status of an exception, 0 if it has none."""
    if isinstance(error, media_exceptions.InvalidResponse):
        return int(error.response.status_code)
    return int(error.code or 0) if isinstance(error, exceptions.GoogleAPICallError) else 0


def pauses() -> tuple[float, float]:
    """Seconds between tries, the first and the longest; a short deadline has short ones."""
    first, longest = PAUSE_SECONDS
    return min(first, deadline_seconds() / 240), min(longest, deadline_seconds() / 8)


def passing(error: BaseException) -> bool:
    """Whether the same request may succeed a little later."""
    if isinstance(error, errors.FlexjaxError):
        return False
    code = _code(error)
    if code:  # 400 is also what the service says of bytes that do not have the checksum sent with them
        return code in PASSING or (code == 400 and "crc32c" in str(error).lower())
    if isinstance(error, auth_exceptions.GoogleAuthError):
        return isinstance(error, auth_exceptions.TransportError) or error.retryable
    if isinstance(error, ValueError) and not isinstance(error, requests.exceptions.JSONDecodeError):
        return False  # requests' word for a URL that is none
    return isinstance(error, (OSError, urllib3.exceptions.HTTPError, http.client.HTTPException, Corrupt))


def _asked_pause(error: BaseException) -> float:
    """Seconds of a Retry-After header."""
    headers = getattr(getattr(error, "response", None), "headers", None) or {}
    stated = str(headers.get("Retry-After", ""))
    return float(stated) if stated.isdecimal() else 0.0


def tried[T](path: epath.PathLike, purpose: str, attempt: Callable[[Deadline], T], size: int = 0) -> T:
    """Repeats an attempt until it succeeds, fails for good, or the deadline for moving `size` bytes has come."""
    deadline = Deadline(size)
    first, longest = pauses()
    for tries in itertools.count(1):
        try:
            return attempt(deadline)
        except Exception as error:
            if not passing(error):
                raise _final(path, purpose, error) from None
            pause = max(_asked_pause(error), min(longest, first * 2 ** min(tries - 1, 30)) * random.uniform(0.5, 1))
            if deadline.left() < first / 2:
                raise errors.StorageError(
                    f"{path} cannot be {purpose} within {deadline.seconds:g} seconds ({tries} tries, last: {brief(error)}); "
                    "check the network and run again; FLEXJAX_STORAGE_DEADLINE=SECONDS allows for slower links"
                ) from None
            time.sleep(min(pause, deadline.left() / 2))
    raise AssertionError


def _final(path: epath.PathLike, purpose: str, error: Exception) -> Exception:
    """The error to raise for one that will not pass; what is no fault of the service stays as it is."""
    ours = (exceptions.GoogleAPICallError, media_exceptions.InvalidResponse, auth_exceptions.GoogleAuthError, OSError)
    if isinstance(error, errors.FlexjaxError) or not isinstance(error, ours):
        return error
    advice = {
        401: "run gcloud auth application-default login",
        403: "ask the bucket's owner (Storage Object User for objects, storage.buckets.get for policies)",
        404: "check the bucket's name",
    }
    said = next((" ".join(str(part.get("message", "")).split())[:150] for part in getattr(error, "errors", []) if part), "")
    return errors.StorageError(
        f"{path} cannot be {purpose}: {brief(error)}{f' ({said})' if said else ''}; "
        f"{advice.get(_code(error), 'check the path and the settings')}"
    )
