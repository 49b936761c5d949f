"""Readers of text and token files, which refuse what they cannot read exactly.

An error names `file:line` (or file and offset) and never quotes the text. Nothing is skipped silently: a document is
yielded, refused, or, in quarantine, counted and listed by id.
"""

import dataclasses
import gzip
import json
import zlib
from collections.abc import Iterator, Sequence
from typing import BinaryIO

import numpy as np
from etils import epath

from flexjax import errors, tree

TEXT_SUFFIXES = (".jsonl", ".jsonl.gz")
TOKEN_SUFFIXES = (".npy", ".bin")
MAX_BAD_SHARE = 0.001  # of the documents, in quarantine

_HOPELESS = 10_000  # bad documents after which a share above the limit ends the reading early
_NPY_MAGIC = b"\x93NUMPY"
_CHECKED_TOKENS = 2**22  # tokens in memory at a time


@dataclasses.dataclass(frozen=True)
class Document:
    """A text, where it stands ("train.jsonl.gz:17"), and its length in UTF-8 bytes."""

    text: str
    id: str
    num_bytes: int


@dataclasses.dataclass
class Report:
    """What a reader saw: the number of good documents, and "file:line: reason" of each one in quarantine."""

    documents: int = 0
    bad: list[str] = dataclasses.field(default_factory=list)


class _BadDocument(Exception):
    """The reason why a line is no document."""


def expand(pattern: str, root: str, domain: str) -> list[epath.Path]:
    """Returns the sorted files that comma-separated patterns name, with `{root}` and `{domain}` filled in.

    Raises:
      ConfigError: a pattern needs a root and there is none, or it is empty.
      DataError: a pattern matches no file.
    """
    paths = set()
    for part in pattern.split(","):
        if not part.strip():
            raise errors.ConfigError(f"file pattern {pattern!r} of domain {domain!r} has an empty part; name a file")
        if "{root}" in part and not root:
            raise errors.ConfigError(f"file pattern {part.strip()!r} needs a root directory; set data.root")
        filled = part.strip().replace("{root}", root.rstrip("/") or root).replace("{domain}", domain)
        found = _glob(filled)
        if not found:
            raise errors.DataError(
                f"{filled}: no file matches (domain {domain!r}); check data.root and data.*_files, or --data"
            )
        paths.update(found)
    return sorted(paths, key=str)


def _glob(pattern: str) -> list[epath.Path]:
    path = epath.Path(pattern)
    if path.exists() and not path.is_dir():  # as it stands, even if a directory is called "[old]"
        return [path]
    parts = path.parts
    first = next((i for i, part in enumerate(parts) if any(c in part for c in "*?[")), None)
    if first is None:
        return []
    parent = epath.Path(*parts[:first])
    return [found for found in parent.glob("/".join(parts[first:])) if not found.is_dir()]


def documents(
    paths: Sequence[epath.PathLike],
    *,
    text_field: str = "text",
    max_document_mb: int = 64,
    bad_documents: str = "strict",
    report: Report | None = None,
) -> Iterator[Document]:
    """Yields the documents of JSONL files in order, holding one line at a time.

    A line may have at most `max_document_mb` million bytes. With `bad_documents` "strict" the first bad line is refused;
    with "quarantine" it is put into `report`. A damaged, missing or empty file is always refused.

    Raises:
      DataError: a bad line or file, by `file:line`; or more than 0.1 % of the documents are bad.
      ConfigError: `bad_documents` is neither "strict" nor "quarantine".
    """
    if bad_documents not in ("strict", "quarantine"):
        raise errors.ConfigError(f"data.bad_documents is {bad_documents!r}; use 'strict' or 'quarantine'")
    report = Report() if report is None else report
    for path in map(epath.Path, paths):
        number = 0
        for number, line in _lines(path, max_document_mb * 1_000_000):
            try:
                if line is None:
                    raise _BadDocument(f"longer than data.max_document_mb ({max_document_mb} MB)")
                text, num_bytes = _parse(line, text_field)
            except _BadDocument as bad:
                if bad_documents == "strict":
                    raise errors.DataError(
                        f"{path}:{number}: {bad}; mend the line or set data.bad_documents=quarantine"
                    ) from None
                report.bad.append(f"{path.name}:{number}: {bad}")
                if len(report.bad) > _HOPELESS:
                    _check_share(report)
                continue
            report.documents += 1
            yield Document(text, f"{path.name}:{number}", num_bytes)
        if number == 0:
            raise errors.DataError(f"{path}: the file is empty; remove it or take it out of the pattern")
    _check_share(report)


def _check_share(report: Report) -> None:
    total = len(report.bad) + report.documents
    if len(report.bad) > MAX_BAD_SHARE * total:
        raise errors.DataError(
            f"{len(report.bad)} of {total} documents are bad, at most {MAX_BAD_SHARE:.1%} may be; the first is {report.bad[0]}"
        )


def _lines(path: epath.Path, limit: int) -> Iterator[tuple[int, bytes | None]]:
    """Yields (line number from 1, line), with None for a line above `limit` bytes, which is passed over in pieces."""
    number = 0
    try:
        with path.open("rb") as raw:
            compressed = path.name.endswith(".gz")
            stream: BinaryIO | gzip.GzipFile = gzip.GzipFile(fileobj=raw) if compressed else raw
            while line := stream.readline(limit + 1):
                number += 1
                if len(line) <= limit:
                    yield number, line
                    continue
                while line and not line.endswith(b"\n"):
                    line = stream.readline(limit)
                yield number, None
    except (EOFError, zlib.error, gzip.BadGzipFile):
        raise errors.DataError(f"{path}:{number + 1}: the gzip stream is cut or corrupt; fetch the file again") from None
    except OSError as error:
        raise errors.DataError(f"{path}:{number + 1}: cannot be read ({error.strerror or type(error).__name__})") from None


def _parse(line: bytes, field: str) -> tuple[str, int]:
    """Returns the text and its number of UTF-8 bytes. The reasons hold positions, never content."""
    if not line.strip():
        raise _BadDocument("blank line")
    try:
        row = tree.strict_json(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise _BadDocument(f"invalid UTF-8 at byte {error.start}") from None
    except json.JSONDecodeError as error:
        raise _BadDocument(f"broken JSON at column {error.colno}") from None
    except tree.DuplicateKey as error:
        raise _BadDocument(str(error)) from None
    except (ValueError, RecursionError):
        raise _BadDocument("JSON with a number or nesting beyond all measure") from None
    if not isinstance(row, dict):
        raise _BadDocument(f"expected a JSON object, got {type(row).__name__}")
    if field not in row:
        raise _BadDocument(f"no field {field!r} (data.text_field)")
    text = row[field]
    if not isinstance(text, str):
        raise _BadDocument(f"field {field!r} must be a string, got {type(text).__name__}")
    if not text:
        raise _BadDocument("empty document")
    try:
        return text, len(text.encode("utf-8"))
    except UnicodeEncodeError as error:
        raise _BadDocument(f"lone surrogate at character {error.start}") from None


def token_array(path: epath.PathLike, *, token_dtype: str, vocab_size: int) -> np.ndarray:
    """Maps a local file of token ids into memory, `[tokens]`, after checking every id.

    The format is OLMo's: little-endian ids without a header, whatever the suffix, documents ended by the EOS id. A real
    `.npy` header is honoured.

    Raises:
      ConfigError: `token_dtype` is neither "uint16" nor "uint32".
      DataError: empty, cut, of another dtype, or with an id outside the vocabulary; the token's offset is named.
    """
    if token_dtype not in ("uint16", "uint32"):
        raise errors.ConfigError(f"data.token_dtype is {token_dtype!r}; use 'uint16' or 'uint32'")
    dtype = np.dtype(token_dtype).newbyteorder("<")
    path = epath.Path(path)
    try:
        with path.open("rb") as file:
            offset = _header_bytes(path, file, dtype)
        size = path.stat().length - offset
        if size == 0:
            raise errors.DataError(f"{path}: no tokens; remove the file or take it out of the pattern")
        if size % dtype.itemsize:
            raise errors.DataError(f"{path}: {size} bytes are no whole number of {token_dtype} ids; is the file cut?")
        tokens = np.memmap(path, dtype, mode="r", offset=offset)
    except OSError as error:
        raise errors.DataError(f"{path}: cannot be read ({error.strerror or type(error).__name__})") from None
    for start in range(0, len(tokens), _CHECKED_TOKENS):
        chunk = tokens[start : start + _CHECKED_TOKENS]
        if chunk.max() >= vocab_size:
            where = start + int(np.argmax(chunk >= vocab_size))
            raise errors.DataError(
                f"{path}: token {where} has id {tokens[where]}, the vocabulary has {vocab_size}; "
                f"check data.tokenizer and data.token_dtype ({token_dtype})"
            )
    return tokens


def _header_bytes(path: epath.Path, file: BinaryIO, dtype: np.dtype) -> int:
    """Length of a `.npy` header, 0 without one; a header must declare a flat array of `dtype` that fills the file."""
    if file.read(len(_NPY_MAGIC)) != _NPY_MAGIC:
        return 0
    file.seek(0)
    try:
        version = np.lib.format.read_magic(file)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, found = read(file)
    except ValueError:
        raise errors.DataError(f"{path}: broken .npy header; write the file again") from None
    if found != dtype or len(shape) != 1:
        raise errors.DataError(f"{path}: expected a flat {dtype} array, got {found} {list(shape)}; see data.token_dtype")
    missing = file.tell() + shape[0] * dtype.itemsize - path.stat().length
    if missing:
        raise errors.DataError(f"{path}: the header declares {shape[0]} tokens, {missing:+} bytes are missing")
    return file.tell()
