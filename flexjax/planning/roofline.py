"""How long a step takes, from its facts and the figures of a chip: an estimate, with what it assumes."""

import dataclasses
from collections.abc import Iterable

from jax.sharding import Mesh

from flexjax.planning import collectives, facts, topology

EXPOSED = ("tensor", "expert")  # a layer waits for what it sends over these
ASSUMPTIONS = (
    "every operation takes the longer of FLOPs / peak and bytes / bandwidth, one after the other; nothing stays in cache",
    "collectives run at the full speed of the links that their axes span",
    "collectives over data and fsdp hide behind computation as far as it lasts, those over tensor and expert not at all",
    "input, checkpoints, evaluation and failures cost nothing",
)


@dataclasses.dataclass(frozen=True)
class Estimate:
    """Seconds of a step, and what follows.

    Attributes:
      compute, memory, operations: of one device, see `facts.Seconds`.
      links: seconds of collectives by the axes they run over.
      step: the estimate.
      mfu: useful FLOPs / (peak * step).
      tokens_per_second: of all devices.
      hours, chip_hours: of the whole run.
    """

    compute: float
    memory: float
    operations: float
    links: dict[str, float]
    step: float
    mfu: float
    tokens_per_second: float
    hours: float
    chip_hours: float


def estimate(
    found: facts.Facts, machine: topology.Topology, mesh: Mesh, useful: float, tokens: int, steps: int
) -> Estimate | None:
    """The roofline of a step; None if the chip's figures are not known.

    Args:
      found: of one device.
      machine, mesh: where it runs.
      useful: FLOPs of a step, all devices together.
      tokens: of a step.
      steps: of the run.
    """
    if machine.chip is None or found.seconds is None:
        return None
    links: dict[str, float] = {}
    hidden = exposed = 0.0
    for one in found.exchanges:
        seconds = one.times * one.sent * _hops(one, machine, mesh) / topology.bandwidth(machine, mesh, one.axes)
        name = ", ".join(one.axes)
        links[name] = links.get(name, 0.0) + seconds
        if _waits(one.axes):
            exposed += seconds
        else:
            hidden += seconds
    step = max(found.seconds.operations, hidden) + exposed
    devices = len(machine.devices)
    hours = steps * step / 3600
    return Estimate(
        compute=found.seconds.compute,
        memory=found.seconds.memory,
        operations=found.seconds.operations,
        links=links,
        step=step,
        mfu=useful / (devices * machine.chip.flops["bfloat16"] * step),
        tokens_per_second=tokens / step,
        hours=hours,
        chip_hours=hours * devices,
    )


def _waits(axes: Iterable[str]) -> bool:
    return any(axis.partition("/")[0] in EXPOSED for axis in axes)


def _hops(one: collectives.Collective, machine: topology.Topology, mesh: Mesh) -> float:
    """What each sends to every other travels a quarter of the way round each dimension of a torus, on average."""
    if "all-to-all" not in one.kind or not machine.shape:
        return 1.0
    return max(1.0, sum(reached / 4 for reached in topology.reach(machine, mesh, one.axes) if reached > 1))
