"""Pieces of a tensor from the processes that read them to the devices of all, over the devices' own links.

In each round every process has one piece. It cuts it into equal blocks, one for each device of the mesh; one `all_to_all`
delivers them, so that a byte leaves the process that read it once. Devices that need the same part then complete it among
themselves (`all_gather`) and write the rows that are theirs.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec
from jaxtyping import Array, Int

from flexjax import sharding


@dataclasses.dataclass(frozen=True)
class Route:
    """How pieces of one shape come to their places in a tensor [R, ...], or in the layers of a tensor [L, R, ...].

    Attributes:
      mesh: devices of all processes.
      spec: how they split the tensor; its layers are not split.
      shape: of the tensor.
      rows: of a piece, along R; a shorter piece is filled up, and what was filled up is never written.
      layered: whether the tensor has layers of rows.
    """

    mesh: Mesh
    spec: PartitionSpec
    shape: tuple[int, ...]
    rows: int
    layered: bool

    @functools.cached_property
    def senders(self) -> list[list[int]]:
        """Places in the mesh of the devices of each process, processes in the order of their index."""
        places: dict[int, list[int]] = {}
        for place, device in enumerate(self.mesh.devices.flat):
            places.setdefault(device.process_index, []).append(place)
        return [places[process] for process in sorted(places)]

    @functools.cached_property
    def row_axes(self) -> tuple[str, ...]:
        """Mesh axes that split the rows."""
        return self._axes[self.layered]

    @functools.cached_property
    def copies(self) -> tuple[str, ...]:
        """Mesh axes along which devices need the same part of a piece, in the order of the mesh."""
        used = {axis for axes in self._axes[1 + self.layered :] for axis in axes}
        return tuple(axis for axis, size in self.mesh.shape.items() if size > 1 and axis not in used)

    @functools.cached_property
    def part_shape(self) -> tuple[int, ...]:
        """Of what one device needs of a piece: all rows, and of the other dimensions as much as it holds."""
        return self._piece.shard_shape(self._piece_shape)

    @functools.cached_property
    def block(self) -> int:
        """How many numbers one device sends to another."""
        size = int(np.prod(self.part_shape, dtype=np.int64))
        return -(-size // (sharding.size(self.mesh, *self.copies) * len(self.senders[0])))

    @functools.cached_property
    def _axes(self) -> list[tuple[str, ...]]:
        """The mesh axes that split each dimension of the tensor."""
        spec = [*self.spec, *[None] * (len(self.shape) - len(self.spec))]
        return [(axes,) if isinstance(axes, str) else tuple(axes or ()) for axes in spec]

    @functools.cached_property
    def _piece(self) -> NamedSharding:
        return NamedSharding(self.mesh, PartitionSpec(None, *self._axes[1 + self.layered :]))

    @functools.cached_property
    def _piece_shape(self) -> tuple[int, ...]:
        return (self.rows, *self.shape[1 + self.layered :])

    def cut(self, piece: np.ndarray | None, dtype: np.dtype) -> np.ndarray:
        """What the devices of this process send, [devices of this process, all devices, block]; zeros without a piece."""
        local = len(self.senders[0])
        blocks = np.zeros((local, self.mesh.size, self.block), dtype)
        if piece is None:
            return blocks
        receivers: dict[Any, list[int]] = {}  # by what they need; in the order of the mesh, in which `all_gather` joins them
        needs = self._piece.devices_indices_map(self._piece_shape)
        for place, device in enumerate(self.mesh.devices.flat):
            receivers.setdefault(needs[device], []).append(place)
        for index, places in receivers.items():
            part = piece[index].reshape(-1)
            missing = len(places) * local * self.block - part.size
            part = np.pad(part, (0, missing)) if missing else part
            blocks[:, places] = part.reshape(len(places), local, self.block).swapaxes(0, 1)
        return blocks

    def deliver(self, tensor: jax.Array, blocks: np.ndarray, targets: Int[np.ndarray, "P 3"]) -> jax.Array:
        """Writes the pieces of all processes into a tensor, whose memory is used again; all processes call it alike.

        Args:
          tensor: as far as it is filled.
          blocks: of this process, from `cut`.
          targets: for each process's piece its layer (0 without layers), its first row and how many rows it has.
        """
        mesh = self.mesh
        places = [place for place, device in enumerate(mesh.devices.flat) if device.process_index == jax.process_index()]
        where = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
        shape = (mesh.size, *blocks.shape[1:])

        def of_device(index: Any) -> np.ndarray:
            return blocks[None, places.index(index[0].start)]

        sent = jax.make_array_from_callback(shape, where, of_device)
        return _deliver(tensor, sent, targets, self)


@functools.partial(jax.jit, static_argnums=3, donate_argnums=0)
def _deliver(tensor: Array, sent: Array, targets: Array, route: Route) -> Array:
    mesh, spec = route.mesh, route.spec
    specs = (spec, PartitionSpec(mesh.axis_names), PartitionSpec())
    run = functools.partial(_on_device, route=route)
    return jax.shard_map(run, mesh=mesh, in_specs=specs, out_specs=spec, check_vma=False)(tensor, sent, targets)


def _on_device(tensor: Array, sent: Array, targets: Array, route: Route) -> Array:
    """One device's share of a delivery: its part of the tensor, and what it sends."""
    blocks = jax.lax.all_to_all(sent[0], route.mesh.axis_names, 0, 0, tiled=True)
    shares = blocks[np.array(route.senders)].reshape(len(route.senders), -1)  # by process, in the order in which it cut them
    held = tensor if route.layered else tensor[None]
    offset = jax.lax.axis_index(route.row_axes) * held.shape[1] if route.row_axes else 0

    def write(process: Array, held: Array) -> Array:
        flat = shares[process]
        if route.copies:
            flat = jax.lax.all_gather(flat, route.copies, tiled=True)
        part = flat[: np.prod(route.part_shape, dtype=np.int64)].reshape(route.part_shape)
        layer, first, count = targets[process]
        return _write(held, part, layer, first - offset, count)

    held = jax.lax.fori_loop(0, len(route.senders), write, held)
    return held if route.layered else held[0]


def _write(held: Array, part: Array, layer: Array, first: Array, count: Array) -> Array:
    """Writes those of the `count` rows of a part, which begin at row `first` of what is held, that lie within it."""
    rows = min(part.shape[0], held.shape[1])
    start = jnp.clip(first, 0, held.shape[1] - rows)
    source = start - first + jnp.arange(rows)
    at: list[Any] = [layer, start, *[0] * (held.ndim - 2)]
    old = jax.lax.dynamic_slice(held, at, (1, rows, *held.shape[2:]))
    ours = ((source >= 0) & (source < count)).reshape(1, rows, *[1] * (held.ndim - 2))
    new = jnp.where(ours, part[jnp.clip(source, 0, part.shape[0] - 1)][None], old)
    return jax.lax.dynamic_update_slice(held, new, at)
