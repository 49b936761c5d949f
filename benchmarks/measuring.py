"""How speed is measured: each case in a process of its own, ours and the peer's in turn, medians, and what it ran on.

Machines are shared and change speed within seconds: trust the ratios of what was measured in turn, not single figures.
"""

import concurrent.futures
import json
import multiprocessing
import os
import pathlib
import platform
import resource
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from flexjax import memory

RESULTS = pathlib.Path(__file__).parent / "results"
REPEATS = 5
ROUNDS = 3
Row = dict[str, Any]


def commit() -> str:
    """The commit that is checked out, and whether tracked files other than results differ from it."""

    def git(*arguments: str) -> str:
        return subprocess.run(["git", *arguments], capture_output=True, text=True).stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no", "--", ":/", ":!/benchmarks/results")
    return git("rev-parse", "--short", "HEAD") + ("+changes" if changed else "")


def machine() -> Row:
    """What the figures were measured on, and with what."""
    device = jax.devices()[0].device_kind
    return {
        "commit": commit(),
        "device": f"{jax.device_count()} x {device}" if device != "cpu" else f"{len(os.sched_getaffinity(0))} CPU cores",
        "processor": _processor(),
        "jax": jax.__version__,
        "load": os.getloadavg()[0],
    }


def _processor() -> str:
    """The widest vectors decide the speed of a CPU more than its name."""
    try:
        words = set(pathlib.Path("/proc/cpuinfo").read_text().split())
    except OSError:
        return platform.machine()
    widest = next((name for name in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if name in words), "")
    return f"{platform.machine()} {widest}".strip()


def timed(call: Callable[[], Any], repeats: int | None = None) -> tuple[float, float]:
    """Median wall seconds and median CPU seconds of a call, after two warm-up calls."""
    walls, cpus = [], []
    for _ in range((repeats or REPEATS) + 2):
        before, start = resource.getrusage(resource.RUSAGE_SELF), time.perf_counter()
        call()
        after = resource.getrusage(resource.RUSAGE_SELF)
        walls.append(time.perf_counter() - start)
        cpus.append(after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime)
    return statistics.median(walls[2:]), statistics.median(cpus[2:])


def side_by_side(calls: Sequence[Callable[[], Any]], rounds: int | None = None) -> list[float]:
    """Median wall seconds of each call, made one after the other, round by round, after two rounds to warm up."""
    walls: list[list[float]] = [[] for _ in calls]
    for _ in range((rounds or REPEATS) + 2):
        for call, seen in zip(calls, walls, strict=True):
            start = time.perf_counter()
            jax.block_until_ready(call())
            seen.append(time.perf_counter() - start)
    return [statistics.median(seen[2:]) for seen in walls]


def resident() -> float:
    """The most memory that this process has held, MB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def line(error: BaseException) -> str:
    """An error as one short line."""
    return " ".join(f"{type(error).__name__}: {error}".split())[:300]


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """The result of a function of a module, called in a new process: nobody's memory and programs but its own."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, context, memory.keep_freed) as pool:
        return pool.submit(function, *arguments).result()


def in_turn(sides: Mapping[str, Callable[[], Row]], rounds: int = ROUNDS) -> dict[str, Row]:
    """Each side's row, with medians over rounds of its numbers; the sides are run A B C A B C ..."""
    found: dict[str, list[Row]] = {name: [] for name in sides}
    for _ in range(rounds):
        for name, run in sides.items():
            found[name].append(run())
    return {name: _median(rows) for name, rows in found.items()}


def _median(rows: list[Row]) -> Row:
    """Numbers that differ become their median; all else is the first row's."""
    numbers = {field for field, value in rows[0].items() if isinstance(value, float)}
    return {field: statistics.median(row[field] for row in rows) if field in numbers else rows[0][field] for field in rows[0]}


def keep(file: str, rows: list[Row], facts: Row) -> None:
    """Prints rows and puts them in place of those of the same `what`, device and processor in a results file."""
    path = RESULTS / file
    rows = [row | facts for row in rows]
    kept = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    same = {(row["what"], row["device"], row["processor"]) for row in rows}
    kept = [row for row in kept if (row["what"], row["device"], row["processor"]) not in same]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*kept, *rows]))
    for row in rows:
        print(json.dumps(row), flush=True)
