"""The mixture layer: y = sum over chosen experts of gate_e * expert_e(h), on one of two paths.

`dense` computes every expert on every token: right for pairs and whenever all experts are active. `dropless` sorts tokens
by expert and computes exactly the chosen ones. Both select with `where` before and after an expert, so that what a
forbidden expert holds, NaN included, reaches neither values nor gradients.
"""

from collections.abc import Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flexjax import config as config_lib
from flexjax.model import kernels, router

Ffn = dict[str, Array]  # gate, up [E, D, F] and down [E, F, D]


def swiglu(x: Float[Array, "... D"], gate: Array, up: Array, down: Array) -> Float[Array, "... D"]:
    """One expert: down(silu(gate x) * (up x)). Gate and up stay separate: splitting a fused product costs a copy."""
    return kernels.project(jax.nn.silu(kernels.project(x, gate)) * kernels.project(x, up), down)


def dense(
    h: Float[Array, "B T D"],
    ffns: Sequence[Ffn],
    banks: Sequence[config_lib.Bank],
    gates: Float[Array, "B T E"],
    allowed: Bool[Array, "B E"] | None,
    skip_idle: bool = False,
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
            y = swiglu(x, *weights)
        out = out + gate * jnp.where(gate > 0, y.astype(jnp.float32), 0)
    return out.astype(h.dtype)


@jax.custom_vjp
def _dispatch(h: Float[Array, "N D"], order: Int[Array, " R"], inverse: Int[Array, "N k"]) -> Float[Array, "R D"]:
    """Copies token rows into sorted order; row r comes from token order[r] // k."""
    return h[order // inverse.shape[1]]


def _dispatch_forward(h: Array, order: Array, inverse: Array) -> tuple[Array, Array]:
    return _dispatch(h, order, inverse), inverse


def _dispatch_backward(inverse: Array, grad: Array) -> tuple[Array, None, None]:
    return grad[inverse].sum(axis=1), None, None  # a gather by the inverse permutation instead of a scatter


_dispatch.defvjp(_dispatch_forward, _dispatch_backward)


@jax.custom_vjp
def _collect(y: Float[Array, "R D"], order: Int[Array, " R"], inverse: Int[Array, "N k"]) -> Float[Array, "N k D"]:
    """Brings sorted rows back to the choices of each token."""
    return y[inverse]


def _collect_forward(y: Array, order: Array, inverse: Array) -> tuple[Array, Array]:
    return _collect(y, order, inverse), order


def _collect_backward(order: Array, grad: Array) -> tuple[Array, None, None]:
    return grad.reshape(-1, grad.shape[-1])[order], None, None


_collect.defvjp(_collect_forward, _collect_backward)


def dropless(
    h: Float[Array, "B T D"], ffns: Sequence[Ffn], banks: Sequence[config_lib.Bank], routing: router.Routing
) -> Float[Array, "B T D"]:
    """Computes the chosen experts only: sort by expert, grouped matmuls, un-sort, combine. No token is ever dropped."""
    B, T, D = h.shape
    k = routing.indices.shape[-1]
    num_experts = routing.probabilities.shape[-1]
    place = jnp.array([*router.positions(banks), num_experts])  # the sentinel sorts behind all experts
    key = place[routing.indices.reshape(-1)]
    order = jnp.argsort(key, stable=True)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0])).reshape(B * T, k)
    sizes = (key[:, None] == jnp.arange(num_experts)[None]).sum(axis=0, dtype=jnp.int32)
    starts = jnp.cumsum(sizes) - sizes
    x = _dispatch(h.reshape(B * T, D), order, inverse)
    y = jnp.zeros_like(x)
    first = 0
    for ffn, bank in zip(ffns, banks, strict=True):
        groups = slice(first, first + len(bank.experts))
        first = groups.stop

        def grouped(rows: Array, weight: Array, groups: slice = groups) -> Array:
            return kernels.grouped_matmul(rows, weight, starts[groups], sizes[groups])

        y = y + grouped(jax.nn.silu(grouped(x, ffn["gate"])) * grouped(x, ffn["up"]), ffn["down"])
    gates = routing.gates.reshape(B * T, k, 1)
    chosen = jnp.where(gates > 0, _collect(y, order, inverse).astype(jnp.float32), 0)
    return (gates * chosen).sum(axis=1).reshape(B, T, D).astype(h.dtype)


def apply(
    h: Float[Array, "B T D"],
    ffns: Sequence[Ffn],
    banks: Sequence[config_lib.Bank],
    routing: router.Routing,
    allowed: Bool[Array, "B E"] | None,
) -> Float[Array, "B T D"]:
    """Chooses the path: dense for a pair and when every expert is active, else dropless."""
    num_experts = routing.probabilities.shape[-1]
    if num_experts <= 2 or routing.indices.shape[-1] == num_experts:
        return dense(h, ffns, banks, router.dense_gates(routing), allowed)
    return dropless(h, ffns, banks, routing)
