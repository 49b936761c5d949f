"""Where everything lies: one mesh of devices, and one table from which every sharding follows.

    data    groups of devices that each hold a whole model and see other sequences
    fsdp    parts of every weight within a group; a weight is gathered when its layer is computed. Splits the batch too
    tensor  parts of the heads, of the hidden units and of the vocabulary
    expert  parts of a bank of experts when tokens choose among them; for everything else it is one more `fsdp`

Every dimension of a parameter or an activation has a logical name; `RULES` says over which mesh axes a name is split.
"""

import functools
import math
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import numpy as np
from jax.experimental import multihost_utils
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from flexjax import config as config_lib
from flexjax import errors, tree

AXES = ("data", "fsdp", "tensor", "expert")
BATCH = ("data", "fsdp", "expert")
Rules = Mapping[str, tuple[str, ...]]
RULES: Rules = {  # at rest; of two dimensions that want one mesh axis, the first has it
    "layer": (),
    "expert": ("expert",),
    "embed": ("fsdp", "expert"),
    "heads": ("tensor",),
    "kv_heads": ("tensor",),
    "mlp": ("tensor",),
    "vocab": ("tensor",),
    "token": (),  # rows of the embedding: a lookup needs any of them
    "column": ("tensor", "fsdp", "expert"),  # columns of the embedding: each device looks up its own
    "whole": (),  # norms, router rows, the experts of a dense layer, and every dimension inside a layer without a name here
    "batch": BATCH,
}
IN_USE: Rules = {**RULES, "embed": ()}  # while a layer is computed
FROZEN_CHOICES = ("sharded", "replicated")
Shapes = Any


def make_mesh(sizes: config_lib.MeshConfig, devices: Iterable[Any] | None = None) -> Mesh:
    """Arranges devices (default: all) as a mesh with the axes of `AXES`.

    Raises:
      ConfigError: the sizes do not multiply to the number of devices, or a choice is unknown.
    """
    found = list(jax.devices() if devices is None else devices)
    if sizes.frozen not in FROZEN_CHOICES:
        raise errors.ConfigError(f"mesh.frozen is '{sizes.frozen}', expected one of {', '.join(FROZEN_CHOICES)}")
    shape = {axis: getattr(sizes, axis) for axis in AXES}
    open_axes = [axis for axis in AXES if not shape[axis]]
    if len(open_axes) > 1:
        raise errors.ConfigError(
            f"mesh.{' and mesh.'.join(open_axes)} are 0, what the others leave; that can be said of one axis only: give sizes"
        )
    given = math.prod(shape[axis] for axis in AXES if shape[axis])
    for axis in open_axes:
        shape[axis] = max(1, len(found) // given)
    if math.prod(shape.values()) != len(found):
        said = " x ".join(f"{axis} {getattr(sizes, axis) or 'any'}" for axis in AXES)
        raise errors.ConfigError(
            f"mesh {said} does not fit {len(found)} devices: the sizes must multiply to {len(found)}, these give {given}; "
            f"use divisors ({', '.join(map(str, _divisors(len(found))))}), and 0 for the axis that takes what the others leave"
        )
    names = tuple(shape.values())
    types = (AxisType.Auto,) * len(AXES)
    if found[0].platform == "tpu":
        return jax.make_mesh(names, AXES, axis_types=types, devices=found)  # along the links of the chips
    return Mesh(np.array(found).reshape(names), AXES, axis_types=types)


def one_device() -> Mesh:
    """The mesh of a single device, in which nothing is split."""
    return make_mesh(config_lib.MeshConfig(), jax.local_devices()[:1])


def size(mesh: Mesh | None, *axes: str) -> int:
    """The product of the sizes of mesh axes."""
    return 1 if mesh is None else int(np.prod([mesh.shape[axis] for axis in axes], dtype=np.int64))


def describe(mesh: Mesh) -> str:
    """The mesh in words: "8 cpu devices (data 2, fsdp 4)"."""
    split = ", ".join(f"{axis} {parts}" for axis, parts in mesh.shape.items() if parts > 1)
    device = mesh.devices.flat[0].platform
    return f"{mesh.size} {device} devices ({split})" if split else f"1 {device} device"


def spec(names: Iterable[str | None], rules: Rules = RULES) -> PartitionSpec:
    """The mesh axes of an array whose dimensions have these logical names; None is never split."""
    used: set[str] = set()
    parts: list[tuple[str, ...] | None] = []
    for name in names:
        axes = tuple(axis for axis in rules[name or "whole"] if axis not in used)
        used |= set(axes)
        parts.append(axes or None)
    return PartitionSpec(*parts)


def sharding(mesh: Mesh, names: Iterable[str | None], rules: Rules = RULES) -> NamedSharding:
    """`spec` on a mesh."""
    return NamedSharding(mesh, spec(names, rules))


def constrain(x: Any, mesh: Mesh | None, *names: str | None) -> Any:
    """Tells the compiler how an activation is split, so that it never guesses; the identity where nothing is."""
    return x if mesh is None or mesh.size == 1 else jax.lax.with_sharding_constraint(x, sharding(mesh, names, IN_USE))


def of_state(state: Shapes, axes: tree.Tree, mesh: Mesh, rules: Rules = RULES) -> Any:
    """Shardings of a training state or a part of one: a leaf whose path ends in that of a parameter lies as it does.

    Args:
      state: any pytree whose dict keys spell parameter paths; what belongs to no parameter is held by everyone.
      axes: logical names by parameter, see `transformer.logical_axes`.
      mesh, rules: as for `spec`.
    """
    names = tree.flatten(axes)

    def place(path: Any, _: Any) -> NamedSharding:
        keys = "/".join(str(key.key) for key in path if isinstance(key, jax.tree_util.DictKey))
        return sharding(mesh, names.get(keys.replace("raw_bias", "bias"), ()), rules)

    return jax.tree_util.tree_map_with_path(place, state)


def put(x: Any, where: NamedSharding) -> jax.Array:
    """An array that every process holds whole, laid on the mesh; each device takes only its part."""
    if isinstance(x, jax.Array) and not (x.is_fully_addressable and not where.is_fully_addressable):
        return jax.device_put(x, where)
    host = np.asarray(x)
    return jax.make_array_from_callback(host.shape, where, lambda index: host[index])


@functools.cache
def _everywhere(mesh: Mesh) -> Callable[[jax.Array], jax.Array]:
    return jax.jit(lambda x: x, out_shardings=NamedSharding(mesh, PartitionSpec()))


def from_main(x: np.ndarray) -> np.ndarray:
    """What process 0 computed, in all: libraries on other hosts may differ in the last digit."""
    return x if jax.process_count() == 1 else np.asarray(multihost_utils.broadcast_one_to_all(x))


def fetch(x: Any) -> np.ndarray:
    """An array of the mesh as every process's own; all processes must ask for it."""
    if isinstance(x, jax.Array) and not x.is_fully_addressable:
        assert isinstance(x.sharding, NamedSharding)  # the only kind that we lay
        x = _everywhere(x.sharding.mesh)(x).addressable_data(0)
    return np.asarray(x)


def check(dimensions: Mapping[str, tuple[int, tuple[str, ...]]], mesh: Mesh) -> None:
    """Refuses a mesh that does not divide what it splits.

    Args:
      dimensions: setting to (its value, the mesh axes that split it).

    Raises:
      ConfigError: names the setting, the axis, and the nearest sizes that work.
    """
    for setting, (value, axes) in dimensions.items():
        parts = size(mesh, *axes)
        if value % parts:
            shown = " x ".join(f"mesh.{axis}={mesh.shape[axis]}" for axis in axes if mesh.shape[axis] > 1)
            raise errors.ConfigError(
                f"{setting}={value} cannot be split in {parts} parts ({shown}); nearest numbers of parts that work: "
                f"{_nearest(parts, _divisors(value))}"
            )


def round_up(batch_size: int, mesh: Mesh) -> int:
    """The next larger number of sequences that the mesh can split."""
    parts = size(mesh, *BATCH)
    return -(-batch_size // parts) * parts


def local_rows(mesh: Mesh, batch_size: int) -> list[int]:
    """Rows of a global batch that this process's devices hold, ascending."""
    where = sharding(mesh, ("batch",))
    mine = where.addressable_devices_indices_map((batch_size,)).values()
    return sorted({row for index in mine if index for row in range(*index[0].indices(batch_size))})


def put_rows(rows: Mapping[str, np.ndarray], mine: list[int], mesh: Mesh, batch_size: int) -> dict[str, jax.Array]:
    """The global batch [B, T] of which this process gives the rows that its devices hold."""
    place = {row: i for i, row in enumerate(mine)}

    def build(array: np.ndarray) -> jax.Array:
        where = sharding(mesh, ("batch", *[None] * (array.ndim - 1)))

        def part(index: Any) -> np.ndarray:
            return array[[place[row] for row in range(*index[0].indices(batch_size))]]

        return jax.make_array_from_callback((batch_size, *array.shape[1:]), where, part)

    return {name: build(array) for name, array in rows.items()}


def _divisors(value: int) -> list[int]:
    return [size for size in range(1, value + 1) if value % size == 0]


def _nearest(wanted: int, choices: list[int]) -> str:
    below = [size for size in choices if size < wanted][-1:]
    above = [size for size in choices if size >= wanted][:1]
    return ", ".join(map(str, below + above))
