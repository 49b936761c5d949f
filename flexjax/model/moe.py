"""The mixture layer: y = sum over chosen experts of gate_e * expert_e(h), on one of two paths.

`dense` computes every expert on every token: right for pairs and whenever all experts are active. `dispatch` sends tokens
to the experts they chose and computes exactly those. Both select with `where` before and after an expert, so that what a
forbidden expert holds, NaN included, reaches neither values nor gradients.
"""

import dataclasses
from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from flexjax import config as config_lib
from flexjax import sharding
from flexjax.model import dispatch, kernels, router


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
    ffns: Sequence[dispatch.Ffn],
    banks: Sequence[config_lib.Bank],
    gates: Float[Array, "B T E"],
    allowed: Bool[Array, "B E"] | None,
    skip_idle: bool = False,
    mesh: Mesh | None = None,
) -> Float[Array, "B T D"]:
    """Computes all experts; with `skip_idle`, an expert that no token chose is skipped at run time (decoding)."""
    slots = [(ffn, slot) for ffn, bank in zip(ffns, banks, strict=True) for slot in range(len(bank.experts))]
    out = jnp.zeros(h.shape, jnp.float32)
    for e, place in enumerate(router.positions(banks)):
        ffn, slot = slots[place]
        x = h if allowed is None else jnp.where(allowed[:, e, None, None], h, 0)
        weights = ffn["gate"][slot], ffn["up"][slot], ffn["down"][slot]
        gate = gates[..., e, None]
        if skip_idle:
            y = jax.lax.cond((gate > 0).any(), swiglu, lambda x, *_: jnp.zeros_like(x), x, *weights)
        else:
            y = swiglu(x, *weights, mesh)
        out = out + gate * jnp.where(gate > 0, y.astype(jnp.float32), 0)
    return out.astype(h.dtype)


def is_sparse(num_experts: int, top_k: int) -> bool:
    """Whether tokens are sent to the experts they chose: not in a pair, and not where every expert is active."""
    return num_experts > 2 and top_k < num_experts


def apply(
    h: Float[Array, "B T D"],
    ffns: Sequence[dispatch.Ffn],
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
        of a sparse one lie as stored, see `dispatch.sharded`.
      mesh: the devices; None for one.
      how: what a mesh has to know for the sparse path, and the grouped matmul.
    """
    if not is_sparse(routing.probabilities.shape[-1], routing.indices.shape[-1]):
        return dense(h, ffns, banks, router.dense_gates(routing), allowed, mesh=mesh)
    if mesh is None or mesh.size == 1:
        return dispatch.dropless(h, ffns, banks, routing, how.kernel)
    return dispatch.sharded(h, ffns, banks, routing, mesh, how.transport, how.kernel, how.whole)
