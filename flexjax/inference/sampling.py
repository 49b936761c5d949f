"""Choosing the next token: greedy, or drawn at a temperature from the top k and the top p of the distribution."""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flexjax import errors

FEW = 64  # tokens that are selected rather than sorted, where top k asks for no more


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Sampling:
    """How each row of a batch draws, so that requests with different wishes share one program.

    Attributes:
      temperature: 0 takes the most probable token.
      top_k: draw among so many tokens; 0 for all.
      top_p: draw among the fewest tokens whose probabilities reach this sum; 1 for all.
      seed: the same seed and prompt give the same text, whatever else is in the batch.
    """

    temperature: Float[Array, " B"]
    top_k: Int[Array, " B"]
    top_p: Float[Array, " B"]
    seed: Int[Array, " B"]


def check(temperature: float, top_k: int, top_p: float, seed: int) -> None:
    """Raises ConfigError if the settings describe no distribution."""
    if not 0 <= temperature < float("inf"):
        raise errors.ConfigError(f"temperature={temperature} must be 0 (greedy) or a positive number")
    if top_k < 0:
        raise errors.ConfigError(f"top_k={top_k} must be 0 (all tokens) or a positive number")
    if not 0 < top_p <= 1:
        raise errors.ConfigError(f"top_p={top_p} must lie above 0 and be at most 1 (all tokens)")
    if not 0 <= seed < 2**31:
        raise errors.ConfigError(f"seed={seed} must lie between 0 and {2**31 - 1}")


def sample(logits: Float[Array, "B V"], settings: Sampling, step: Int[Array, " B"]) -> Int[Array, " B"]:
    """Draws one token per row; `step` numbers the draws of each request.

    The order is temperature, top k, then top p of what is left. Draws are Gumbel maxima, each row's noise from its own seed
    and step alone. Rows are sorted only while some row wants top p without a top k of at most `FEW`, or a larger top k; noise
    is drawn only while some row is not greedy.
    """
    greedy = jnp.argmax(logits, axis=-1)

    def draw() -> Array:
        warm = jnp.where(settings.temperature > 0, settings.temperature, 1)
        scaled = logits / warm[:, None]
        limited = ((settings.top_k > 0) | (settings.top_p < 1)).any()
        scaled = jax.lax.cond(limited, lambda: _restrict(scaled, settings), lambda: scaled)
        keys = jax.vmap(lambda seed, step: jax.random.fold_in(jax.random.key(seed), step))(settings.seed, step)
        noise = jax.vmap(lambda key: jax.random.gumbel(key, logits.shape[1:], jnp.float32))(keys)
        return jnp.where(settings.temperature > 0, jnp.argmax(scaled + noise, axis=-1), greedy)

    return jax.lax.cond((settings.temperature > 0).any(), draw, lambda: greedy).astype(jnp.int32)


def _restrict(scaled: Array, settings: Sampling) -> Array:
    """Logits with -inf for what top k and top p leave out; ties go to the smaller id.

    Selection and sorting may differ in the last bit of a sum, so a row's own settings alone say which of them it goes by.
    """
    free = (settings.top_k == 0) & (settings.top_p == 1)
    selected = (settings.top_k > 0) & (settings.top_k <= FEW)
    everything = jnp.ones_like(scaled, bool)

    def by_sorting() -> Array:
        order = jnp.argsort(-scaled, axis=-1, stable=True)
        return _kept(jnp.take_along_axis(scaled, order, axis=-1), order, settings, scaled.shape[1])

    def by_selection() -> Array:
        return _kept(*jax.lax.top_k(scaled, min(FEW, scaled.shape[1])), settings, scaled.shape[1])

    few = jax.lax.cond(selected.any(), by_selection, lambda: everything)
    many = jax.lax.cond((~free & ~selected).any(), by_sorting, lambda: everything)
    return jnp.where(free[:, None] | jnp.where(selected[:, None], few, many), scaled, -jnp.inf)


def _kept(descending: Float[Array, "B n"], ids: Int[Array, "B n"], settings: Sampling, vocab_size: int) -> Bool[Array, "B V"]:
    """Which ids top k and top p leave, of the n most probable ones in order."""
    rank = jnp.arange(descending.shape[1])[None]
    kept = (rank < settings.top_k[:, None]) | (settings.top_k[:, None] == 0)
    p = jax.nn.softmax(jnp.where(kept, descending, -jnp.inf), axis=-1)
    before = jnp.cumsum(p, axis=-1) - p
    kept &= (before < settings.top_p[:, None]) | (settings.top_p[:, None] == 1) | (rank == 0)
    rows = jnp.arange(len(ids))[:, None]
    return jnp.zeros((len(ids), vocab_size), bool).at[rows, ids].set(kept)
