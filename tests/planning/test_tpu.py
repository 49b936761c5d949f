"""The 7B programs by the TPU's own compiler: memory, what travels, and how much is fused, against what it was.

Needs `libtpu` (the extra `plan`) and no TPU; one to five minutes for each, several times that beside other jobs.
"""

import collections as counting
import importlib.util

import jax
import pytest

from configs import math_expert, router_tuning
from flexjax import config as config_lib
from flexjax import jobs, tree
from flexjax.model import router, transformer
from flexjax.planning import collectives, hlo, planner, topology
from tests.planning import test_goldens

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu: pip install -e '.[plan]'"),
]
MACHINE = "v5e:16x16"
SEEN = ("fusion", "copy", "transpose", "custom-call")  # more of them: something is no longer fused, or changes its layout
OWNERS = ("academic", "code", "creative", "math", "news", "reddit")


def program(config):
    config_lib.resolve(config)
    config.mesh = config_lib.MeshConfig(fsdp=256)
    config.train.accumulation = 4
    return planner.build(config, jobs.architecture(config), topology.parse(MACHINE))


def expert_step():
    """The step that trains a 2x7B pair's expert."""
    return program(math_expert.get_config("7b")).lower()


def forward():
    """The forward pass of 7 experts, 4 active, with the logits of a window on each chip."""
    config = router_tuning.get_config("7b")
    config.mixture.experts = OWNERS
    job = program(config)
    architecture = jobs.architecture(config)
    architecture = transformer.Architecture(architecture.config, architecture.banks, 4)
    compute = transformer.Compute("bfloat16", scan=True, mesh=job.mesh)
    params = tree.combine(job.state.trainable, job.frozen)
    rows = job.batch["tokens"].shape[0] // 4
    tokens = jax.ShapeDtypeStruct((rows, config.data.seq_len), "int32", sharding=job.batch["tokens"].sharding)

    def run(params, tokens):
        hidden = transformer.forward(router.constrain(params), tokens, architecture, compute).hidden
        return transformer.logits(params, hidden[:, -1])

    return jax.jit(run).lower(params, tokens)


@pytest.mark.parametrize("lower", [expert_step, forward], ids=["2x7b-expert-step", "7x7b-forward"])
def test_what_the_tpu_compiler_makes_of_it_is_the_golden_one(lower, request):
    with jax.numpy_dtype_promotion("standard"):  # JAX itself mixes dtypes where it lowers attention for TPUs
        executable = lower().compile()
    module = hlo.Module(executable.as_text())
    sizes, found = executable.memory_analysis(), collectives.table(collectives.find(module, {"fsdp": 256}))
    operations = counting.Counter(step.instruction.op for step in module.walk(into_fusions=False))
    new = {
        "arguments": sizes.argument_size_in_bytes,
        "temporaries": sizes.temp_size_in_bytes,
        "collectives": [[kind, list(axes), times] for (kind, axes), (times, _) in found.items()],
        "sent": sum(sent for _, sent in found.values()),
        "operations": {kind: operations[kind] for kind in SEEN},
    }
    test_goldens.check(f"tpu-{request.node.callspec.id}", new)
