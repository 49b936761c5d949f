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
LOW = {"east": 2, "west": 2, "north": 1}  # ranks
TOKENS = np.random.default_rng(0).integers(23, size=(2, 7))


def _everything():
    banks = (*transformer.dense_banks(TINY), *(config_lib.Bank(name, (name,), f) for name, f in OWNERS.items()))
    banks += tuple(config_lib.Bank(name, (name,), 6, rank=rank) for name, rank in LOW.items())
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


ALL_SIZES = sorted({**OWNERS, **LOW})


@settings(deadline=None, max_examples=60)
@given(st.sets(st.sampled_from(ALL_SIZES), min_size=1), st.data())
def test_removing_equals_never_having_merged_whatever_the_sizes(subset, data):
    name, order = data.draw(st.sampled_from(sorted(subset))), data.draw(st.permutations(["public", *sorted(subset)]))
    left, left_banks = surgery.remove(*merge(subset, order), name)
    never, never_banks = merge(subset - {name})
    assert left_banks == never_banks and equal(left, never)
    params, banks = merge(subset)
    shared, experts = surgery.split(params, banks)
    assert equal(shared, SHARED) and all(equal(experts[other], EXPERTS[other]) for other in subset)


def test_removing_one_of_mixed_sizes_gives_the_same_logits():
    for name, rest in (("east", ["alpha", "west"]), ("alpha", ["east", "west"])):
        left = surgery.remove(*merge([name, *rest]), name)
        np.testing.assert_array_equal(logits(*left), logits(*merge(rest)))


def test_banks_are_by_width_and_rank():
    params, banks = merge(["alpha", "beta", "east", "north", "west"])
    assert [(bank.name, bank.experts, bank.d_ff, bank.rank) for bank in banks] == [
        ("public", ("public",), 6, 0),
        ("w6", ("alpha",), 6, 0),
        ("w3", ("beta",), 3, 0),
        ("r2", ("east", "west"), 6, 2),
        ("r1", ("north",), 6, 1),
    ]
    shapes = tree.flatten(transformer.abstract(surgery.architecture(TINY, banks, 2)))
    assert {p: leaf.shape for p, leaf in tree.flatten(params).items()} == {p: s.shape for p, s in shapes.items()}
    assert [(surgery.width(EXPERTS[name]), surgery.rank(EXPERTS[name])) for name in ("beta", "east")] == [(3, 0), (6, 2)]
    widths, ranks = (
        {name: size(EXPERTS[name]) for name in ("public", "beta", "east")} for size in (surgery.width, surgery.rank)
    )
    assert surgery.group(widths, ranks) == {"public": ("public",), "w3": ("beta",), "r2": ("east",)}


def test_a_low_rank_expert_and_its_expansion_say_the_same():
    names = ("alpha", "beta", "east", "north")
    whole = {name: surgery.expand(EXPERTS[name], EXPERTS["public"]) for name in ("public", *names)}
    assert whole["alpha"] is EXPERTS["alpha"] and surgery.rank(whole["east"]) == 0
    assert whole["east"]["router"] is EXPERTS["east"]["router"]
    np.testing.assert_allclose(logits(*surgery.join(SHARED, whole)), logits(*merge(names)), rtol=1e-4, atol=1e-4)
    one = {"ffn": jax.tree.map(lambda leaf: leaf[1], EXPERTS["east"]["ffn"])}
    layer = surgery.expand(one, {"ffn": {name: leaf[1] for name, leaf in EXPERTS["public"]["ffn"].items()}})
    np.testing.assert_array_equal(layer["ffn"]["down"], whole["east"]["ffn"]["down"][1])
    assert layer["ffn"]["down"].dtype == np.float32


def test_the_first_low_rank_expert_is_the_public_one():
    public = EXPERTS["public"]
    shapes = {name: leaf.shape for name, leaf in public["ffn"].items()}
    first = surgery.low_rank(shapes, 3, seed=1)
    assert equal(first, surgery.low_rank(shapes, 3, seed=1))
    assert equal(surgery.expand(first, public), {"ffn": public["ffn"]}) and surgery.rank(first) == 3
    assert not equal(first, surgery.low_rank(shapes, 3, seed=2))
    assert (first["ffn"]["gate"]["a"] != first["ffn"]["up"]["a"]).all()
    wide = {"gate": (2, 40, 90), "up": (2, 40, 90), "down": (2, 90, 40)}
    for name, fan_in in (("gate", 40), ("down", 90)):
        a = surgery.low_rank(wide, 16, seed=0)["ffn"][name]["a"]
        assert a.dtype == np.float32 and a.std() == pytest.approx(fan_in**-0.5, rel=0.05)
    for rank in (0, 7):
        with pytest.raises(errors.ConfigError, match=f"expert.rank={rank} must lie between 1 and 6"):
            surgery.low_rank(shapes, rank, seed=0)


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
    with pytest.raises(errors.ConfigError, match="'mixed' mixes experts of width 3, width 6; give each"):
        surgery.join(SHARED, {name: EXPERTS[name] for name in ("public", "alpha", "beta")}, groups)
    groups = {"public": ("public",), "mixed": ("alpha", "east", "north")}
    with pytest.raises(errors.ConfigError, match="'mixed' mixes experts of width 6, rank 1, rank 2; give each"):
        surgery.join(SHARED, {name: EXPERTS[name] for name in ("public", "alpha", "east", "north")}, groups)
    with pytest.raises(errors.ConfigError, match="beta"):
        surgery.join(
            SHARED, {name: EXPERTS[name] for name in ("public", "alpha", "beta")}, {"public": ("public",), "w6": ("alpha",)}
        )
    with pytest.raises(errors.ConfigError, match="rank 2 has no units of its own"):
        surgery.narrow(EXPERTS["east"], 3)
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
