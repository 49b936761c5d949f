"""How fast the quickstart model trains, and how fast its data could come: one JSON row a line.

python -m benchmarks.throughput >> benchmarks/results/throughput.jsonl
"""

import json
import os
import platform
import resource
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np
from etils import epath

from flexjax import checkpoint, jobs, memory, presets, sharding, tree
from flexjax import config as config_lib
from flexjax.data import sources
from flexjax.model import transformer
from flexjax.train import flops, metrics, program

REPEATS = 15


def commit() -> str:
    """The commit that is checked out, and whether tracked files differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()

    return git("rev-parse", "--short", "HEAD") + ("+changes" if git("status", "--porcelain", "--untracked-files=no") else "")


def machine() -> dict[str, Any]:
    """What the figures were measured on, and with what."""
    device = jax.devices()[0].device_kind
    return {
        "commit": commit(),
        "device": f"{jax.device_count()} x {device}" if device != "cpu" else f"{os.cpu_count()} CPU cores",
        "processor": platform.machine(),
        "jax": jax.__version__,
        "load": os.getloadavg()[0],
    }


def timed(call: Callable[[], Any]) -> tuple[float, float]:
    """Median wall seconds and median CPU seconds of a call, after two warm-up calls."""
    walls, cpus = [], []
    for _ in range(REPEATS + 2):
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        call()
        after = resource.getrusage(resource.RUSAGE_SELF)
        walls.append(time.perf_counter() - start)
        cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(walls[2:]), statistics.median(cpus[2:])


def training(phase: str, peak: float) -> dict[str, Any]:
    """One training step of the quickstart on random tokens."""
    config = presets.base("quickstart")
    config.phase, config.train = phase, config.anchor.train if phase == "public" else presets.expert_training("quickstart")
    row = step(config)
    return {"what": f"train/{phase}", **row, "mfu": row["gflops"] * 1e12 / row["ms"] / peak}


def step(config: config_lib.Config) -> dict[str, Any]:
    """A training step of a job on random tokens: what is trained, what it costs, and how long it takes."""
    config_lib.resolve(config)
    architecture, settings = jobs.architecture(config), config.train
    choices, mesh = config_lib.MeshConfig(), sharding.one_device()
    job = program.Program(architecture, settings, mesh, choices, config.data.seq_len)
    shape = (settings.batch_size, config.data.seq_len)
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
    rows = {"tokens": ids, "targets": ids, "weights": np.ones(shape, np.float32), "segments": np.zeros(shape, np.int32)}
    batch = job.put_batch(rows, sharding.local_rows(mesh, settings.batch_size))
    state, frozen = job.place(transformer.init(architecture, 0))
    run, holder = job.compile(), [state]

    def once() -> None:
        holder[0], _ = run(holder[0], frozen, batch)
        jax.block_until_ready(holder[0])

    wall, cpu = timed(once)
    cost = flops.per_token(architecture, job.state.trainable, config.data.seq_len).total
    return {
        "trainable": tree.count(job.state.trainable),
        "optimizer_bytes": checkpoint.size(job.state.optimizer),
        "gflops": cost * ids.size / 1e9,
        "ms": wall * 1e3,
        "cpu_ms": cpu * 1e3,
        "tokens_per_second": ids.size / wall,
    }


def pipeline() -> dict[str, Any]:
    """The built-in public corpus through the prefetching iterator."""
    config = presets.base("quickstart")
    config_lib.resolve(config)
    with tempfile.TemporaryDirectory() as directory:
        corpora = sources.Corpora(config, epath.Path(directory), None, lambda _: None)
        stream = corpora.pipeline({"public": 0.25, "math": 0.75}, config.anchor.train).iterate(0)
        wall, cpu = timed(lambda: [next(stream) for _ in range(50)])
        stream.close()
    tokens = 50 * config.anchor.train.batch_size * config.data.seq_len
    return {"what": "pipeline", "ms": wall * 1e3 / 50, "cpu_ms": cpu * 1e3 / 50, "tokens_per_second": tokens / wall}


def main() -> None:
    memory.keep_freed()
    peak, facts = metrics.peak_flops(), machine()
    for row in (training("public", peak), training("expert", peak), pipeline()):
        print(json.dumps(row | {"peak_flops": peak} | facts), flush=True)


if __name__ == "__main__":
    main()
