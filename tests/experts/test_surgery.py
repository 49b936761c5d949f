"""Experts in and out of a tree, by name: inverses, any order, and removal that leaves no trace (G2)."""

import itertools

import jax
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjax import config as config_lib
from flexjax import errors, tree
from flexjax.experts import surgery
from flexjax.model import router, transformer
from tests.model import noise

TINY = config_lib.ModelConfig(
    vocab_size=23, d_model=8, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4, d_ff=6, init_std=0.4
)
OWNERS = {"alpha": 6, "beta": 3, "code": 6, "math": 3, "zoo": 6}
TOKENS = np.random.default_rng(0).integers(23, size=(2, 7))


def _everything():
    banks = (*transformer.dense_banks(TINY), *(config_lib.Bank(name, (name,), f) for name, f in OWNERS.items()))
    return surgery.split(noise.params(transformer.Architecture(TINY, banks, 2)), banks)


SHARED, EXPERTS = _everything()
PROGRAMS = {}


def merge(names, order=None):
    chosen = {name: EXPERTS[name] for name in (order or ("public", *names))}
    return surgery.join(SHARED, chosen)


def equal(a, b):
    """Bit for bit, paths included."""
    a, b = tree.flatten(a), tree.flatten(b)
    return list(a) == list(b) and all(a[p].dtype == b[p].dtype and a[p].tobytes() == b[p].tobytes() for p in a)


def logits(params, banks):
    """With the program of these banks, compiled once: the same program on the same bytes."""
    if banks not in PROGRAMS:
        architecture = surgery.architecture(TINY, banks, min(2, len(router.expert_names(banks))))
        PROGRAMS[banks] = jax.jit(
            lambda params: transformer.logits(params, transformer.forward(params, TOKENS, architecture).hidden)
        )
    return np.asarray(PROGRAMS[banks](params))


SUBSETS = [s for size in range(1, 6) for s in itertools.combinations(sorted(OWNERS), size)]
REMOVALS = [(subset, name) for subset in SUBSETS for name in subset]


def test_there_are_eighty_removals():
    assert len(REMOVALS) == 80


@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_removing_equals_never_having_merged(subset):
    params, banks = merge(subset)
    for name in subset:
        left, left_banks = surgery.remove(params, banks, name)
        never, never_banks = merge([other for other in subset if other != name])
        assert left_banks == never_banks and equal(left, never)


@pytest.mark.parametrize("subset", [("alpha", "beta"), ("alpha", "beta", "code")], ids="+".join)
def test_removing_gives_the_same_logits(subset):
    params, banks = merge(subset)
    for name in subset:
        left, never = surgery.remove(params, banks, name), merge([other for other in subset if other != name])
        np.testing.assert_array_equal(logits(*left), logits(*never))


@pytest.mark.reliability
@pytest.mark.parametrize("subset", SUBSETS, ids="+".join)
def test_removing_gives_the_same_logits_for_every_subset(subset):
    test_removing_gives_the_same_logits(subset)


@settings(deadline=None, max_examples=50)
@given(st.permutations(["public", *OWNERS]))
def test_order_of_merging_does_not_matter(order):
    params, banks = merge(None, order)
    expected, expected_banks = merge(OWNERS)
    assert banks == expected_banks and equal(params, expected)
    assert [bank.experts for bank in banks] == [("public",), ("alpha", "code", "zoo"), ("beta", "math")]


@pytest.mark.parametrize("subset", [(), ("beta",), ("alpha", "zoo"), tuple(OWNERS)], ids="+".join)
def test_join_and_split_are_inverses(subset):
    params, banks = merge(subset)
    shared, experts = surgery.split(params, banks)
    assert equal(shared, SHARED) and set(experts) == {"public", *subset}
    for name, expert in experts.items():
        if subset:
            assert equal(expert, EXPERTS[name])
    again, again_banks = surgery.join(shared, experts, {bank.name: bank.experts for bank in banks})
    assert again_banks == banks and equal(again, params)


def test_joined_parameters_fit_their_architecture():
    for subset in ((), ("beta",), tuple(OWNERS)):
        params, banks = merge(subset)
        shapes = tree.flatten(transformer.abstract(surgery.architecture(TINY, banks, 1)))
        assert {p: leaf.shape for p, leaf in tree.flatten(params).items()} == {p: s.shape for p, s in shapes.items()}


def test_an_expert_keeps_its_own_numbers_whatever_the_banks():
    params, banks = surgery.join(SHARED, {n: EXPERTS[n] for n in ("public", "alpha", "zoo")}, {
        "zoo": ("zoo",), "public": ("public",), "mine": ("alpha",)
    })  # fmt: skip
    standard = merge(("alpha", "zoo"))
    np.testing.assert_allclose(logits(params, banks), logits(*standard), rtol=1e-5, atol=1e-5)


def test_what_cannot_be_joined_or_removed_is_refused():
    with pytest.raises(errors.ConfigError, match="needs the expert 'public'"):
        surgery.join(SHARED, {"alpha": EXPERTS["alpha"]})
    groups = {"public": ("public",), "mixed": ("alpha", "beta")}
    with pytest.raises(errors.ConfigError, match="'mixed' mixes experts of widths"):
        surgery.join(SHARED, {name: EXPERTS[name] for name in ("public", "alpha", "beta")}, groups)
    with pytest.raises(errors.ConfigError, match="beta"):
        surgery.join(
            SHARED, {name: EXPERTS[name] for name in ("public", "alpha", "beta")}, {"public": ("public",), "w6": ("alpha",)}
        )
    params, banks = merge(("alpha",))
    with pytest.raises(errors.PolicyError, match="no expert 'beta'"):
        surgery.remove(params, banks, "beta")
    with pytest.raises(errors.ConfigError, match="cannot be removed"):
        surgery.remove(params, banks, "public")


def test_narrow_keeps_the_strongest_units_in_order():
    expert = tree.map_with_path(lambda _, leaf: leaf.copy(), EXPERTS["alpha"])
    for layer, weak in enumerate([(0, 3), (2, 5)]):
        for unit in weak:
            for name in ("gate", "up"):
                expert["ffn"][name][layer, :, unit] *= 1e-3
            expert["ffn"]["down"][layer, unit] *= 1e-3
    small = surgery.narrow(expert, 4)
    for layer, kept in enumerate([[1, 2, 4, 5], [0, 1, 3, 4]]):
        np.testing.assert_array_equal(small["ffn"]["gate"][layer], expert["ffn"]["gate"][layer][:, kept])
        np.testing.assert_array_equal(small["ffn"]["up"][layer], expert["ffn"]["up"][layer][:, kept])
        np.testing.assert_array_equal(small["ffn"]["down"][layer], expert["ffn"]["down"][layer][kept])
    assert small["router"] is expert["router"] and surgery.width(small) == 4
    assert surgery.narrow(expert, 6) is expert
    for d_ff in (0, 7):
        with pytest.raises(errors.ConfigError, match=f"d_ff={d_ff}"):
            surgery.narrow(expert, d_ff)
