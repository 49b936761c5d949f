"""Several real processes on this machine, two fake devices each: they work together, and none outlives the others for long."""

import json
import os
import pathlib
import re
import shutil
import signal
import socket
import subprocess
import sys
import time

import jax
import pytest
from jax._src import distributed as runtime

from flexjax import distributed, errors, peers

ROOT = pathlib.Path(__file__).parents[1]
ENVIRONMENT = os.environ | {"XLA_FLAGS": "--xla_force_host_platform_device_count=2", "JAX_PLATFORMS": "cpu"}
HANG = 30  # seconds that nobody may outlive a process that is gone


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Job:
    """Processes that run a scenario of `distributed_child`, one argument for each."""

    def __init__(self, folder, scenario, arguments, count=None):
        self.folder, self.coordinator = folder / scenario, f"127.0.0.1:{free_port()}"
        self.scenario, self.count = scenario, count or len(arguments)
        self.folder.mkdir()
        self.processes, self.seconds = [], {}
        for argument in arguments:
            self.start(len(self.processes), argument)

    def start(self, index, argument):
        command = [sys.executable, "-m", "tests.distributed_child", self.scenario, self.coordinator]
        name = self.folder / str(len(self.processes))
        with open(f"{name}.out", "w") as out, open(f"{name}.err", "w") as err:
            child = subprocess.Popen(
                [*command, str(self.count), str(index), argument], cwd=ROOT, env=ENVIRONMENT, stdout=out, stderr=err
            )
        self.processes.append(child)

    def said(self, index):
        """{event: what the process said of it}."""
        lines = (self.folder / f"{index}.out").read_text().splitlines()
        return {said["event"]: said for said in map(json.loads, (line for line in lines if line.startswith("{")))}

    def complained(self, index):
        return (self.folder / f"{index}.err").read_text()

    def lines(self, index):
        """Those of ours on stderr, not those of C++ code."""
        return [line for line in self.complained(index).splitlines() if line.startswith(("stopped: ", "error: "))]

    def wait_for(self, event, limit=60):
        end = time.monotonic() + limit
        while not all(event in self.said(index) for index in range(len(self.processes))):
            assert time.monotonic() < end, [self.complained(index) for index in range(len(self.processes))]
            time.sleep(0.05)

    def signal(self, index, number):
        self.processes[index].send_signal(number)

    def wait(self, *indices, limit=60):
        """Exit codes; all processes if none is named."""
        since = time.monotonic()
        codes = []
        for index in indices or range(len(self.processes)):
            codes.append(self.processes[index].wait(max(0.1, since + limit - time.monotonic())))
            self.seconds[index] = time.monotonic() - since
        return codes

    def end(self):
        for process in self.processes:
            if process.poll() is None:
                process.kill()
                process.wait()


@pytest.fixture
def run(tmp_path):
    jobs = []

    def start(*arguments, **keywords):
        jobs.append(Job(tmp_path, *arguments, **keywords))
        return jobs[-1]

    yield start
    for job in jobs:
        job.end()


def test_a_single_process_needs_nobody():
    distributed.start()
    assert (distributed.index(), distributed.count(), distributed.is_main()) == (0, 1, True)
    assert distributed.exchange("name", {"a": (1, 2)}) == [{"a": [1, 2]}], "as if it had been sent"
    distributed.barrier("name")
    distributed.agree({"config": "a"})
    assert not distributed.stop_requested(False)
    assert distributed.stop_requested(True)
    with pytest.raises(jax.errors.JaxRuntimeError), distributed.lost_peers_are_preemption():
        raise jax.errors.JaxRuntimeError("UNKNOWN: Gloo all-reduce failed: Connection closed by peer")
    distributed.finish(2)
    distributed.start("127.0.0.1:1234", 1, 0)
    assert runtime.global_state.client is None


@pytest.mark.parametrize(
    ("arguments", "named"),
    [
        ({"coordinator": "localhost:1234"}, "--num_processes, --process_id missing"),
        ({"num_processes": 2, "process_id": 0}, "--coordinator missing"),
        ({"coordinator": "localhost", "num_processes": 2, "process_id": 0}, "'localhost', expected HOST:PORT"),
        ({"coordinator": "localhost:http", "num_processes": 2, "process_id": 0}, "expected HOST:PORT"),
        ({"coordinator": "localhost:99999", "num_processes": 2, "process_id": 0}, "expected HOST:PORT"),
        ({"coordinator": ":1234", "num_processes": 2, "process_id": 0}, "expected HOST:PORT"),
        ({"coordinator": "localhost:1234", "num_processes": 2, "process_id": 2}, "--process_id is 2"),
        ({"coordinator": "localhost:1234", "num_processes": 2, "process_id": -2}, "--process_id is -2"),
        ({"coordinator": "localhost:1234", "num_processes": -1, "process_id": 0}, "--num_processes is -1"),
        ({"coordinator": "localhost:1234", "detect": True}, "--coordinator: leave out what is to be detected"),
        ({"coordinator": "127.0.0.1:1", "num_processes": 2, "process_id": 1, "timeout": 0}, "cannot be reached within 0 s"),
        ({"coordinator": "no.invalid:1", "num_processes": 2, "process_id": 1, "timeout": 0}, "no.invalid:1 cannot be reached"),
    ],
)
def test_arguments_that_do_not_go_together(arguments, named):
    with pytest.raises(errors.ConfigError, match=re.escape(named)):
        distributed.start(**arguments)
    assert runtime.global_state.client is None


@pytest.mark.parametrize(
    ("call", "named"),
    [
        ("distributed.start(detect=True)", "no TPU pod, SLURM, Open MPI or Kubernetes job is found here"),
        ("jax.devices(); distributed.start('127.0.0.1:{port}', 2, 0)", "must be called before any JAX calls"),
    ],
)
def test_processes_that_cannot_be_joined(call, named):
    code = "import jax; from flexjax import distributed, errors\ntry: " + call.format(port=free_port())
    code += "\nexcept errors.ConfigError as error: print(error)"
    environment = ENVIRONMENT | {"TPU_SKIP_MDS_QUERY": "1"}
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)
    assert named in ended.stdout, ended.stderr


def test_the_code_version_is_that_of_the_source(tmp_path, monkeypatch):
    copy = shutil.copytree(ROOT / "flexjax", tmp_path / "flexjax", ignore=shutil.ignore_patterns("__pycache__"))
    here = distributed.code_version()
    monkeypatch.setattr(distributed, "__file__", str(copy / "distributed.py"))
    assert distributed.code_version() == here
    (copy / "model" / "router.py").rename(copy / "model" / "other.py")
    renamed = distributed.code_version()
    (copy / "model" / "other.py").rename(copy / "model" / "router.py")
    (copy / "errors.py").write_bytes((copy / "errors.py").read_bytes() + b"\n")
    assert len({here, renamed, distributed.code_version()}) == 3
    assert distributed.versions()["jax"] == jax.__version__


def test_two_work_together_and_stop_at_the_same_step(run):
    job = run("talk", ["", ""])
    job.wait_for("cost")
    job.signal(1, signal.SIGTERM)
    assert job.wait() == [75, 75]
    for index in (0, 1):
        assert job.said(index)["sum"] == {"event": "sum", "value": 6.0, "index": index, "main": index == 0}
        assert job.said(index)["stopped"] == job.said(0)["stopped"]
        assert job.lines(index) == [f"stopped: asked to stop, saved step {job.said(0)['stopped']['step']}"]


def test_facts_that_differ_are_refused_everywhere(run):
    job = run("facts", ["a", "b"])
    assert job.wait() == [2, 2]
    for index in (0, 1):
        (line,) = job.lines(index)
        assert re.match(r"error: process 1 on \S+ differs from process 0 on \S+: config is b, expected a; ", line)


# What follows takes minutes: it waits until silence means death.


@pytest.mark.reliability
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("sent", [signal.SIGKILL, signal.SIGSTOP])
def test_nobody_outlives_a_host_for_long(run, victim, sent):
    """Whoever is left sits in a collective, in a barrier, or in Python."""
    survivor = 1 - victim
    jobs = {
        "collective": run("collectives", ["", ""]),
        "barrier": run("barrier_of", [str(survivor)] * 2),
        "python": run("python_of", [""] * 2),
        "end": run("end_of", [str(victim)] * 2),
    }
    for job in jobs.values():
        job.wait_for("running")
    time.sleep(1)
    since = time.monotonic()
    for job in jobs.values():
        job.signal(victim, sent)
    for where, job in jobs.items():
        assert job.wait(survivor) == [75], job.complained(survivor)
        (line,) = job.lines(survivor)
        assert re.match(rf"stopped: process {victim} on \S+ is gone since \d+ s; start the same command again", line)
        assert "Traceback" not in job.complained(survivor)
        print(f"{sent.name} of process {victim}: the one in {where} ended {time.monotonic() - since:.1f} s later")
    assert time.monotonic() - since < HANG
    if sent == signal.SIGSTOP:  # the network is back, but nobody is there
        for job in jobs.values():
            job.signal(victim, signal.SIGCONT)
        for job in jobs.values():
            assert job.wait(victim) == [75], job.complained(victim)
            assert len(job.lines(victim)) == 1
        print(
            f"SIGCONT of process {victim}: the last one ended {max(job.seconds[victim] for job in jobs.values()):.1f} s later"
        )


@pytest.mark.reliability
def test_of_three_the_others_name_the_one_that_is_gone(run):
    job = run("collectives", ["", "", ""])
    job.wait_for("running")
    job.signal(2, signal.SIGKILL)
    assert job.wait(limit=HANG) == [75, 75, -signal.SIGKILL]
    for index in (0, 1):
        (line,) = job.lines(index)
        assert line.startswith("stopped: process 2 on ")


@pytest.mark.reliability
@pytest.mark.parametrize("failing", [0, 1])
def test_an_error_of_one_stops_all(run, failing):
    job = run("error", [str(failing)] * 3)
    codes = job.wait(limit=HANG)
    assert codes == [3 if index == failing else 75 for index in range(3)]
    for index in range(3):
        (line,) = job.lines(index)
        own = "error: corpus.jsonl:3 is not valid JSON; mend it"
        assert line == own if index == failing else f"process {failing} on " in line and "exit code 3" in line
        assert "Traceback" not in job.complained(index)
    print(f"process {failing} of 3 had an error: all ended {max(job.seconds.values()):.1f} s after their start")


@pytest.mark.reliability
def test_the_same_error_everywhere_keeps_its_code(run):
    job = run("bug", ["", ""])
    assert job.wait(limit=HANG) == [1, 1]
    for index in (0, 1):
        assert job.complained(index).count("ZeroDivisionError: a bug") == 1
        assert not job.lines(index)


@pytest.mark.reliability
@pytest.mark.parametrize("later", [0, 1])
def test_a_clean_end_is_no_death(run, later):
    job = run("late", [str(later)] * 2)
    assert job.wait(limit=HANG) == [0, 0]
    assert job.lines(0) == job.lines(1) == []
    assert job.complained(1) == "" and "Check failure" not in job.complained(0)


@pytest.mark.reliability
@pytest.mark.parametrize("asked", [0, 1])
def test_asked_to_stop_while_it_waits_for_the_end_of_others(run, asked):
    job = run("end_of", [str(1 - asked)] * 2)
    job.wait_for("running")
    time.sleep(1)
    job.signal(asked, signal.SIGTERM)
    assert job.wait(limit=HANG) == [75, 75]
    assert job.lines(asked) == ["stopped: asked to stop"]
    assert len(job.lines(1 - asked)) == 1


@pytest.fixture(scope="module")
def patient(tmp_path_factory):
    """Jobs that take half a minute each, all at once."""
    folder = tmp_path_factory.mktemp("patient")
    jobs = {
        "locked": Job(folder, "thread_locked", [str(peers.HEARTBEAT_SECONDS + 8)] * 2),
        "abort": Job(folder, "abort", ["", ""]),
        "broken": Job(folder, "broken", ["", ""]),
        "alone": Job(folder, "python_of", ["", ""], count=3),
    }
    yield jobs
    for job in jobs.values():
        job.end()


@pytest.mark.reliability
def test_a_process_that_lives_is_not_given_up(patient):
    """A call that holds Python's lock for long: the heartbeats go on."""
    job = patient["locked"]
    assert job.wait() == [0, 0], [job.complained(0), job.complained(1)]


@pytest.mark.reliability
def test_an_abort_of_its_own_stays_one(patient):
    job = patient["abort"]
    assert job.wait(limit=HANG) == [75, -signal.SIGABRT]
    assert not job.lines(1)


@pytest.mark.reliability
@pytest.mark.parametrize("first_killed", [True, False])
def test_a_process_does_not_join_a_job_that_has_begun(run, first_killed):
    job = run("python_of", ["", ""])
    job.wait_for("running")
    if first_killed:
        job.signal(1, signal.SIGKILL)
    job.start(1, "")
    assert job.wait(limit=HANG) == [75, -signal.SIGKILL if first_killed else 75, 75]
    assert "process 1 was started while others still ran" in job.complained(2)


@pytest.mark.reliability
def test_a_connection_that_broke_though_all_live(patient):
    job = patient["broken"]
    assert job.wait(limit=HANG + 10) == [75, 75]
    lines = job.lines(0) + job.lines(1)
    assert len(lines) == 2 and any("broke (UNKNOWN: Gloo" in line for line in lines)


@pytest.mark.reliability
def test_a_barrier_to_which_somebody_does_not_come(run):
    job = run("missing", ["", ""])
    assert job.wait(limit=HANG) == [75, 75]
    assert re.match(r"stopped: process 1 on \S+ did not come to 'barrier only one' within 0.5 s; ", job.lines(0)[0])


@pytest.mark.reliability
def test_processes_that_never_come(patient):
    job = patient["alone"]
    assert job.wait() == [2, 2]
    assert all("error: 3 processes at 127.0.0.1" in job.lines(index)[0] for index in (0, 1))


def test_a_process_leaves_though_nobody_reads_its_stderr():
    script = "import os; r, w = os.pipe(); os.dup2(w, 2); os.close(r); from flexjax import peers; peers.leave('stopped', 75)"
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT, timeout=60).returncode == 75
