"""SIGTERM, a full disk and a second writer, end to end: the exit code, the one line, and what can be continued (G6, G11)."""

import contextlib
import random
import subprocess
import time

import pytest

from tests.reliability import runs


def ended(child, timeout=60):
    """Exit code and seconds until the process ended."""
    start = time.monotonic()
    return child.wait(timeout), time.monotonic() - start


def test_sigterm_saves_and_exits_75_and_a_second_one_exits_at_once(tmp_path, cache):
    home = tmp_path / "run"
    child = runs.start(home, cache, steps=30, save_every=7, stall=12)
    runs.wait_for(lambda: "stalled" in runs.said(home), child, home)
    child.terminate()  # the batch of step 12 does not come for two minutes
    time.sleep(0.3)
    assert child.poll() is None
    for _ in range(10):  # on a busy machine, signals that follow closely are one
        child.terminate()
        with contextlib.suppress(subprocess.TimeoutExpired):
            child.wait(1)
            break
    code, seconds = ended(child)
    assert code == 75 and seconds < 2
    assert runs.committed(home) == {7}
    child = runs.start(home, cache, steps=30, save_every=7)
    assert ended(child)[0] == 0, runs.said(home)
    assert "resumed at step 7 of 30" in runs.said(home) and runs.committed(home) == {28, 30}
    assert [step for step, _, _ in runs.rows(home)] == list(range(1, 31))


def steps_done(directory):
    path = directory / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


@pytest.mark.reliability
def test_a_run_stopped_by_sigterm_at_random_times_ends_bit_identical(tmp_path, cache):
    whole, home, flags = tmp_path / "whole", tmp_path / "stopped", {"steps": 5000, "save_every": 5000}
    rng, saved = random.Random(0), [0]
    for _ in range(5):
        child = runs.start(home, cache, **flags)
        runs.wait_for(lambda: steps_done(home) > saved[-1] + 1, child, home)
        time.sleep(rng.uniform(0, 0.5))
        child.terminate()
        code, seconds = ended(child)
        assert code == 75 and seconds < 30, runs.said(home)[-2000:]
        saved.append(max(runs.committed(home)))
        assert saved[-1] > saved[-2] and f"asked to stop, saved step {saved[-1]}" in runs.said(home)
    flags = {"steps": 5000, "save_every": saved[-1] + 20}  # where to save is free to change
    children = [runs.start(directory, cache, **flags) for directory in (home, whole)]
    for child, directory in zip(children, (home, whole), strict=True):
        runs.wait_for(lambda: saved[-1] + 20 in runs.committed(directory), child, directory)  # noqa: B023
        child.kill()
        child.wait()
    assert runs.content(home, saved[-1] + 20) == runs.content(whole, saved[-1] + 20)
    upto = saved[-1] + 20
    assert runs.rows(home)[:upto] == runs.rows(whole)[:upto]


@pytest.mark.reliability
@pytest.mark.parametrize(
    ("limit", "flags", "named"),
    [
        (8_000, {"save_every": 5, "log_every": 1000}, "cannot write checkpoint {home}/checkpoints/5"),
        (40_000, {"save_every": 2, "log_every": 1}, "cannot write {home}/metrics.jsonl or tensorboard"),
    ],
)
def test_a_full_disk_ends_the_run_with_one_line_and_it_continues_when_there_is_room(tmp_path, cache, limit, flags, named):
    home = tmp_path / "run"
    command = runs.command(home, cache, steps=400, limit=limit, **flags)
    full = subprocess.run(command, cwd=runs.ROOT, capture_output=True, text=True, timeout=90)  # a log file would be full too
    assert full.returncode == 6, full.stderr[-2000:]
    assert full.stderr.splitlines()[-1].startswith("error: " + named.format(home=home))
    for step in runs.committed(home):
        runs.content(home, step)
    assert all(name.isdigit() for name in runs.listing(home))
    last = max(runs.committed(home), default=0)
    assert last < 100
    child = runs.start(home, cache, steps=400, save_every=200, log_every=1)
    assert ended(child)[0] == 0, runs.said(home)[-2000:]
    assert runs.rows(home)[-1][0] == 400 and runs.content(home, 400)
