"""What measures speed runs, at toy shapes, and says what it measured; how fast anything is, is never asserted here."""

import importlib
import json
import pathlib

import pytest

from benchmarks import decode, expert_step, growth, measuring, moe_layer, overheads
from benchmarks.peer import call
from flexjax import errors


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    monkeypatch.setattr(measuring, "REPEATS", 1)
    monkeypatch.setattr(decode, "NEW_TOKENS", 4)


@pytest.mark.parametrize("rank", [0, 4])
def test_an_experts_step_is_measured_with_what_it_costs(rank):
    found = expert_step.measure(expert_step.job("toy", rank=rank))
    assert found["ms"] > 0 and found["rss_mb"] > 0
    assert found["optimizer_bytes"] == 8 * found["trainable"] + 4, "two moments and a count"
    assert 0.7 < found["executed_over_analytic"] <= 1.001, "what no query may see is not computed, nothing is twice"
    assert found["micro_batches"] == 4


def test_a_mixture_layer_and_a_decoder_are_measured():
    assert set(moe_layer.measure("toy")) == {"forward_ms", "both_ms"}
    found = decode.measure("toy", 2)
    assert 0 < found["tokens"] <= 8


def test_growth_is_measured_beside_that_of_flops(monkeypatch):
    assert growth.slope((1, 2, 4), (3, 6, 12)) == pytest.approx(1) and growth.slope((1, 2, 4), (5, 5, 5)) == pytest.approx(0)
    monkeypatch.setitem(growth.AXES, "active", ((1, 2), growth.AXES["active"][1]))
    found = growth.measure("active", "toy")
    assert found["values"] == [1, 2] and min(found["ms"]) > 0
    assert 0 < found["slope_of_flops"] < 1, "a second expert costs less than all else"


def test_what_masks_metrics_and_checkpoints_cost_is_measured(monkeypatch):
    monkeypatch.setattr(overheads, "ROUNDS", 1)
    found = overheads.measure("toy")
    assert found["logging"] > 0 and found["checkpoints"] > 0
    assert found["together"] == pytest.approx(sum(found[name] for name in ("mask", "metrics", "logging", "checkpoints")))


def test_flags_of_benchmarks_do_not_clash():
    names = [f"benchmarks.{path.stem}" for path in sorted(pathlib.Path("benchmarks").glob("[a-z]*.py"))]
    assert "benchmarks.run" in names and "benchmarks.decode" in names
    for name in names:
        importlib.import_module(name)


def test_rows_replace_those_of_the_same_case_and_machine_only(tmp_path, monkeypatch):
    monkeypatch.setattr(measuring, "RESULTS", tmp_path)
    here, there = ({"device": device, "processor": "x"} for device in ("2 CPU cores", "GPU"))
    measuring.keep("rows.jsonl", [{"what": "a", "ms": 1}, {"what": "b", "ms": 2}], here)
    measuring.keep("rows.jsonl", [{"what": "a", "ms": 3}], there)
    measuring.keep("rows.jsonl", [{"what": "a", "ms": 4}], here)
    found = [json.loads(line) for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert [(row["what"], row["device"], row["ms"]) for row in found] == [
        ("b", "2 CPU cores", 2),
        ("a", "GPU", 3),
        ("a", "2 CPU cores", 4),
    ]


def test_sides_are_run_in_turn_and_only_measured_numbers_become_medians():
    said = []

    def side(name, values):
        def run():
            said.append(name)
            return {"name": name, "count": 7, "ms": values.pop(0)}

        return run

    found = measuring.in_turn({"ours": side("ours", [1.0, 9.0, 2.0]), "theirs": side("theirs", [5.0, 4.0, 6.0])}, rounds=3)
    assert said == ["ours", "theirs"] * 3
    assert found["ours"] == {"name": "ours", "count": 7, "ms": 2.0} and found["theirs"]["ms"] == 5.0


def test_without_the_second_environment_the_peer_says_how_to_build_it(monkeypatch):
    monkeypatch.setattr(call, "PYTHON", pathlib.Path("/nowhere/python"))
    with pytest.raises(errors.ConfigError, match=r"setup_torch\.sh"):
        call.run("train")
