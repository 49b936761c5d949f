"""Causal self-attention of OLMo-2: full-width qk-norm, rotary positions, grouped keys and values."""

import dataclasses

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from flexjax import config as config_lib
from flexjax import sharding, tree
from flexjax.model import kernels

NEGATIVE = -1e30
QUERY_BLOCK = 512


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
    return jnp.cos(angle), jnp.sin(angle)


def rotate(x: Float[Array, "B T N H"], cos: Float[Array, "B T H"], sin: Float[Array, "B T H"]) -> Array:
    """Applies rotary positions in float32."""
    x32 = x.astype(jnp.float32)
    left, right = jnp.split(x32, 2, axis=-1)
    turned = jnp.concatenate([-right, left], axis=-1)
    return (x32 * cos[:, :, None] + turned * sin[:, :, None]).astype(x.dtype)


def causal_mask(length: int, segments: Int[Array, "B T"] | None) -> Bool[Array, "#B 1 T T"]:
    """True where a query may see a key: not later, and of the same segment if segments are given."""
    mask = jnp.tril(jnp.ones((length, length), bool))[None, None]
    if segments is not None:
        mask = mask & (segments[:, None, :, None] == segments[:, None, None, :])
    return mask


def _by_einsum(q: Array, k: Array, v: Array, mask: Array) -> Array:
    B, T, N, H = q.shape
    K = k.shape[2]
    grouped = q.reshape(B, T, K, N // K, H).transpose(0, 2, 3, 1, 4)  # explicit head-major layout: fastest on CPU
    k, v = k.transpose(0, 2, 1, 3), v.transpose(0, 2, 1, 3)
    scores = jnp.einsum("BKGTH,BKSH->BKGTS", grouped, k, preferred_element_type=jnp.float32) * H**-0.5
    weights = jax.nn.softmax(jnp.where(mask[:, :, None], scores, NEGATIVE), axis=-1).astype(v.dtype)
    out = jnp.einsum("BKGTS,BKSH->BKGTH", weights, v)
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def _by_library(q: Array, k: Array, v: Array, mask: Array) -> Array:
    with jax.numpy_dtype_promotion("standard"):  # the library itself mixes float32 and bfloat16
        return jax.nn.dot_product_attention(q, k, v, mask=mask)


def _by_query_blocks(q: Array, k: Array, v: Array, mask: Array) -> Array:
    """Self-attention of a long window, some queries at a time: what no query may see is not computed, no score is kept."""
    length = q.shape[1]
    if length != k.shape[1] or length % QUERY_BLOCK:
        return _by_library(q, k, v, mask)
    block = jax.checkpoint(_by_library)
    stops = range(QUERY_BLOCK, length + 1, QUERY_BLOCK)
    pieces = [
        block(q[:, stop - QUERY_BLOCK : stop], k[:, :stop], v[:, :stop], mask[:, :, stop - QUERY_BLOCK : stop, :stop])
        for stop in stops
    ]
    return jnp.concatenate(pieces, axis=1)


def attend(
    q: Float[Array, "B T N H"], k: Float[Array, "B S K H"], v: Float[Array, "B S K H"], mask: Bool[Array, "#B 1 T S"]
) -> Float[Array, "B T N H"]:
    """Softmax attention with scale 1/sqrt(H); the implementation follows the platform that is compiled for.

    `mask` is causal where there are as many keys as queries.
    """
    return jax.lax.platform_dependent(q, k, v, mask, cpu=_by_einsum, tpu=_by_query_blocks, default=_by_library)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class KeyValues:
    """Cached keys and values of one layer, [B, S, K, H] each."""

    k: Array
    v: Array


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
    if cache is not None:
        past, position = cache
        k = jax.lax.dynamic_update_slice_in_dim(past.k, k.astype(past.k.dtype), position, axis=1)
        v = jax.lax.dynamic_update_slice_in_dim(past.v, v.astype(past.v.dtype), position, axis=1)
    out = sharding.constrain(attend(q, k, v, mask).reshape(B, T, -1), mesh, "batch", None, "heads")
    out = sharding.constrain(kernels.project(out, w["o"]), mesh, "batch", None, None)
    return h + rms_norm(out, layer["norms"]["attention"], config.norm_eps), KeyValues(k, v)
