"""How the time of a step grows with its size, beside how its FLOPs grow: slopes in log-log, 1 if time doubles with size.

    python -m benchmarks.growth                     # on the cores at hand; prefix `taskset -c 0` for one
    python -m benchmarks.growth --axes=experts      # one of them

The points of an axis are compiled in one process and run in turn. Rows go to results/growth.jsonl.
"""

import dataclasses
from collections.abc import Callable, Sequence

import numpy as np
from absl import app, flags

from benchmarks import expert_step, measuring
from flexjax import config as config_lib
from flexjax import presets

FILE = "growth.jsonl"
TOKENS = expert_step.BATCH * expert_step.SEQ_LEN


def expert(
    shape: str, layers: int = 2, batch: int = expert_step.BATCH, seq_len: int = expert_step.SEQ_LEN
) -> config_lib.Config:
    """The job of an expert beside the public one."""
    config = expert_step.job(shape)
    config.model = dataclasses.replace(config.model, num_layers=layers)
    config.train.batch_size, config.data.seq_len = batch, seq_len
    return config


def joint(shape: str, experts: int = 8, active: int = 2) -> config_lib.Config:
    """The job of a jointly trained mixture, in which everything is trained and tokens are sent to the experts they chose."""
    config = expert(shape)
    config.phase, config.train = "joint", presets.joint_training("quickstart")
    config.train.batch_size = expert_step.BATCH
    config.mixture.experts, config.mixture.top_k = tuple(f"e{e}" for e in range(1, experts)), active
    return config


AXES: dict[str, tuple[Sequence[int], Callable[[str, int], config_lib.Config]]] = {
    "tokens": ((2, 4, 8, 16), lambda shape, batch: expert(shape, batch=batch)),
    "layers": ((1, 2, 4), lambda shape, layers: expert(shape, layers)),
    "window": ((128, 256, 512, 1024), lambda shape, length: expert(shape, batch=TOKENS // length, seq_len=length)),
    "experts": ((4, 8, 16), lambda shape, experts: joint(shape, experts=experts)),
    "active": ((1, 2, 4), lambda shape, active: joint(shape, active=active)),
}
MEANING = {
    "tokens": "sequences in a batch",
    "layers": "layers",
    "window": "tokens in a window, as many in a batch",
    "experts": "experts, 2 active",
    "active": "active experts of 8",
}


def measure(axis: str, shape: str) -> measuring.Row:
    """Milliseconds of a step at each point of an axis, and both slopes."""
    values, job = AXES[axis]
    steps = [expert_step.ready(job(shape, value)) for value in values]
    ms = [1e3 * wall for wall in measuring.side_by_side([step.once for step in steps])]
    cost = [expert_step.analytic(step) for step in steps]
    found = {"values": list(values), "ms": ms, "gflops": [each / 1e9 for each in cost]}
    return {"what": f"growth with {MEANING[axis]}", **found, "slope": slope(values, ms), "slope_of_flops": slope(values, cost)}


def slope(sizes: Sequence[float], costs: Sequence[float]) -> float:
    """The exponent p of the power law cost ~ size^p, by least squares in logarithms."""
    return float(np.polyfit(np.log(sizes), np.log(costs), 1)[0])


_AXES = flags.DEFINE_list("axes", list(AXES), f"Of {', '.join(AXES)}.")


def main(argv: list[str]) -> None:
    facts = measuring.machine()
    for axis in _AXES.value:
        measuring.keep(FILE, [measuring.apart(measure, axis, "small")], facts)


if __name__ == "__main__":
    app.run(main)
