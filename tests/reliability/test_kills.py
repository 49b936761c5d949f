"""SIGKILL at any moment of a run that saves every step: no commit is lost, no byte is wrong, nothing stays behind (G5)."""

import collections
import concurrent.futures
import dataclasses
import random
import time

import pytest

from tests.reliability import runs

KEEP = 2
ENDLESS = 1_000_000


def _writing(home, commit, arrays):
    """Whether a step is being written whose arrays, or whose commit.json, lie there already."""
    pending = [name for name in runs.listing(home) if name.startswith("writing-")]
    return any(
        (home / "checkpoints" / name / runs.COMMIT).exists() == commit
        and (home / "checkpoints" / name / "state").exists() == arrays
        for name in pending
    )


POINTS = {
    "arrays are being written": lambda home: _writing(home, commit=False, arrays=False),
    "arrays are written, not yet hashed": lambda home: _writing(home, commit=False, arrays=True),
    "commit.json is there, not yet renamed": lambda home: _writing(home, commit=True, arrays=True),
    "an old step is being deleted": lambda home: any(name.startswith("discarded-") for name in runs.listing(home)),
}


@dataclasses.dataclass
class Series:
    """What a series of kills and restarts of one run has shown."""

    kills: int = 0
    lost: int = 0
    orphans: int = 0
    found: collections.Counter = dataclasses.field(default_factory=collections.Counter)  # what a kill left behind
    contents: dict = dataclasses.field(default_factory=dict)  # arrays by step
    last: int = 0


def _wait(home, point, rng):
    if point == "at random":
        time.sleep(rng.uniform(0, 0.4))
        return
    before, end = runs.committed(home), time.monotonic() + 2
    while time.monotonic() < end:
        if POINTS[point](home) if point in POINTS else runs.committed(home) - before:
            return


def kill_and_restart(home, cache, kills, seed):
    """Kills a run again and again, checks the disk after each kill and each restart, and stops it by SIGTERM in the end."""
    rng, series = random.Random(seed), Series()
    points = ["at random", "a step was just committed", *POINTS]
    for index in range(kills + 1):
        child = runs.start(home, cache, steps=ENDLESS, keep=KEEP)
        runs.wait_for(lambda: runs.committed(home) and max(runs.committed(home)) > series.last, child, home)
        series.orphans += len(list((home / "checkpoints").glob("*/orphan")))  # it went through the restart's sweep
        if index == kills:
            child.terminate()
            assert child.wait(60) == 75, runs.said(home)[-2000:]
            break
        _wait(home, points[index % len(points)] if rng.random() < 0.8 else "at random", rng)
        seen = max(runs.committed(home))
        child.kill()
        child.wait(60)
        series.kills += 1
        steps = runs.committed(home)
        series.lost += max(steps) < seen
        for step in steps:
            found = runs.content(home, step)
            assert series.contents.setdefault(step, found) == found, f"step {step} was trained anew to other bytes"
        series.last = max(steps)
        left = runs.listing(home) - {str(step) for step in steps}
        series.found.update({name.split("-")[0] for name in left} or {"nothing"})
        for name in left:
            assert name.startswith(("writing-", "discarded-")), name
            (home / "checkpoints" / name / "orphan").write_text("")
    assert runs.listing(home) == {str(step) for step in runs.committed(home)} and len(runs.committed(home)) == KEEP
    series.last = max(runs.committed(home))
    series.contents |= {step: runs.content(home, step) for step in runs.committed(home)}
    return series


def wrong_steps(series, home, cache):
    """Steps whose arrays, or whose rows in metrics.jsonl, are not those of a run that nobody killed."""
    reference = home.with_name(home.name + "-reference")
    child = runs.start(reference, cache, steps=series.last, keep=series.last)
    assert child.wait(300) == 0, runs.said(reference)[-2000:]
    assert runs.rows(home) == runs.rows(reference)
    assert [step for step, _, _ in runs.rows(home)] == list(range(1, series.last + 1))
    return [step for step, found in series.contents.items() if runs.content(reference, step) != found]


def test_a_kill_loses_no_commit_and_leaves_nothing_behind(tmp_path, cache):
    series = kill_and_restart(tmp_path / "run", cache, kills=1, seed=3)
    assert (series.kills, series.lost, series.orphans) == (1, 0, 0)


@pytest.mark.reliability
def test_fifty_kills_lose_no_commit_no_byte_and_leave_no_orphan(tmp_path, cache):
    with concurrent.futures.ThreadPoolExecutor(2) as pool:
        homes = [tmp_path / name for name in ("one", "two")]
        both = list(
            pool.map(lambda home: kill_and_restart(home, cache, kills=25, seed=len(home.name) + ord(home.name[0])), homes)
        )
        wrong = list(pool.map(lambda pair: wrong_steps(*pair, cache), zip(both, homes, strict=True)))
    found = sum((series.found for series in both), collections.Counter())
    compared = sum(len(series.contents) for series in both)
    print(f"{sum(s.kills for s in both)} kills, {compared} steps compared, left behind by kills: {dict(found)}")
    assert [sum(getattr(series, name) for series in both) for name in ("kills", "lost", "orphans")] == [50, 0, 0]
    assert wrong == [[], []]
    assert found["writing"] >= 10  # the kills did fall into saves
