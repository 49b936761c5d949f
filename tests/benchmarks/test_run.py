"""Every method of the suite at its smallest size, by the command that a user types."""

import dataclasses
import json
import os
import signal
import subprocess
import sys
import time

import pytest
from etils import epath

from benchmarks import run
from benchmarks.reporting import rows
from benchmarks.suite import catalogue, suites, training, tuning
from flexjax import config as config_lib
from flexjax import errors, tree
from flexjax.model import transformer
from flexjax.train import flops
from tests.commands.zygote import ENVIRONMENT, ROOT

SUITE, SIZE = suites.find("installed", "smoke")
EVERY = catalogue.entries(SUITE, SIZE)


def start(home, *flags):
    command = [sys.executable, "-m", "benchmarks.run", f"--workdir={home / 'stages'}", f"--out={home / 'results'}", *flags]
    compiled = {"JAX_COMPILATION_CACHE_DIR": f"{home / 'compiled'}", "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    environment = os.environ | ENVIRONMENT | compiled  # methods share most of their programs, none of which compiles for long
    return subprocess.Popen(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def finish(process):
    out, err = process.communicate(timeout=600)
    return process.returncode, out, err


SMOKE = ("--suite=installed", "--size=smoke", "--seeds=1")


@pytest.fixture(scope="module")
def killed(tmp_path_factory):
    """The home of a suite that was killed once its first expert was there, and what it had finished."""
    home = tmp_path_factory.mktemp("suite")
    process = start(home, *SMOKE, "--methods=all")
    deadline = time.monotonic() + 300
    while process.poll() is None and not list(home.glob("stages/seed0/expert-code-*/done.json")):
        assert time.monotonic() < deadline
        time.sleep(0.1)
    process.send_signal(signal.SIGKILL)
    out = finish(process)[1]
    done = {path.parent.name: path.stat().st_mtime_ns for path in home.glob("stages/seed0/*/done.json")}
    assert done, out
    return home, done


@pytest.fixture(scope="module")
def finished(killed):
    """The same suite, started again: its home, and what it said."""
    code, out, err = finish(start(killed[0], *SMOKE, "--methods=all"))
    assert code == 0, err
    return killed[0], out


def test_every_method_has_a_row_and_none_failed(finished):
    found = rows.read(finished[0] / "results" / rows.FILE)
    assert {row["method"]: row["error"] for row in found} == dict.fromkeys(EVERY, "")
    assert {row["method"] for row in found if not row["scores"]["report"]} == set()


def test_what_was_finished_before_a_kill_is_not_done_again(killed, finished):
    home, done = killed
    assert {name: (home / "stages/seed0" / name / "done.json").stat().st_mtime_ns for name in done} == done
    assert "anchor: begins" not in finished[1]


def test_a_finished_suite_does_nothing_but_report(finished):
    before = (finished[0] / "results" / rows.FILE).read_bytes()
    (finished[0] / "results" / "report.md").unlink()
    code, out, _ = finish(start(finished[0], *SMOKE, "--methods=all"))
    assert code == 0
    assert out.count("finished, skipped") == len(EVERY)
    assert "begins" not in out
    assert (finished[0] / "results" / rows.FILE).read_bytes() == before
    assert (finished[0] / "results" / "report.md").exists()


def ledger(finished, method):
    return next(row["ledger"] for row in rows.read(finished[0] / "results" / rows.FILE) if row["method"] == method)


def test_budgets_are_matched_by_the_ledger(finished):
    """As near as whole steps of a run of a few steps come."""
    flex = ledger(finished, "flex")
    assert set(flex["runs"]) == {f"expert-{name}" for name in SUITE.owners}
    for method, times in {"joint-1x": 1, "joint-2x": 2, "joint-frozen-1x": 1, "joint-frozen-2x": 2, "control": 1}.items():
        (entry,) = ledger(finished, method)["runs"].values()
        step = entry["flops"] / entry["steps"]
        assert abs(entry["flops"] - times * flex["training_flops"]) <= step / 2, method
    (data,) = ledger(finished, "joint-data")["runs"].values()
    assert data["tokens"] == sum(run["tokens"] for run in flex["runs"].values())
    assert ledger(finished, "btm")["forwards"] == len(SUITE.domains)
    assert ledger(finished, "anchor")["training_flops"] == 0


def test_documents_are_the_same_for_all_methods(finished):
    found = rows.read(finished[0] / "results" / rows.FILE)
    sizes = {row["method"]: {d: s["bytes"] for d, s in row["scores"]["report"].items()} for row in found}
    assert all(each == sizes["anchor"] for each in sizes.values())


def test_a_method_that_fails_is_reported_and_the_others_run(finished, tmp_path):
    """Also one that raises something nobody thought of; its row says so, and the next start tries it again."""
    said: list[str] = []
    bench = training.Bench(SUITE, "smoke", epath.Path(finished[0] / "stages"), "", 0, said.append)

    def broken(lab):
        raise errors.DataError("no such text;\nput it there")

    chosen = {
        "broken": catalogue.Entry("Broken", "core", broken),
        "worse": catalogue.Entry("Worse", "core", lambda lab: [][1]),
        "anchor": EVERY["anchor"],
    }
    run.run_seed(bench, chosen, tmp_path)
    found = {row["method"]: row for row in rows.read(tmp_path / rows.FILE)}
    assert {name: row["status"] for name, row in found.items()} == {"broken": "failed", "worse": "failed", "anchor": "ok"}
    assert found["broken"]["error"] == "DataError: no such text;\\nput it there", "one line"
    assert found["worse"]["error"].startswith("IndexError")
    run.run_seed(bench, chosen, tmp_path)
    assert sum("finished, skipped" in line for line in said) == 1


def test_rows_made_of_something_else_are_made_anew_and_that_is_said(finished, tmp_path, monkeypatch):
    said: list[str] = []
    bench = training.Bench(SUITE, "smoke", epath.Path(finished[0] / "stages"), "", 0, said.append)
    chosen = {"anchor": EVERY["anchor"]}
    run.run_seed(bench, chosen, tmp_path)
    monkeypatch.setattr(tuning, "FRACTION", 0.5)
    run.run_seed(bench, chosen, tmp_path)
    assert any("changed, run anew" in line for line in said)
    assert len(rows.read(tmp_path / rows.FILE)) == 1


def test_rows_beside_another_anchor_are_made_anew_once_anything_is_run(finished, tmp_path):
    """The same seed on another machine may give another anchor, and a gap is measured from one anchor."""
    said: list[str] = []
    bench = training.Bench(SUITE, "smoke", epath.Path(finished[0] / "stages"), "", 0, said.append)
    run.run_seed(bench, {"anchor": EVERY["anchor"]}, tmp_path)
    (row,) = rows.read(tmp_path / rows.FILE)
    (tmp_path / rows.FILE).write_text(json.dumps(row | {"anchor": "of another machine"}) + "\n")
    run.run_seed(bench, {"anchor": EVERY["anchor"]}, tmp_path)
    assert any("finished, skipped" in line for line in said), "nothing is missing: no anchor is trained to find out"
    run.run_seed(bench, {"anchor": EVERY["anchor"], "flex": EVERY["flex"]}, tmp_path)
    assert any("anchor: what it is made of changed, run anew" in line for line in said)
    assert {row["anchor"] for row in rows.read(tmp_path / rows.FILE)} == {row["anchor"]}


def test_a_starved_anchor_stops_the_suite(finished, tmp_path):
    """No row says that a method failed: none was tried."""
    starved = dataclasses.replace(SUITE, gate={"smoke": 1.0})
    bench = training.Bench(starved, "smoke", epath.Path(finished[0] / "stages"), "", 0, lambda _: None)
    with pytest.raises(errors.NumericError, match="beside a starved anchor everything wins"):
        run.run_seed(bench, {"flex": EVERY["flex"]}, tmp_path)
    assert not (tmp_path / rows.FILE).exists()


@pytest.mark.parametrize("suite", suites.SUITES.values(), ids=lambda suite: suite.name)
@pytest.mark.parametrize("size", ["cpu", "gpu"])
def test_the_anchor_costs_more_than_experts_and_joint_models_after_it(suite, size):
    shapes = suites.SIZES[size]
    dense = transformer.Architecture(shapes.model, transformer.dense_banks(shapes.model))
    assert shapes.anchor_steps >= 10 * shapes.expert_steps

    def cost(architecture, trainable):
        leaves = tree.partition(transformer.abstract(architecture), trainable)[0]
        return flops.per_token(architecture, leaves, shapes.seq_len).total

    pair = (*transformer.dense_banks(shapes.model), config_lib.Bank("e", ("e",), shapes.model.d_ff))
    one = cost(transformer.Architecture(shapes.model, pair, 2), "experts/e/.*") * shapes.expert_steps * suite.expert_share
    assert 2 * one * len(suite.owners) <= cost(dense, ".*") * shapes.anchor_steps


@pytest.mark.parametrize(
    ("flags", "code", "said"),
    [
        (["--suite=table1"], 2, "--data_root"),
        (["--suite=table1", "--data_root=nowhere"], 3, "nowhere/flexmix-mini/public/train.jsonl.gz"),
        (["--suite=table3"], 2, "table1, table2, installed"),
        (["--suite=installed", "--size=huge"], 2, "smoke, cpu, gpu"),
        (["--suite=installed", "--methods=flexx"], 2, "flex-sequence"),
        (["--suite=installed", "--tasks=all", "--data_root=nowhere"], 3, "nowhere/tasks"),
        (["--suite=installed", "--sweep=train.rate=1"], 2, "train.rate"),
        (["--suite=installed", "--sweep=train.learning_rate=much"], 2, "much"),
        (["--suite=installed", "--sweep=train.learning_rate=-1.0"], 2, "train.learning_rate"),
        (["--suite=installed", "--sweep=anchor.train.steps=5"], 2, "expert.*"),
        (["--suite=installed", "--seeds=0"], 2, "seeds"),
        (["--suite=installed", "core"], 2, "core"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_mistakes_get_one_line(tmp_path, flags, code, said):
    found, _, err = finish(start(tmp_path, *flags))
    assert (found, len(err.strip().splitlines())) == (code, 1), err
    assert said in err
