"""Stages are done once; grids of settings."""

import pytest
from etils import epath

from benchmarks.suite import stages, sweep
from flexjax import errors


@pytest.fixture
def suite(tmp_path):
    said: list[str] = []
    return stages.Stages(epath.Path(tmp_path), said.append), said


def test_a_stage_is_done_once_whatever_asks(suite):
    found, said = suite
    made = []

    def make(directory):
        made.append(directory)
        return {"run": 1}

    first = found.run("train", {"rate": 1.0}, make)
    assert found.run("train", {"rate": 1.0}, make) == first and made == [first]
    assert stages.facts(first)["run"] == 1 and len(said) == 2
    second = found.run("train", {"rate": 2.0}, make)
    assert second != first and stages.facts(first)["run"] == 1
    assert any("its inputs changed" in line for line in said)
    assert found.run("train-more", {"rate": 1.0}, make) != first
    assert sum("its inputs changed" in line for line in said) == 1, "another name is another stage"


def test_what_was_interrupted_goes_on_in_its_directory(suite):
    found, said = suite

    def interrupted(directory):
        (directory / "part").write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        found.run("train", {}, interrupted)
    directory = found.run("train", {}, lambda directory: {"part": (directory / "part").read_text()})
    assert stages.facts(directory)["part"] == "half" and stages.facts(directory)["resumed"]
    assert "train: goes on" in said


def test_a_grid_is_every_combination():
    assert sweep.grid(["train.learning_rate=2e-3,4e-3", "expert.rank=8", "expert.kind=low_rank"]) == [
        {"train.learning_rate": rate, "expert.rank": 8, "expert.kind": "low_rank"} for rate in (2e-3, 4e-3)
    ]
    assert sweep.grid(["expert.public_fraction=0"]) == [{"expert.public_fraction": 0.0}]


@pytest.mark.parametrize("flag", ["train.learning_rate", "train.learning_rate=", "train.rate=1", "expert.rank=1.5", "expert=1"])
def test_a_grid_that_cannot_be_is_refused(flag):
    with pytest.raises(errors.ConfigError):
        sweep.grid([flag])
