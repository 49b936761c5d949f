"""The launch scripts, with fakes for Python and the tools of clusters: what is called, with which words, and what follows."""

import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest
import yaml

from tests.launch import fakes, manifest

ROOT = pathlib.Path(__file__).parents[2]
LAUNCH = ROOT / "launch"
SECONDS = 20
ODD = """--config.data.root=/mnt/flexjax/it's $(x) "a" \\ & b"""
TRAINING = ["--config=configs/public.py:7b", "--workdir=/mnt/flexjax/run", "--config.mesh.fsdp=16", ODD, "--fall_back"]
PLAN = ["--config=configs/public.py:7b", "--config.mesh.fsdp=16", ODD]  # what of it a plan understands
CLOUD = ["--name=run1", "--zone=us-west4-a"]
STORED = ["--image=registry/flexjax:1", "--storage=shared"]
OPTIONS = {  # what each script needs, and what makes it plan
    "local.sh": ["--topology=v5e:4x4"],
    "slurm.sh": ["--gpu=h100"],
    "queued_resources.sh": [*CLOUD, "--topology=v5e:4x4", "--mount=10.0.0.2:/share"],
    "xpk.sh": [*CLOUD, *STORED, "--topology=v5e:4x4", "--cluster=c1"],
    "jobset.sh": ["--name=run1", "--topology=v5e:4x4", "--image=registry/flexjax:1", "--claim=shared"],
}
WITH_PLAN = sorted(OPTIONS)


class Shell:
    """Runs launch scripts where only the fakes can be called."""

    def __init__(self, directory):
        self.state, self.bin = directory / "state", directory / "bin"
        self.state.mkdir()
        self.bin.mkdir()
        fakes.install(self.bin)
        self.environment = {
            "PATH": f"{self.bin}:/usr/bin:/bin",
            "HOME": str(directory),
            "TMPDIR": str(directory),
            "STATE": str(self.state),
            "POLL_SECONDS": "0.01",
        }

    def start(self, script, *arguments, **variables):
        command = ["bash", f"launch/{script}", *map(str, arguments)]
        environment = self.environment | {name: str(value) for name, value in variables.items()}
        pipe = subprocess.PIPE
        return subprocess.Popen(command, cwd=ROOT, env=environment, text=True, stdout=pipe, stderr=pipe, start_new_session=True)

    def run(self, script, *arguments, **variables):
        process = self.start(script, *arguments, **variables)
        out, err = self.end(process)
        return subprocess.CompletedProcess(script, process.returncode, out, err)

    def end(self, process):
        """What a script wrote, when it has ended; it and what it started are killed if that takes too long."""
        try:
            return process.communicate(timeout=SECONDS)
        finally:
            if process.poll() is None:
                for line in subprocess.run(
                    ["pgrep", "--session", str(process.pid)], capture_output=True, text=True
                ).stdout.split():
                    os.kill(int(line), signal.SIGKILL)
                process.communicate()

    def calls(self, name=None):
        """Each call as a list of words; of one program, without its name."""
        path = self.state / "calls"
        lines = [line.split("\x1f") for line in path.read_text().splitlines()] if path.exists() else []
        return lines if name is None else [words[1:] for words in lines if words[0] == name]

    def await_file(self, name):
        deadline = time.monotonic() + SECONDS
        while not (self.state / name).exists():
            assert time.monotonic() < deadline, f"{name} does not come"
            time.sleep(0.01)


@pytest.fixture
def shell(tmp_path):
    return Shell(tmp_path)


def commands(text):
    """The lines of a dry run as lists of words."""
    return [shlex.split(line) for line in text.splitlines()]


def test_shellcheck():
    found = shutil.which("shellcheck", path=f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}")
    assert found, "shellcheck is missing; pip install -r requirements-dev.txt"
    scripts = [*sorted(LAUNCH.glob("*.sh")), LAUNCH / "slurm.sbatch"]
    result = subprocess.run([found, "--external-sources", *scripts], cwd=ROOT, capture_output=True, text=True, timeout=SECONDS)
    assert result.returncode == 0, result.stdout


def test_scripts_stay_small():
    for path in LAUNCH.iterdir():
        lines = path.read_text().splitlines()
        assert len(lines) <= 120 and max(map(len, lines)) <= 128, path.name
        if path.suffix == ".sh" and path.name not in (
            "flags.sh",
            "exit_codes.sh",
            "topology.sh",
            "slice.sh",
        ):  # the others are sourced
            assert "set -euo pipefail" in lines and os.access(path, os.X_OK), path.name


# Flags


@pytest.mark.parametrize("script", [*OPTIONS, "slurm.sbatch"])
def test_help(shell, script):
    result = shell.run(script, "--help")
    assert (result.returncode, result.stderr) == (0, "")
    assert f"launch/{script}" in result.stdout and "-- --config=FILE" in result.stdout
    declared = re.search(r'^parse "(.*?)"', (LAUNCH / script).read_text(), re.MULTILINE)[1].split()
    assert {name for name in declared if f"--{name}" not in result.stdout} == set(), "options without a word in the usage"


BAD_FLAGS = {
    "unknown": (["--nonsense=1", "--", *TRAINING], "--nonsense"),
    "unknown switch": (["--nonsense", "--", *TRAINING], "--nonsense"),
    "no value": (["--restarts=", "--", *TRAINING], "--restarts="),
    "a switch with a value": (["--dry_run=1", "--", *TRAINING], "--dry_run"),
    "an option without": (["--restarts", "--", *TRAINING], "--restarts"),
    "a stray word": (["configs/public.py"], "configs/public.py"),
    "a training flag in front": (["--config=configs/public.py"], "--config=configs/public.py"),
    "no number": (["--restarts=many", "--", *TRAINING], "--restarts=many"),
    "nothing to train": ([], "--config="),
    "no config": (["--", "--workdir=/mnt/flexjax/run"], "--config"),
    "no workdir": (["--", "--config=configs/public.py"], "--workdir"),
    "a bucket": (["--", "--config=configs/public.py", "--workdir=gs://bucket/run"], "gs://bucket/run"),
    "a word behind --": (["--", *TRAINING, "stray"], "stray"),
    "two lines": (["--", *TRAINING, "--config.data.root=a\nb"], "line break"),
    "ours": (["--", *TRAINING, "--process_id=0"], "--process_id=0"),
}


@pytest.mark.parametrize("case", BAD_FLAGS)
@pytest.mark.parametrize("script", [*OPTIONS, "slurm.sbatch"])
def test_bad_flags(shell, script, case):
    arguments, named = BAD_FLAGS[case]
    result = shell.run(script, *OPTIONS.get(script, []), *arguments)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and named in result.stderr
    assert shell.calls() == []


OF_ONE_SCRIPT = {
    "local.sh": [["--processes=0"], ["--devices=0"]],
    "slurm.sh": [["--nodes=0"], ["--gpus=x"]],
    "queued_resources.sh": [
        ["--spot", "--reserved"],
        ["--mount=bucket"],
        ["--mount=gs://bucket/folder"],
        ["--mount_point=/data"],
        ["--name=Run_1"],
        ["--topology=h100:16"],
        ["--topology=v5e:4x4x4"],
        ["--topology=v5p:4x4"],
        ["--topology=v5e:3x3"],
        ["--topology=v5e:0x4"],
    ],
    "xpk.sh": [["--name=-run"], ["--topology=16x16"]],
    "jobset.sh": [["--namespace=A"], ["--mount_point=/data"], ['--claim=a"b'], ["--image=a b"], ["--topology=v6e"]],
}


@pytest.mark.parametrize(("script", "wrong"), [(script, wrong) for script in OF_ONE_SCRIPT for wrong in OF_ONE_SCRIPT[script]])
def test_bad_values(shell, script, wrong):
    result = shell.run(script, *OPTIONS[script], *wrong, "--", *TRAINING)
    assert result.returncode == 2
    assert result.stderr.startswith("error: ") and result.stderr.count("\n") == 1 and wrong[-1].split("=")[0] in result.stderr
    assert shell.calls() == []


@pytest.mark.parametrize("script", ["queued_resources.sh", "xpk.sh", "jobset.sh"])
def test_missing_options(shell, script):
    for index, option in enumerate(OPTIONS[script]):
        result = shell.run(script, *OPTIONS[script][:index], *OPTIONS[script][index + 1 :], "--", *TRAINING)
        assert (result.returncode, result.stderr) == (2, f"error: {option.split('=')[0]} is missing; see --help\n")


# The plan, and dry runs


@pytest.mark.parametrize("script", WITH_PLAN)
def test_dry_run_prints_and_calls_nothing(shell, script):
    result = shell.run(script, *OPTIONS[script], "--dry_run", "--", *TRAINING)
    assert (result.returncode, result.stderr) == (0, "")
    assert shell.calls() == []
    machine = ["--topology=gpu:16", "--gpu=h100"] if script == "slurm.sh" else ["--topology=v5e:4x4"]
    first = result.stdout.splitlines()[0].removeprefix("# ")
    assert shlex.split(first) == ["env", "JAX_PLATFORMS=cpu", "python", "-m", "flexjax.plan", *machine, *PLAN]
    without = shell.run(script, *OPTIONS[script], "--dry_run", "--skip_plan", "--", *TRAINING)
    assert "flexjax.plan" not in without.stdout and len(without.stdout.splitlines()) == len(result.stdout.splitlines()) - 1


@pytest.mark.parametrize("script", WITH_PLAN)
def test_plan_that_fails_stops_the_launch(shell, script):
    result = shell.run(script, *OPTIONS[script], "--", *TRAINING, PLAN_CODE=2)
    assert result.returncode == 2
    assert result.stderr.splitlines()[-1].startswith("error: the plan for ")
    assert [words[:3] for words in shell.calls()] == [["python", "-m", "flexjax.plan"]]


@pytest.mark.parametrize("script", WITH_PLAN)
def test_plan_comes_first_and_can_be_skipped(shell, script):
    assert shell.run(script, *OPTIONS[script], "--", *TRAINING).returncode == 0
    first, *rest = shell.calls()
    assert first[:3] == ["python", "-m", "flexjax.plan"] and rest
    (shell.state / "calls").unlink()
    assert shell.run(script, *OPTIONS[script], "--skip_plan", "--", *TRAINING, PLAN_CODE=2).returncode == 0
    assert [words[:3] for words in shell.calls()] == [words[:3] for words in rest]


def test_documented_commands(shell):
    """Every launch command of docs/pods.md, as a dry run."""
    text = (ROOT / "docs" / "pods.md").read_text().replace("$IMAGE", "registry/flexjax:1")
    blocks = re.findall(r"```bash\n(.*?)```", text, re.DOTALL)
    found = [shlex.split(line) for block in blocks for line in block.splitlines() if line.startswith("launch/")]
    assert {words[0] for words in found} == {f"launch/{script}" for script in OPTIONS}
    for path, *words in found:
        result = shell.run(path.removeprefix("launch/"), "--dry_run", *words)
        assert result.returncode == 0, f"{path} {shlex.join(words)}: {result.stderr}"
    assert shell.calls() == []


# One machine


def starts(shell):
    """The process ids of each start of flexjax.main, in the order of their calls."""
    calls = [words for words in shell.calls("python") if words[1] == "flexjax.main"]
    return [int(words[4].removeprefix("--process_id=")) for words in calls]


def test_local_processes(shell):
    result = shell.run("local.sh", "--processes=3", "--devices=4", "--", *TRAINING)
    assert result.returncode == 0
    calls = shell.calls("python")
    assert sorted(starts(shell)) == [0, 1, 2]
    assert len({words[2] for words in calls}) == 1, "one coordinator"
    assert re.fullmatch(r"--coordinator=127\.0\.0\.1:2\d{4}", calls[0][2])
    for words in calls:
        assert words[:2] == ["-m", "flexjax.main"] and words[3] == "--num_processes=3" and words[5:] == TRAINING


def test_local_fake_devices(shell):
    result = shell.run("local.sh", "--devices=4", "--dry_run", "--", *TRAINING, XLA_FLAGS="--xla_dump_to=/d")
    for index, words in enumerate(commands(result.stdout)):
        flags = "XLA_FLAGS=--xla_dump_to=/d --xla_force_host_platform_device_count=4"
        assert words[:6] == ["env", "JAX_PLATFORMS=cpu", flags, "python", "-m", "flexjax.main"]
        assert words[6:] == ["--coordinator=127.0.0.1:PORT", "--num_processes=2", f"--process_id={index}", *TRAINING]


@pytest.mark.parametrize(
    ("codes", "expected", "attempts"),
    [
        (("75 75 0", "75 75 0"), 0, 3),  # preempted twice
        (("75 0", "137 0"), 0, 2),  # a host was lost, the other one noticed
        (("75", "75"), 75, 3),  # preempted for ever: bounded
        (("75", "3"), 3, 1),  # an error: the other only saw the process go
        (("2", "4"), 4, 1),
        (("0", "7"), 7, 1),
        (("75", "1"), 1, 1),  # a bug of ours
        (("137", "0"), 137, 1),  # nobody saved
    ],
)
def test_local_restarts(shell, codes, expected, attempts):
    result = shell.run("local.sh", "--restarts=2", "--", *TRAINING, CODES_0=codes[0], CODES_1=codes[1])
    assert result.returncode == expected
    assert sorted(starts(shell)) == sorted([0, 1] * attempts)
    assert result.stderr.count("exit code 75: restart ") == attempts - 1
    assert ("all 2 restarts are used" in result.stderr) == (expected == 75)


@pytest.mark.parametrize(("number", "whole_group"), [(signal.SIGTERM, False), (signal.SIGINT, False), (signal.SIGINT, True)])
def test_local_signals(shell, number, whole_group):
    """Each process hears SIGTERM exactly once, also when a terminal sends Ctrl-C to the whole group; nobody starts again."""
    process = shell.start("local.sh", "--processes=3", "--", *TRAINING, UNTIL_SIGNAL=sys.executable, LISTEN=fakes.LISTEN)
    for index in range(3):
        shell.await_file(f"ready.{index}")
    if whole_group:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    process.wait(timeout=SECONDS)
    assert all((shell.state / f"saved.{index}").exists() for index in range(3)), "it waits for all of them"
    _, err = shell.end(process)
    assert process.returncode == 75, err
    assert sorted((shell.state / "signals").read_text().splitlines()) == ["0 SIGTERM", "1 SIGTERM", "2 SIGTERM"]
    assert sorted(starts(shell)) == [0, 1, 2] and "restart" not in err


# SLURM


def test_slurm_submits(shell):
    options = ["--nodes=4", "--gpus=4", "--partition=p", "--account=a", "--time=1:00:00", "--restarts=3"]
    assert shell.run("slurm.sh", *options, "--", *TRAINING).returncode == 0
    (words,) = shell.calls("sbatch")
    submit = ["--nodes=4", "--ntasks-per-node=4", "--gpus-per-node=4", "--time=1:00:00", "--partition=p", "--account=a"]
    assert words == [*submit, "launch/slurm.sbatch", "--restarts=3", "--", *TRAINING]
    printed = commands(shell.run("slurm.sh", *options, "--dry_run", "--", *TRAINING).stdout)
    assert printed[0] == ["sbatch", *words] and printed[1][0] == "srun" and printed[2][-3:] == ["scontrol", "requeue", "JOB"]


def test_slurm_directives():
    """They stand before the first command, where sbatch reads them; what the text promises is among them."""
    head = (LAUNCH / "slurm.sbatch").read_text().split("\n\n")[0].splitlines()
    directives = [line.removeprefix("#SBATCH ") for line in head if line.startswith("#SBATCH ")]
    assert all(re.fullmatch(r"--[a-z-]+(=\S+)?", line) for line in directives)
    assert {"--requeue", "--signal=TERM@120", "--open-mode=append"} <= set(directives)


@pytest.mark.parametrize(
    ("codes", "done", "expected", "requeued"),
    [
        (("0", "0"), 0, 0, False),
        (("75", "75"), 0, 75, True),
        (("75", "75"), 2, 75, False),  # all restarts used
        (("75", "3"), 0, 3, False),  # srun says 75
        (("137", "75"), 1, 75, True),  # srun says 137
        (("2", "2"), 0, 2, False),
    ],
)
def test_slurm_job(shell, tmp_path, codes, done, expected, requeued):
    training = ["--config=configs/public.py", f"--workdir={tmp_path}/run", ODD]
    slurm = {"SLURM_JOB_ID": 7, "SLURM_NTASKS": 2, "SLURM_RESTART_COUNT": done, "SLURM_SUBMIT_DIR": ROOT}
    result = shell.run("slurm.sbatch", "--restarts=2", "--", *training, CODES_0=codes[0], CODES_1=codes[1], **slurm)
    assert result.returncode == expected
    assert shell.calls("python") == [["-m", "flexjax.main", "--distributed", *training]] * 2
    assert shell.calls("scontrol") == ([["requeue", "7"]] if requeued else [])
    assert list((tmp_path / "run" / "exit_codes").iterdir()) == []


def test_slurm_signal(shell, tmp_path):
    """SIGTERM reaches every process of the step, our shells too: they outlive it, and the job is queued again."""
    training = ["--config=configs/public.py", f"--workdir={tmp_path}/run"]
    slurm = {"SLURM_JOB_ID": 7, "SLURM_NTASKS": 1, "SLURM_SUBMIT_DIR": ROOT}
    listen = {"UNTIL_SIGNAL": sys.executable, "LISTEN": fakes.LISTEN}
    process = shell.start("slurm.sbatch", "--", *training, **slurm, **listen)
    shell.await_file("ready.0")
    os.killpg(process.pid, signal.SIGTERM)
    _, err = shell.end(process)
    assert process.returncode == 75, err
    assert shell.calls("scontrol") == [["requeue", "7"]]


def test_slurm_that_cannot_start_tasks(shell, tmp_path):
    training = ["--config=configs/public.py", f"--workdir={tmp_path}/run"]
    result = shell.run("slurm.sbatch", "--", *training, SLURM_JOB_ID=7, SLURM_NTASKS=2, SLURM_SUBMIT_DIR=ROOT, SRUN_CODE=9)
    assert result.returncode == 9 and shell.calls("scontrol") == []


def test_slurm_outside_of_a_job(shell, tmp_path):
    result = shell.run("slurm.sbatch", "--", *TRAINING)
    assert result.returncode == 2 and "no SLURM job" in result.stderr
    result = shell.run("slurm.sbatch", "--", *TRAINING, SLURM_SUBMIT_DIR=tmp_path)
    assert result.returncode == 2 and "not the checkout" in result.stderr
    assert shell.calls() == []


# Queued resources


def verbs(shell):
    """What was asked of gcloud, in short."""
    found = []
    for words in shell.calls("gcloud"):
        verb = words[3]
        if verb == "ssh":
            command = words[-1]
            verb = "stop" if "pkill" in command else "train" if "flexjax.main" in command else "set up"
        found.append(verb)
    return found


ONCE = ["scp", "set up", "train"]


@pytest.mark.parametrize(
    ("states", "workers", "expected", "asked"),
    [
        ("ABSENT WAITING_FOR_RESOURCES PROVISIONING ACTIVE", "0,0,0,0", 0, ["describe", "create", *["describe"] * 3, *ONCE]),
        ("OFFLINE ACTIVE", "0,0,0,0", 0, [*["describe"] * 2, *ONCE]),  # it may be ours already: not asked for again
        ("ACTIVE", "75,75,75,75 0,0,0,0", 0, ["describe", *ONCE, "describe", *ONCE]),
        ("ACTIVE", "0,0,0 0,0,0,0", 0, ["describe", *ONCE, "describe", *ONCE]),  # a worker that says nothing is lost
        ("ACTIVE", "75,75,4,75", 4, ["describe", *ONCE]),
        ("ACTIVE", "75,75,75,75", 75, ["describe", *ONCE] * 3),
        (
            "ACTIVE SUSPENDED ABSENT ACTIVE",  # taken away, asked for again
            "75,75 0,0,0,0",
            0,
            ["describe", *ONCE, "describe", "delete", "create", "describe", "create", "describe", *ONCE],
        ),
    ],
)
def test_queued_resources(shell, states, workers, expected, asked):
    options = [*OPTIONS["queued_resources.sh"], "--restarts=2", "--skip_plan"]
    result = shell.run("queued_resources.sh", *options, "--", *TRAINING, STATES=states, WORKERS=workers)
    assert result.returncode == expected, result.stderr
    assert verbs(shell) == [*asked, "delete"], "given back at the end, whatever the outcome"


def test_queued_resources_words(shell):
    """The exact words, and that the workers' shells read the training flags as they were given."""
    options = ["--name=run1", "--zone=us-east5-a", "--project=p1", "--topology=v5p:4x4x8", "--mount=gs://bucket", "--reserved"]
    result = shell.run("queued_resources.sh", *options, "--dry_run", "--skip_plan", "--", *TRAINING)
    create, describe, archive, copy, set_up, train, delete = commands(result.stdout)
    where = ["--zone=us-east5-a", "--project=p1"]
    resources, machine = ["gcloud", "compute", "tpus", "queued-resources"], ["gcloud", "compute", "tpus", "tpu-vm"]
    size = ["--node-id=run1", "--accelerator-type=v5p-256", "--runtime-version=v2-alpha-tpuv5", "--reserved"]
    assert create == [*resources, "create", "run1", *where, *size]
    assert describe == [*resources, "describe", "run1", *where, "--format=value(state.state)"]
    assert archive[:3] == ["git", "archive", "--format=tar.gz"] and archive[3].endswith("/flexjax-abc1234.tar.gz")
    assert copy == [*machine, "scp", archive[3].removeprefix("--output="), "run1:", *where, "--worker=all"]
    assert set_up[:-1] == train[:-1] == [*machine, "ssh", "run1", *where, "--worker=all"]
    assert "bash flexjax/launch/setup_worker.sh gs://bucket /mnt/flexjax" in set_up[-1]
    assert delete == [*resources, "delete", "run1", *where, "--force", "--quiet"]

    home = shell.state.parent
    (home / "flexjax" / ".venv" / "bin").mkdir(parents=True)
    (home / "flexjax" / ".venv" / "bin" / "python").symlink_to(shell.bin / "python")
    remote = ["bash", "-c", train[-1].removeprefix("--command=")]
    said = subprocess.run(
        remote, cwd=home, env=shell.environment | {"CODES": "5"}, capture_output=True, text=True, timeout=SECONDS
    )
    assert said.stdout == "\nflexjax-exit-code 5\n"
    assert shell.calls("python") == [["-m", "flexjax.main", "--distributed", *TRAINING]]


def test_queued_resources_that_fail_to_set_up(shell):
    options = [*OPTIONS["queued_resources.sh"], "--skip_plan"]
    result = shell.run("queued_resources.sh", *options, "--", *TRAINING, GCLOUD_CODE=1)
    assert result.returncode == 6 and "nothing was trained" in result.stderr
    assert "train" not in verbs(shell) and verbs(shell)[-1] == "delete"
    assert "run1 may not be deleted" in result.stderr.splitlines()[-1]


def test_queued_resources_can_be_kept(shell):
    options = [*OPTIONS["queued_resources.sh"], "--keep", "--skip_plan"]
    assert shell.run("queued_resources.sh", *options, "--", *TRAINING).returncode == 0
    assert verbs(shell) == ["describe", *ONCE]


def test_queued_resources_stop(shell):
    """Ctrl-C stops the processes on the workers, waits for them, gives the slice back, and starts nothing again."""
    options = [*OPTIONS["queued_resources.sh"], "--skip_plan"]
    listen = {"UNTIL_SIGNAL": sys.executable, "LISTEN": fakes.LISTEN}
    process = shell.start("queued_resources.sh", *options, "--", *TRAINING, WORKERS="75,75,75,75", **listen)
    shell.await_file("ready.gcloud")
    os.killpg(process.pid, signal.SIGINT)
    _, err = shell.end(process)
    assert process.returncode == 75, err
    assert verbs(shell) == ["describe", *ONCE, "stop", "delete"]
    assert not (shell.state / "signals").exists(), "Ctrl-C reached the connection"
    assert not (shell.state / "deleted-too-early").exists()


def test_setup_of_a_worker(shell):
    local = shell.state.parent / ".local" / "bin"
    local.mkdir(parents=True)
    (local / "uv").symlink_to(shell.bin / "uv")
    assert shell.run("setup_worker.sh", "10.0.0.2:/share", "/mnt/flexjax").returncode == 0
    assert ["mount", "-t", "nfs", "-o", "hard", "10.0.0.2:/share", "/mnt/flexjax"] in shell.calls("sudo")
    assert [words[:2] for words in shell.calls("uv")] == [["venv", "--quiet"], ["pip", "install"]]
    assert shell.run("setup_worker.sh", "gs://bucket", "/mnt/flexjax").returncode == 0
    (words,) = shell.calls("gcsfuse")
    assert words[-2:] == ["bucket", "/mnt/flexjax"] and "--metadata-cache-ttl-secs=0" in words
    (shell.state / "calls").unlink()
    assert shell.run("setup_worker.sh", "gs://bucket", "/mnt/flexjax", MOUNTED=0).returncode == 0
    assert shell.calls("gcsfuse") == shell.calls("sudo") == [], "mounted already"
    result = shell.run("setup_worker.sh", "gs://bucket")
    assert result.returncode == 2 and result.stderr.startswith("error: ") and result.stderr.count("\n") == 1


# xpk


def test_xpk(shell):
    result = shell.run("xpk.sh", *OPTIONS["xpk.sh"], "--project=p1", "--restarts=4", "--skip_plan", "--", *TRAINING)
    assert result.returncode == 0
    (words,) = shell.calls("xpk")
    *options, command = words
    assert options == [
        *("workload", "create", "--workload=run1", "--cluster=c1", "--zone=us-west4-a", "--project=p1"),
        *("--tpu-type=v5litepod-4x4", "--num-slices=1", "--docker-image=registry/flexjax:1", "--storage=shared"),
        *("--max-restarts=4", "--restart-on-exit-codes=75", "--termination-grace-period-seconds=120"),
    ]
    train = ["exec", "python", "-m", "flexjax.main", "--distributed", *TRAINING]
    assert shlex.split(command.removeprefix("--command=")) == train


# JobSet


def render(shell, *options):
    result = shell.run("jobset.sh", *OPTIONS["jobset.sh"], *options, "--dry_run", "--", *TRAINING)
    assert result.returncode == 0, result.stderr
    return result.stdout


@pytest.mark.parametrize(
    ("topology", "label", "hosts", "chips"),
    [
        ("v5e:16x16", "tpu-v5-lite-podslice", 64, 4),
        ("v5p:4x4x8", "tpu-v5p-slice", 32, 4),
        ("v6e:2x2", "tpu-v6e-slice", 1, 4),
        ("v6e:1x1", "tpu-v6e-slice", 1, 1),
    ],
)
def test_jobset_manifest(shell, topology, label, hosts, chips):
    text = render(shell, f"--topology={topology}", "--namespace=team", "--restarts=7", "--gcsfuse")
    assert "${" not in "".join(line for line in text.splitlines() if not line.startswith("#"))
    jobset = yaml.safe_load(text)
    manifest.check(jobset, manifest.JOBSET)
    assert jobset["metadata"]["name"] == "run1" and jobset["metadata"]["namespace"] == "team"
    assert jobset["spec"]["failurePolicy"]["maxRestarts"] == 7
    (group,) = jobset["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    assert (group["replicas"], job["parallelism"], job["completions"]) == (1, hosts, hosts)
    pod = job["template"]["spec"]
    assert list(pod["nodeSelector"].values()) == [label, topology.split(":")[1]]
    assert job["template"]["metadata"]["annotations"] == {"gke-gcsfuse/volumes": "true"}
    (container,) = pod["containers"]
    assert container["image"] == "registry/flexjax:1"
    assert container["resources"]["limits"]["google.com/tpu"] == chips
    assert container["command"] == ["python", "-m", "flexjax.main", "--distributed"]
    assert [word.replace("$$(", "$(") for word in container["args"]] == TRAINING, "Kubernetes reads $$( as $("
    assert not any(re.search(r"(?<!\$)\$\(", word) for word in container["args"])
    assert [mount["name"] for mount in container["volumeMounts"]] == [volume["name"] for volume in pod["volumes"]]
    assert container["volumeMounts"][0]["mountPath"] == "/mnt/flexjax"
    assert pod["volumes"][0]["persistentVolumeClaim"]["claimName"] == "shared"
    named = job["podFailurePolicy"]["rules"][1]["onExitCodes"]["containerName"]
    assert named == container["name"], "a rule about a container that does not exist never fits"


def test_jobset_starts_again_on_75_only(shell):
    jobset = yaml.safe_load(render(shell))
    expected = {0: "done", 75: "restart"} | dict.fromkeys((1, 2, 3, 4, 5, 6, 7, 74, 76, 137, 139), "fail")
    assert {code: manifest.outcome(jobset, code) for code in expected} == expected
    assert manifest.outcome(jobset, 143, disrupted=True) == "restart", "the cluster took the host away"


def test_jobset_spot(shell):
    selector = "cloud.google.com/gke-spot"
    pods = [yaml.safe_load(render(shell, *options))["spec"]["replicatedJobs"][0] for options in ([], ["--spot"])]
    plain, spot = (pod["template"]["spec"]["template"]["spec"]["nodeSelector"] for pod in pods)
    assert spot == plain | {selector: "true"} and selector not in plain


def test_jobset_is_applied(shell):
    dry = render(shell)
    assert shell.run("jobset.sh", *OPTIONS["jobset.sh"], "--", *TRAINING).returncode == 0
    assert shell.calls("kubectl") == [["apply", "--filename=-"]]
    assert yaml.safe_load((shell.state / "applied.yaml").read_text()) == yaml.safe_load(dry)


def test_manifest_check_refuses(shell):
    """The check itself: an unknown field, a missing one, a wrong type, a wrong value."""
    good = render(shell)
    spoiled = [
        good.replace("restartPolicy: Never", "restartPolicy: Never\n              hostnetwork: true"),
        good.replace("              restartPolicy: Never\n", ""),
        good.replace("completions: 4", 'completions: "4"'),
        good.replace("restartPolicy: Never", "restartPolicy: OnFailure"),
        good.replace("containerName: flexjax", "containername: flexjax"),
        good.replace("jobset.x-k8s.io/v1alpha2", "jobset.x-k8s.io/v1"),
    ]
    for text in spoiled:
        assert text != good
        with pytest.raises(AssertionError, match="manifest"):
            manifest.check(yaml.safe_load(text), manifest.JOBSET)
