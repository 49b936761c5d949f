"""Bits per byte: how well a model predicts a text, whatever its tokenizer.

The rule (windows, EOS, what is scored) stands with `data.pipeline.evaluation_batches`, which feeds this.
"""

import dataclasses
import math
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from flexjax import sharding, tree
from flexjax.data import pipeline, tokens
from flexjax.model import losses, placement, router, transformer


@dataclasses.dataclass
class Score:
    """What one model makes of one text."""

    bits_per_byte: float
    num_bytes: int
    num_tokens: int
    shares: dict[str, float]  # of the gate mass, mean over tokens and layers


@dataclasses.dataclass
class TokenScores:
    """What one model makes of every token of a text, in order.

    Attributes:
      nats: -log p of each token, float32 [N].
      starts: whether the model knew nothing before it: the first of its document inside its window, [N].
      documents: the document that each token belongs to, [N].
      document_bytes: UTF-8 bytes of each document, [documents].
      shares: of the gate mass by layer and expert, mean over tokens, [L, E]; of a model without a router [1, 1].
    """

    nats: Float[np.ndarray, " N"]
    starts: Bool[np.ndarray, " N"]
    documents: Int[np.ndarray, " N"]
    document_bytes: Int[np.ndarray, " documents"]
    shares: Float[np.ndarray, "L E"]


def forward_nats(
    params: tree.Tree,
    tokens: Int[Array, "B T"],
    targets: Int[Array, "B T"],
    architecture: transformer.Architecture,
    compute: transformer.Compute,
    *,
    allowed: Bool[Array, "B E"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    weights: Float[Array, "B T"] | None = None,
) -> tuple[Float[Array, "B T"], router.RoutingStats | None]:
    """-log p of each target, and the routing; the masks as in `transformer.forward`, to be jitted."""
    mask = allowed if architecture.routed else None
    out = transformer.forward(params, tokens, architecture, compute, allowed=mask, segments=segments, weights=weights)
    head = transformer.head_kernel(params)
    _, nats, _ = losses.cross_entropy(out.hidden, head, targets, head_trainable=False, mesh=compute.mesh)
    return nats, out.routing


class Scorer:
    """One model, ready to score texts; compiled once.

    Args:
      architecture, params: the model; biases effective.
      seq_len: window length in tokens.
      batch_size: windows at once.
      dtype: of the computation.
      mesh: the devices; None for one. The batch becomes a multiple of what they split it into.
    """

    def __init__(
        self,
        architecture: transformer.Architecture,
        params: tree.Tree,
        seq_len: int,
        batch_size: int,
        dtype: str = "float32",
        mesh: Mesh | None = None,
    ) -> None:
        self._mesh = mesh = sharding.one_device() if mesh is None else mesh
        sharding.check(transformer.splits(architecture), mesh)
        self.architecture, self.seq_len, self.batch_size = architecture, seq_len, sharding.round_up(batch_size, mesh)
        self._params = placement.place(params, architecture, mesh)
        compute = transformer.Compute(jnp.dtype(dtype), mesh=mesh)

        def score(params: tree.Tree, batch: dict[str, jax.Array], allowed: jax.Array) -> tuple[jax.Array, jax.Array]:
            nats, routing = forward_nats(
                params,
                batch["tokens"],
                batch["targets"],
                architecture,
                compute,
                allowed=allowed,
                segments=batch["segments"],
                weights=batch["weights"],
            )
            tokens_per_row = batch["weights"].sum(axis=1)
            if routing is None:
                shares = tokens_per_row.sum()[None, None]
            else:
                shares = jnp.einsum("LBE,B->LE", routing.share, tokens_per_row)
            return nats * batch["weights"], shares

        def total(params: tree.Tree, batch: dict[str, jax.Array], allowed: jax.Array) -> tuple[jax.Array, jax.Array]:
            nats, shares = score(params, batch, allowed)
            return nats.sum(), shares

        self._each, self._total = jax.jit(score), jax.jit(total)

    def score(self, source: tokens.TokenSource, max_bytes: int = 0, experts: Iterable[str] | None = None) -> Score:
        """Scores a text with the named experts switched on (None: all).

        Raises:
          PolicyError: an expert is unknown. DataError: the text has no document.
        """
        batches = pipeline.evaluation_batches(source, seq_len=self.seq_len, batch_size=self.batch_size, max_bytes=max_bytes)
        nats, total = 0.0, np.zeros(len(self.architecture.experts))
        for _, batch_nats, batch_shares in self._run(self._total, batches, experts):
            nats += float(batch_nats)
            total += sharding.fetch(batch_shares).astype(np.float64).mean(axis=0)
        shares = total / batches.num_tokens
        return Score(
            bits_per_byte=nats / math.log(2) / batches.num_bytes,
            num_bytes=batches.num_bytes,
            num_tokens=batches.num_tokens,
            shares=dict(zip(self.architecture.experts, shares.tolist(), strict=True)),
        )

    def tokens(self, source: tokens.TokenSource, max_bytes: int = 0, experts: Iterable[str] | None = None) -> TokenScores:
        """Scores each token of a text, under the rule and the errors of `score`."""
        batches = pipeline.evaluation_batches(source, seq_len=self.seq_len, batch_size=self.batch_size, max_bytes=max_bytes)
        return gather(source, batches, self._run(self._each, batches, experts))

    def _run(
        self, program: Any, batches: pipeline.EvaluationBatches, experts: Iterable[str] | None
    ) -> Iterator[tuple[pipeline.Batch, jax.Array, jax.Array]]:
        """Each batch with what the program makes of it."""
        names = self.architecture.experts
        allowed = router.allowed_mask(names, names if experts is None else experts, self.batch_size)
        allowed = sharding.put(np.asarray(allowed), sharding.sharding(self._mesh, ("batch", None)))
        every = list(range(self.batch_size))
        for batch in batches:
            rows = {name: batch[name] for name in ("tokens", "targets", "weights", "segments")}
            inputs = sharding.put_rows(rows, every, self._mesh, self.batch_size)
            yield batch, *program(self._params, inputs, allowed)


def gather(
    source: tokens.TokenSource,
    batches: pipeline.EvaluationBatches,
    scored: Iterable[tuple[pipeline.Batch, jax.Array, jax.Array]],
) -> TokenScores:
    """Puts the scores of a text's batches in the order of its tokens.

    Args:
      source: the text.
      batches: of it.
      scored: each batch with nats [B, T] and sums of shares [L, E].
    """
    nats, starts, shares = [], [], []
    for batch, batch_nats, batch_shares in scored:
        counts = batch["weights"] > 0
        nats.append(sharding.fetch(batch_nats)[counts])
        segments = np.where(counts, batch["segments"], -1)
        before = np.pad(segments, ((0, 0), (1, 0)), constant_values=-1)[:, :-1]
        starts.append((segments != before)[counts])
        shares.append(sharding.fetch(batch_shares).astype(np.float64))
    lengths = np.diff(source.documents[: batches.num_documents], axis=1)[:, 0]
    return TokenScores(
        nats=np.concatenate(nats),
        starts=np.concatenate(starts),
        documents=np.repeat(np.arange(batches.num_documents), lengths),
        document_bytes=np.array([source.document_bytes(index) for index in range(batches.num_documents)]),
        shares=np.sum(shares, axis=0) / batches.num_tokens,
    )
