"""Generation routed by sequence: the candidates of `sequence` side by side, one text; the loop is one compiled program."""

import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from flexjax.inference import decode, sampling, sequence
from flexjax.model import attention, losses, transformer


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State(decode.State):
    """A batch of R requests under way. `cache` and `allowed` have C * R rows, candidate by candidate; all else has R."""

    log_weights: Float[Array, "C R"]  # before the next token
    used: Float[Array, "C R"]
    log_prior: Float[Array, "C R"]  # -inf fills up where a request has fewer candidates than others


class SequenceDecoder(decode.Decoder):
    """A decoder that answers each request under its candidates at once, as one text.

    Every candidate is a row of the model's batch with its own mask. All rows of a request read the same tokens, and each new
    token is drawn once, from their mixture. The prompt sets the weights before the first.

    Args:
      params, architecture, eos_id, vocab_size, dtype: of `decode.Decoder`.
      how: candidates are weighed.
    """

    def __init__(
        self,
        params: transformer.Params,
        architecture: transformer.Architecture,
        eos_id: int,
        vocab_size: int | None = None,
        dtype: Any = jnp.float32,
        how: sequence.Settings = sequence.Settings(),
    ) -> None:
        super().__init__(params, architecture, eos_id, vocab_size, dtype)
        self.how = how
        self.prefill = jax.jit(self._prefill_rows, static_argnames="filled")
        self.advance = jax.jit(self._advance_rows, donate_argnames="state")

    def follow(self, request: decode.Request, max_new_tokens: int) -> Iterator[tuple[list[int], Float[np.ndarray, " C"]]]:
        """Yields the ids of one continuation in pieces, each with the candidates' weights behind it; at least one piece."""
        for ids, state in self._run([request], max_new_tokens, decode.STREAM_TOKENS):
            assert isinstance(state, State)
            yield ids[0].tolist(), np.exp(np.asarray(state.log_weights[:, 0]))

    def start(self, requests: Sequence[decode.Request], max_new_tokens: int) -> State:
        """Lays out a batch, computes the keys and values of all candidates, and weighs them by the prompts."""
        tokens, start, settings = self.lay_out(requests, max_new_tokens)
        names = self.architecture.experts
        masks = [sequence.candidates(names, names if r.experts is None else r.experts) for r in requests]
        count, filled = max(map(len, masks)), tokens.shape[1] - max_new_tokens
        rows = [found[c] if c < len(found) else found[0] for c in range(count) for found in masks]
        allowed = np.array([[name in mask for name in names] for mask in rows])
        log_prior = [[-math.log(len(found)) if c < len(found) else -math.inf for found in masks] for c in range(count)]
        return self.prefill(self.weights, tokens, start, allowed, settings, np.array(log_prior, np.float32), filled=filled)

    def _prefill_rows(
        self,
        weights: decode.Weights,
        tokens: Array,
        start: Array,
        allowed: Array,
        settings: sampling.Sampling,
        log_prior: Array,
        filled: int,
    ) -> State:
        (R, _), C = tokens.shape, len(log_prior)
        rows = jnp.tile(tokens, (C, 1))
        h, cache = self.fill(weights, rows, jnp.tile(start, C), allowed, filled)
        h = jnp.pad(h, ((0, 0), (0, 1), (0, 0)))  # back to a length that falls into chunks
        hidden = attention.rms_norm(h, weights["head"]["norm"], self.architecture.config.norm_eps)
        head = transformer.head_kernel(weights)
        _, nats, _ = losses.cross_entropy(hidden, head, rows[:, 1 : filled + 1], head_trainable=False)

        def token(carry: tuple[Array, Array], seen: tuple[Array, Array]) -> tuple[tuple[Array, Array], None]:
            (log_weights, used), (nats, index) = carry, seen
            used = sequence.in_use(jnp, log_weights, used, index, self.how)
            after = sequence.update(jnp, log_weights, nats, log_prior, self.how), used
            return jax.tree.map(lambda new, old: jnp.where(index >= 0, new, old), after, carry), None

        index = jnp.arange(filled - 1)[:, None, None] - start[None, None]
        seen = jnp.moveaxis(nats[:, :-1].reshape(C, R, -1), 2, 0), index
        (log_weights, used), _ = jax.lax.scan(token, (log_prior, log_prior), seen)
        done = jnp.zeros(R, bool)
        return State(tokens, jnp.int32(filled), done, cache, start, allowed, settings, log_weights, used, log_prior)

    def _advance_rows(self, weights: decode.Weights, state: State, until: Array) -> State:
        C, R = state.log_weights.shape

        def body(state: State) -> State:
            rows = dataclasses.replace(state, tokens=jnp.tile(state.tokens, (C, 1)), start=jnp.tile(state.start, C))
            logits, cache = self.step(weights, rows)
            index = (state.filled - 1 - state.start)[None]
            used = sequence.in_use(jnp, state.log_weights, state.used, index, self.how)
            log_p = jax.nn.log_softmax(logits, axis=-1).reshape(C, R, -1)
            mixed = logits if C == 1 else jnp.logaddexp.reduce(used[..., None] + log_p, axis=0)  # of one, to the last bit
            after = self.extend(state, mixed, cache)
            token = jax.lax.dynamic_index_in_dim(after.tokens, state.filled, axis=1, keepdims=False)
            nats = -jnp.take_along_axis(log_p, token[None, :, None], axis=2)[..., 0]
            log_weights = sequence.update(jnp, state.log_weights, nats, state.log_prior, self.how)
            log_weights = jnp.where(after.done[None], state.log_weights, log_weights)  # an EOS is no part of the text
            return dataclasses.replace(after, log_weights=log_weights, used=used)

        return decode.until_ended(body, state, until)
