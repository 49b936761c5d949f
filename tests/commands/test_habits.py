"""What a shell and its user do to commands: odd but legal paths, second starts, pipes, help, Ctrl-C."""

import json
import signal
import subprocess
import sys
import threading

import jax
import pytest

from flexjax import command
from tests.commands import zygote
from tests.commands.conftest import MATH, snapshot

BROKEN_PIPE, PREEMPTED = 141, 75


def test_second_start_skips_what_is_finished(commands, tiny, house):
    before = snapshot(house)
    result = commands.main(MATH, *tiny, f"--workdir={house}", "--json")
    assert result.code == 0
    stages = result.err.splitlines()
    assert [line.split(":")[0] for line in stages] == ["anchor", "expert 'math'", "model", "evaluation"]
    assert all("finished, skipped" in line for line in stages)
    *report, last = result.out.splitlines()
    assert report == (house.parent / "report.txt").read_text().splitlines(), "the same table, in the same order"
    assert json.loads(last)["workdir"] == str(house)
    after = snapshot(house)
    assert {name for name in after if after[name] != before.get(name)} <= {"report.png"}


def test_odd_but_legal_places(commands, tiny, anchor, corpus, tmp_path):
    """A relative workdir with spaces, brackets and unicode; a corpus behind a directory that looks like a pattern."""
    (tmp_path / "corpus [old]").symlink_to(corpus)
    place = "mein Lauf [é漢]"
    arguments = [*tiny, f"--config.data.root={tmp_path}/corpus [old]", f"--config.anchor.path={anchor}"]
    config = f"--config={zygote.ROOT}/configs/math_expert.py"
    result = commands.main(config, *arguments, f"--workdir={place}", cwd=tmp_path)
    assert result.code == 0, result.err
    assert (tmp_path / place / "model" / "manifest.json").exists()
    assert f"--model={place}/model" in result.out
    shown = commands.merge("verify", f"--model={place}/model", cwd=tmp_path)
    assert shown.code == 0, shown.err


def test_default_workdir(commands, tiny, anchor, tmp_path):
    config = f"--config={zygote.ROOT}/configs/math_expert.py"
    result = commands.main(config, *tiny, f"--config.anchor.path={anchor}", "--config.expert.d_ff=65", cwd=tmp_path)
    assert result.code == 2
    assert [path.name for path in (tmp_path / "runs").iterdir()] == ["math_expert-quickstart"]


@pytest.mark.parametrize("name", ["main", "merge", "evaluate"])
@pytest.mark.parametrize("flag", ["--help", "-h"])
def test_help(commands, name, flag):
    result = getattr(commands, name)(flag, "--nonsense")
    assert (result.code, result.err) == (0, "")
    assert f"python -m flexjax.{name}" in result.out
    assert "--[no]json" in result.out
    assert "grain" not in result.out, "flags of libraries"


def test_pipe_that_is_closed(commands, house):
    result = commands.merge("show", f"--model={house / 'model'}", stdout=zygote.BROKEN_PIPE)
    assert (result.code, result.err) == (BROKEN_PIPE, "")


@pytest.mark.parametrize("stdout", [zygote.BROKEN_PIPE, "/dev/full"])
def test_refusal_is_heard_though_stdout_is_gone(commands, house, anchor, stdout, tmp_path):
    """The table before the refusal cannot be printed; the refusal and its exit code stay."""
    create = ["create", f"--model={tmp_path / 'new'}", f"--anchor={anchor}", f"--expert={house / 'expert'}", "--top_k=9"]
    result = commands.merge(*create, stdout=stdout)
    assert result.code == 2
    assert result.err.startswith("error: top_k") and result.err.count("\n") == 1


def test_disk_full_behind_stdout(commands, house):
    result = commands.merge("show", f"--model={house / 'model'}", stdout="/dev/full")
    assert result.code == 6
    assert result.err.startswith("error: ") and result.err.count("\n") == 1


def test_interrupt(commands, tiny, anchor, tmp_path):
    """Ctrl-C during training: the step is saved, one line, exit code 75, and the next start continues."""
    listen = "import os, signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL); os.execv(sys.executable, sys.argv[1:])"
    command = [sys.executable, "-c", listen]  # a shell's background jobs ignore SIGINT, and so would their children
    command += [sys.executable, "-m", "flexjax.main", MATH, *tiny, f"--config.anchor.path={anchor}"]
    command += [f"--workdir={tmp_path / 'run'}", "--config.train.steps=100000", "--config.train.save_every=5"]
    process = subprocess.Popen(
        command,
        cwd=zygote.ROOT,
        env=commands.main.environment,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    deadline = threading.Timer(zygote.SECONDS, process.kill)
    deadline.start()
    with process:
        for line in process.stderr:
            if "step 1/" in line:
                break
        process.send_signal(signal.SIGINT)
        rest = process.stderr.read()
    deadline.cancel()
    assert process.returncode == PREEMPTED, rest
    last = rest.splitlines()[-1]
    assert last.startswith("stopped: ") and "saved step" in last and "start the same command again" in last
    assert "Traceback" not in rest


@pytest.mark.parametrize(
    ("error", "size"),
    [
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory allocating 395940212088 bytes."), "asked for 368.7 GiB"),
        (jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Ran out of memory. Used 20.1G of 15.75G hbm."), "asked for 20.1G"),
        (MemoryError("no"), "asked for more"),
    ],
)
def test_out_of_memory_says_what_was_asked_and_how_to_plan(error, size, monkeypatch, capsys):
    def main(_):
        raise error

    monkeypatch.setattr("sys.argv", ["main", "--config=a.py", "--config.train.steps=3"])
    monkeypatch.setattr(command, "_parse", lambda argv: [])
    with pytest.raises(SystemExit) as ended:
        command.run(main)
    said = capsys.readouterr().err
    assert ended.value.code == 2 and said.startswith("error: out of memory: ") and len(said.splitlines()) == 1
    assert size in said and "python -m flexjax.plan --config=a.py --config.train.steps=3 --topology=cpu:8" in said
