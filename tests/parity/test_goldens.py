"""Our forward pass over imported folders against what transformers computed on them."""

import json

import numpy as np
import pytest

from flexjax.experts.huggingface import importing
from tests.parity import folders


@pytest.mark.parametrize("name", folders.CASES)
def test_logits_masks_and_greedy_continuations_are_those_of_transformers(name, tmp_path):
    facts = folders.golden(name)
    report = importing.import_folder(folders.write_golden(tmp_path / "hf", name), tmp_path / "ours")
    for what, error in folders.check_case(facts, tmp_path / "ours", report["experts"]).items():
        assert error < folders.TOLERANCE, f"{name} {what}: relative error {error:.1e}; {folders.RENEW}"


def test_a_near_tie_ends_the_comparison_and_nothing_else_does():
    logits = np.eye(4)[[0, 1, 2, 3]]
    assert folders.check_greedy(logits, 1, np.array([0, 1, 2]), np.ones(3)) == 3
    assert folders.check_greedy(logits, 1, np.array([0, 3, 3]), np.array([1, 1e-5, 1])) == 1
    with pytest.raises(AssertionError):
        folders.check_greedy(logits, 1, np.array([0, 1, 3]), np.ones(3))


def test_goldens_are_small():
    assert sum(path.stat().st_size for path in folders.GOLDENS.iterdir()) < 1_000_000


def test_fused_layout_is_the_same_model(tmp_path):
    facts = folders.golden("moe7_mha")
    config, state = json.loads(str(facts["config"])), folders.state_of(facts)
    plain = folders.write(tmp_path / "plain", config, state)
    fused = folders.write(tmp_path / "fused", config, folders.fuse(state), shards=3)
    reports = [importing.import_folder(source, tmp_path / f"{source.name}_ours") for source in (plain, fused)]
    assert reports[0]["digest"] == reports[1]["digest"]
    assert reports[0]["tensors"] > reports[1]["tensors"]
