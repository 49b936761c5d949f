"""The mixture layer: y = sum over chosen experts of gate_e * expert_e(h), on one of two paths.

`dense` computes every expert on every token: right for pairs and whenever all experts are active. `dispatch` sends tokens
to the experts they chose and computes exactly those. Both select with `where` before and after an expert, so that what a
forbidden expert holds, NaN included, reaches neither values nor gradients. Low-rank experts are computed beside `public`,
whose products they share, on every token on either path.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from flexjax import config as config_lib
from flexjax import sharding
from flexjax.model import dispatch, kernels, low_rank, router


@dataclasses.dataclass(frozen=True)
class Dispatch:
    """How tokens reach the experts they chose, see `dispatch.sharded`."""

    transport: str = "auto"
    kernel: str = "auto"
    whole: tuple[str, ...] = ()


def swiglu(x: Float[Array, "... D"], gate: Array, up: Array, down: Array, mesh: Mesh | None = None) -> Float[Array, "... D"]:
    """One expert: down(silu(gate x) * (up x)). Gate and up stay separate: splitting a fused product costs a copy."""
    hidden = jax.nn.silu(kernels.project(x, gate)) * kernels.project(x, up)
    return kernels.project(sharding.constrain(hidden, mesh, "batch", *[None] * (x.ndim - 2), "mlp"), down)


def dense(
    h: Float[Array, "B T D"],
    ffns: Sequence[Any],
    banks: Sequence[config_lib.Bank],
    gates: Float[Array, "B T E"],
    allowed: Bool[Array, "B E"] | None,
    skip_idle: bool = False,
    mesh: Mesh | None = None,
) -> Float[Array, "B T D"]:
    """Computes all experts; with `skip_idle`, an expert that no token chose is skipped at run time (decoding)."""
    out, apart = _together(h, ffns, banks, gates, skip_idle, mesh), dispatch.apart(banks)
    for e, (bank, ffn, slot) in enumerate(_ordered(ffns, banks)):
        if bank not in apart:
            continue
        x = h if allowed is None else jnp.where(allowed[:, e, None, None], h, 0)
        weights = ffn["gate"][slot], ffn["up"][slot], ffn["down"][slot]
        gate = gates[..., e, None]
        if skip_idle:
            y = jax.lax.cond((gate > 0).any(), swiglu, lambda x, *_: jnp.zeros_like(x), x, *weights)
        else:
            y = swiglu(x, *weights, mesh)
        out = out + gate * jnp.where(gate > 0, y.astype(jnp.float32), 0)
    return out.astype(h.dtype)


def _ordered(ffns: Sequence[Any], banks: Sequence[config_lib.Bank]) -> list[tuple[config_lib.Bank, Any, int]]:
    """Bank, its weights, and slot there, of each expert in canonical order."""
    slots = [(bank, ffn, slot) for ffn, bank in zip(ffns, banks, strict=True) for slot in range(len(bank.experts))]
    return [slots[place] for place in router.positions(banks)]


def _together(
    h: Array, ffns: Sequence[Any], banks: Sequence[config_lib.Bank], gates: Array, skip_idle: bool, mesh: Mesh | None
) -> Float[Array, "B T D"]:
    """The gated sum of the low-rank experts and of `public` beside them, in float32; 0 where no expert is of low rank."""
    members: list[Any] = []
    parts, apart = [], dispatch.apart(banks)
    for e, (bank, ffn, slot) in enumerate(_ordered(ffns, banks)):
        if bank not in apart:  # in canonical order: `public` is the first
            members.append({part: _slot(weight, slot) for part, weight in ffn.items()})
            parts.append(gates[..., e : e + 1])
    if not members:
        return jnp.zeros(h.shape, jnp.float32)
    return low_rank.mixture(h, members[0], members[1:], jnp.concatenate(parts, axis=-1), skip_idle, mesh)


def _slot(weight: Any, slot: int) -> Any:
    """One expert's matrix, or both of its factors."""
    return {side: factor[slot] for side, factor in weight.items()} if isinstance(weight, dict) else weight[slot]


def is_sparse(banks: Sequence[config_lib.Bank], top_k: int) -> bool:
    """Whether tokens are sent to the experts they chose: not in a pair, nor where all are active or none lives apart."""
    num_experts = len(router.expert_names(banks))
    return num_experts > 2 and top_k < num_experts and bool(dispatch.apart(banks))


def apply(
    h: Float[Array, "B T D"],
    ffns: Sequence[Any],
    banks: Sequence[config_lib.Bank],
    routing: router.Routing,
    allowed: Bool[Array, "B E"] | None,
    mesh: Mesh | None = None,
    how: Dispatch = Dispatch(),
) -> Float[Array, "B T D"]:
    """Chooses the path.

    Args:
      h, routing, allowed: on a mesh, split over `sharding.BATCH` in B.
      ffns: weights by bank, in the dtype of `h`. On a mesh, those of a dense layer are split over `tensor` alone; those
        of a sparse one lie as stored, see `dispatch.sharded`. Low-rank factors, and `public` beside them, may lie either way.
      mesh: the devices; None for one.
      how: what a mesh has to know for the sparse path, and the grouped matmul.
    """
    if not is_sparse(banks, routing.indices.shape[-1]):
        return dense(h, ffns, banks, router.dense_gates(routing), allowed, mesh=mesh)
    beside, dtype, apart = None, h.dtype, dispatch.apart(banks)
    if len(apart) < len(banks):
        beside, dtype = _together(h, ffns, banks, router.dense_gates(routing), False, mesh), jnp.dtype(jnp.float32)
        ffns = [ffn for ffn, bank in zip(ffns, banks, strict=True) if bank in apart]
        routing = dispatch.among(routing, banks, apart)
    if mesh is None or mesh.size == 1:
        y = dispatch.dropless(h, ffns, apart, routing, how.kernel, dtype)
    else:
        y = dispatch.sharded(h, ffns, apart, routing, mesh, how.transport, how.kernel, how.whole, dtype)
    return y if beside is None else (beside + y).astype(h.dtype)
