"""Runs one step on one device and prints what the plan predicted and what the process took: JSON on stdout.

python -m tests.planning.peak
"""

import json
import pathlib

import jax
import numpy as np

from flexjax import config as config_lib
from flexjax import jobs, memory
from flexjax.model import transformer
from flexjax.planning import facts
from tests.planning import conftest

MODEL = config_lib.ModelConfig(vocab_size=8192, d_model=512, num_layers=2, num_heads=8, num_kv_heads=8, head_dim=64, d_ff=1408)


def resident(line):
    status = pathlib.Path("/proc/self/status").read_text()
    return int(next(row for row in status.splitlines() if row.startswith(line)).split()[1]) * 1024


def main():
    memory.keep_freed()
    config = conftest.job("public", mesh={}, batch_size=16, load_balance_loss=1e-2)  # one part: see `program.micro_batches`
    config.model, config.data.seq_len = MODEL, 256
    job = conftest.program(config, conftest.cpu(1))
    lowered = facts.Lowered(job)
    predicted = facts.compiled(lowered, None, "CPU").peak
    step = job.compile()
    params = transformer.init(jobs.architecture(config), 0)
    rows = {name: np.zeros(like.shape, like.dtype) for name, like in job.batch.items()}
    batch = {name: jax.device_put(value, job.batch[name].sharding) for name, value in rows.items()}
    state, frozen = job.place(params)
    held = sum(leaf.nbytes for leaf in jax.tree.leaves((state, frozen, batch)))
    del params
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak counts from here
    before = resident("VmRSS") - held
    state, metrics = step(state, frozen, batch)
    assert np.isfinite(float(metrics["loss"]))
    print(json.dumps({"predicted": predicted, "measured": resident("VmHWM") - before, "held": held}))


if __name__ == "__main__":
    main()
