"""One job in several processes, as on several hosts: the same result, one writer, one voice."""

import json

import pytest

from tests.commands.conftest import MATH
from tests.commands.processes import finish, start

MESH = ["--config.mesh.data=2", "--config.mesh.fsdp=2"]


def rows(directory):
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def finished(tiny, cache, tmp_path_factory):
    """The whole math job in one process and in two: their directories and what was said."""
    found = {}
    for count in (1, 2):
        directory = tmp_path_factory.mktemp("run") / str(count)
        arguments = [MATH, *tiny, *MESH, f"--workdir={directory}", "--config.train.log_every=1"]
        found[count] = directory, finish(start("main", count, arguments, cache))
        assert [code for code, _, _ in found[count][1]] == [0] * count, found[count][1]
    return found


def test_two_processes_train_what_one_trains(finished):
    alone, together = (rows(finished[count][0]) for count in (1, 2))
    assert [row["step"] for row in alone] == [row["step"] for row in together] == [1, 2, 3, 4]
    for one, two in zip(alone, together, strict=True):
        assert two["loss"] == pytest.approx(one["loss"], rel=1e-5)
    scores = [json.loads((finished[count][0] / "evaluation.json").read_text())["scores"] for count in (1, 2)]
    for subject, domains in scores[0].items():
        for domain, score in domains.items():
            assert scores[1][subject][domain]["bits_per_byte"] == pytest.approx(score["bits_per_byte"], rel=1e-4)


def test_process_0_alone_speaks(finished):
    (_, out, err), (_, silent_out, silent_err) = finished[2][1]
    assert "bits per byte" in out and "expert math  step 4/4" in err and "[Gloo]" not in out
    assert silent_out == "" and silent_err == ""


def test_both_artefacts_are_sound(commands, finished):
    for part in ("public/anchor", "expert", "model"):
        result = commands.merge("verify", f"--model={finished[2][0] / part}")
        assert result.code == 0, result.err


def test_a_process_with_another_config_is_refused_by_name_in_all(tiny, cache, tmp_path):
    def other(index):
        return ["--config.train.weight_decay=0.2"] if index else []

    ended = finish(start("main", 2, [MATH, *tiny, f"--workdir={tmp_path}"], cache, other), 60)
    for code, _, err in ended:
        assert code == 2
        assert "process 1" in err and "config.train.weight_decay is 0.2, expected 0.0" in err.splitlines()[-1], err


def test_two_processes_score_what_one_scores(finished, corpus, cache):
    model, text = finished[1][0] / "model", f"math={corpus}/math/validation.jsonl"
    arguments = [f"--model={model}", f"--data={text}", "--mesh=data=2,fsdp=2", "--max_kilobytes=1", "--json"]
    scores = []
    for count in (1, 2):
        ended = finish(start("evaluate", count, arguments, cache))
        assert [code for code, _, _ in ended] == [0] * count, ended
        assert all(out == "" for _, out, _ in ended[1:])
        scores.append(json.loads(ended[0][1].splitlines()[-1])["scores"]["math"]["bits_per_byte"])
    assert scores[1] == pytest.approx(scores[0], rel=1e-5)
