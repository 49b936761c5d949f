"""What a plan predicts is what a machine holds and does, as far as this one can tell."""

import dataclasses
import json
import os
import subprocess
import sys

import jax
import numpy as np
import pytest

from flexjax import hardware, jobs
from flexjax.model import transformer
from flexjax.planning import advice, analytic, facts, planner
from tests.planning import conftest

SMALL = {"vocab_size": 512, "d_model": 64, "num_layers": 2, "num_heads": 4, "num_kv_heads": 4, "head_dim": 16, "d_ff": 128}
CASES = [
    ("public", {"fsdp": 8}),
    ("public", conftest.CUBE),
    ("expert", {"data": 2, "fsdp": 4, "frozen": "replicated"}),
    ("low-rank", conftest.CUBE),
    ("low-rank", {"data": 2, "fsdp": 4, "frozen": "replicated"}),
    ("router", conftest.CUBE),
    ("joint", {"fsdp": 2, "expert": 4}),
]


def small(phase, mesh, **train):
    config = conftest.job(phase, mesh=mesh, **train)
    config.model = dataclasses.replace(config.model, **SMALL)
    return config


@pytest.mark.parametrize(("phase", "mesh"), CASES, ids=str)
def test_predicted_argument_bytes_are_those_of_the_live_arrays(phase, mesh):
    config = small(phase, mesh)
    job = conftest.program(config)
    state, frozen = job.place(transformer.init(jobs.architecture(config), 0))
    rows = {name: np.zeros(like.shape, like.dtype) for name, like in job.batch.items()}
    batch = {name: jax.device_put(value, job.batch[name].sharding) for name, value in rows.items()}
    held = dict.fromkeys(jax.devices(), 0)
    for leaf in jax.tree.leaves((state, frozen, batch)):
        for shard in leaf.addressable_shards:
            held[shard.device] += shard.data.nbytes
    assert set(held.values()) == {facts.argument_bytes(job)}


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
def test_predicted_peak_is_what_a_process_takes():
    """Arguments and temporaries of one step on one device, against the growth of the process's own peak."""
    environment = os.environ | {"XLA_FLAGS": "--xla_backend_optimization_level=0", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-m", "tests.planning.peak"]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300, check=False)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["predicted"] > 4 * found["held"]
    assert found["measured"] == pytest.approx(found["predicted"], rel=0.1)


def test_a_refusal_of_the_compiler_is_read():
    message = (
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory in memory space hbm. Used 15.76G of 15.75G hbm.\n"
        "  Largest program allocations in hbm:\n\n  1. Size: 784.00M\n     Operator: op_name=\"frozen['head']['kernel']\"\n"
        "     Shape: bf16[4096,100352]{1,0:T(8,128)(2,1)}\n     Unpadded size: 784.00M\n\n"
        "  2. Size: 688.00M\n     Shape: f32[32,1,11008,512]{3,2,1,0:T(8,128)}\n"
    )
    refused = facts.TooLargeError(message)
    assert refused.needed == int(15.76 * 2**30)
    assert [(buffer.bytes, buffer.shape) for buffer in refused.largest] == [
        (784 * 2**20, "bf16[4096,100352]"),
        (688 * 2**20, "f32[32,1,11008,512]"),
    ]
    early = facts.TooLargeError("the total memory required for HLO temporaries (272.00G) exceeds available HBM (15.75G).")
    assert early.needed == 272 * 2**30


def test_a_step_that_the_compiler_refuses_does_not_fit_and_says_what_would_help(monkeypatch):
    def refuse(*_):
        raise facts.TooLargeError("Used 20.00G of 16.00G hbm")

    monkeypatch.setattr(facts, "compiled", refuse)
    config = small("expert", {"data": 4, "fsdp": 2}, remat="none")
    machine = conftest.cpu(chip=conftest.CHIP)
    architecture = jobs.architecture(config)
    plan = planner.make(config, architecture, machine, planner.Options(), planner.lower(config, architecture, machine))
    assert not plan["fits"] and plan["facts"]["peak"] == 20 * 2**30
    assert len(plan["advice"]) == 3
    saved = [change["saves"] for change in plan["advice"]]
    assert saved == sorted(saved, reverse=True) and saved[-1] > 0


def test_low_rank_experts_are_planned_by_their_rank():
    """Formulas: state and time shrink with the rank, and half of it is what would help."""
    machine, found = dataclasses.replace(conftest.cpu(chip=conftest.CHIP), compiles=False), []
    for rank in (32, 8):
        config = small("low-rank", {"data": 4, "fsdp": 2})
        config.expert.rank = rank
        job = conftest.program(config)
        found.append((facts.checkpoint_bytes(job), analytic.estimate(job, machine.chip, why="test")))
    assert found[0][0] > 3.5 * found[1][0]
    assert found[0][1].temporaries > found[1][1].temporaries and found[0][1].seconds.operations > found[1][1].seconds.operations
    changes = advice._changes(config, machine)
    assert [text for text, *_ in changes if "expert." in text] == ["expert.rank=4: an expert of half the rank"]
    config.expert.rank = 4
    shaped = advice._shaped(jobs.architecture(small("low-rank", {"data": 8})), config)
    assert [bank.rank for bank in shaped.banks] == [0, 4] and shaped == jobs.architecture(config)


def test_every_chip_is_found_by_what_jax_calls_it():
    assert hardware.of_device("TPU v5 lite").name == "v5e"
    assert hardware.of_device("TPU v5").name == hardware.of_device("TPU v5p").name == "v5p"
    assert hardware.of_device("NVIDIA H100 80GB HBM3").name == "h100"
    assert hardware.of_device("cpu") is None
