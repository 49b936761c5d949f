"""One plan: a job on a machine, compiled or by formulas, with all that is known of it before anybody pays."""

import dataclasses
import importlib.metadata
from typing import Any

import jax

from flexjax import config as config_lib
from flexjax import sharding, tree
from flexjax.model import transformer
from flexjax.planning import advice, analytic, facts, roofline, topology
from flexjax.train import flops, program


@dataclasses.dataclass
class Options:
    """What the user says of money and storage.

    Attributes:
      price: of a chip for an hour, 0 if not given.
      storage: bytes/s that one host writes.
    """

    price: float = 0.0
    storage: float = 1e9


def build(config: config_lib.Config, architecture: transformer.Architecture, machine: topology.Topology) -> program.Program:
    """The program that trains a job on a machine.

    Raises:
      ConfigError: the mesh does not fit the machine or the model.
    """
    mesh = sharding.make_mesh(config.mesh, machine.devices)
    return program.Program(architecture, config.train, mesh, config.mesh, config.data.seq_len)


def lower(
    config: config_lib.Config, architecture: transformer.Architecture, machine: topology.Topology
) -> program.Program | facts.Lowered:
    """The program, lowered if the machine has a compiler."""
    job = build(config, architecture, machine)
    return facts.Lowered(job) if machine.compiles else job


def make(
    config: config_lib.Config,
    architecture: transformer.Architecture,
    machine: topology.Topology,
    options: Options,
    lowered: program.Program | facts.Lowered,
) -> dict[str, Any]:
    """Plans a resolved job of which `lower` made a program; JSON all the way down, which `report` shows."""
    job = lowered.job if isinstance(lowered, facts.Lowered) else lowered
    fits, found = look(lowered, machine)
    tokens = config.train.batch_size * config.data.seq_len
    useful = flops.per_token(architecture, job.state.trainable, config.data.seq_len).total * tokens
    estimate = roofline.estimate(found, machine, job.mesh, useful, tokens, config.train.steps)
    saved = facts.checkpoint_bytes(job)
    limit = None if machine.chip is None else machine.chip.memory
    return {
        "job": {
            "phase": config.phase,
            "experts": list(architecture.experts),
            "parameters": tree.count(job.state.trainable) + tree.count(job.frozen),
            "trained": tree.count(job.state.trainable),
            "steps": config.train.steps,
            "tokens_per_step": tokens,
            "sequences": config.train.batch_size,
            "seq_len": config.data.seq_len,
            "accumulation": config.train.accumulation,
            "remat": config.train.remat,
            "compute_dtype": config.train.compute_dtype,
            "frozen_dtype": config.train.frozen_dtype,
            "layers": config.model.num_layers,
        },
        "machine": {
            "topology": machine.name,
            "devices": len(machine.devices),
            "hosts": machine.hosts,
            "chip": None if machine.chip is None else dataclasses.asdict(machine.chip),
        },
        "mesh": dict(job.mesh.shape) | {"frozen": config.mesh.frozen, "transport": config.mesh.transport},
        "fits": fits,
        "memory": {"limit": limit, "headroom": None if limit is None else limit - found.peak},
        "facts": facts.as_dict(found),
        "useful_flops": useful / len(machine.devices),
        "roofline": None if estimate is None else dataclasses.asdict(estimate),
        "price": estimate.chip_hours * options.price if estimate and options.price else None,
        "checkpoint": {
            "bytes": saved,
            "storage": options.storage,
            "seconds": saved / (machine.hosts * options.storage),
        },
        "advice": [] if fits else [dataclasses.asdict(change) for change in advice.best(config, architecture, machine, build)],
    }


def look(lowered: program.Program | facts.Lowered, machine: topology.Topology) -> tuple[bool, facts.Facts]:
    """Whether a step fits, and its facts; a machine whose memory is not known holds everything."""
    limit = float("inf") if machine.chip is None else machine.chip.memory
    if not isinstance(lowered, facts.Lowered):
        found = analytic.estimate(lowered, machine.chip, why="no compiler was asked")
        return found.peak <= limit, found
    try:
        found = facts.compiled(lowered, machine.chip, compiler(machine))
    except facts.TooLargeError as refused:
        found = analytic.estimate(lowered.job, machine.chip, why=f"{compiler(machine)} refuses: the step does not fit")
        if refused.needed:
            found.temporaries = refused.needed - found.arguments
        found.largest = refused.largest
        return False, found
    return found.peak <= limit, found


def compiler(machine: topology.Topology) -> str:
    """The compiler of a machine, with its version."""
    if machine.devices[0].platform == "tpu":
        return f"libtpu {importlib.metadata.version('libtpu')} for {machine.name}"
    return f"jax {jax.__version__} for CPU"


def key(
    config: config_lib.Config,
    machine: topology.Topology,
    options: Options,
    lowered: program.Program | facts.Lowered,
    code: str,
) -> str:
    """Digest of everything that decides a plan: the job, the machine, the program's text, and the code that plans."""
    parts = {
        "config": config_lib.to_dict(config),
        "machine": machine.name,
        "chip": None if machine.chip is None else dataclasses.asdict(machine.chip),
        "method": compiler(machine) if machine.compiles else "formulas",
        "options": dataclasses.asdict(options),
        "program": lowered.digest if isinstance(lowered, facts.Lowered) else "",
        "code": code,
    }
    return tree.sha256(tree.canonical_json(parts))
