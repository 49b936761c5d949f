"""From token sources to batches: packing and order, every batch reachable by its number.

Window i of a source is `tokens[i*T : i*T + T + 1]`: inputs and, one later, targets, so that each token but the first is a
target exactly once per epoch. Row r of step j is element `j * B + r` of an endless sequence that depends on the seed, the
sources and their weights alone: not on the number of hosts, nor on where a run was interrupted.
"""

import contextlib
import hashlib
import math
from collections.abc import Generator, Iterator, Mapping, Sequence
from typing import Any

import grain
import numpy as np

from flexjax import errors
from flexjax.data import tokens as tokens_lib

Batch = dict[str, np.ndarray]
Rows = slice | Sequence[int] | None

_PACKING = "stream windows, stride T, v1"
_ENDLESS = 2**62


class _Windows:
    """The windows of a source as a grain data source: ids `[<= T+1]`."""

    def __init__(self, source: tokens_lib.TokenSource, seq_len: int):
        self._source, self._seq_len = source, seq_len

    def __len__(self) -> int:
        return math.ceil((self._source.num_tokens - 1) / self._seq_len)

    def __getitem__(self, window: Any) -> np.ndarray:
        start = int(window) * self._seq_len
        return self._source.read(start, start + self._seq_len + 1)


class _Batches:
    """The batches of a pipeline as a grain data source, for its prefetching."""

    def __init__(self, pipeline: "Pipeline", rows: Rows):
        self._pipeline, self._rows = pipeline, rows

    def __len__(self) -> int:
        return _ENDLESS

    def __getitem__(self, step: Any) -> Batch:
        return self._pipeline.batch(int(step), self._rows)


class Pipeline:
    """An endless, shuffled mixture of token sources.

    Each source is shuffled anew in each of its own epochs, and gives each of its windows once per epoch. Sources are
    interleaved by `weights` (shares of windows, to within 1 % of the smallest), in the order of their names.

    A batch is a dict: `tokens`, `targets` int32 `[B, T]`; `weights` float32 `[B, T]`, 0 at padding; `segments` int32
    `[B, T]`, the number of the document inside the window (the EOS before a document belongs to it), or all 0 with
    `attend_across_documents`.

    Attributes:
      names: the sources' names, sorted.
    """

    def __init__(
        self,
        sources: Mapping[str, tokens_lib.TokenSource],
        weights: Mapping[str, float],
        seq_len: int,
        batch_size: int,
        seed: int,
        attend_across_documents: bool = False,
        prefetch: int = 4,
    ):
        """Raises ConfigError if sources, weights or sizes do not go together, DataError if a source has no window."""
        self.names = tuple(sorted(sources))
        _check(sources, weights, seq_len, batch_size)
        self._sources, self._weights = dict(sources), {name: float(weights[name]) for name in self.names}
        self._seq_len, self._batch_size, self._seed = seq_len, batch_size, seed
        self._attend_across_documents, self._prefetch = attend_across_documents, prefetch
        self._eos_id = sources[self.names[0]].eos_id
        datasets = [
            grain.MapDataset.source(_Windows(sources[name], seq_len))
            .shuffle(seed=_shuffle_seed(seed, name))
            .repeat(reseed_each_epoch=True)
            for name in self.names
        ]
        self._dataset = grain.MapDataset.mix(datasets, list(self._weights.values()))

    def batch(self, step: int, rows: Rows = None) -> Batch:
        """Returns the rows (all, a slice or a list of indices in `[0, B)`) of the batch of a step."""
        chosen = np.arange(self._batch_size)[slice(None) if rows is None else rows]
        windows = [self._dataset[step * self._batch_size + int(row)] for row in chosen]
        batch = _pack(windows, self._seq_len, self._eos_id)
        if self._attend_across_documents:
            batch["segments"] = np.zeros_like(batch["segments"])
        return batch

    def iterate(self, start_step: int = 0, rows: Rows = None) -> Generator[Batch]:
        """Yields the batches from a step on, for ever; up to `prefetch` are made ahead in a thread.

        The thread ends when the iterator is closed (`contextlib.closing`) or forgotten.
        """
        options = grain.ReadOptions(num_threads=min(1, self._prefetch), prefetch_buffer_size=self._prefetch)
        iterator = iter(grain.MapDataset.source(_Batches(self, rows)).to_iter_dataset(options))
        iterator.set_state({"next_index": start_step})
        with contextlib.closing(iterator):
            yield from iterator

    def identity(self) -> dict[str, str | int | float | bool]:
        """Returns the named parts that decide every batch; store it beside a checkpoint, see `check_identity`."""
        total = sum(self._weights.values())
        return {
            **{f"source/{name}": self._sources[name].digest for name in self.names},
            **{f"weight/{name}": self._weights[name] / total for name in self.names},
            "tokenizer": self._sources[self.names[0]].tokenizer_digest,
            "seq_len": self._seq_len,
            "packing": _PACKING,
            "attend_across_documents": self._attend_across_documents,
            "seed": self._seed,
            "global_batch": self._batch_size,
        }


def check_identity(saved: Mapping[str, Any], current: Mapping[str, Any]) -> None:
    """Refuses to continue a run on other data.

    Raises:
      ConfigError: names every part of the identity that differs, with both values.
    """
    changed = [
        f"{part} (saved {saved.get(part, 'nothing')}, now {current.get(part, 'nothing')})"
        for part in sorted({*saved, *current})
        if part not in saved or part not in current or saved[part] != current[part]
    ]
    if changed:
        raise errors.ConfigError(
            f"the checkpoint belongs to another data stream: {'; '.join(changed)}; restore these or start a new workdir"
        )


def _check(sources: Mapping[str, tokens_lib.TokenSource], weights: Mapping[str, float], seq_len: int, batch_size: int) -> None:
    if not sources or set(sources) != set(weights):
        raise errors.ConfigError(f"data mixture: sources {sorted(sources)} and weights {sorted(weights)} must agree")
    if seq_len < 1 or batch_size < 1:
        raise errors.ConfigError(f"data.seq_len ({seq_len}) and train.batch_size ({batch_size}) must be positive")
    for name, source in sources.items():
        if not (weights[name] > 0 and math.isfinite(weights[name])):
            raise errors.ConfigError(f"data mixture: the weight of {name!r} is {weights[name]}; leave out what is not wanted")
        if source.num_tokens < 2:
            raise errors.DataError(f"data source {name!r} has {source.num_tokens} tokens, at least 2 are needed")
    if len({source.tokenizer_digest for source in sources.values()}) > 1:
        raise errors.ConfigError(f"data mixture: the sources {sorted(sources)} come from different tokenizers")


def _shuffle_seed(seed: int, name: str) -> int:
    """A seed per source, far from that of another run or epoch: grain adds the epoch to it."""
    return int.from_bytes(hashlib.sha256(f"{seed}/{name}".encode()).digest()[:4])


def _pack(windows: Sequence[np.ndarray], seq_len: int, eos_id: int) -> Batch:
    """Pads windows `[<= T+1]` with EOS to rows; padding has weight 0."""
    ids = np.full((len(windows), seq_len + 1), eos_id, np.int32)
    for row, window in zip(ids, windows, strict=True):
        row[: len(window)] = window
    counts = np.array([len(window) - 1 for window in windows])
    tokens = ids[:, :-1].copy()
    segments = np.cumsum(tokens == eos_id, axis=1, dtype=np.int32)
    return {
        "tokens": tokens,
        "targets": ids[:, 1:].copy(),
        "weights": (np.arange(seq_len) < counts[:, None]).astype(np.float32),
        "segments": segments - segments[:, :1],
    }


class EvaluationBatches:
    """The batches of a scoring pass, in order; may be iterated again.

    Attributes:
      num_documents: documents scored.
      num_bytes: UTF-8 bytes of their text.
      num_tokens: their tokens, the sum of all weights.
    """

    def __init__(self, source: tokens_lib.TokenSource, seq_len: int, batch_size: int, max_bytes: int):
        self._source, self._seq_len, self._batch_size = source, seq_len, batch_size
        self.num_documents = self.num_bytes = 0
        for index in range(source.num_documents):
            num_bytes = source.document_bytes(index)
            if max_bytes and index and self.num_bytes + num_bytes > max_bytes:
                break
            self.num_documents, self.num_bytes = index + 1, self.num_bytes + num_bytes
        self._documents = source.documents[: self.num_documents]
        self.num_tokens = int((self._documents[:, 1] - self._documents[:, 0]).sum())

    def __iter__(self) -> Iterator[Batch]:
        windows: list[np.ndarray] = []
        for window in self._windows():
            windows.append(window)
            if len(windows) == self._batch_size:
                yield self._batch(windows)
                windows = []
        if windows:
            yield self._batch(windows)

    def _windows(self) -> Iterator[np.ndarray]:
        """Windows over `EOS d1 EOS d2 ... EOS dn`, of which a token file lacks the first EOS."""
        eos = np.array([self._source.eos_id], np.int32)
        rest = eos[:0]
        for start, stop in self._documents.tolist():
            rest = np.concatenate([rest, eos])
            for position in range(start, stop, 2**20):
                rest = np.concatenate([rest, self._source.read(position, min(position + 2**20, stop))])
                while len(rest) > self._seq_len:
                    yield rest[: self._seq_len + 1]
                    rest = rest[self._seq_len :]
        if len(rest) > 1:
            yield rest

    def _batch(self, windows: list[np.ndarray]) -> Batch:
        padding = [windows[0][:0]] * (self._batch_size - len(windows))
        batch = _pack([*windows, *padding], self._seq_len, self._source.eos_id)
        batch["weights"] *= batch["targets"] != self._source.eos_id
        return batch


def evaluation_batches(
    source: tokens_lib.TokenSource, *, seq_len: int, batch_size: int, max_bytes: int = 0
) -> EvaluationBatches:
    """Returns the batches that score a source, and the number of bytes they stand for.

    Bits per byte = the sum of -log2 p(token) over all tokens of the text / the UTF-8 bytes of the text. EOS is context, never
    scored; windows of T tokens overlap by one token; context never crosses a document, nor a window. Each token of the
    text has weight 1 exactly once. `max_bytes` (0: no limit) keeps the leading whole documents that fit, at least one.

    Raises:
      DataError: the source has no document.
    """
    if not source.num_documents:
        raise errors.DataError("the validation source has no document; check data.validation_files")
    return EvaluationBatches(source, seq_len, batch_size, max_bytes)
