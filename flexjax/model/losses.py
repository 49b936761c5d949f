"""Losses per token and per sequence; whoever trains takes the means."""

from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from flexjax import sharding
from flexjax.model import router

CHUNK_LOGITS = 2**22  # logits that a device holds at once,
CHUNK_ROWS = 1024  # unless they are those of this many tokens: fewer would read the head more often than compute with it


def _token_losses(
    hidden: Array, kernel: Array, targets: Array, z_weight: float, mesh: Mesh | None
) -> tuple[Array, tuple[Array, Array]]:
    rows = hidden.reshape(-1, hidden.shape[-1])  # as a matrix: see `kernels.project`
    logits = jnp.dot(rows, kernel.astype(hidden.dtype), preferred_element_type=jnp.float32)
    logits = sharding.constrain(logits.reshape(*hidden.shape[:-1], kernel.shape[1]), mesh, "batch", None, "vocab")
    log_z = jax.nn.logsumexp(logits, axis=-1)
    if sharding.size(mesh, *sharding.RULES["vocab"]) > 1:  # each part of the vocabulary looks among its own
        chosen = jnp.where(jnp.arange(logits.shape[-1])[None, None] == targets[..., None], logits, 0).sum(axis=-1)
    else:
        chosen = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    cross_entropy = log_z - chosen
    z = jnp.square(log_z)
    return cross_entropy + z_weight * z, (cross_entropy, z)


def _chunks(x: Array, count: int) -> Array:
    return jnp.moveaxis(x.reshape(x.shape[0], count, -1, *x.shape[2:]), 1, 0)


def _join(x: Array) -> Array:
    x = jnp.moveaxis(x, 0, 1)
    return x.reshape(x.shape[0], -1, *x.shape[3:])


def _chunk_count(hidden: Array, kernel: Array, mesh: Mesh | None) -> int:
    B, T, _ = hidden.shape
    rows = B * T // sharding.size(mesh, *sharding.BATCH)
    vocab = kernel.shape[1] // sharding.size(mesh, *sharding.RULES["vocab"])
    wanted = min(-(-rows * vocab // CHUNK_LOGITS), -(-rows // CHUNK_ROWS))
    return next(count for count in range(1, T + 1) if T % count == 0 and count >= min(wanted, T))


@partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def _frozen_head(
    hidden: Array, kernel: Array, targets: Array, z_weight: float, mesh: Mesh | None
) -> tuple[Array, Array, Array]:
    def chunk(args: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        total, (cross_entropy, z) = _token_losses(args[0], kernel, args[1], z_weight, mesh)
        return total, cross_entropy, z

    count = _chunk_count(hidden, kernel, mesh)
    return jax.tree.map(_join, jax.lax.map(chunk, (_chunks(hidden, count), _chunks(targets, count))))


def _frozen_forward(
    hidden: Array, kernel: Array, targets: Array, z_weight: float, mesh: Mesh | None
) -> tuple[tuple[Array, Array, Array], Array]:
    def chunk(args: tuple[Array, Array]) -> tuple[tuple[Array, Array, Array], Array]:
        x, y = args
        total, gradient, (cross_entropy, z) = jax.vjp(lambda x: _token_losses(x, kernel, y, z_weight, mesh), x, has_aux=True)
        return (total, cross_entropy, z), gradient(jnp.ones_like(total))[0]

    count = _chunk_count(hidden, kernel, mesh)
    losses, dx = jax.lax.map(chunk, (_chunks(hidden, count), _chunks(targets, count)))
    return jax.tree.map(_join, losses), _join(dx)


def _frozen_backward(
    z_weight: float, mesh: Mesh | None, dx: Array, grads: tuple[Array, Array, Array]
) -> tuple[Array, None, None]:
    return (grads[0][..., None] * dx.astype(jnp.float32)).astype(dx.dtype), None, None


_frozen_head.defvjp(_frozen_forward, _frozen_backward)


def _trainable_head(
    hidden: Array, kernel: Array, targets: Array, z_weight: float, mesh: Mesh | None
) -> tuple[Array, Array, Array]:
    @jax.checkpoint
    def chunk(args: tuple[Array, Array]) -> tuple[Array, Array, Array]:
        total, (cross_entropy, z) = _token_losses(args[0], kernel, args[1], z_weight, mesh)
        return total, cross_entropy, z

    count = _chunk_count(hidden, kernel, mesh)
    return jax.tree.map(_join, jax.lax.map(chunk, (_chunks(hidden, count), _chunks(targets, count))))


def cross_entropy(
    hidden: Float[Array, "B T D"],
    kernel: Float[Array, "D V"],
    targets: Int[Array, "B T"],
    *,
    z_weight: float = 0.0,
    head_trainable: bool = True,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B T"], Float[Array, "B T"], Float[Array, "B T"]]:
    """Returns (cross-entropy + z_weight * z, cross-entropy, z = squared log-normalizer) per token, in nats.

    Only the first is meant to be differentiated. The logits are never all in memory. With a frozen head, the gradient by
    `hidden` is computed together with the loss, so that no logits are kept or computed twice and the head gets none.
    """
    if not head_trainable:
        kernel = kernel.astype(hidden.dtype)  # half the bytes to gather; a trained head's gradient is summed in float32
    kernel = sharding.constrain(kernel, mesh, None, "vocab")
    function = _trainable_head if head_trainable else _frozen_head
    total, ce, z = function(hidden, kernel, targets, z_weight, mesh)
    return total, jax.lax.stop_gradient(ce), jax.lax.stop_gradient(z)


def sequence_mean(values: Float[Array, "B T"], weights: Float[Array, "B T"]) -> Float[Array, " B"]:
    """Mean over the tokens of each sequence that count; 0 where none does."""
    return (values * weights).sum(axis=1) / jnp.maximum(weights.sum(axis=1), 1)


def load_balance(stats: router.RoutingStats, share: Float[Array, " B"]) -> Float[Array, ""]:
    """E * sum_e load_e * probability_e, mean over layers; 1 when balanced (Switch Transformer, eq. 4; load is per choice).

    `share` is each sequence's share of the batch's tokens.
    """
    load = jax.lax.stop_gradient(jnp.einsum("LBE,B->LE", stats.load, share))
    probability = jnp.einsum("LBE,B->LE", stats.probability, share)
    return load.shape[-1] * (load * probability).sum(axis=-1).mean()
