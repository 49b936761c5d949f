"""Averages of shared leaves: a few rows at a time, whatever the files hold."""

import numpy as np
import pytest

from flexjax.experts import averaging
from tests.governance import parts


@pytest.fixture
def given(tmp_path):
    anchor = parts.write_anchor(tmp_path / "anchor")
    leaves = ("embed/embedding", "layers/attention/q")
    bundles = [
        parts.write_bundle(tmp_path / name, name, anchor, parts.moved(seed, leaves))
        for seed, name in enumerate(("alpha", "gamma"))
    ]
    return anchor, [*bundles, parts.write_bundle(tmp_path / "beta", "beta", anchor)]


@pytest.mark.parametrize(("path", "most"), [("embed/embedding", 5), ("layers/attention/q", 1)])
def test_a_few_rows_are_in_memory_at_a_time(given, path, most, monkeypatch):
    monkeypatch.setattr(averaging, "ROWS", 5)
    anchor, bundles = given
    pieces = list(averaging._means(path, anchor, bundles))
    assert max(len(piece) for piece in pieces) == most
    ours = anchor.tensor(path).astype(np.float64)
    theirs = [bundle.tensor(f"shared/{path}").astype(np.float64) for bundle in bundles[:2]]
    np.testing.assert_array_equal(np.concatenate(pieces), ((ours + sum(theirs)) / 3).astype(np.float32))
