"""What the allowed mask, metrics and checkpoints add to a step, in percent of it.

    python -m benchmarks.overheads

Programs with and without are run in turn; what happens every so many steps is timed by the CPU seconds of all threads and
shared out over those steps, so that nothing hides behind another core. Rows go to results/overheads.jsonl.
"""

import pathlib
import resource
import statistics
import tempfile
import time
from collections.abc import Callable, Mapping
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


def in_turn(programs: Mapping[str, Callable[[], Any]]) -> dict[str, float]:
    """Median seconds of each, run one after the other, round by round."""
    walls: dict[str, list[float]] = {name: [] for name in programs}
    for _ in range(ROUNDS + 2):
        for name, call in programs.items():
            start = time.perf_counter()
            jax.block_until_ready(call())
            walls[name].append(time.perf_counter() - start)
    return {name: statistics.median(seen[2:]) for name, seen in walls.items()}


def mask(shape: str) -> float:
    """Percent that a mask which allows all adds to the forward pass of 8 experts, 2 active."""
    config = growth.joint(shape)
    config_lib.resolve(config)
    architecture = jobs.architecture(config)
    params = transformer.init(architecture, 0)
    tokens = jnp.zeros((expert_step.BATCH, expert_step.SEQ_LEN), jnp.int32)
    allowed = jnp.ones((expert_step.BATCH, len(architecture.experts)), bool)
    forward = jax.jit(lambda params, allowed: transformer.forward(params, tokens, architecture, allowed=allowed).hidden)
    found = in_turn({"without": lambda: forward(params, None), "with": lambda: forward(params, allowed)})
    return 100 * (found["with"] / found["without"] - 1)


def in_step(step: expert_step.Ready) -> float:
    """Percent that a step's metrics add to it: without anybody who reads them the compiler leaves them out."""
    silent = jax.jit(lambda *arguments: step.job.step(*arguments)[0], donate_argnums=0)

    def alone() -> None:
        step.state = silent(step.state, step.frozen, step.batch)
        jax.block_until_ready(step.state)

    found = in_turn({"with": step.once, "without": alone})
    return 100 * (found["with"] / found["without"] - 1)


def logging(step: expert_step.Ready, config: config_lib.Config, home: epath.Path) -> float:
    """CPU seconds of one logged row."""
    step.state, values = step.run(step.state, step.frozen, step.batch)
    log = metrics.Log(home, "overheads", 0, 1000, 1, 1.0, 1)
    number = iter(range(1, 1000))
    try:
        return measuring.timed(lambda: log.write(next(number), values, step.job.architecture.experts))[1]
    finally:
        log.close()


def saving(step: expert_step.Ready, home: pathlib.Path) -> float:
    """CPU seconds of one checkpoint, from copying to the commit."""
    checkpoints, spent = checkpoint.Checkpoints(home / "checkpoints", keep=2), []
    for number in range(1, measuring.REPEATS + 2):
        before = resource.getrusage(resource.RUSAGE_SELF)
        checkpoints.save(number, step.state, {})
        checkpoints.wait()
        after = resource.getrusage(resource.RUSAGE_SELF)
        spent.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    checkpoints.close()
    return statistics.median(spent[1:])


def main(argv: list[str]) -> None:
    measuring.keep(FILE, [measuring.apart(measure, "small")], measuring.machine())


if __name__ == "__main__":
    app.run(main)
