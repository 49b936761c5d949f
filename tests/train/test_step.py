"""One step: it trains what it should and nothing else, in every way that it can be computed."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from flexjax import checkpoint, config, sharding, tree
from flexjax.model import router, transformer
from flexjax.train import program
from flexjax.train import step as step_lib
from tests.train import tiny

EXPECTED = {
    "pair": {f"experts/math/{leaf}" for leaf in ("ffn/gate", "ffn/up", "ffn/down", "router/row", "router/raw_bias")},
    "merged": {f"experts/joint/router/{leaf}" for leaf in ("row", "raw_bias")},
}


@functools.cache
def after(name, steps=3, **changes):
    """State and metrics after some steps on one batch."""
    run = tiny.run(name, **changes)
    state, rows = run.state, []
    for _ in range(steps):
        state, metrics = run(tiny.batch(), state)
        rows.append(jax.tree.map(np.asarray, metrics))
    return state, rows


@pytest.mark.parametrize("name", ["pair", "merged"])
def test_state_optimizer_and_checkpoint_hold_exactly_the_trainable_leaves(name):
    state, _ = after(name)
    assert set(tree.flatten(state.trainable)) == EXPECTED[name]
    adam = next(part for part in state.optimizer if isinstance(part, optax.ScaleByAdamState))
    assert set(tree.flatten(adam.mu)) == set(tree.flatten(adam.nu)) == EXPECTED[name]
    sizes = 3 * tree.count(state.trainable) + sum(leaf.size for leaf in jax.tree.leaves(state) if leaf.ndim == 0)
    assert sum(leaf.size for leaf in jax.tree.leaves(state)) == sizes
    assert len(checkpoint.describe(state)) == 3 * len(EXPECTED[name]) + 5  # and five counters


@pytest.mark.parametrize("name", ["pair", "merged", "joint"])
def test_frozen_leaves_keep_their_bytes_while_every_trained_leaf_moves(name):
    run = tiny.run(name)
    assert run.state is tiny.run(name).state
    frozen, trainable = tiny.digest(run.frozen), tiny.digest(run.state.trainable)
    state, rows = after(name)
    assert tiny.digest(run.frozen) == frozen
    moved = tiny.digest(state.trainable)
    assert [path for path in moved if moved[path] == trainable[path]] == []
    assert rows[0]["loss"] > rows[-1]["loss"] > 0
    given = tree.flatten(tiny.params_of(name))
    assert all(frozen[path] == found for path, found in tiny.digest(given).items() if path in frozen)


def test_joint_training_trains_all_but_the_biases_by_their_pattern():
    state, _ = after("joint")
    assert set(tree.flatten(tiny.params_of("joint"))) - set(tree.flatten(state.trainable)) == {"experts/joint/router/bias"}


@pytest.mark.parametrize(
    ("name", "changes", "tolerance"),
    [
        ("pair", {"scan_layers": True, "remat": "dots"}, 1e-5),
        ("merged", {"scan_layers": True, "remat": "full"}, 1e-5),
        ("pair", {"compute_dtype": "bfloat16"}, 2e-2),
    ],
)
def test_scan_remat_and_bfloat16_agree_with_the_plain_step(name, changes, tolerance):
    (plain, expected), (other, found) = after(name, steps=1), after(name, steps=1, **changes)
    for key in ("loss", "cross_entropy", "gradient_norm"):
        np.testing.assert_allclose(found[0][key], expected[0][key], rtol=tolerance)
    assert {leaf.dtype for leaf in jax.tree.leaves(other.trainable)} == {jnp.float32.dtype}
    if tolerance < 1e-3:
        for path, leaf in tree.flatten(other.optimizer[1].mu).items():
            np.testing.assert_allclose(leaf, tree.flatten(plain.optimizer[1].mu)[path], rtol=1e-3, atol=1e-7)


@pytest.mark.parametrize("uneven", [False, True])
def test_accumulation_equals_one_big_batch(uneven):
    batch = tiny.batch(uneven=uneven)
    (whole, expected), (parts, found) = tiny.run("pair")(batch), tiny.run("pair", accumulation=4)(batch)
    for key in ("loss", "cross_entropy", "z", "router_z", "gradient_norm", "share", "entropy", "bias"):
        np.testing.assert_allclose(found[key], expected[key], rtol=1e-5, err_msg=key)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-8), parts.optimizer[1].mu, whole.optimizer[1].mu
    )


@pytest.mark.parametrize(
    ("changes", "seq_len", "parts"),
    [
        ({"batch_size": 8}, 256, 4),
        ({"batch_size": 8}, 16, 1),
        ({"batch_size": 8}, 4096, 8),
        ({"batch_size": 6}, 128, 1),  # 4 rows would do, but do not divide it
        ({"batch_size": 8, "accumulation": 2}, 256, 4),
        ({"batch_size": 8, "accumulation": 8}, 16, 8),
        ({"batch_size": 8, "accumulation": 2, "load_balance_loss": 0.1}, 256, 2),  # a loss of the whole batch
    ],
)
def test_on_one_cpu_a_step_is_summed_over_parts_that_its_caches_hold(changes, seq_len, parts):
    settings = config.TrainConfig(**changes)
    assert program.micro_batches(settings, sharding.one_device(), seq_len) == parts
    settings = dataclasses.replace(settings, accumulation=1)
    assert program.micro_batches(settings, sharding.make_mesh(config.MeshConfig(fsdp=8)), seq_len) == 1


def test_a_batch_without_a_token_that_counts_gives_a_finite_step():
    batch = tiny.batch() | {"weights": np.zeros((4, 16), np.float32)}
    state, metrics = tiny.run("pair")(batch)
    assert float(metrics["cross_entropy"]) == 0 and not metrics["skipped"]
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))


@pytest.mark.parametrize("name", ["pair", "joint"])
def test_the_loss_of_a_sequence_depends_on_that_sequence_alone(name):
    settings = tiny.settings(name, router_z_loss=0.1)

    @functools.partial(jax.jit, compiler_options=tiny.QUICK)
    def losses(batch):
        params = tiny.params_of(name)
        return step_lib.sequence_losses(
            params, batch, tiny.ARCHITECTURES[name], transformer.Compute(), settings, head_trainable=False
        )[0]

    batch, other = tiny.batch(0), tiny.batch(1)
    mixed = {key: np.concatenate([batch[key][:1], other[key][1:]]) for key in batch}
    mixed["weights"] = mixed["weights"] * np.array([[1], [0.5], [0], [1]], np.float32)
    a, b = losses(batch), losses(mixed)
    np.testing.assert_allclose(a[0], b[0], rtol=0 if name == "pair" else 1e-6)
    assert (np.abs(a[1:] - b[1:]) > 1e-3).all()


@pytest.fixture(scope="module")
def joint_loss():
    """Loss, metrics and gradient as functions of (load_balance_loss, router_z_loss), compiled once."""

    @functools.partial(jax.jit, compiler_options=tiny.QUICK)
    def run(balance, router_z):
        settings = tiny.settings("joint", load_balance_loss=balance, router_z_loss=router_z, z_loss=1e-2)
        architecture, batch = tiny.ARCHITECTURES["joint"], tiny.batch()

        def loss(params):
            return step_lib.batch_loss(params, batch, architecture, transformer.Compute(), settings, head_trainable=True)

        (_, metrics), gradient = jax.value_and_grad(loss, has_aux=True)(tiny.params_of("joint"))
        return metrics, gradient

    return run


def test_each_part_of_the_loss_is_reported_and_adds_up(joint_loss):
    metrics, _ = joint_loss(0.3, 0.2)
    expected = metrics["cross_entropy"] + 1e-2 * metrics["z"] + 0.2 * metrics["router_z"] + 0.3 * metrics["load_balance"]
    np.testing.assert_allclose(metrics["loss"], expected, rtol=1e-6)
    assert all(float(metrics[part]) > 0 for part in ("cross_entropy", "z", "router_z", "load_balance"))


@pytest.mark.parametrize("weights", [(1.0, 0.0), (0.0, 1.0)])
def test_each_router_loss_pulls_at_the_rows(joint_loss, weights):
    base, pulled = joint_loss(0.0, 0.0)[1], joint_loss(*weights)[1]
    for bank in ("public", "joint"):
        change = pulled["experts"][bank]["router"]["row"] - base["experts"][bank]["router"]["row"]
        assert float(jnp.abs(change).max()) > 1e-4


def test_routing_metrics_are_per_layer_and_expert_in_canonical_order(joint_loss):
    metrics, _ = joint_loss(0.0, 0.0)
    assert metrics["share"].shape == metrics["bias"].shape == (2, 3) and metrics["entropy"].shape == (2,)
    np.testing.assert_allclose(metrics["share"].sum(axis=1), 1, rtol=1e-5)
    assert ((metrics["entropy"] > 0) & (metrics["entropy"] <= np.log(3) + 1e-5)).all()
    np.testing.assert_allclose(metrics["bias"], [[0, -0.2, -0.2]] * 2, rtol=1e-6)


def test_bias_stays_at_most_zero_for_any_raw_value_and_keeps_a_gradient():
    run = tiny.run("pair")
    for raw in (-1e30, -30.0, 0.0, 30.0, 1e30):
        trainable = tree.flatten(run.state.trainable)
        trainable["experts/math/router/raw_bias"] = jnp.full((2, 1), raw)
        state, metrics = run(tiny.batch(), dataclasses.replace(run.state, trainable=tree.unflatten(trainable)))
        assert (metrics["bias"] <= 0).all() and not metrics["skipped"], raw
        gradient = state.optimizer[1].mu["experts"]["math"]["router"]["raw_bias"]
        assert (gradient != 0).all() or abs(raw) == 1e30, raw
        assert (router.constrain(state.trainable)["experts"]["math"]["router"]["bias"] <= 0).all()


def test_reported_bias_is_what_the_next_step_routes_with():
    state, rows = after("pair")
    next_bias = np.asarray(tiny.run("pair")(tiny.batch(3), state)[1]["bias"])
    kept = np.asarray(router.constrain(state.trainable)["experts"]["math"]["router"]["bias"])
    np.testing.assert_array_equal(next_bias, np.concatenate([np.zeros((2, 1), np.float32), kept], axis=1))
    assert (next_bias[:, 1] != rows[0]["bias"][:, 1]).all()


def test_the_default_decay_leaves_norms_rows_and_biases_alone():
    decayed = tree.flatten(tree.matches(router.free(tiny.params_of("pair")), config.TrainConfig().decayed))
    kept = {path.rsplit("/", 1)[1] for path, decays in decayed.items() if not decays}
    assert kept == {"q_norm", "k_norm", "attention", "ffn", "norm", "row", "raw_bias"}
