"""What to change when a step does not fit: every change that is open, by what it saves."""

import copy
import dataclasses
from collections.abc import Callable, Iterator

from flexjax import config as config_lib
from flexjax import errors
from flexjax.model import transformer
from flexjax.planning import analytic, topology
from flexjax.train import program

Build = Callable[[config_lib.Config, transformer.Architecture, topology.Topology], program.Program]
COUNT = 3


@dataclasses.dataclass(frozen=True)
class Change:
    """A change and the bytes that it saves on each device, by the formulas."""

    text: str
    saves: int


def best(
    config: config_lib.Config, architecture: transformer.Architecture, machine: topology.Topology, build: Build
) -> list[Change]:
    """The three changes that save most, largest first; those that save nothing are left out."""
    job, found = build(config, architecture, machine), []
    before = analytic.estimate(job, machine.chip, why="").peak
    config = copy.deepcopy(config)
    for axis, size in job.mesh.shape.items():  # where the config says 0, what the others leave
        setattr(config.mesh, axis, size)
    for text, changed, where in _changes(config, machine):
        try:
            after = analytic.estimate(build(changed, _shaped(architecture, changed), where), machine.chip, why="").peak
        except errors.ConfigError:
            continue  # this mesh does not divide this model
        if after < before:
            found.append(Change(text, before - after))
    return sorted(found, key=lambda change: -change.saves)[:COUNT]


def _shaped(architecture: transformer.Architecture, config: config_lib.Config) -> transformer.Architecture:
    """The architecture with experts of the width and rank that the config says."""
    if config.phase != "expert":
        return architecture
    width, rank = config.expert.d_ff or config.model.d_ff, config.expert.rank
    banks = [
        bank if bank.name == config_lib.PUBLIC else dataclasses.replace(bank, d_ff=width, rank=rank)
        for bank in architecture.banks
    ]
    return dataclasses.replace(architecture, banks=tuple(banks))


def _changes(
    config: config_lib.Config, machine: topology.Topology
) -> Iterator[tuple[str, config_lib.Config, topology.Topology]]:
    mesh, train, count = config.mesh, config.train, len(machine.devices)
    data, rows = mesh.data, train.batch_size // (mesh.data * mesh.fsdp * mesh.expert)  # rows of a device in a step

    def copied() -> config_lib.Config:
        return copy.deepcopy(config)

    if train.accumulation < rows:
        changed = copied()
        changed.train.accumulation = rows
        yield f"train.accumulation={rows}: one sequence at a time on each device", changed, machine
    if data > 1:
        changed = copied()
        changed.mesh.data, changed.mesh.fsdp = 1, mesh.fsdp * data
        yield f"mesh.data=1 mesh.fsdp={mesh.fsdp * data}: every device holds its part of the weights only", changed, machine
    for tensor in (2, 4):
        if mesh.fsdp % tensor == 0:
            changed = copied()
            split, again = config_lib.MeshConfig(**vars(mesh)), train.accumulation * tensor
            split.tensor, split.fsdp = mesh.tensor * tensor, mesh.fsdp // tensor
            changed.mesh, changed.train.accumulation = split, again
            said = f"mesh.fsdp={split.fsdp} mesh.tensor={split.tensor} train.accumulation={again}"
            yield f"{said}: {tensor} devices share a sequence", changed, machine
    for field, value, why in (
        ("remat", "full", "one residual a layer is kept for the backward pass"),
        ("frozen_dtype", "bfloat16", "frozen weights take half"),
        ("compute_dtype", "bfloat16", "activations take half"),
    ):
        if getattr(train, field) != value:
            changed = copied()
            setattr(changed.train, field, value)
            yield f"train.{field}={value}: {why}", changed, machine
    if mesh.frozen != "sharded":
        changed = copied()
        changed.mesh.frozen = "sharded"
        yield "mesh.frozen=sharded: frozen weights are split like the others", changed, machine
    if config.data.seq_len > 1:
        changed = copied()
        changed.data.seq_len = config.data.seq_len // 2
        yield f"data.seq_len={changed.data.seq_len}: windows of half the length", changed, machine
    if config.phase == "expert" and config.expert.kind == "low_rank":
        if rank := config.expert.rank // 2:
            changed = copied()
            changed.expert.rank = rank
            yield f"expert.rank={rank}: an expert of half the rank", changed, machine
    elif config.phase == "expert" and (width := (config.expert.d_ff or config.model.d_ff) // 2):
        changed = copied()
        changed.expert.d_ff = width
        yield f"expert.d_ff={width}: an expert of half the width", changed, machine
    changed = copied()
    changed.mesh.fsdp = 2 * mesh.fsdp
    changed.train.accumulation = again = min(train.accumulation, max(1, rows // 2))
    devices = [topology.OnPaper(i) for i in range(2 * count)]
    said = f"twice the devices, mesh.fsdp={2 * mesh.fsdp} train.accumulation={again}"
    yield said, changed, dataclasses.replace(machine, devices=devices)
