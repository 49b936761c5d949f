"""The steps that train, compiled for eight fake devices: what they need and say, against what it was and what it must be.

One missing constraint once cost 51 GB of temporaries instead of 8.
"""

import json
import math
import pathlib

import pytest

from flexjax import sharding
from flexjax.planning import analytic, collectives, facts
from flexjax.train import flops
from tests.planning import conftest

HOME = pathlib.Path(__file__).parent / "goldens"
CASES = {
    "public": ("public", "quickstart", conftest.CUBE, 1),
    "expert": ("expert", "quickstart", conftest.CUBE, 1),
    "low-rank": ("low-rank", "quickstart", {"data": 2, "fsdp": 4}, 1),
    "router": ("router", "quickstart", conftest.CUBE, 1),
    "joint": ("joint", "quickstart", {"fsdp": 2, "expert": 4}, 1),
    "public-7b": ("public", "7b", conftest.CUBE, 128),
    "expert-7b": ("expert", "7b", conftest.CUBE, 128),
}
TOLERANCE = 0.05
RENEW = """{name}: {what} of the compiled step changed.
That is right only when the model, the step, a sharding rule or the version of jax was changed on purpose, and the new
numbers are explained: look at each collective and at the bytes before. More temporaries or a new collective usually mean
that an activation lost its constraint. Then say so in the commit, and renew: delete tests/planning/goldens/{name}.json and
run this test twice.
was {old}
is  {new}"""


def compiled(name):
    phase, variant, mesh, accumulation = CASES[name]
    return conftest.compiled(phase, variant, tuple(mesh.items()), accumulation=accumulation)


def measured(name):
    _, found = compiled(name)
    rows = collectives.table(found.exchanges)
    return {
        "arguments": found.arguments,
        "temporaries": found.temporaries,
        "collectives": [[kind, list(axes), times] for (kind, axes), (times, _) in rows.items()],
        "sent": sum(sent for _, sent in rows.values()),
    }


def check(name, new):
    """Compares with the golden file, which is written if there is none; collectives are equal, numbers near."""
    path = HOME / f"{name}.json"
    if not path.exists():
        path.write_text(json.dumps(new, indent=1) + "\n")
        pytest.fail(f"{path.name} was missing and has been written; look at it, then run again")
    old = json.loads(path.read_text())
    for what in new:
        same = new[what] == (old[what] if what == "collectives" else pytest.approx(old[what], rel=TOLERANCE))
        assert same, RENEW.format(name=name, what=what, old=old[what], new=new[what])


@pytest.mark.parametrize("name", CASES)
def test_memory_and_collectives_are_the_golden_ones(name):
    check(name, measured(name))


@pytest.mark.parametrize("name", CASES)
def test_predicted_argument_bytes_are_those_of_the_compiled_program(name):
    job, found = compiled(name)
    unread = math.prod(job.batch["segments"].sharding.shard_shape(job.batch["segments"].shape)) * 4
    assert facts.argument_bytes(job) - unread <= found.arguments <= facts.argument_bytes(job) + 4096


@pytest.mark.parametrize("name", ["public", "expert", "low-rank", "router"])
def test_compiled_flops_are_the_analytic_ones_split_over_the_devices(name):
    """Without remat nothing is computed again, but the logits of a head that is trained."""
    job, found = compiled(name)
    rows, length = job.batch["tokens"].shape
    useful = flops.per_token(job.architecture, job.state.trainable, length).total
    if name == "public":
        useful += 2 * job.architecture.config.d_model * job.architecture.config.vocab_size
    assert sum(found.flops.values()) == pytest.approx(useful * rows * length / 8, rel=0.02)


@pytest.mark.parametrize("name", ["public-7b", "expert-7b"])
def test_formulas_are_near_the_compiler(name):
    job, found = compiled(name)
    guess = analytic.estimate(job, None, why="test")
    assert 0.7 < guess.temporaries / found.temporaries < 1.5
    assert 0.9 < sum(guess.flops.values()) / sum(found.flops.values()) < 1.1


@pytest.mark.slow
def test_lost_constraints_and_kept_activations_are_seen(monkeypatch):
    """The check of the check: what a mistake would do to a step is more than a golden allows."""
    phase, variant, mesh, accumulation = CASES["expert"]
    old = json.loads((HOME / "expert.json").read_text())
    monkeypatch.setattr(sharding, "constrain", lambda x, mesh, *names: x)
    built = conftest.program(conftest.job(phase, variant, mesh, accumulation=accumulation))
    lost = conftest.look(built)
    assert [[*key] for key in collectives.table(lost.exchanges)] != [
        [kind, tuple(axes)] for kind, axes, _ in old["collectives"]
    ]
    monkeypatch.undo()
    _, kept = conftest.compiled("expert", "7b", tuple(conftest.CUBE.items()), accumulation=128, remat="none")
    assert kept.temporaries > (1 + TOLERANCE) * json.loads((HOME / "expert-7b.json").read_text())["temporaries"]
