"""Which mesh: every sensible one by formulas, the best first."""

import copy
import dataclasses
from collections.abc import Iterator

from flexjax import config as config_lib
from flexjax import errors, sharding
from flexjax.model import dispatch, transformer
from flexjax.planning import analytic, planner, roofline, topology
from flexjax.train import flops

MOST_TENSOR = 8  # more, and a layer waits for its neighbours longer than it computes
MARGIN = 0.85  # of the memory that a mesh may fill by formulas; they are not exact


@dataclasses.dataclass(frozen=True)
class Candidate:
    """A mesh with the fewest micro-batches that fit on it.

    Attributes:
      mesh: sizes by axis.
      frozen: how frozen weights lie.
      accumulation: micro-batches of a step.
      peak: bytes on each device.
      seconds: of a step, 0 if the chip's figures are not known: then memory decides.
      fits: within `MARGIN` of the memory.
    """

    mesh: dict[str, int]
    frozen: str
    accumulation: int
    peak: int
    seconds: float
    fits: bool

    def applied(self, config: config_lib.Config) -> config_lib.Config:
        """The job on this mesh."""
        changed = copy.deepcopy(config)
        for axis, size in self.mesh.items():
            setattr(changed.mesh, axis, size)
        changed.mesh.frozen, changed.train.accumulation = self.frozen, self.accumulation
        return changed


def rank(config: config_lib.Config, architecture: transformer.Architecture, machine: topology.Topology) -> list[Candidate]:
    """Every mesh that divides the machine and the model; those that fit first, then by time, then by memory.

    Raises:
      ConfigError: no mesh divides them.
    """
    on_paper = dataclasses.replace(machine, devices=[topology.OnPaper(d) for d in range(len(machine.devices))], compiles=False)
    found = [
        candidate
        for mesh, frozen in _meshes(architecture, len(machine.devices), config)
        if (candidate := _best(config, architecture, on_paper, mesh, frozen)) is not None
    ]
    if not found:
        raise errors.ConfigError(
            f"no mesh of {len(machine.devices)} devices divides this model and train.batch_size={config.train.batch_size}"
        )
    same = {
        (tuple(one.mesh.items()), one.accumulation, one.peak): one for one in reversed(found)
    }  # "replicated" changes nothing
    return sorted(same.values(), key=lambda one: (not one.fits, one.seconds if one.fits else one.peak, one.peak))


def _meshes(
    architecture: transformer.Architecture, count: int, config: config_lib.Config
) -> Iterator[tuple[dict[str, int], str]]:
    sizes = [size for size in range(1, count + 1) if count % size == 0]
    experts = max(len(bank.experts) for bank in dispatch.apart(architecture.banks)) if architecture.sparse else 1
    for tensor in (size for size in sizes if size <= MOST_TENSOR):
        for expert in (size for size in sizes if size == 1 or size < 2 * experts):
            for fsdp in sizes:
                if count % (tensor * expert * fsdp):
                    continue
                mesh = dict(zip(sharding.AXES, (count // (tensor * expert * fsdp), fsdp, tensor, expert), strict=True))
                for frozen in sharding.FROZEN_CHOICES if config.train.trainable != ".*" and fsdp > 1 else ("sharded",):
                    yield mesh, frozen


def _best(
    config: config_lib.Config,
    architecture: transformer.Architecture,
    machine: topology.Topology,
    mesh: dict[str, int],
    frozen: str,
) -> Candidate | None:
    """The fewest micro-batches that fit; if none do, the most; None if the mesh divides nothing."""
    groups = mesh["data"] * mesh["fsdp"] * mesh["expert"]
    rows = config.train.batch_size // groups
    if not rows or config.train.batch_size % groups:
        return None
    limit = MARGIN * machine.chip.memory if machine.chip else float("inf")
    try:
        job = planner.build(Candidate(mesh, frozen, rows, 0, 0.0, False).applied(config), architecture, machine)
    except errors.ConfigError:
        return None
    tokens = config.train.batch_size * config.data.seq_len
    useful = flops.per_token(architecture, job.state.trainable, config.data.seq_len).total * tokens
    for accumulation in (size for size in range(1, rows + 1) if rows % size == 0):
        found = analytic.estimate(job, machine.chip, why="search", accumulation=accumulation)
        if found.peak <= limit or accumulation == rows:
            break
    time = roofline.estimate(found, machine, job.mesh, useful, tokens, config.train.steps)
    seconds = 0.0 if time is None else time.step
    return Candidate(mesh, frozen, accumulation, found.peak, seconds, found.peak <= limit)
