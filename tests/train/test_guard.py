"""A step without a usable gradient is skipped whole (G12)."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import tree
from flexjax.train import step as step_lib
from tests.train import tiny


def weights(value):
    batch = tiny.batch(7)
    batch["weights"] = batch["weights"].copy()
    batch["weights"][2, 3] = value
    return batch


def spike():
    """A batch whose losses cancel but whose gradient is about a million times the usual."""
    batch = tiny.batch(7)
    batch["weights"] = batch["weights"].copy()
    batch["weights"][:, 0::2] *= 1e6
    batch["weights"][:, 1::2] *= 1 - 1e6
    return batch


def frozen_with(run, path, value):
    flat = tree.flatten(run.frozen)
    return tree.unflatten(flat | {path: jnp.full_like(flat[path], value)})


def huge_logits(run):
    flat = tree.flatten(run.frozen)
    return tree.unflatten(flat | {"head/kernel": flat["head/kernel"] * 1e17})


def poisoned(state, value):
    flat = tree.flatten(state.trainable)
    flat["experts/math/ffn/gate"] = jnp.full_like(flat["experts/math/ffn/gate"], value)
    return dataclasses.replace(state, trainable=tree.unflatten(flat))


def warm(run, updates=step_lib.GUARD_WARMUP + 1):
    state = run.state
    for index in range(updates):
        state, metrics = run(tiny.batch(index % 4), state)
        assert not metrics["skipped"]
    return state


@pytest.fixture(scope="module")
def runs():
    whole, in_parts = tiny.run("pair"), tiny.run("pair", accumulation=4)
    return {1: (whole, warm(whole)), 4: (in_parts, warm(in_parts, 2))}


CASES = {
    "batch holds NaN": lambda run, state: (weights(np.nan), run.frozen, state),
    "batch holds infinity": lambda run, state: (weights(np.inf), run.frozen, state),
    "batch holds minus infinity": lambda run, state: (weights(-np.inf), run.frozen, state),
    "a frozen leaf holds NaN": lambda run, state: (tiny.batch(7), frozen_with(run, "head/kernel", np.nan), state),
    "a frozen leaf holds infinity": lambda run, state: (tiny.batch(7), frozen_with(run, "embed/embedding", np.inf), state),
    "the expert overflows": lambda run, state: (tiny.batch(7), run.frozen, poisoned(state, 3e38)),
    "the gradient jumps": lambda run, state: (spike(), run.frozen, state),
    "the loss is finite, the gradient is not": lambda run, state: (tiny.batch(7), huge_logits(run), run.state),
    "one micro-batch holds NaN": lambda run, state: (weights(np.nan), run.frozen, state),
}


@pytest.mark.parametrize("case", CASES)
def test_exactly_one_step_is_skipped_and_the_state_is_bitwise_unchanged(case, runs):
    run, state = runs[4 if "micro" in case else 1]
    batch, frozen, before = CASES[case](run, state)
    after, metrics = run.step(before, frozen, batch)
    assert bool(metrics["skipped"]) and int(metrics["bad_steps"]) == 1
    if case == "the loss is finite, the gradient is not":
        assert np.isfinite(metrics["loss"]) and not np.isfinite(metrics["gradient_norm"])
    if case == "the gradient jumps":
        assert np.isfinite(metrics["loss"]) and metrics["gradient_norm"] > 1e4 * before.norm_mean
    for field in ("trainable", "optimizer", "updates", "norm_mean"):
        assert tiny.same_bytes(getattr(before, field), getattr(after, field)), field
    assert int(after.step) == int(before.step) + 1
    following, metrics = run(tiny.batch(1), dataclasses.replace(after, trainable=state.trainable))
    never, _ = run(tiny.batch(1), dataclasses.replace(before, trainable=state.trainable))
    assert not metrics["skipped"] and int(following.bad_steps) == 0
    assert tiny.same_bytes(dataclasses.replace(following, step=never.step), never)


def test_bad_steps_count_up_only_in_a_row(runs):
    run, state = runs[1]
    counts = []
    for bad in (True, True, True, False, True):
        state, metrics = run(weights(np.nan) if bad else tiny.batch(), state)
        counts.append(int(metrics["bad_steps"]))
    assert counts == [1, 2, 3, 0, 1]
    assert int(state.updates) == step_lib.GUARD_WARMUP + 2


def test_no_jump_is_told_before_the_running_mean_has_settled():
    run = tiny.run("pair")
    state, metrics = run(spike(), warm(run, 1))
    assert not metrics["skipped"] and float(metrics["gradient_norm"]) > 1e4
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
