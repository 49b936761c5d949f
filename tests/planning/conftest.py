"""Jobs of `configs/`, planned on the eight fake CPU devices of every test process."""

import dataclasses
import functools
import types

import jax

from configs import joint_moe, math_expert, public, router_tuning
from flexjax import config as config_lib
from flexjax import hardware, jobs
from flexjax.planning import facts, planner, topology
from tests.train import tiny


def low_rank(variant):
    """The math expert with rank 16."""
    config = math_expert.get_config(variant)
    config.expert.kind, config.expert.rank = "low_rank", 16
    return config


CONFIGS = {
    "public": public,
    "expert": math_expert,
    "low-rank": types.SimpleNamespace(get_config=low_rank),
    "joint": joint_moe,
    "router": router_tuning,
}
CUBE = {"data": 2, "fsdp": 2, "tensor": 2}
CHIP = hardware.Chip("test", "", {"bfloat16": 1e12, "float32": 1e12}, 16 * 2**30, 1e11, 1e10)


def job(phase, variant="quickstart", mesh=CUBE, **train):
    """A resolved config on a mesh; a quickstart has two layers here, or one of the costly kind: its others are like them."""
    found = CONFIGS[phase].get_config(variant)
    if variant == "quickstart":
        found.model = dataclasses.replace(found.model, num_layers=1 if phase == "joint" else 2)
    else:  # short windows: this host's attention keeps all scores, which would be most of the memory
        found.data.seq_len = 1024
    config_lib.resolve(found)
    found.mesh = config_lib.MeshConfig(**mesh)
    found.train = dataclasses.replace(found.train, **train)
    return found


def cpu(count=8, chip=None):
    """The fake devices as a machine."""
    return topology.Topology(f"cpu:{count}", chip, jax.devices()[:count], (), True, 1)


def program(config, machine=None):
    """The program of a job."""
    return planner.build(config, jobs.architecture(config), machine or cpu())


def look(built, quick=True):
    """Facts of a program; `quick` leaves out what LLVM would do to it, which neither memory nor collectives depend on."""
    lowered = facts.Lowered(built)
    if quick:
        lowered.stage = types.SimpleNamespace(compile=functools.partial(lowered.stage.compile, compiler_options=tiny.QUICK))
    return facts.compiled(lowered, None, "CPU")


@functools.cache
def compiled(phase, variant="quickstart", mesh=tuple(CUBE.items()), **train):
    """Facts of a compiled job; equal ones are compiled once."""
    built = program(job(phase, variant, dict(mesh), **train))
    return built, look(built)
