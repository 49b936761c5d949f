"""Token sources: corpora as memory-mapped token ids, made once and cached by the digest of their content.

Text becomes the stream `EOS d1 EOS d2 ... EOS dn EOS`, so that each document's first token is predicted from an EOS. Token
files are used as they are, in place.
"""

import functools
import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from absl import logging
from etils import epath

from flexjax import config, errors, workdir
from flexjax.data import cache, corpus
from flexjax.data import tokenizer as tokenizer_lib

Progress = Callable[[int, int], None]  # documents and UTF-8 bytes of text so far

_FORMAT = 1  # of a cached corpus; raise it when the files or the stream change
_BATCH_BYTES = 4_000_000  # of text, tokenised at a time
_CHUNK_TOKENS = 2**22  # read at a time
_FILES = ("tokens.bin", "bytes.npy")


class TokenSource:
    """A stream of token ids over one or more memory maps, and where its documents are.

    Attributes:
      num_tokens: length of the stream, EOS ids included.
      eos_id: the id between documents.
      digest: SHA-256 over what decides the content: the files' bytes, the tokenizer, the text field, the treatment of bad
        documents. Not their names or places.
      tokenizer_digest: that of the tokenizer.
      bad_documents: "file:line: reason" of each document left out in quarantine.
    """

    def __init__(
        self,
        arrays: Sequence[np.ndarray],
        tokenizer: tokenizer_lib.Tokenizer,
        digest: str,
        document_bytes: np.ndarray | None = None,
        bad_documents: Sequence[str] = (),
    ):
        self._arrays = tuple(arrays)
        self._offsets = np.concatenate([[0], np.cumsum([len(array) for array in arrays])])
        self._tokenizer = tokenizer
        self._document_bytes = document_bytes
        self.num_tokens = int(self._offsets[-1])
        self.eos_id = tokenizer.eos_id
        self.tokenizer_digest = tokenizer.digest
        self.digest = digest
        self.bad_documents = tuple(bad_documents)

    def read(self, start: int, stop: int) -> np.ndarray:
        """Returns a copy of the ids `[start, stop)`, int32, cut off at the end of the stream."""
        stop = min(stop, self.num_tokens)
        first = int(np.searchsorted(self._offsets, start, side="right")) - 1
        pieces = []
        while start < stop:
            offset, end = int(self._offsets[first]), min(stop, int(self._offsets[first + 1]))
            pieces.append(self._arrays[first][start - offset : end - offset].astype(np.int32))
            start, first = end, first + 1
        return pieces[0] if len(pieces) == 1 else np.concatenate([np.zeros(0, np.int32), *pieces])

    @functools.cached_property
    def documents(self) -> np.ndarray:
        """First and past-the-last position of each document's own tokens, int64 `[documents, 2]`."""
        bounds = [
            bound + offset
            for array, offset in zip(self._arrays, self._offsets, strict=False)
            for bound in _runs(array, self.eos_id)
        ]
        return np.concatenate([np.zeros((0, 2), np.int64), *bounds])

    @property
    def num_documents(self) -> int:
        """How many documents there are; the first call reads the whole stream once."""
        return len(self.documents)

    def document(self, index: int) -> np.ndarray:
        """Returns the ids of one document, int32, without EOS."""
        start, stop = self.documents[index]
        return self.read(int(start), int(stop))

    def document_bytes(self, index: int) -> int:
        """UTF-8 bytes of a document's text; of a token file, of the decoded text."""
        if self._document_bytes is not None:
            return int(self._document_bytes[index])
        return len(self._tokenizer.decode(self.document(index)).encode("utf-8"))


def _runs(array: np.ndarray, eos_id: int) -> Iterator[np.ndarray]:
    """Bounds of the runs without EOS, int64 `[runs, 2]` per chunk read; an array's end also ends a run."""
    last = -1
    for start in range(0, len(array) + 1, _CHUNK_TOKENS):
        chunk = array[start : start + _CHUNK_TOKENS]
        ends = np.flatnonzero(chunk == eos_id) + start
        if start + len(chunk) == len(array):
            ends = np.append(ends, len(array))
        if len(ends):
            starts = np.concatenate([[last], ends[:-1]]) + 1
            last = int(ends[-1])
            yield np.stack([starts, ends], axis=1)[starts < ends]


def tokenize(
    paths: Sequence[epath.PathLike],
    tokenizer: tokenizer_lib.Tokenizer,
    data_config: config.DataConfig,
    vocab_size: int,
    cache_dir: epath.PathLike,
    progress: Progress | None = None,
) -> TokenSource:
    """Returns the token source of text files (.jsonl, .jsonl.gz) or of token files (.npy, .bin).

    Text is tokenised into `<cache_dir>/<digest>/`, which appears whole or not at all and is reused when it is intact. Memory
    stays bounded by a batch of text and some bytes per document.

    Raises:
      ConfigError: mixed or unknown kinds of files, a tokenizer larger than `vocab_size`, a cache that is not local.
      DataError: what `corpus.documents` and `corpus.token_array` refuse; a file that changed while it was read.
      StorageError: the cache cannot be written.
    """
    paths = [epath.Path(path) for path in paths]
    cache_dir = epath.Path(cache_dir)
    if not workdir.is_local(cache_dir):
        raise errors.ConfigError(f"{cache_dir}: tokens are memory-mapped; set data.cache_dir to a local directory")
    if tokenizer.vocab_size > vocab_size:
        raise errors.ConfigError(
            f"the tokenizer has {tokenizer.vocab_size} ids, the model room for {vocab_size}; "
            "raise model.vocab_size or set data.tokenizer"
        )
    kinds = {_kind(path) for path in paths}
    if len(kinds) != 1:
        raise errors.ConfigError(f"{len(kinds)} kinds of files in one source; give text files only, or token files only")
    if kinds == {"tokens"}:
        return _from_token_files(paths, tokenizer, data_config, vocab_size, cache_dir)

    files = [cache.file_digest(path) for path in paths]
    digest = _text_digest(files, tokenizer, data_config)
    source = _cached(cache_dir / digest, tokenizer, digest)
    if source is None:
        with cache.published(cache_dir / digest) as directory:
            _write_cache(directory, paths, tokenizer, data_config, vocab_size, progress)
            if files != [cache.file_digest(path) for path in paths]:
                raise errors.DataError(f"{paths[0].parent}: a file changed while it was read; start again")
        source = _cached(cache_dir / digest, tokenizer, digest)
    if source is None:
        raise errors.StorageError(f"{cache_dir / digest}: the tokens read back differ from those written; check the disk")
    return source


def _kind(path: epath.Path) -> str:
    if path.name.endswith(corpus.TEXT_SUFFIXES):
        return "text"
    if path.name.endswith(corpus.TOKEN_SUFFIXES):
        return "tokens"
    known = ", ".join(corpus.TEXT_SUFFIXES + corpus.TOKEN_SUFFIXES)
    raise errors.ConfigError(f"{path}: unknown kind of file; expected one of {known}")


def _digest(**parts: Any) -> str:
    return hashlib.sha256(json.dumps({"format": _FORMAT, **parts}, sort_keys=True).encode()).hexdigest()


def _text_digest(files: list[str], tokenizer: tokenizer_lib.Tokenizer, data_config: config.DataConfig) -> str:
    limit = {}
    if data_config.bad_documents == "quarantine":  # then the limit decides which documents there are
        limit = {"max_document_mb": data_config.max_document_mb}
    return _digest(
        files=files,
        tokenizer=tokenizer.digest,
        text_field=data_config.text_field,
        bad_documents=data_config.bad_documents,
        **limit,
    )


def _from_token_files(
    paths: list[epath.Path],
    tokenizer: tokenizer_lib.Tokenizer,
    data_config: config.DataConfig,
    vocab_size: int,
    cache_dir: epath.Path,
) -> TokenSource:
    digests, arrays = [], []
    for path in paths:
        digest = cache.file_digest(path)
        if not workdir.is_local(path):
            path = _local_copy(path, digest, cache_dir)
        digests.append(digest)
        arrays.append(corpus.token_array(path, token_dtype=data_config.token_dtype, vocab_size=vocab_size))
    digest = _digest(files=digests, tokenizer=tokenizer.digest, token_dtype=data_config.token_dtype)
    return TokenSource(arrays, tokenizer, digest)


def _local_copy(path: epath.Path, digest: str, cache_dir: epath.Path) -> epath.Path:
    """A file of an object store, which cannot be memory-mapped, copied once into the cache."""
    copy = cache_dir / digest / path.name
    if not copy.exists() or cache.file_digest(copy) != digest:
        with cache.published(copy.parent) as directory, (directory / path.name).open("wb") as file:
            if cache.file_digest(path, file) != digest:
                raise errors.DataError(f"{path}: the file changed while it was read; start again")
    return copy


def _write_cache(
    directory: epath.Path,
    paths: list[epath.Path],
    tokenizer: tokenizer_lib.Tokenizer,
    data_config: config.DataConfig,
    vocab_size: int,
    progress: Progress | None,
) -> None:
    dtype = np.dtype("<u2" if vocab_size <= 2**16 else "<u4")
    report = corpus.Report()
    documents = corpus.documents(
        paths,
        text_field=data_config.text_field,
        max_document_mb=data_config.max_document_mb,
        bad_documents=data_config.bad_documents,
        report=report,
    )
    eos = np.array([tokenizer.eos_id], dtype)
    lengths: list[np.ndarray] = []
    total = 0
    with (directory / _FILES[0]).open("wb") as file:
        for batch in _batches(documents):
            for ids in tokenizer.encode_batch([document.text for document in batch]):
                file.write(eos.tobytes() + ids.astype(dtype).tobytes())
            lengths.append(np.array([document.num_bytes for document in batch], np.int64))
            total += int(lengths[-1].sum())
            if progress is not None:
                progress(report.documents, total)
        file.write(eos.tobytes())
    with (directory / _FILES[1]).open("wb") as file:
        np.save(file, np.concatenate(lengths), allow_pickle=False)
    meta = {
        "dtype": dtype.str,
        "bad_documents": report.bad,
        "sha256": {name: cache.file_digest(directory / name) for name in _FILES},
    }
    (directory / "meta.json").write_text(json.dumps(meta, indent=1))


def _batches(documents: Iterator[corpus.Document]) -> Iterator[list[corpus.Document]]:
    batch: list[corpus.Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += document.num_bytes
        if size >= _BATCH_BYTES:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _cached(directory: epath.Path, tokenizer: tokenizer_lib.Tokenizer, digest: str) -> TokenSource | None:
    """The source in a cache directory, or None if it is not there or a file has not the digest it was written with."""
    if not directory.exists():
        return None
    try:
        meta = json.loads((directory / "meta.json").read_text())
        intact = all(cache.file_digest(directory / name) == meta["sha256"][name] for name in _FILES)
        dtype, bad = np.dtype(meta["dtype"]), meta["bad_documents"]
    except (OSError, errors.DataError, ValueError, KeyError, TypeError):
        intact = False
    if not intact:
        logging.warning("%s: the cached tokens are damaged and are made again", directory)
        return None
    tokens = np.memmap(directory / _FILES[0], dtype, mode="r")
    return TokenSource([tokens], tokenizer, digest, np.load(directory / _FILES[1], allow_pickle=False), bad)
