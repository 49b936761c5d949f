"""Moves token rows to the experts that were chosen and back: sorted on a device, exchanged over the `expert` axis of a mesh.

    send     h [n, D] -> rows [M, D], grouped by the expert that will multiply them
    collect  rows [M, D] -> [n, k, D], the row of every choice

Each is the other's gradient, so both directions are gathers and exchanges, never scatters. Two transports:

    padded  every pair of devices exchanges as many rows as one could ever send the other; runs everywhere
    ragged  only rows that exist travel (TPU)

Letters: n tokens of a device, k choices of a token, X devices of the axis, S slots for experts on each, R rows that are
sent, M rows that a device can receive.
"""

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

AXIS = "expert"


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Travel:
    """How rows move between devices, and where they lie at both ends.

    Attributes:
      sent, received: rows for and from each device.
      here, there: where rows for each device begin among those sent, and where on that device they are put.
      arrived, back: where rows from each device begin among those received, and where there their results are put.
      regroup, ungroup: places of the rows grouped by expert among those received, and of these among the grouped; None
        where both lie alike.
      ragged: the transport.
    """

    sent: Int[Array, " X"]
    received: Int[Array, " X"]
    here: Int[Array, " X"]
    there: Int[Array, " X"]
    arrived: Int[Array, " X"]
    back: Int[Array, " X"]
    regroup: Int[Array, " M"] | None
    ungroup: Int[Array, " M"] | None
    rows: int = dataclasses.field(metadata={"static": True})
    ragged: bool = dataclasses.field(metadata={"static": True})


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Route:
    """What one device sends.

    Attributes:
      pick: the choice (token * k + i) that lies in each row sent.
      fetch: the row in which each choice comes back.
      chosen: whether a choice names an expert; None where what comes back for others is 0 anyway.
      travel: None if nothing leaves the device.
    """

    pick: Int[Array, " R"]
    fetch: Int[Array, "n k"]
    chosen: Bool[Array, "n k"] | None
    travel: Travel | None


def _outward(rows: Float[Array, "R D"], travel: Travel | None) -> Float[Array, "M D"]:
    if travel is None:
        return rows
    if travel.ragged:
        room = jnp.zeros_like(rows, shape=(travel.rows, rows.shape[1]))
        places = travel.here, travel.sent, travel.there, travel.received
        rows = jax.lax.ragged_all_to_all(rows, room, *places, axis_name=AXIS)
    else:
        rows = jax.lax.all_to_all(rows, AXIS, 0, 0, tiled=True)
    return rows if travel.regroup is None else rows[travel.regroup]


def _homeward(rows: Float[Array, "M D"], route: Route) -> Float[Array, "n k D"]:
    travel = route.travel
    if travel is None:
        return rows[route.fetch]
    rows = rows if travel.ungroup is None else rows[travel.ungroup]
    if travel.ragged:
        room = jnp.zeros_like(rows, shape=(route.pick.shape[0], rows.shape[1]))
        places = travel.arrived, travel.received, travel.back, travel.sent
        rows = jax.lax.ragged_all_to_all(rows, room, *places, axis_name=AXIS)
    else:
        rows = jax.lax.all_to_all(rows, AXIS, 0, 0, tiled=True)
    return rows[route.fetch] if route.chosen is None else jnp.where(route.chosen[..., None], rows[route.fetch], 0)


@jax.custom_vjp
def send(h: Float[Array, "n D"], route: Route) -> Float[Array, "M D"]:
    """Copies token rows to the experts they chose, grouped by expert; what lies beyond the groups is arbitrary."""
    return _outward(h[route.pick // route.fetch.shape[1]], route.travel)


def _send_forward(h: Array, route: Route) -> tuple[Array, Route]:
    return send(h, route), route


def _send_backward(route: Route, grad: Array) -> tuple[Array, None]:
    return _homeward(grad, route).sum(axis=1), None


send.defvjp(_send_forward, _send_backward)


@jax.custom_vjp
def collect(y: Float[Array, "M D"], route: Route) -> Float[Array, "n k D"]:
    """Brings the experts' rows back to the choices of each token; rows beyond the groups must be 0 if nothing travels."""
    return _homeward(y, route)


def _collect_forward(y: Array, route: Route) -> tuple[Array, Route]:
    return collect(y, route), route


def _collect_backward(route: Route, grad: Array) -> tuple[Array, None]:
    return _outward(grad.reshape(-1, grad.shape[-1])[route.pick], route.travel), None


collect.defvjp(_collect_forward, _collect_backward)


def pair_rows(tokens: int, top_k: int, slots: int) -> int:
    """Rows that one device can send another: a token chooses an expert once."""
    return tokens * min(top_k, slots)


def plan(
    slot: Int[Array, "n k"], devices: int, slots: int, ragged: bool = False
) -> tuple[Route, Int[Array, " S"], Int[Array, " S"]]:
    """Decides where every row of this device goes.

    Args:
      slot: the chosen expert's place, device * S + slot on that device; X * S for a choice that is not sent.
      devices, slots: X and S. With more than one device, to be called in a `shard_map` over the axis.
      ragged: the transport.

    Returns:
      The route, and starts and sizes of the groups of rows that this device's slots will multiply.
    """
    key, top_k = slot.reshape(-1), slot.shape[1]
    order = jnp.argsort(key, stable=True)
    inverse = jnp.zeros_like(order).at[order].set(jnp.arange(order.shape[0]))
    sizes = (key[:, None] == jnp.arange(devices * slots)[None]).sum(axis=0, dtype=jnp.int32)
    if devices == 1:
        return Route(order, inverse.reshape(slot.shape), None, None), jnp.cumsum(sizes) - sizes, sizes
    me = jax.lax.axis_index(AXIS)
    table = jax.lax.all_gather(sizes, AXIS).reshape(devices, devices, slots)  # rows from a device to a device's slot
    pairs, incoming = table.sum(axis=2), table[:, me]
    room = pair_rows(slot.shape[0], top_k, slots)
    first = _exclusive(pairs[me], 0)  # of the sorted rows
    if ragged:
        pick, fetch, here, arrived = order, inverse, first, _exclusive(incoming.sum(axis=1), 0)
    else:
        row, device = jnp.arange(devices * room), jnp.minimum(key // slots, devices - 1)
        here = arrived = jnp.arange(devices) * room
        pick = order[jnp.minimum(first[row // room] + row % room, key.shape[0] - 1)]
        fetch = jnp.minimum(here[device] + inverse - first[device], devices * room - 1)
    travel = Travel(
        sent=pairs[me],
        received=incoming.sum(axis=1),
        here=here,
        there=_exclusive(pairs, 0)[me],
        arrived=arrived,
        back=_exclusive(pairs, 1)[:, me],
        regroup=None,
        ungroup=None,
        rows=devices * room,
        ragged=ragged,
    )
    grouped = _exclusive(incoming.T.reshape(-1), 0).reshape(slots, devices)  # where (slot, device) begins, in that order
    if not (ragged and slots == 1):
        came = arrived[:, None] + _exclusive(incoming, 1)  # where (device, slot) begins, in that order
        travel.regroup = _translate(grouped.reshape(-1), came.T.reshape(-1), travel.rows)
        travel.ungroup = _translate(came.reshape(-1), grouped.T.reshape(-1), travel.rows)
    chosen = (key < devices * slots).reshape(slot.shape)
    return Route(pick, fetch.reshape(slot.shape), chosen, travel), grouped[:, 0], incoming.sum(axis=0)


def _exclusive(sizes: Array, axis: int) -> Array:
    return jnp.cumsum(sizes, axis=axis) - sizes


def _translate(starts: Int[Array, " runs"], targets: Int[Array, " runs"], rows: int) -> Int[Array, " rows"]:
    """Where each row lies in another layout of the same runs: run i begins at starts[i], ascending, and there at targets[i]."""
    row = jnp.arange(rows)
    run = jnp.searchsorted(starts, row, side="right", method="compare_all") - 1
    return jnp.clip(targets[run] + row - starts[run], 0, rows - 1)
