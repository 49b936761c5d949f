"""Other ways of merging: each computes what its definition says, and starts from what it must start from."""

import functools
import itertools

import jax
import ml_dtypes
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flexjax import baselines, errors, tree
from flexjax import config as config_lib
from flexjax.experts import surgery
from flexjax.model import router, transformer
from flexjax.train import flops
from flexjax.train import optimizer as optimizer_lib
from flexjax.train import program as program_lib
from flexjax.train import step as step_lib
from tests.model import noise
from tests.train import tiny

TINY = config_lib.ModelConfig(
    vocab_size=23, d_model=8, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=4, d_ff=6, init_std=0.4
)
DENSE = transformer.Architecture(TINY, transformer.dense_banks(TINY))
ANCHOR, MATH, CODE = (noise.params(DENSE, seed, std=1.0) for seed in range(3))  # so large that RMSNorm's epsilon is nothing
TOKENS = np.random.default_rng(0).integers(23, size=(2, 7))
ROWS = {name: noise.params(DENSE, 9 + i)["layers"]["norms"]["ffn"] for i, name in enumerate(("public", "math", "code"))}


@functools.cache
def program(architecture_key):
    architecture = transformer.Architecture(TINY, *architecture_key)
    return jax.jit(
        lambda params: transformer.logits(params, transformer.forward(params, TOKENS, architecture).hidden),
        compiler_options=tiny.QUICK,
    )


def logits(architecture, params):
    return np.asarray(program((architecture.banks, architecture.top_k))(params))


def assert_same_function(found, expected=(DENSE, ANCHOR)):
    np.testing.assert_allclose(logits(*found), logits(*expected), atol=1e-5)


def equal(a, b):
    a, b = tree.flatten(a), tree.flatten(b)
    return list(a) == list(b) and all(np.asarray(a[p]).tobytes() == np.asarray(b[p]).tobytes() for p in a)


# soup


@given(st.lists(st.floats(1e-3, 1e3), min_size=1, max_size=5))
@settings(max_examples=20)
def test_a_soup_of_equal_models_is_the_model(weights):
    assert equal(baselines.soup([ANCHOR] * len(weights), weights), ANCHOR)


def test_a_soup_is_the_weighted_mean_whatever_the_scale_of_the_weights():
    found = tree.flatten(baselines.soup([ANCHOR, MATH], [2, 6]))
    for path, leaf in found.items():
        expected = 0.25 * tree.flatten(ANCHOR)[path] + 0.75 * tree.flatten(MATH)[path]
        np.testing.assert_allclose(leaf, expected, rtol=1e-6, atol=1e-7)
    assert equal(baselines.soup([ANCHOR, MATH]), baselines.soup([MATH, ANCHOR], [5, 5]))
    assert equal(baselines.soup([ANCHOR, MATH, CODE], [0, 1, 0]), MATH)


def test_a_soup_keeps_dtypes_and_adds_up_in_double_precision():
    large, small = ({"x": np.full(3, value, np.float32)} for value in (2**24, 1))
    np.testing.assert_array_equal(baselines.soup([large, *[small] * 255])["x"], np.full(3, (2**24 + 255) / 256, np.float32))
    coarse = baselines.soup([{"x": np.ones(3, ml_dtypes.bfloat16)}] * 2)["x"]
    assert coarse.dtype == ml_dtypes.bfloat16 and (coarse == 1).all()


@pytest.mark.parametrize("weights", [[1], [1, -1], [0, 0], [1, float("nan")]], ids=str)
def test_weights_that_make_no_mean_are_refused(weights):
    with pytest.raises(errors.ConfigError, match="2 models cannot have the weights"):
        baselines.soup([ANCHOR, MATH], weights)


def test_models_of_other_paths_make_no_mean():
    with pytest.raises(errors.ConfigError, match="head/kernel is not in all"):
        baselines.soup([ANCHOR, {**MATH, "head": {"norm": MATH["head"]["norm"]}}])
    with pytest.raises(errors.ConfigError, match="0 models"):
        baselines.soup([])


def test_models_of_other_shapes_make_no_mean():
    """Not even where NumPy would stretch one to the other."""
    flat = tree.flatten(MATH)
    for leaf in (flat["layers/norms/ffn"][:1], flat["layers/norms/ffn"][..., :1], flat["layers/norms/ffn"][0]):
        odd = tree.unflatten(flat | {"layers/norms/ffn": leaf})
        with pytest.raises(errors.ConfigError, match=r"layers/norms/ffn is \[2, 8\] in one model and \["):
            baselines.soup([ANCHOR, MATH, odd])


# dense experts put together


def test_no_coordination_takes_ffns_from_the_dense_and_all_else_from_the_anchor():
    architecture, params = baselines.no_coordination(DENSE, ANCHOR, {"math": MATH, "code": CODE}, ROWS)
    assert architecture.experts == ("public", "code", "math") and architecture.top_k == 3
    shared, experts = surgery.split(params, architecture.banks)
    assert equal(shared, surgery.split(ANCHOR, DENSE.banks)[0])
    for name, model in {"public": ANCHOR, "math": MATH, "code": CODE}.items():
        assert equal(experts[name]["ffn"], surgery.split(model, DENSE.banks)[1]["public"]["ffn"])
        assert equal(experts[name]["router"], {"row": ROWS[name]})
    other = baselines.no_coordination(DENSE, ANCHOR, {"code": CODE, "math": MATH}, ROWS)
    assert other[0] == architecture and equal(other[1], params)


def test_no_coordination_of_what_did_not_learn_is_the_anchor():
    assert_same_function(baselines.no_coordination(DENSE, ANCHOR, {"math": ANCHOR, "code": ANCHOR}, ROWS))


def test_rows_must_be_those_of_the_experts():
    with pytest.raises(errors.ConfigError, match="rows of code, math, public for experts math, public"):
        baselines.no_coordination(DENSE, ANCHOR, {"math": MATH}, ROWS)


def test_branch_train_mix_averages_everything_but_the_ffns():
    architecture, params = baselines.branch_train_mix(DENSE, ANCHOR, {"math": MATH, "code": CODE}, seed=1)
    assert architecture.top_k == 2 and [bank.name for bank in architecture.banks] == [baselines.JOINT]
    shared, experts = surgery.split(params, architecture.banks)
    assert equal(shared, surgery.split(baselines.soup([ANCHOR, MATH, CODE]), DENSE.banks)[0])
    assert equal(experts["code"]["ffn"], surgery.split(CODE, DENSE.banks)[1]["public"]["ffn"])
    rows = np.stack([expert["router"]["row"] for expert in experts.values()])
    assert len(np.unique(rows)) == rows.size and 0.5 * TINY.init_std < rows.std() < 2 * TINY.init_std
    assert not equal(params, baselines.branch_train_mix(DENSE, ANCHOR, {"math": MATH, "code": CODE}, seed=2)[1])


@pytest.mark.parametrize("top_k", [1, 2, 3])
def test_branch_train_mix_of_identical_models_is_the_model(top_k):
    found = baselines.branch_train_mix(DENSE, MATH, {"math": MATH, "code": MATH}, seed=0, top_k=top_k)
    assert_same_function(found, (DENSE, MATH))


def test_only_dense_models_are_taken_apart():
    merged = baselines.no_coordination(DENSE, ANCHOR, {"math": MATH}, {name: ROWS[name] for name in ("public", "math")})
    with pytest.raises(errors.ConfigError, match="expected a dense model, got one of public, math"):
        baselines.copies(*merged, ROWS, public_apart=True)


# copies


@pytest.mark.parametrize("top_k", [1, 2, None])
@pytest.mark.parametrize("public_apart", [False, True])
def test_copies_begin_as_the_anchor(public_apart, top_k):
    found = baselines.copies(DENSE, ANCHOR, ROWS, public_apart=public_apart, biased=public_apart, top_k=top_k)
    assert found[0].experts == ("public", "code", "math") and found[0].top_k == (top_k or 3)
    assert_same_function(found)


def test_copies_can_leave_public_where_it_is():
    architecture, params = baselines.copies(DENSE, ANCHOR, ROWS, public_apart=True, biased=True)
    trainable, frozen = tree.partition(params, f"experts/{baselines.OWNERS}/.*")
    assert set(frozen["experts"]) == {"public"} and "bias" not in frozen["experts"]["public"]["router"]
    assert set(tree.flatten(params)) == set(tree.flatten(transformer.abstract(architecture)))
    np.testing.assert_array_equal(trainable["experts"][baselines.OWNERS]["router"]["bias"], np.zeros((2, 2)))
    with pytest.raises(errors.ConfigError, match="public_apart=True"):
        baselines.copies(DENSE, ANCHOR, ROWS, public_apart=False, biased=True)


# LoRA


def test_lora_begins_as_the_anchor_exactly():
    architecture, params = baselines.lora(DENSE, ANCHOR, rank=2, seed=0, name="math")
    assert set(tree.flatten(params)) == set(tree.flatten(transformer.abstract(architecture)))
    np.testing.assert_array_equal(logits(architecture, params), logits(DENSE, ANCHOR))


def test_lora_is_its_adapter_alone_and_folds_into_a_dense_model():
    architecture, params = baselines.lora(DENSE, ANCHOR, rank=2, seed=0, name="math")
    adapter, rest = tree.partition(params, baselines.ADAPTER)
    assert len(tree.flatten(adapter)) == 6 and tree.count(adapter) == 3 * 2 * TINY.num_layers * (TINY.d_model + TINY.d_ff)
    trained = tree.combine(tree.partition(noise.params(architecture, 5, std=0.3), baselines.ADAPTER)[0], rest)
    assert not np.allclose(logits(architecture, trained), logits(DENSE, ANCHOR), atol=1e-2)
    folded = baselines.fold(architecture, trained)
    assert folded[0] == DENSE
    assert_same_function(folded, (architecture, trained))


def test_only_lora_models_are_folded():
    two = {name: ROWS[name] for name in ("public", "math")}
    for found in (
        (DENSE, ANCHOR),
        baselines.no_coordination(DENSE, ANCHOR, {"math": MATH}, two),
        baselines.no_coordination(DENSE, ANCHOR, {"math": MATH, "code": CODE}, ROWS),
    ):
        with pytest.raises(errors.ConfigError, match=r"one low-rank adapter, got experts public.*`lora` made"):
            baselines.fold(*found)


def test_a_training_step_trains_the_adapter_and_nothing_else():
    dense, source = tiny.ARCHITECTURES["dense"], tiny.Letters(vocab=12)
    architecture, params = baselines.lora(dense, tiny.params_of("dense"), rank=4, seed=0, name="math")
    config = tiny.settings("dense", trainable=baselines.ADAPTER, weight_decay=0.0)
    trainable, frozen = tree.partition(params, config.trainable)
    optimizer = optimizer_lib.make(config, trainable)
    step = step_lib.make_step(architecture, transformer.Compute(), config, optimizer, head_trainable=False)
    step, state, losses = jax.jit(step, compiler_options=tiny.QUICK), step_lib.init_state(trainable, optimizer), []
    for number in range(10):
        batch = {name: rows for name, rows in tiny.stream(source=source).batch(number).items() if name in program_lib.INPUTS}
        state, found = step(state, frozen, batch)
        losses.append(float(found["cross_entropy"]))
    assert losses[-1] < losses[0] - 0.2
    np.testing.assert_array_equal(found["share"], np.tile([[0.0, 1.0]], (2, 1)))
    after, before = tree.flatten(state.trainable), tree.flatten(trainable)
    assert list(after) == list(before) and all((np.asarray(after[path]) != before[path]).any() for path in before)
    cost = flops.per_token(architecture, trainable, tiny.SEQ_LEN)
    assert cost.total < flops.per_token(dense, tiny.params_of("dense"), tiny.SEQ_LEN).total


# FedAvg


def test_owners_who_pull_in_opposite_directions_cancel():
    steps = tree.map_with_path(lambda _, leaf: np.float32(2**-10) * np.round(leaf * 8), MATH)
    start = tree.map_with_path(lambda _, leaf: np.round(leaf * 16) / np.float32(16), ANCHOR)
    up = tree.map_with_path(lambda _, a, b: a + b, start, steps)
    down = tree.map_with_path(lambda _, a, b: a - b, start, steps)
    found = tree.flatten(baselines.soup([up, down], [5, 5]))
    assert all((leaf == found[path]).all() for path, leaf in tree.flatten(start).items())


@given(st.integers(1, 400), st.integers(1, 90))
def test_rounds_cover_all_steps_at_falling_rates(steps, local):
    rounds = baselines.federated_rounds(steps, local, 0.5)
    assert all(r.steps == local for r in rounds[:-1])
    assert sum(r.steps for r in rounds) == steps and all(1 <= r.steps <= local for r in rounds)
    rates = [r.learning_rate for r in rounds]
    assert all(0.05 <= rate <= 0.5 for rate in rates) and all(a > b for a, b in itertools.pairwise(rates))


def test_rounds_without_steps_are_refused():
    with pytest.raises(errors.ConfigError, match="local_steps=0"):
        baselines.federated_rounds(10, 0, 0.1)


def test_names_are_in_canonical_order_everywhere():
    for found in (
        baselines.copies(DENSE, ANCHOR, dict(reversed(ROWS.items())), public_apart=True),
        baselines.branch_train_mix(DENSE, ANCHOR, {"math": MATH, "code": CODE}, seed=0),
    ):
        laid = [name for bank in found[0].banks for name in bank.experts]
        assert tuple(laid) == router.canonical_order(laid)
