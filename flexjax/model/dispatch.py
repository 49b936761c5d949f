"""The sparse path of the mixture layer: route, sort, exchange, grouped matmuls, exchange back, combine.

On one device rows are sorted by expert, multiplied and un-sorted (`dropless`). On a mesh (`sharded`) every device sorts the
rows of its own tokens; they travel to the devices whose experts were chosen, are regrouped there so that the matmuls see
rows that exist only, and their results travel back. No token is dropped, and a choice that no allowed expert can fill is
not sent.
"""

import dataclasses
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from flexjax import config as config_lib
from flexjax import errors, hardware, sharding
from flexjax.model import exchange, kernels, router

Ffn = dict[str, Array]  # gate, up [E, D, F] and down [E, F, D]
LOGICAL = {"gate": ("expert", "embed", "mlp"), "up": ("expert", "embed", "mlp"), "down": ("expert", "mlp", "embed")}
TRANSPORTS = ("auto", "padded", "ragged")
KEPT = "expert rows"  # names what a policy of `jax.checkpoint` should keep: exchanged rows and products
Multiply = Callable[[Array, Array, Array], Array]


def apart(banks: Sequence[config_lib.Bank]) -> tuple[config_lib.Bank, ...]:
    """Banks whose experts tokens are sent to: all, but for low-rank ones and `public`, whose products these share."""
    if not any(bank.rank for bank in banks):
        return tuple(banks)
    return tuple(bank for bank in banks if not bank.rank and config_lib.PUBLIC not in bank.experts)


def among(routing: router.Routing, banks: Sequence[config_lib.Bank], kept: Sequence[config_lib.Bank]) -> router.Routing:
    """A decision over the experts of `banks` as one over those of `kept`: other choices are not sent."""
    names, left = router.expert_names(banks), router.expert_names(kept)
    place = jnp.array([*(left.index(name) if name in left else len(left) for name in names), len(left)])
    indices = place[routing.indices]
    probabilities = jnp.stack([routing.probabilities[..., names.index(name)] for name in left], axis=-1)
    return dataclasses.replace(
        routing, probabilities=probabilities, indices=indices, gates=jnp.where(indices < len(left), routing.gates, 0)
    )


def _experts(
    x: Float[Array, "M D"], ffns: Sequence[Ffn], starts: Int[Array, " S"], sizes: Int[Array, " S"], kernel: str
) -> Float[Array, "M D"]:
    """Every row through the expert that it belongs to; the banks lie end to end."""
    y = jnp.zeros_like(x)
    first = 0
    for ffn in ffns:
        groups = slice(first, first + ffn["gate"].shape[0])
        first = groups.stop

        def grouped(rows: Array, weight: Array, groups: slice = groups) -> Array:
            return kernels.grouped_matmul(rows, weight, starts[groups] if groups.start else None, sizes[groups], kernel)

        gate, up = (checkpoint_name(grouped(x, ffn[part]), KEPT) for part in ("gate", "up"))
        y = y + grouped(jax.nn.silu(gate) * up, ffn["down"])
    return y


def _mixture(
    h: Float[Array, "n D"], gates: Float[Array, "n k"], planned: tuple[exchange.Route, Array, Array], multiply: Multiply
) -> Float[Array, "n D"]:
    """Sends, multiplies, collects and combines, in float32."""
    route, starts, sizes = planned
    with jax.named_scope("send"):
        x = checkpoint_name(exchange.send(h, route), KEPT)
    with jax.named_scope("multiply"):
        y = multiply(x, starts, sizes)
    with jax.named_scope("collect"):
        y = checkpoint_name(exchange.collect(y, route), KEPT)
    chosen = jnp.where(gates[..., None] > 0, y.astype(jnp.float32), 0)
    return (gates[..., None] * chosen).sum(axis=1)


def dropless(
    h: Float[Array, "B T D"],
    ffns: Sequence[Ffn],
    banks: Sequence[config_lib.Bank],
    routing: router.Routing,
    kernel: str = "auto",
    dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "B T D"]:
    """Computes the chosen experts only, on one device; `kernel` as for `kernels.grouped_matmul`, `dtype` None for that of h."""
    k, num_experts = routing.indices.shape[-1], routing.probabilities.shape[-1]
    place = jnp.array([*router.positions(banks), num_experts])  # the sentinel sorts behind all experts
    planned = exchange.plan(place[routing.indices.reshape(-1)].reshape(-1, k), 1, num_experts)

    def multiply(x: Array, starts: Array, sizes: Array) -> Array:
        return _experts(x, ffns, starts, sizes, kernel)

    out = _mixture(h.reshape(-1, h.shape[-1]), routing.gates.reshape(-1, k), planned, multiply)
    return out.reshape(h.shape).astype(dtype or h.dtype)


def sharded(
    h: Float[Array, "B T D"],
    ffns: Sequence[Ffn],
    banks: Sequence[config_lib.Bank],
    routing: router.Routing,
    mesh: Mesh,
    transport: str = "auto",
    kernel: str = "auto",
    whole: Sequence[str] = (),
    dtype: jax.typing.DTypeLike | None = None,
) -> Float[Array, "B T D"]:
    """The same on a mesh: no sort is global, and no expert leaves its device.

    The backward pass gathers weights again rather than keep them.

    Args:
      h, routing: split over `sharding.BATCH` in B.
      ffns: as stored, the expert axis padded to a multiple of the mesh's `expert` with slots that get no token.
      transport: one of `TRANSPORTS`.
      kernel: see `kernels.grouped_matmul`.
      whole: banks of which every device of an `fsdp` group has all of D; others are gathered, their gradients scattered.
      dtype: of the result; None for that of `h`.

    Raises:
      ConfigError: the devices cannot do the transport.
    """
    devices, k = sharding.size(mesh, exchange.AXIS), routing.indices.shape[-1]
    place, slots = _places(ffns, banks, devices)
    ragged = resolve(transport, mesh) == "ragged"
    rules = [sharding.IN_USE if bank.name in whole else sharding.RULES for bank in banks]
    splits = [{part: sharding.spec(LOGICAL[part], rule) for part in ffn} for ffn, rule in zip(ffns, rules, strict=True)]
    batch = sharding.spec(("batch",))

    def gather_and_multiply(x: Array, starts: Array, sizes: Array, ffns: Sequence[Ffn]) -> Array:
        weights = [
            {part: _gather(leaf, LOGICAL[part], split[part], mesh) for part, leaf in ffn.items()}
            for ffn, split in zip(ffns, splits, strict=True)
        ]
        return _experts(x, weights, starts, sizes, kernel)

    multiply = jax.checkpoint(gather_and_multiply, policy=jax.checkpoint_policies.save_only_these_names(KEPT))

    def local(h: Array, indices: Array, gates: Array, ffns: Sequence[Ffn]) -> Array:
        h, gates = _vary(h, mesh, sharding.BATCH), _vary(gates, mesh, sharding.BATCH)
        with jax.named_scope("plan"):
            planned = exchange.plan(jnp.asarray(place)[indices.reshape(-1, k)], devices, slots, ragged)
        rows, parts = h.reshape(-1, h.shape[-1]), gates.reshape(-1, k)
        out = _mixture(rows, parts, planned, lambda *groups: multiply(*groups, ffns)).astype(dtype or h.dtype)
        return jax.lax.psum(out, "tensor").reshape(h.shape)

    mapped = jax.shard_map(local, mesh=mesh, in_specs=(batch, batch, batch, splits), out_specs=batch)
    return mapped(h, routing.indices, routing.gates, list(ffns))


def _places(ffns: Sequence[Ffn], banks: Sequence[config_lib.Bank], devices: int) -> tuple[np.ndarray, int]:
    """For each expert in canonical order, then the sentinel: device * S + slot there; and S. Banks are dealt in equal runs."""
    held = [ffn["gate"].shape[0] // devices for ffn in ffns]
    first, slots = np.cumsum(held) - held, sum(held)
    laid = [
        slot // held[b] * slots + first[b] + slot % held[b] for b, bank in enumerate(banks) for slot in range(len(bank.experts))
    ]
    return np.array([*(laid[place] for place in router.positions(banks)), devices * slots], np.int32), slots


def _vary(x: Array, mesh: Mesh, split: Sequence[str]) -> Array:
    """Has the gradient of what is alike along some axes of the mesh summed over them, at this place."""
    return jax.lax.pcast(x, tuple(axis for axis in mesh.axis_names if axis not in split), to="varying")


def _gather(leaf: Array, names: tuple[str, ...], split: jax.sharding.PartitionSpec, mesh: Mesh) -> Array:
    """A weight with all of D; its gradient is scattered, then summed over the devices that hold the same part."""
    axes = [(part,) if isinstance(part, str) else part or () for part in split]
    leaf, dimension = _vary(leaf, mesh, sum(axes, ())), names.index("embed")
    return jax.lax.all_gather(leaf, axes[dimension], axis=dimension, tiled=True) if axes[dimension] else leaf


def resolve(transport: str, mesh: Mesh) -> str:
    """The transport that a mesh gets: "auto" is ragged on TPUs whose links form a 3D torus (v5p), padded elsewhere.

    The compiler refuses a ragged exchange over a whole v5e pod; on smaller flat slices it can be asked for.

    Raises:
      ConfigError: the transport is unknown, or the devices cannot do it.
    """
    platform, chip = mesh.devices.flat[0].platform, hardware.of_device(mesh.devices.flat[0].device_kind)
    if transport not in TRANSPORTS:
        raise errors.ConfigError(f"mesh.transport is '{transport}', expected one of {', '.join(TRANSPORTS)}")
    if transport == "ragged" and platform != "tpu":
        raise errors.ConfigError(f"mesh.transport 'ragged' needs TPUs, these devices are {platform}; take 'padded' or 'auto'")
    best = "ragged" if platform == "tpu" and chip is not None and chip.dimensions == 3 else "padded"
    return best if transport == "auto" else transport


@dataclasses.dataclass(frozen=True)
class Room:
    """What the exchange keeps free on a device, so that no routing can overflow it.

    Attributes:
      expected: rows that come in if routing is even.
      pair: rows that one device can send another.
      rows: rows that can come in.
      bytes: of that many rows.
    """

    expected: int
    pair: int
    rows: int
    bytes: int

    def __str__(self) -> str:
        size = f"{self.bytes / 2**20:,.1f} MiB a buffer"
        return f"room for {self.rows:,} rows a device ({size}), {self.expected:,} if routing is even"


def buffer_bound(
    banks: Sequence[config_lib.Bank], mesh: Mesh | None, tokens: int, top_k: int, d_model: int, dtype: jax.typing.DTypeLike
) -> Room:
    """The room that the exchange needs, in one pass of one layer with `tokens` tokens a device; both transports alike."""
    devices, sent = sharding.size(mesh, exchange.AXIS), apart(banks)
    pair = exchange.pair_rows(tokens, top_k, sum(-(-len(bank.experts) // devices) for bank in sent))
    expected = tokens * top_k * len(router.expert_names(sent)) // len(router.expert_names(banks))
    return Room(expected, pair, devices * pair, devices * pair * d_model * jnp.dtype(dtype).itemsize)
