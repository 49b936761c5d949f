"""What the makers publish of their chips: the one table behind MFU and plans.

Sources: cloud.google.com/tpu/docs/{v5e, v5p, v6e} for TPUs (peak, HBM, its bandwidth, inter-chip links); NVIDIA's data sheets
of A100 80GB SXM, H100 SXM and H200 SXM for GPUs (dense peaks, without sparsity; NVLink, both directions together).
"""

import dataclasses
from collections.abc import Mapping

from flexjax import errors

GIB = 2**30


@dataclasses.dataclass(frozen=True)
class Chip:
    """One device as JAX counts them.

    Attributes:
      name: what a topology calls it.
      kind: how the `device_kind` that JAX reports begins.
      flops: peak by dtype, FLOP/s; on TPU a float32 product is multiplied in bfloat16 unless asked otherwise.
      memory: bytes that a program may use.
      bandwidth: of that memory, bytes/s.
      link: bytes/s that it sends to its neighbours, over all its links together.
      dimensions: of the torus that the links form; 0: a switch that joins any two.
      island: chips that the links join; 0: as many as a slice has.
      network: bytes/s that it sends beyond its island.
    """

    name: str
    kind: str
    flops: Mapping[str, float]
    memory: float
    bandwidth: float
    link: float
    dimensions: int = 0
    island: int = 0
    network: float = 0.0


def _tpu(name: str, kind: str, peak: float, memory: float, bandwidth: float, gigabits: float, dimensions: int) -> Chip:
    flops = {"bfloat16": peak, "float32": peak}
    return Chip(name, kind, flops, memory * GIB, bandwidth, gigabits * 1e9 / 8, dimensions)


def _gpu(name: str, peak: float, tf32: float, memory: float, bandwidth: float, nvlink: float) -> Chip:
    # half of NVLink's figure is one direction; 400 Gbit/s a GPU is the usual network of a node of eight
    flops = {"bfloat16": peak, "float32": tf32}
    return Chip(name, f"NVIDIA {name.upper()}", flops, memory, bandwidth, nvlink / 2, island=8, network=50e9)


CHIPS = {  # memory of a TPU: what its compiler lets a program use of 16, 95 and 32 GiB
    chip.name: chip
    for chip in (
        _tpu("v5e", "TPU v5 lite", 197e12, 15.75, 819e9, 1600, 2),
        _tpu("v5p", "TPU v5", 459e12, 95.73, 2765e9, 4800, 3),
        _tpu("v6e", "TPU v6 lite", 918e12, 31.24, 1640e9, 3584, 2),
        _gpu("a100", 312e12, 156e12, 80e9, 2039e9, 600e9),
        _gpu("h100", 989e12, 494e12, 80e9, 3350e9, 900e9),
        _gpu("h200", 989e12, 494e12, 141e9, 4800e9, 900e9),
    )
}


def chip(name: str) -> Chip:
    """The chip of a name.

    Raises:
      ConfigError: it is not in the table; the message lists those that are.
    """
    if name not in CHIPS:
        raise errors.ConfigError(f"unknown chip '{name}', expected one of {', '.join(CHIPS)}; others can be given by numbers")
    return CHIPS[name]


def of_device(device_kind: str) -> Chip | None:
    """The chip that JAX calls `device_kind`, None if it is not in the table; of several beginnings the longest counts."""
    found = [chip for chip in CHIPS.values() if device_kind.startswith(chip.kind)]
    return max(found, key=lambda chip: len(chip.kind), default=None)
