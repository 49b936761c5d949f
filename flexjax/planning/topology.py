"""Machines that a plan is made for, which need not be there: TPU slices, GPUs as numbers, fake CPU devices.

v5e:16x16   a TPU slice by its chips along each dimension; compiled for by the `libtpu` wheel
cpu:8       fake devices of this host; compiled for by its own compiler
gpu:8       by numbers only: there is no compiler without the GPU
"""

import dataclasses
import importlib.util
import math
import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.experimental import topologies
from jax.sharding import Mesh

from flexjax import errors, hardware

FLAT = "1x1, 2x2, 2x4, 4x4, 4x8, 8x8, 8x16, 16x16"
CUBES = "2x2x1, 2x2x2, 2x2x4, 2x4x4, 4x4x4, 4x4x8, 4x8x8, 8x8x8, 8x8x16, 8x16x16"
SLICES = {"v5e": FLAT, "v5p": CUBES, "v6e": FLAT}
CLOSED = {"v5e": 16, "v5p": 4, "v6e": 16}  # along a multiple of so many chips, the links of a slice form a ring
CHIPS_PER_HOST = 4
ALONE = {  # this host is no TPU, and there is nobody to ask what it is: else the library looks around and complains
    "TPU_SKIP_MDS_QUERY": "1",
    "TPU_ACCELERATOR_TYPE": "v5litepod-4",
    "TPU_WORKER_HOSTNAMES": "localhost",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",  # it only compiles: two plans do not fight for a device
}


@dataclasses.dataclass(frozen=True)
class OnPaper:
    """A device that has a number and nothing else."""

    id: int
    platform: str = "paper"
    device_kind: str = "paper"
    process_index: int = 0
    client: None = None


@dataclasses.dataclass(frozen=True)
class Topology:
    """A machine.

    Attributes:
      name: as the user writes it.
      chip: its figures, None if nothing is known of them.
      devices: real, described or on paper.
      shape: chips along each dimension of the torus, empty if there is none.
      compiles: whether a program can be compiled for it here.
      hosts: machines that write a checkpoint together.
    """

    name: str
    chip: hardware.Chip | None
    devices: Sequence[Any]
    shape: tuple[int, ...]
    compiles: bool
    hosts: int


def fake_devices(name: str) -> None:
    """Asks for the CPU devices that a topology needs; must run before JAX starts a backend, and does nothing for others."""
    kind, _, size = name.partition(":")
    if kind == "cpu" and size.isdigit():
        flag = f"--xla_force_host_platform_device_count={size}"
        os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} {flag}".strip()


def parse(name: str, chip: hardware.Chip | None = None, analytic: bool = False) -> Topology:
    """The machine of a name.

    Args:
      name: see the module.
      chip: figures of a GPU or CPU; those of a TPU are in the table.
      analytic: never compile.

    Raises:
      ConfigError: it is no known topology, its compiler is missing or refuses it, or a GPU has no figures.
    """
    kind, _, size = name.partition(":")
    if kind in SLICES and re.fullmatch(r"\d+(x\d+)*", size):
        return _slice(kind, size, analytic)
    if kind not in ("cpu", "gpu") or not size.isdigit() or int(size) < 1:
        raise _unknown(name)
    count = int(size)
    if kind == "gpu":
        if chip is None:
            raise errors.ConfigError(
                f"--topology={name} needs --gpu=h100 (a100, h200), or --flops, --memory_gb, --bandwidth, --link"
            )
        return Topology(name, chip, [OnPaper(i) for i in range(count)], (), False, -(-count // max(1, chip.island)))
    if analytic:
        return Topology(name, chip, [OnPaper(i) for i in range(count)], (), False, 1)
    found = jax.devices("cpu")
    if len(found) < count:
        raise errors.ConfigError(
            f"--topology={name}: this process has {len(found)} CPU devices; it was asked too late for more"
        )
    return Topology(name, chip, found[:count], (), True, 1)


def _slice(kind: str, size: str, analytic: bool) -> Topology:
    topology, chip, shape = f"{kind}:{size}", hardware.chip(kind), tuple(int(part) for part in size.split("x"))
    count = math.prod(shape)
    hosts = -(-count // CHIPS_PER_HOST)
    if len(shape) != chip.dimensions or not count:
        raise _unknown(topology)
    if analytic:
        return Topology(topology, chip, [OnPaper(i) for i in range(count)], shape, False, hosts)
    if importlib.util.find_spec("libtpu") is None:
        raise errors.ConfigError(
            f"--topology={topology} needs the compiler of TPUs, which works on any host: pip install -e '.[plan]'; "
            "or pass --analytic for a plan by formulas"
        )
    for name, value in ALONE.items():
        os.environ.setdefault(name, value)
    try:
        devices = topologies.get_topology_desc(platform="tpu", topology_name=topology).devices
    except Exception as error:  # the plugin raises what it likes
        raise _unknown(topology, str(error).splitlines()[0][:200]) from None
    return Topology(topology, chip, devices, shape, True, hosts)


def _unknown(name: str, reason: str = "") -> errors.ConfigError:
    known = "; ".join(f"{kind}: {sizes}" for kind, sizes in SLICES.items())
    said = f" ({reason})" if reason else ""
    return errors.ConfigError(f"--topology={name} is not known{said}; known are {known}; cpu:N; gpu:N with --gpu")


def bandwidth(machine: Topology, mesh: Mesh | Mapping[str, int], axes: Sequence[str]) -> float:
    """Bytes/s at which a device sends along mesh axes, all of them together.

    On a torus: two links for each dimension that the axes close to a ring, one for a dimension that they cover in part or
    that is open. Behind a switch: its whole link, and beyond an island the network, which its members share the work of.
    """
    chip = machine.chip
    if chip is None:
        return math.nan
    if not chip.dimensions:
        members = _members(mesh, axes)
        islands = len({int(device) // chip.island for device in members}) if chip.island else 1
        return chip.link if islands == 1 else min(chip.link, chip.network * len(members) / islands)
    link, total = chip.link / (2 * chip.dimensions), 0.0
    for reached, length in zip(reach(machine, mesh, axes), machine.shape, strict=True):
        closed = reached == length and length % CLOSED[chip.name] == 0
        total += (reached > 1) * link * (2 if closed else 1)
    return total or math.nan


def reach(machine: Topology, mesh: Mesh | Mapping[str, int], axes: Sequence[str]) -> list[int]:
    """How many places along each dimension of the torus a group of these axes has; empty without a torus.

    Described TPU devices know their coordinates; on paper they are numbered row by row.
    """
    places = np.array([_place(machine, mesh, int(device)) for device in _members(mesh, axes)])
    return [len(set(places[:, dimension].tolist())) for dimension in range(len(machine.shape))]


def _members(mesh: Mesh | Mapping[str, int], axes: Sequence[str]) -> np.ndarray:
    """Numbers of the devices that the first of them meets along axes; a part of an axis counts as all of it."""
    sizes = dict(mesh.shape) if isinstance(mesh, Mesh) else dict(mesh)
    names = [axis.partition("/")[0] for axis in axes]
    laid = np.arange(math.prod(sizes.values())).reshape(tuple(sizes.values()))
    return laid[tuple(slice(None) if axis in names else 0 for axis in sizes)].reshape(-1)


def _place(machine: Topology, mesh: Mesh | Mapping[str, int], index: int) -> tuple[int, ...]:
    if isinstance(mesh, Mesh) and hasattr(mesh.devices.flat[index], "coords"):
        return tuple(mesh.devices.flat[index].coords)
    return tuple(int(part) for part in np.unravel_index(index, machine.shape))
