"""Every method of the suite, on the smallest size, as `python -m benchmarks.run --size=smoke --methods=all` runs them."""

import json

import pytest
from etils import epath

from benchmarks import report, run
from benchmarks.reporting import rows
from benchmarks.suite import catalogue, suites, training


@pytest.fixture(scope="module")
def suite():
    found, size = suites.find("installed", "smoke")
    return found, catalogue.entries(found, size)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, suite):
    """The directory of stages, that of results, and what was said."""
    home, out = tmp_path_factory.mktemp("stages"), tmp_path_factory.mktemp("results")
    said: list[str] = []
    run.run_seed(training.Bench(suite[0], "smoke", epath.Path(home), "", 0, said.append), suite[1], out)
    return home, out, said


def test_every_method_has_a_row_and_none_failed(finished, suite):
    found = rows.read(finished[1] / rows.FILE)
    assert {row["method"]: row.get("error") for row in found} == dict.fromkeys(suite[1], "")


