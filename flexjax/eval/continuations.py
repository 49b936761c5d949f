"""What models say about given continuations, and how they go on by themselves: the two things that benchmark items ask of one.

`Scorer` and `Generator` are all that `tasks` knows of a model, so that a mixture of models can stand in for one. A row is
(context, continuation), both token ids; an EOS stands before each row, as before every document of the training text.
"""

import copy
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol, Self

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from flexjax import errors, tree
from flexjax.eval import bits_per_byte
from flexjax.inference import decode
from flexjax.model import router, transformer

Ids = Sequence[int] | np.ndarray
Row = tuple[Ids, Ids]
NARROWEST = 32  # tokens: rows are padded to this width, or to the next doubling of it, up to the window


class Scorer(Protocol):
    """Whatever gives continuations a likelihood.

    Attributes:
      window: tokens of context and continuation that it can score together.
    """

    window: int

    def score(self, rows: Sequence[Row]) -> list[float]:
        """Returns -log p(continuation | context) of each row, in nats."""


class Generator(Protocol):
    """Whatever continues a text."""

    def generate(self, prompts: Sequence[Ids], max_new_tokens: int) -> list[np.ndarray]:
        """Returns the ids that follow each prompt, up to and without EOS."""


class ModelScorer:
    """A `Scorer` of one model; compiled once for each width of rows.

    Args:
      architecture, params: the model; biases effective.
      eos_id: the token between documents.
      window: the longest row in tokens; what the model was trained with.
      batch_size: rows at once at the full window, more of shorter ones.
      dtype: of the computation.
      experts: the names of those that may be used; None for all.

    Raises:
      PolicyError: an expert is unknown, or none is named.
    """

    def __init__(
        self,
        architecture: transformer.Architecture,
        params: tree.Tree,
        eos_id: int,
        window: int,
        batch_size: int = 16,
        dtype: str = "float32",
        experts: Iterable[str] | None = None,
    ) -> None:
        self.architecture, self.window, self.batch_size, self.eos_id = architecture, window, batch_size, eos_id
        self._params = jax.tree.map(jnp.asarray, params)
        self._experts = self._checked(experts)
        compute = transformer.Compute(jnp.dtype(dtype))

        def nats(params: tree.Tree, tokens: jax.Array, targets: jax.Array, allowed: jax.Array) -> jax.Array:
            return bits_per_byte.forward_nats(params, tokens, targets, architecture, compute, allowed=allowed)[0]

        self._nats = jax.jit(nats)

    def restricted(self, experts: Iterable[str] | None) -> Self:
        """The same model and the same compiled programs with other experts switched on; errors as above."""
        other = copy.copy(self)
        other._experts = self._checked(experts)
        return other

    def score(self, rows: Sequence[Row]) -> list[float]:
        """Returns -log p(continuation | context) of each row, in nats; errors as `tokens`."""
        return [
            float(nats[len(context) :].sum(dtype=np.float64))
            for nats, (context, _) in zip(self.tokens(rows), rows, strict=True)
        ]

    def tokens(self, rows: Sequence[Row]) -> list[Float[np.ndarray, " n"]]:
        """Returns -log p of every token of each row, context included: what causal mixtures of models are weighted by.

        Raises:
          DataError: a row does not fit the window.
        """
        found: dict[int, np.ndarray] = {}
        for width, chosen in self._batches([len(context) + len(continuation) for context, continuation in rows]):
            size = self.batch_size * self.window // width
            ids = np.full((size, width + 1), self.eos_id, np.int32)
            for line, index in zip(ids, chosen, strict=False):
                context, continuation = rows[index]
                line[1 : 1 + len(context)] = context
                line[1 + len(context) : 1 + len(context) + len(continuation)] = continuation
            allowed = router.allowed_mask(self.architecture.experts, self._experts, size)
            nats = np.asarray(self._nats(self._params, ids[:, :-1], ids[:, 1:], allowed))
            for line, index in zip(nats, chosen, strict=False):
                found[index] = line[: sum(map(len, rows[index]))]
        return [found[index] for index in range(len(rows))]

    def _batches(self, lengths: list[int]) -> Iterator[tuple[int, list[int]]]:
        """Rows of one width, by index, as many as go through at once."""
        if lengths and max(lengths) > self.window:
            raise errors.DataError(f"a row of {max(lengths)} tokens does not fit the window of {self.window}; leave it out")
        groups: dict[int, list[int]] = {}
        for index, length in enumerate(lengths):
            width = NARROWEST
            while width < length:
                width *= 2
            groups.setdefault(min(width, self.window), []).append(index)
        for width, indices in sorted(groups.items()):
            size = self.batch_size * self.window // width
            for start in range(0, len(indices), size):
                yield width, indices[start : start + size]

    def _checked(self, experts: Iterable[str] | None) -> tuple[str, ...]:
        names = self.architecture.experts if experts is None else tuple(experts)
        router.allowed_mask(self.architecture.experts, names, 1)
        return names


class Mixture:
    """A `Scorer` of several models, or of one under several sets of experts, that predict each token together.

    Args:
      scorers: the models.
      combine: -log p of every token of a text, [N], from that under each model, [M, N], and the tokens before which nothing
        is known, [N]; causal. For instance `mixtures.branch_train_merge` or `sequence.combine`, their settings filled in.
    """

    def __init__(self, scorers: Sequence[ModelScorer], combine: Callable[[np.ndarray, np.ndarray], np.ndarray]) -> None:
        self.scorers, self.combine = tuple(scorers), combine
        self.window = min(scorer.window for scorer in scorers)

    def score(self, rows: Sequence[Row]) -> list[float]:
        """Returns -log p(continuation | context) of each row, in nats; the context weighs in as `combine` says."""
        if not rows:
            return []
        lengths = [len(context) + len(continuation) for context, continuation in rows]
        ends = np.cumsum(lengths)
        starts = np.zeros(ends[-1], bool)
        starts[ends - lengths] = True
        nats = self.combine(np.stack([np.concatenate(scorer.tokens(rows)) for scorer in self.scorers]), starts)
        return [float(nats[end - len(row[1]) : end].sum()) for row, end in zip(rows, ends.tolist(), strict=True)]


class Greedy:
    """A `Generator` that takes the most probable token of one model, a bounded batch of prompts at a time.

    Args:
      decoder: the model.
      experts: the names of those that may be used; None for all.
      batch_size: prompts at once; the longest of all goes with every batch.
    """

    def __init__(self, decoder: decode.Decoder, experts: Iterable[str] | None = None, batch_size: int = 32) -> None:
        self.decoder, self.batch_size = decoder, batch_size
        self.experts = None if experts is None else tuple(experts)

    def generate(self, prompts: Sequence[Ids], max_new_tokens: int) -> list[np.ndarray]:
        """Returns the ids that follow each prompt, up to and without EOS; errors as `decode.Decoder.generate`."""
        asked = [[int(token) for token in prompt] for prompt in prompts]
        size = max(1, min(self.batch_size, len(asked)))
        answers: list[np.ndarray] = []
        for start in range(0, len(asked), size):
            batch = asked[start : start + size]
            filled = batch + [max(asked, key=len)] * (size + 1 - len(batch))  # so that one program serves all batches
            found = self.decoder.generate([decode.Request(prompt, self.experts) for prompt in filled], max_new_tokens)
            answers += found[: len(batch)]
        return answers
