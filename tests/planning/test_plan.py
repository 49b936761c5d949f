"""`flexjax.plan` as a user types it."""

import json

import pytest

from tests.commands import zygote

PUBLIC = ["--config=configs/public.py", "--config.model.num_layers=1", "--config.train.scan_layers=true"]
SEVEN = ["--config=configs/math_expert.py:7b"]
NUMBERS = ["--flops=1e12", "--memory_gb=1", "--bandwidth=1e11", "--link=1e10"]
CONFIG = 2


@pytest.fixture(scope="module")
def plan(tmp_path_factory):
    process = zygote.Zygote("flexjax.plan", tmp_path_factory.mktemp("plan"))
    yield process
    process.close()


def last(result):
    return json.loads(result.out.splitlines()[-1])


def test_a_plan_is_compiled_reported_and_not_made_again(plan, tmp_path):
    page = tmp_path / "plans" / "public.md"
    arguments = [*PUBLIC, "--topology=cpu:4", "--config.mesh.fsdp=4", *NUMBERS, f"--report={page}", "--json"]
    first = plan(*arguments, "--price=2")
    assert first.code == 0, first.err
    found = last(first)
    assert found["fits"] and found["facts"]["method"].startswith("compiled by jax")
    assert found["mesh"]["fsdp"] == 4 and found["machine"]["devices"] == 4
    assert found["memory"]["headroom"] == found["memory"]["limit"] - found["facts"]["peak"]
    assert found["price"] == pytest.approx(2 * found["roofline"]["chip_hours"])
    assert ["all-gather", ["fsdp"]] in [[row["kind"], row["axes"]] for row in found["facts"]["collectives"]]
    for words in ("fits: ", "MFU", "all-gather", "The estimate assumes", "checkpoint"):
        assert words in first.out and words in page.read_text()
    again = plan(*arguments, "--price=2")
    assert again.code == 0 and "nothing is compiled" in again.err and last(again) == found
    other = plan(*arguments, "--price=2", "--config.train.steps=7")
    assert other.code == 0 and "nothing is compiled" not in other.err and last(other)["job"]["steps"] == 7


def test_a_plan_that_does_not_fit_says_so_with_changes_that_help(plan):
    result = plan(*SEVEN, "--topology=v5e:2x2", "--analytic", "--config.mesh.fsdp=4", "--config.train.remat=none", "--json")
    assert result.code == CONFIG
    lines = result.err.splitlines()
    assert lines[-1].startswith("error: ") and "does not fit" in lines[-1] and "GiB" in lines[-1]
    advice = last(result)["advice"]
    assert len(advice) == 3 and any("train.remat=full" in change["text"] for change in advice)
    assert all(change["text"] in result.out for change in advice)


def test_gpus_are_planned_by_numbers_and_labelled(plan):
    result = plan(*SEVEN, "--topology=gpu:64", "--gpu=h100", "--config.mesh.fsdp=64", "--json")
    assert result.code == 0, result.err
    found = last(result)
    assert "formulas" in found["facts"]["method"] and found["machine"]["hosts"] == 8
    assert found["facts"]["arguments"] > 4.3e9 * 12 / 64  # the expert and its moments, and the frozen rest
    assert 0 < found["roofline"]["mfu"] < 1


def test_search_shows_the_meshes_and_plans_the_best(plan):
    result = plan(*SEVEN, "--topology=v5e:4x4", "--analytic", "--search", "--json")
    assert result.code == 0, result.err
    assert "meshes of 16 devices, by formulas" in result.out
    assert last(result)["fits"] and last(result)["mesh"]["fsdp"] > 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], ["--config and --topology are needed"]),
        (PUBLIC, ["--topology"]),
        ([*PUBLIC, "--topology=v9:2x2"], ["v9:2x2", "v5e: 1x1", "v5p: 2x2x1", "cpu:N", "gpu:N"]),
        ([*PUBLIC, "--topology=gpu:8"], ["--gpu=h100"]),
        ([*PUBLIC, "--topology=gpu:8", "--gpu=h42"], ["h42", "h100"]),
        ([*PUBLIC, "--topology=gpu:8", "--gpu=v5e"], ["--topology=v5e:16x16"]),
        ([*PUBLIC, "--topology=gpu:8", "--flops=1e12"], ["--memory_gb is missing"]),
        ([*PUBLIC, "--topology=cpu:8", "--config.mesh.fsdp=3"], ["mesh", "8 devices"]),
        ([*PUBLIC, "--topology=cpu:8", "--config.phase=none"], ["config.phase is 'none'", "public, expert, joint, router"]),
        ([*PUBLIC, "--topology=cpu:8", "--report=plan.txt"], ["plan.txt", ".md"]),
        ([*PUBLIC, "--topology=cpu:8", "--price=-1"], ["price"]),
        ([*PUBLIC, "--topology=cpu:8", "now"], ["unexpected argument 'now'"]),
    ],
)
def test_bad_input_is_one_clear_line(plan, arguments, says):
    result = plan(*arguments)
    assert result.code == CONFIG, result.err
    lines = result.err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: "), result.err
    for words in says:
        assert words in lines[0], f"{words!r} is not said: {lines[0]}"
