"""Bits per byte: how well a model predicts a text, whatever its tokenizer.

The rule (windows, EOS, what is scored) stands with `data.pipeline.evaluation_batches`, which feeds this.
"""

import dataclasses
import math
from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

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
            out = transformer.forward(
                params,
                batch["tokens"],
                architecture,
                compute,
                allowed=allowed if architecture.routed else None,
                segments=batch["segments"],
                weights=batch["weights"],
            )
            head = transformer.head_kernel(params)
            _, nats, _ = losses.cross_entropy(out.hidden, head, batch["targets"], head_trainable=False, mesh=mesh)
            tokens_per_row = batch["weights"].sum(axis=1)
            if out.routing is None:
                shares = tokens_per_row.sum()[None]
            else:
                shares = jnp.einsum("LBE,B->E", out.routing.share, tokens_per_row) / architecture.config.num_layers
            return (nats * batch["weights"]).sum(), shares

        self._score = jax.jit(score)

    def score(self, source: tokens.TokenSource, max_bytes: int = 0, experts: Iterable[str] | None = None) -> Score:
        """Scores a text with the named experts switched on (None: all).

        Raises:
          PolicyError: an expert is unknown. DataError: the text has no document.
        """
        names = self.architecture.experts
        allowed = router.allowed_mask(names, names if experts is None else experts, self.batch_size)
        allowed = sharding.put(np.asarray(allowed), sharding.sharding(self._mesh, ("batch", None)))
        every = list(range(self.batch_size))
        batches = pipeline.evaluation_batches(source, seq_len=self.seq_len, batch_size=self.batch_size, max_bytes=max_bytes)
        nats, shares = 0.0, np.zeros(len(names))
        for batch in batches:
            rows = {name: batch[name] for name in ("tokens", "targets", "weights", "segments")}
            inputs = sharding.put_rows(rows, every, self._mesh, self.batch_size)
            batch_nats, batch_shares = self._score(self._params, inputs, allowed)
            nats += float(batch_nats)
            shares += np.asarray(batch_shares, np.float64)
        return Score(
            bits_per_byte=nats / math.log(2) / batches.num_bytes,
            num_bytes=batches.num_bytes,
            num_tokens=batches.num_tokens,
            shares={name: float(share) / batches.num_tokens for name, share in zip(names, shares, strict=True)},
        )
