"""Low-rank experts: each matrix is that of the public FFN plus a product a b of rank r, which is never multiplied out.

    G, U     = x Wg, x Wu                                       once, for `public` and all low-rank experts
    hidden_e = silu(G + (x a_g) b_g) * (U + (x a_u) b_u)        of `public` without the products
    y        = (sum of gate_e hidden_e) Wd + sum of gate_e (hidden_e a_d) b_d

The public matrices belong to the anchor and are used whoever is allowed. What an expert adds is selected, never multiplied
by 0, wherever a token did not choose it: in values and in gradients (FlexMoRE).
"""

from collections.abc import Sequence
from functools import partial

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float

from flexjax import config as config_lib
from flexjax import errors, sharding
from flexjax.model import kernels

Factors = dict[str, dict[str, Array]]  # gate and up: a [D, r], b [r, F]; down: a [F, r], b [r, D]
PARTS = ("gate", "up", "down")
ENDS = {"gate": (None, "mlp"), "up": (None, "mlp"), "down": ("mlp", None)}  # what a matrix is split along while it is used
Ends = tuple[str | None, str | None]


def mixture(
    h: Float[Array, "B T D"],
    public: dict[str, Array],
    experts: Sequence[Factors],
    gates: Float[Array, "B T E"],
    skip_idle: bool = False,
    mesh: Mesh | None = None,
) -> Float[Array, "B T D"]:
    """The gated sum of `public` and of low-rank experts, in float32.

    Args:
      h: on a mesh, split over `sharding.BATCH` in B.
      public: gate, up and down of the public expert, in the dtype of `h`.
      experts: factors of each low-rank expert, in the dtype of `h`.
      gates: of `public`, then of `experts`; 0 where a token did not choose.
      skip_idle: leave out at run time what no token chose (decoding).
      mesh: the devices; weights that lie split over `fsdp` and `expert` are gathered here.
    """
    if not skip_idle:
        return _mixture(h, public, experts, gates, skip_idle, mesh)

    def busy(h: Array, public: dict[str, Array], experts: Sequence[Factors], gates: Array) -> Array:
        return _mixture(h, public, experts, gates, skip_idle, mesh)

    def idle(h: Array, *_: object) -> Array:
        return jnp.zeros(h.shape, jnp.float32)

    return jax.lax.cond((gates > 0).any(), busy, idle, h, public, list(experts), gates)


def _mixture(
    h: Array, public: dict[str, Array], experts: Sequence[Factors], gates: Array, skip_idle: bool, mesh: Mesh | None
) -> Array:
    weights = {part: sharding.constrain(public[part], mesh, *ENDS[part]) for part in PARTS}
    gate, up = (_split(kernels.project(h, weights[part]), "mlp", mesh) for part in ("gate", "up"))
    hidden = gates[..., :1] * jnp.where(gates[..., :1] > 0, (jax.nn.silu(gate) * up).astype(jnp.float32), 0)
    out = jnp.zeros(h.shape, jnp.float32)

    def one(h: Array, gate: Array, up: Array, weight: Array, factors: Factors) -> tuple[Array, Array]:
        chosen = weight > 0
        own = {part: _delta(h, factors[part], chosen, ENDS[part], mesh) for part in ("gate", "up")}
        inner = _split(jax.nn.silu(gate + own["gate"]) * (up + own["up"]), "mlp", mesh)
        outer = _delta(inner, factors["down"], chosen, ENDS["down"], mesh)
        return weight * jnp.where(chosen, inner.astype(jnp.float32), 0), weight * outer.astype(jnp.float32)

    def nothing(h: Array, gate: Array, *_: object) -> tuple[Array, Array]:
        return jnp.zeros(gate.shape, jnp.float32), jnp.zeros(h.shape, jnp.float32)

    for e, factors in enumerate(experts, 1):
        weight = gates[..., e, None]
        state = h, gate, up, weight, factors
        inner, outer = jax.lax.cond((weight > 0).any(), one, nothing, *state) if skip_idle else one(*state)
        hidden, out = hidden + inner, out + outer
    hidden = _split(hidden.astype(h.dtype), "mlp", mesh)
    return out + kernels.project(hidden, weights["down"]).astype(jnp.float32)


def _delta(x: Array, factors: dict[str, Array], chosen: Bool[Array, "B T 1"], ends: Ends, mesh: Mesh | None) -> Array:
    """(x a) b where a token chose, 0 elsewhere, whatever the factors hold; so are the gradients."""
    a = sharding.constrain(factors["a"], mesh, ends[0], None)
    b = sharding.constrain(factors["b"], mesh, None, ends[1])
    return _product(ends, mesh, x, a, b, chosen)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _product(ends: Ends, mesh: Mesh | None, x: Array, a: Array, b: Array, chosen: Array) -> Array:
    return _product_forward(ends, mesh, x, a, b, chosen)[0]


def _product_forward(
    ends: Ends, mesh: Mesh | None, x: Array, a: Array, b: Array, chosen: Array
) -> tuple[Array, tuple[Array, ...]]:
    z = jnp.where(chosen, _split(kernels.project(x, a), None, mesh), 0)
    y = jnp.where(chosen, _split(kernels.project(z, b), ends[1], mesh), 0)
    return y, (x, a, b, chosen, z)


def _product_backward(ends: Ends, mesh: Mesh | None, saved: tuple[Array, ...], dy: Array) -> tuple[Array | None, ...]:
    x, a, b, chosen, z = saved
    dy = jnp.where(chosen, dy, 0)
    dz = jnp.where(chosen, _split(kernels.project(dy, b.T), None, mesh), 0)
    dx = jnp.where(chosen, _split(kernels.project(dz, a.T), ends[0], mesh), 0)
    return dx, _rows(jnp.where(chosen, x, 0)).T @ _rows(dz), _rows(z).T @ _rows(dy), None


_product.defvjp(_product_forward, _product_backward)


def _rows(x: Array) -> Array:
    return x.reshape(-1, x.shape[-1])


def _split(x: Array, axis: str | None, mesh: Mesh | None) -> Array:
    return sharding.constrain(x, mesh, "batch", *[None] * (x.ndim - 2), axis)


def check(banks: Sequence[config_lib.Bank], config: config_lib.ModelConfig) -> None:
    """Raises ConfigError if a low-rank bank has a rank or width that cannot be, or no public expert in a bank of its own."""
    most = min(config.d_model, config.d_ff)
    for bank in banks:
        if not 0 <= bank.rank <= most:
            raise errors.ConfigError(f"rank {bank.rank} of {', '.join(bank.experts)} must lie between 1 and {most}")
        if bank.rank and bank.d_ff != config.d_ff:
            raise errors.ConfigError(
                f"low-rank experts are as wide as the public one, {config.d_ff}; bank '{bank.name}' has d_ff {bank.d_ff}"
            )
        if bank.rank and not any(other.experts == (config_lib.PUBLIC,) and not other.rank for other in banks):
            raise errors.ConfigError(f"low-rank experts need 'public' in a bank of its own, beside bank '{bank.name}'")
