"""G10: two processes train; one dies or is told to stop: nothing hangs, no commit is lost, starting again goes on."""

import json
import random
import signal
import time

import pytest

from flexjax import checkpoint
from tests.commands.conftest import MATH
from tests.commands.processes import finish, start

ROUNDS = 20
STEPS = 600
LONGEST = 30  # seconds in which whoever is left has ended
STOPPED, AGAIN = 0, 75


def committed(directory):
    found = directory / "checkpoints"
    return max((int(path.parent.name) for path in found.glob("*/commit.json") if path.parent.name.isdecimal()), default=0)


def wait_for_step(directory, step, processes):
    end = time.monotonic() + 120
    while committed(directory) < step:
        assert time.monotonic() < end and all(process.poll() is None for process in processes), [
            process.communicate() for process in processes if process.poll() is not None
        ]
        time.sleep(0.05)


@pytest.mark.reliability
def test_a_lost_host_hangs_nobody_and_loses_no_commit(tiny, cache, anchor, tmp_path):
    rng, longest, kinds = random.Random(0), 0.0, []
    job = [MATH, *tiny, f"--config.anchor.path={anchor}", f"--workdir={tmp_path}", "--config.mesh.fsdp=2"]
    job += [f"--config.train.steps={STEPS}", "--config.train.save_every=10", "--config.train.keep=3"]
    reached = 0
    for number in range(ROUNDS):
        processes = start("main", 2, job, cache)
        wait_for_step(tmp_path, reached + 10, processes)
        time.sleep(rng.uniform(0, 0.3))
        victim, how = number % 2, rng.choice([signal.SIGKILL, signal.SIGTERM])
        before, began = committed(tmp_path), time.monotonic()
        processes[victim].send_signal(how)
        ended = finish(processes, LONGEST)
        longest = max(longest, time.monotonic() - began)
        kinds.append(f"{how.name} to {victim}")
        codes = [code for code, _, _ in ended]
        if how == signal.SIGTERM:
            assert codes == [AGAIN, AGAIN], ended
        else:
            assert codes[victim] == -signal.SIGKILL and codes[1 - victim] == AGAIN, ended
            said = [line for line in ended[1 - victim][2].splitlines() if line.startswith("stopped: ")]
            assert len(said) == 1 and "Traceback" not in ended[1 - victim][2], ended
        reached = committed(tmp_path)
        assert reached >= before
        checkpoint.Checkpoints(tmp_path / "checkpoints", keep=3).verify(reached)
    processes = start("main", 2, job, cache)
    ended = finish(processes, 240)
    assert [code for code, _, _ in ended] == [STOPPED, STOPPED], ended
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and steps[-1] == STEPS
    print(f"\nG10: {ROUNDS} rounds, {', '.join(sorted(set(kinds)))}; the longest end took {longest:.1f} s; lost commits 0")


@pytest.mark.reliability
def test_a_run_goes_on_with_another_number_of_processes(tiny, cache, anchor, tmp_path):
    def job(name):
        job = [MATH, *tiny, f"--config.anchor.path={anchor}", f"--workdir={tmp_path / name}", "--config.mesh.fsdp=2"]
        return [*job, "--config.train.steps=300", "--config.train.save_every=10", "--config.train.log_every=1"]

    def losses(name):
        return [json.loads(line)["loss"] for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]

    assert [code for code, _, _ in finish(start("main", 1, job("whole"), cache))] == [STOPPED]
    reached = 0
    for count in (2, 4):
        processes = start("main", count, job("moved"), cache)
        wait_for_step(tmp_path / "moved", reached + 20, processes)
        processes[-1].send_signal(signal.SIGTERM)
        assert [code for code, _, _ in finish(processes)] == [AGAIN] * count
        reached = committed(tmp_path / "moved")
    assert [code for code, _, _ in finish(start("main", 1, job("moved"), cache))] == [STOPPED]
    assert len(losses("moved")) == len(losses("whole")) == 300
    assert losses("moved") == pytest.approx(losses("whole"), rel=2e-4)
