"""What the allowed mask, metrics and checkpoints add to a step, in percent of it.

    python -m benchmarks.overheads

Programs with and without are run in turn; what happens every so many steps is timed by the CPU seconds of all threads and
shared out over those steps, so that nothing hides behind another core. Rows go to results/overheads.jsonl.
"""

import itertools
import pathlib
import tempfile
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app
from etils import epath

from benchmarks import expert_step, growth, measuring
from flexjax import checkpoint, jobs
from flexjax import config as config_lib
from flexjax.model import transformer
from flexjax.train import metrics

FILE = "overheads.jsonl"
ROUNDS = 15


def measure(shape: str) -> measuring.Row:
    """Each cost in percent of the expert's step, the mask's of the forward pass of a merged model; and their sum."""
    config = expert_step.job(shape)
    step = expert_step.ready(config)
    cost = {"mask": mask(shape), "metrics": in_step(step)}
    _, step_cpu = measuring.timed(step.once)
    with tempfile.TemporaryDirectory() as home:
        for name, seconds, every in (
            ("logging", logging(step, config, epath.Path(home)), config.train.log_every),
            ("checkpoints", saving(step, pathlib.Path(home)), config.train.save_every),
        ):
            cost[name] = 100 * seconds / (every * step_cpu)
    return {"what": f"overheads of a step, {shape}, %", **cost, "together": sum(cost.values())}


def added(without: Callable[[], Any], including: Callable[[], Any]) -> float:
    """Percent that one call takes longer than another."""
    base, whole = measuring.side_by_side([without, including], ROUNDS)
    return 100 * (whole / base - 1)


def mask(shape: str) -> float:
    """Percent that a mask which allows all adds to the forward pass of 8 experts, 2 active."""
    config = growth.joint(shape)
    config_lib.resolve(config)
    architecture = jobs.architecture(config)
    params = transformer.init(architecture, 0)
    tokens = jnp.zeros((expert_step.BATCH, expert_step.SEQ_LEN), jnp.int32)
    allowed = jnp.ones((expert_step.BATCH, len(architecture.experts)), bool)
    forward = jax.jit(lambda params, allowed: transformer.forward(params, tokens, architecture, allowed=allowed).hidden)
    return added(lambda: forward(params, None), lambda: forward(params, allowed))


def in_step(step: expert_step.Ready) -> float:
    """Percent that a step's metrics add to it: without anybody who reads them the compiler leaves them out."""
    silent = jax.jit(lambda *arguments: step.job.step(*arguments)[0], donate_argnums=0)

    def alone() -> None:
        step.state = silent(step.state, step.frozen, step.batch)
        jax.block_until_ready(step.state)

    return added(alone, step.once)


def logging(step: expert_step.Ready, config: config_lib.Config, home: epath.Path) -> float:
    """CPU seconds of one logged row."""
    step.state, values = step.run(step.state, step.frozen, step.batch)
    log = metrics.Log(home, "overheads", 0, 1000, 1, 1.0, 1)
    number = itertools.count(1)
    try:
        return measuring.timed(lambda: log.write(next(number), values, step.job.architecture.experts))[1]
    finally:
        log.close()


def saving(step: expert_step.Ready, home: pathlib.Path) -> float:
    """CPU seconds of one checkpoint, from copying to the commit."""
    checkpoints, number = checkpoint.Checkpoints(home / "checkpoints", keep=2), itertools.count(1)

    def save() -> None:
        checkpoints.save(next(number), step.state, {})
        checkpoints.wait()

    return measuring.timed(save)[1]


def main(argv: list[str]) -> None:
    measuring.keep(FILE, [measuring.apart(measure, "small")], measuring.machine())


if __name__ == "__main__":
    app.run(main)
