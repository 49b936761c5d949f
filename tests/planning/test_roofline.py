"""Time from figures: links of a torus, and what hides behind what."""

import dataclasses

import pytest

from flexjax import config as config_lib
from flexjax import errors, hardware, jobs, sharding
from flexjax.planning import collectives, facts, roofline, search, topology
from tests.planning import conftest

SECONDS = facts.Seconds(compute=3.0, memory=2.0, operations=4.0)


def test_a_ring_uses_both_directions_and_an_open_line_one():
    wide, small = (topology.parse(name, analytic=True) for name in ("v5e:16x16", "v5e:4x4"))
    link = 1600e9 / 8 / 4
    rows, both = {"data": 16, "fsdp": 16}, {"fsdp": 256}
    assert topology.bandwidth(wide, rows, ["fsdp"]) == topology.bandwidth(wide, rows, ["data"]) == 2 * link
    assert topology.bandwidth(wide, both, ["fsdp"]) == 4 * link
    assert topology.bandwidth(wide, {"data": 32, "fsdp": 8}, ["fsdp"]) == link  # half a ring is a line
    assert topology.bandwidth(small, {"fsdp": 16}, ["fsdp"]) == 2 * link


def test_a_switch_ends_at_the_island():
    machine = topology.parse("gpu:32", hardware.chip("h100"))
    assert topology.bandwidth(machine, {"data": 4, "fsdp": 8}, ["fsdp"]) == 450e9
    assert topology.bandwidth(machine, {"data": 4, "fsdp": 8}, ["data"]) == 50e9
    assert topology.bandwidth(machine, {"data": 1, "fsdp": 32}, ["fsdp"]) == 400e9  # eight share the work of each island


def one(axes, gigabytes, kind="all-gather", group=8):
    return collectives.Collective(kind, axes, group, gigabytes * 1e9, 1, "")


def estimate(exchanges, machine=None):
    found = facts.Facts("", 0, 0, seconds=SECONDS, exchanges=exchanges)
    config = conftest.job("public", mesh={"fsdp": 4, "tensor": 2})
    mesh = sharding.make_mesh(config.mesh)
    return roofline.estimate(found, machine or conftest.cpu(chip=conftest.CHIP), mesh, useful=8e12, tokens=1000, steps=3600)


def test_weights_hide_behind_computation_and_activations_do_not():
    assert estimate([]).step == 4.0
    assert estimate([one(("fsdp",), 30)]).step == 4.0  # 3 s at 1e10
    assert estimate([one(("data", "fsdp"), 50)]).step == 5.0
    found = estimate([one(("fsdp",), 50), one(("tensor",), 20)])
    assert found.step == 7.0 and found.links == {"fsdp": 5.0, "tensor": 2.0}


def test_what_follows_from_a_step():
    found = estimate([])
    assert found.mfu == 8e12 / (8 * 1e12 * 4.0)
    assert found.tokens_per_second == 250
    assert found.hours == 4.0 and found.chip_hours == 32.0


def test_on_a_ring_everybody_to_everybody_travels_further():
    machine = topology.parse("v5e:2x4", analytic=True)
    near, far = (
        roofline.estimate(
            facts.Facts("", 0, 0, seconds=SECONDS, exchanges=[one(("expert",), 1, kind)]),
            machine,
            sharding.make_mesh(config_lib.MeshConfig(expert=8), machine.devices),
            useful=1,
            tokens=1,
            steps=1,
        ).links["expert"]
        for kind in ("all-gather", "all-to-all")
    )
    assert far == (2 / 4 + 4 / 4) * near


def test_no_figures_no_estimate():
    assert estimate([], conftest.cpu()) is None


@pytest.mark.parametrize("name", ["v5e:16x16", "v5p:4x4x8", "v6e:2x2", "v5e:2x4"])
def test_slices_on_paper(name):
    machine = topology.parse(name, analytic=True)
    assert not machine.compiles and machine.hosts == max(1, len(machine.devices) // 4)


@pytest.mark.parametrize(
    "name", ["v4:2x2", "v5e", "v5e:", "v5e:4x4x4", "v5p:4x4", "tpu:8", "cpu:", "cpu:0", "gpu:x", "v5e:0x4"]
)
def test_an_unknown_topology_lists_those_that_are_known(name):
    with pytest.raises(errors.ConfigError, match=r"16x16.*4x4x8"):
        topology.parse(name, hardware.chip("h100"))


def test_search_prefers_what_fits_and_then_what_is_fast():
    config = conftest.job("expert", "7b")
    machine = topology.parse("v5e:4x4", analytic=True)
    found = search.rank(config, jobs.architecture(config), machine)
    assert [one.fits for one in found] == sorted((one.fits for one in found), reverse=True)
    fitting = [one for one in found if one.fits]
    assert fitting and [one.seconds for one in fitting] == sorted(one.seconds for one in fitting)
    assert all(one.peak <= search.MARGIN * machine.chip.memory for one in fitting)
    best = fitting[0].applied(config)
    assert dataclasses.asdict(best.mesh)["fsdp"] == fitting[0].mesh["fsdp"]
    assert best.train.accumulation == fitting[0].accumulation


def test_search_without_figures_goes_by_memory():
    config = conftest.job("joint")
    found = search.rank(config, jobs.architecture(config), conftest.cpu())
    assert [one.peak for one in found] == sorted(one.peak for one in found)
    assert {one.mesh["expert"] for one in found} > {1, 2}


def test_search_says_when_no_mesh_divides_the_job():
    config = conftest.job("public", batch_size=3)
    with pytest.raises(errors.ConfigError, match=r"train\.batch_size=3"):
        search.rank(config, jobs.architecture(config), topology.parse("v5e:4x4", analytic=True))
