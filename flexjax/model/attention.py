"""Causal self-attention of OLMo-2: full-width qk-norm, rotary positions, grouped keys and values."""

import dataclasses
from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from flexjax import config as config_lib
from flexjax import sharding, tree
from flexjax.model import kernels

NEGATIVE = -1e30
TPU_BLOCK = 512  # queries at a time
CPU_BLOCK = 128
Attend = Callable[[Array, Array, Array, Array], Array]


def rms_norm(x: Float[Array, "... D"], weight: Float[Array, " D"], eps: float) -> Float[Array, "... D"]:
    """Root-mean-square norm, computed and scaled in float32, then cast back to the dtype of `x`."""
    x32 = x.astype(jnp.float32)
    scale = jax.lax.rsqrt(jnp.mean(jnp.square(x32), axis=-1, keepdims=True) + eps)
    return (x32 * scale * jnp.broadcast_to(weight.astype(jnp.float32), x.shape)).astype(x.dtype)


def rotary(positions: Int[Array, "B T"], head_dim: int, theta: float) -> tuple[Array, Array]:
    """Returns cos and sin, each [B, T, head_dim] in float32, in the rotate-half convention."""
    frequency = theta ** (-jnp.arange(0, head_dim, 2, dtype=jnp.float32) / head_dim)
    angle = positions[..., None].astype(jnp.float32) * frequency[None, None]
    angle = jnp.concatenate([angle, angle], axis=-1)
    return kernels.keep(jnp.cos(angle)), kernels.keep(jnp.sin(angle))


def rotate(x: Float[Array, "B T N H"], cos: Float[Array, "B T H"], sin: Float[Array, "B T H"]) -> Array:
    """Applies rotary positions in float32. The halves of a head change places by `rev`: to join them again costs a copy."""
    halves = (*x.shape[:-1], 2, x.shape[-1] // 2)
    x32, cos, sin = (part.astype(jnp.float32).reshape(*part.shape[:2], -1, *halves[-2:]) for part in (x, cos, sin))
    sign = jnp.array([-1, 1], jnp.float32)[None, None, None, :, None]
    return (x32 * cos + jax.lax.rev(x32, (3,)) * (sin * sign)).reshape(x.shape).astype(x.dtype)


def causal_mask(length: int, segments: Int[Array, "B T"] | None) -> Bool[Array, "#B 1 T T"]:
    """True where a query may see a key: not later, and of the same segment if segments are given."""
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
    if segments is not None:
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
    return mask


def _swap(x: Array) -> Array:
    """Heads first or tokens first, whichever it is not."""
    return x.transpose(0, 2, 1, 3)


@jax.custom_vjp
def _by_einsum(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Attention as XLA's CPU compiler does it fastest: heads first, and as few passes over the scores as can be."""
    return _by_einsum_forward(q, k, v, mask)[0]


def _heads_first(x: Array, groups: int) -> Array:
    """[B, T, N, H] as [B, K, G, T, H]: G query heads that share each of K keys."""
    B, T, N, H = x.shape
    return x.reshape(B, T, N // groups, groups, H).transpose(0, 2, 3, 1, 4)


def _tokens_first(x: Array) -> Array:
    B, K, G, T, H = x.shape
    return x.transpose(0, 3, 1, 2, 4).reshape(B, T, K * G, H)


def _by_einsum_forward(q: Array, k: Array, v: Array, mask: Array) -> tuple[Array, tuple[Array, ...]]:
    groups, scale = q.shape[2] // k.shape[2], q.shape[3] ** -0.5
    q, k, v = _heads_first(q, groups), _swap(k), _swap(v)
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", q, k, preferred_element_type=jnp.float32) * scale
    scores = jnp.where(mask[:, :, None], scores, NEGATIVE)
    weights = jnp.exp(scores - scores.max(axis=-1, keepdims=True))
    share = 1 / weights.sum(axis=-1, keepdims=True)
    weights = weights.astype(v.dtype)
    out = jnp.einsum("BKGTS,BKSH->BKGTH", weights, v, preferred_element_type=jnp.float32) * share  # T x H, not T x S
    out = out.astype(v.dtype)
    return _tokens_first(out), (q, k, v, weights, share, out)


def _by_einsum_backward(saved: tuple[Array, ...], dy: Array) -> tuple[Array, Array, Array, None]:
    q, k, v, weights, share, out = saved
    dy = _heads_first(dy, q.shape[2]).astype(jnp.float32) * share
    mean = (dy * out.astype(jnp.float32)).sum(axis=-1, keepdims=True)  # of the scores' gradients: T x H again
    dy = dy.astype(v.dtype)
    dweights = jnp.einsum("BKGTH,BKSH->BKGTS", dy, v, preferred_element_type=jnp.float32)
    dscores = (weights.astype(jnp.float32) * (dweights - mean) * q.shape[4] ** -0.5).astype(q.dtype)
    dq = jnp.einsum("BKGTS,BKSH->BKGTH", dscores, k)
    dk = jnp.einsum("BKGTS,BKGTH->BKSH", dscores, q)
    dv = jnp.einsum("BKGTS,BKGTH->BKSH", weights, dy)
    return _tokens_first(dq), _swap(dk), _swap(dv), None


_by_einsum.defvjp(_by_einsum_forward, _by_einsum_backward)


def _by_library(q: Array, k: Array, v: Array, mask: Array) -> Array:
    with jax.numpy_dtype_promotion("standard"):  # the library itself mixes float32 and bfloat16
        return jax.nn.dot_product_attention(q, k, v, mask=mask)


def _by_query_blocks(whole: Attend, block: Attend, size: int, q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Self-attention of a long window, some queries at a time: what no query may see is not computed."""
    length = q.shape[1]
    if length != k.shape[1] or length % size:
        return whole(q, k, v, mask)
    pieces = []
    for stop in range(size, length + 1, size):
        queries = slice(stop - size, stop)
        pieces.append(block(q[:, queries], k[:, :stop], v[:, :stop], mask[:, :, queries, :stop]))
    return jnp.concatenate(pieces, axis=1)


_on_cpu = partial(_by_query_blocks, _by_einsum, _by_einsum, CPU_BLOCK)
_on_tpu = partial(_by_query_blocks, _by_library, jax.checkpoint(_by_library), TPU_BLOCK)  # no score is kept


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Bool[Array, "#B 1 T S"]
) -> Float[Array, "B T N H"]:
    """Softmax attention with scale 1/sqrt(H); the implementation follows the platform that is compiled for.

    `mask` is causal where there are as many keys as queries.
    """
    return jax.lax.platform_dependent(q, k, v, mask, cpu=_on_cpu, tpu=_on_tpu, default=_by_library)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class KeyValues:
    """Cached keys and values of one layer: heads first, so that a step of one token multiplies them as they lie."""

    k: Float[Array, "B K S H"]
    v: Float[Array, "B K S H"]


def _write(old: Array, new: Array, position: Array) -> Array:
    return jax.lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), position, axis=2)


def block(
    h: Float[Array, "B T D"],
    layer: tree.Tree,
    config: config_lib.ModelConfig,
    rotary: tuple[Array, Array],
    mask: Bool[Array, "#B 1 T S"],
    cache: tuple[KeyValues, Array] | None = None,
    mesh: Mesh | None = None,
) -> tuple[Float[Array, "B T D"], KeyValues]:
    """A layer up to its experts: h + RMS(attention(h)).

    With a cache (keys and values so far, write position), the new ones are written into it.
    """
    B, T, _ = h.shape
    w = layer["attention"]

    def project(name: str, axis: str) -> Array:
        return sharding.constrain(kernels.project(h, w[name]), mesh, "batch", None, axis)

    q = rms_norm(project("q", "heads"), w["q_norm"], config.norm_eps)
    k = rms_norm(project("k", "kv_heads"), w["k_norm"], config.norm_eps)
    v = project("v", "kv_heads").reshape(B, T, config.num_kv_heads, config.head_dim)
    q = rotate(q.reshape(B, T, config.num_heads, config.head_dim), *rotary)
    k = rotate(k.reshape(B, T, config.num_kv_heads, config.head_dim), *rotary)
    kept = KeyValues(_swap(k), _swap(v))
    if cache is not None:
        past, position = cache
        kept = jax.tree.map(lambda old, new: _write(old, new, position), past, kept)
        k, v = _swap(kept.k), _swap(kept.v)
    out = sharding.constrain(attend(q, k, v, mask).reshape(B, T, -1), mesh, "batch", None, "heads")
    out = sharding.constrain(kernels.project(out, w["o"]), mesh, "batch", None, None)
    return h + rms_norm(out, layer["norms"]["attention"], config.norm_eps), kept
