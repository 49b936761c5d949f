"""The accelerator's benchmark at toy shapes: every row is there, a case may fail, and a deadline is told."""

import json

import pytest

from benchmarks import accelerator, measuring, profiles
from flexjax import errors


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(measuring, "RESULTS", tmp_path)
    monkeypatch.setattr(measuring, "REPEATS", 1)


def kept(directory):
    rows = [json.loads(line) for line in (directory / accelerator.FILE).read_text().splitlines()]
    return {row["what"].removesuffix(", toy"): row for row in rows}


@pytest.mark.slow  # compiles nine steps
def test_every_case_is_measured(tmp_path, capsys):
    accelerator.measure("toy", 600)
    rows, names = kept(tmp_path), list(accelerator.cases(accelerator.SIZES["toy"]))
    assert list(rows) == [*names, "whole run"]
    assert not [row for row in rows.values() if "error" in row] and rows["whole run"]["left_out"] == []
    found = rows["correctness"]
    assert found["sparse_float32"] < 1e-5 and found["pair_float32"] < 1e-5 and found["sparse_float32_routed_otherwise"] == 0
    assert 1e-4 < found["sparse_bfloat16"] < 2e-2 and "far_off" not in found
    assert rows["peak"]["peak_tflops"] > 0 and rows["peak"]["bandwidth_gbps"] > 0
    for name, row in rows.items():
        if "step" in name or "forward" in name or "prefill" in name:
            assert row["mfu"] > 0 and row["tokens_per_second"] > 0 and row["layers"] == 2, name
        if "step" in name:
            assert row["predicted_gb"] > 0 and row["argument_gb"] > 0, name
        if "decode" in name:
            assert row["of_bandwidth"] > 0 and 4 <= row["experts_read"] <= 8, name
    profile = rows["expert step, 7B, full"]
    assert set(profile["profile_ms"]) == {*profiles.SCOPES, "other"} and "profile_error" not in profile
    assert profile["profile_events"] and profile["profile_ms"]["experts"] > 0
    printed = capsys.readouterr().out.split("predicted over compiled")[1]
    assert all(name in printed for name in names)


def test_the_full_size_has_every_case():
    assert list(accelerator.cases(accelerator.SIZES["full"])) == [
        "correctness",
        "peak",
        "grouped matmul",
        *(f"expert step, {size}, {kind}" for size in ("7B", "1B") for kind in ("full", "rank 64")),
        *(f"joint step, 7B, {k} of 8 experts" for k in (2, 4)),
        *(f"merged forward, 7B, {k} of 8 experts" for k in (2, 4)),
        "prefill, 7B, 4 of 8 experts",
        *(f"decode, 7B, 4 of 8 experts, batch {batch}" for batch in (1, 32)),
    ]


def test_a_case_that_fails_leaves_its_error_and_the_rest_runs(tmp_path, monkeypatch):
    def fails(session):
        raise RuntimeError("RESOURCE_EXHAUSTED: out of\n memory")

    monkeypatch.setattr(accelerator, "cases", lambda size: {"large": fails, "peak": accelerator.peak})
    accelerator.measure("toy", 600)
    rows = kept(tmp_path)
    assert rows["large"]["error"] == "RuntimeError: RESOURCE_EXHAUSTED: out of memory"
    assert rows["peak"]["peak_tflops"] > 0 and "error" not in rows["whole run"]


def test_the_deadline_leaves_a_row_that_names_what_was_left_out(tmp_path):
    accelerator.measure("toy", -1, ["decode"])
    (row,) = kept(tmp_path).values()
    assert "deadline" in row["error"]
    assert row["left_out"] == ["peak", "decode, 7B, 4 of 8 experts, batch 2"]


def test_a_layer_that_is_far_off_ends_the_run_with_an_error_behind_all_rows(tmp_path, monkeypatch):
    monkeypatch.setattr(accelerator, "TOLERANCE", 1e-12)
    with pytest.raises(errors.NumericError, match="sparse layer in float32"):
        accelerator.measure("toy", 600, ["correctness"])
    assert "bfloat16" in kept(tmp_path)["correctness"]["far_off"] and "whole run" in kept(tmp_path)


def test_events_are_added_up_by_the_scope_of_their_instruction():
    text = """
  %fusion.1 = f32[2]{0} fusion(%a), kind=kLoop, metadata={op_name="jit(step)/transpose(jvp(attention))/mul" stack_frame_id=1}
  ROOT dot.2 = f32[2]{0} dot(%a, %b), metadata={op_type="dot" op_name="jit(step)/while/body/checkpoint/experts/dot_general"}
  %while.3 = f32[2]{0} while(%a), metadata={op_name="jit(step)/head/while"}"""
    events = [("fusion.1", 2e6), ("dot.2", 4e6), ("while.3", 9e6), ("copy.4", 1e6)]
    assert profiles.by_scope(events, text, steps=2) == {
        "attention": 1.0,
        "experts": 2.0,
        "head": 0.0,
        "optimizer": 0.0,
        "other": 0.5,
    }
