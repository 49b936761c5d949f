"""Every phase and every kind of domain row, through the command; and that finished work is not mistaken for other work."""

import json

import pytest

from tests.commands.conftest import MATH

CONFIG = 2


def evaluation(directory):
    return json.loads((directory / "evaluation.json").read_text())["scores"]


def manifest(directory):
    return json.loads((directory / "manifest.json").read_text())


@pytest.mark.parametrize("rows", ["mean", "text", "random"])
def test_an_expert_with_each_kind_of_row(commands, tiny, rows, tmp_path):
    result = commands.main(MATH, *tiny, f"--config.anchor.rows={rows}", f"--workdir={tmp_path}")
    assert result.code == 0, result.err
    assert f"by the anchor's method '{rows}'" in result.err
    assert manifest(tmp_path / "public" / "anchor")["rows"] == rows
    assert ("statistics/projection" in manifest(tmp_path / "public" / "anchor")["tensors"]) == (rows == "text")


def test_joint_training_then_router_tuning(commands, tiny, anchor, tmp_path):
    joint = ["--config=configs/joint_moe.py", *tiny, f"--config.anchor.path={anchor}", f"--workdir={tmp_path / 'joint'}"]
    result = commands.main(*joint)
    assert result.code == 0, result.err
    assert set(evaluation(tmp_path / "joint")) == {"anchor", "model"}
    joint_anchor = manifest(tmp_path / "joint" / "model" / "anchor")
    assert not any(path.startswith("statistics/") for path in joint_anchor["tensors"]), "the old anchor's states do not hold"
    model = tmp_path / "joint" / "model"
    tuning = ["--config=configs/router_tuning.py", *tiny, f"--config.mixture.model_path={model}"]
    result = commands.main(*tuning, f"--workdir={tmp_path / 'tuned'}")
    assert result.code == 0, result.err
    assert set(evaluation(tmp_path / "tuned")) == {"anchor", "untuned", "tuned"}
    before, after = manifest(model), manifest(tmp_path / "tuned" / "model")
    assert before["anchor"] == after["anchor"] and set(before["experts"]) == set(after["experts"]) == {"code", "math"}
    assert before["experts"]["math"] != after["experts"]["math"]
    for directory in (model, tmp_path / "tuned" / "model"):
        assert commands.merge("verify", f"--model={directory}").code == 0
    again = commands.main(*joint)
    assert again.code == 0 and "joint model: finished, skipped" in again.err


def test_an_anchor_from_elsewhere_gets_what_owners_need(commands, tiny, house, tmp_path):
    """The anchor of a joint model, like an imported one, has no statistics; the public phase adds them, and a router memory."""
    joint = ["--config=configs/joint_moe.py", *tiny, f"--config.anchor.path={house / 'public' / 'anchor'}"]
    assert commands.main(*joint, f"--workdir={tmp_path / 'joint'}").code == 0
    bare = tmp_path / "joint" / "model" / "anchor"
    refused = commands.main(MATH, *tiny, f"--config.anchor.path={bare}", f"--workdir={tmp_path / 'expert'}")
    assert refused.code == CONFIG
    assert f"--config=configs/public.py --config.anchor.path={bare}" in refused.err
    public = ["--config=configs/public.py", *tiny, f"--config.anchor.path={bare}", f"--workdir={tmp_path / 'public'}"]
    result = commands.main(*public, "--config.model.router_memory=0.9")
    assert result.code == 0, result.err
    ready = tmp_path / "public" / "anchor"
    assert manifest(ready)["model"] == manifest(bare)["model"] | {"router_memory": 0.9}
    result = commands.main(MATH, *tiny, f"--config.anchor.path={ready}", f"--workdir={tmp_path / 'expert'}")
    assert result.code == 0, result.err
    assert "router memory 0.9" in commands.merge("show", f"--model={tmp_path / 'expert' / 'model'}").out


def test_a_finished_expert_is_not_taken_for_one_of_another_anchor_or_text(refuse, commands, tiny, anchor, tmp_path):
    other = ["--config=configs/public.py", *tiny, "--config.seed=1", f"--workdir={tmp_path / 'public'}"]
    assert commands.main(*other).code == 0
    mine = [MATH, *tiny, f"--workdir={tmp_path / 'math'}"]
    assert commands.main(*mine, f"--config.anchor.path={anchor}").code == 0
    refuse(
        commands.main, [*mine, f"--config.anchor.path={tmp_path / 'public' / 'anchor'}"], CONFIG, "expert is finished", "start"
    )
    texts = f"--config.data.train_files={tmp_path.parent}/nothing/{{domain}}"
    assert commands.main(*mine, f"--config.anchor.path={anchor}", texts).code == 3
