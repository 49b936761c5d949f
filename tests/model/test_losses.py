"""Losses: the hand-written gradient of the frozen head, chunking, and the router's auxiliary losses."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import config, sharding
from flexjax.model import losses, router

B, T, D, V = 2, 12, 5, 17


def example(dtype=jnp.float32):
    random = np.random.default_rng(0)
    hidden = jnp.asarray(random.normal(size=(B, T, D)), dtype)
    return hidden, jnp.asarray(random.normal(size=(D, V)), jnp.float32), jnp.asarray(random.integers(V, size=(B, T)))


def plain(hidden, kernel, targets, z_weight):
    logits = jnp.einsum("BTD,DV->BTV", hidden, kernel)
    log_z = jax.nn.logsumexp(logits, axis=-1)
    ce = -jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)[..., 0]
    return ce + z_weight * log_z**2, ce, log_z**2


@pytest.mark.parametrize("head_trainable", [True, False])
@pytest.mark.parametrize("chunk_logits", [2**22, 4 * B * V], ids=["whole", "chunks"])
def test_loss_and_gradient_equal_autodiff(head_trainable, chunk_logits, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_LOGITS", chunk_logits)
    monkeypatch.setattr(losses, "CHUNK_ROWS", 1)
    hidden, kernel, targets = example()
    weights = jnp.linspace(0, 1, B * T).reshape(B, T)

    def ours(hidden, kernel):
        total, *_ = losses.cross_entropy(hidden, kernel, targets, z_weight=0.3, head_trainable=head_trainable)
        return (total * weights).sum()

    values = losses.cross_entropy(hidden, kernel, targets, z_weight=0.3, head_trainable=head_trainable)
    for a, b in zip(values, plain(hidden, kernel, targets, 0.3), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6)
    d_hidden, d_kernel = jax.jit(jax.grad(ours, (0, 1)))(hidden, kernel)
    expected = jax.jit(jax.grad(lambda h, k: (plain(h, k, targets, 0.3)[0] * weights).sum(), (0, 1)))(hidden, kernel)
    np.testing.assert_allclose(d_hidden, expected[0], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(d_kernel, expected[1] if head_trainable else jnp.zeros((D, V)), rtol=1e-4, atol=1e-5)


def test_chunks_divide_the_window_and_bound_the_logits(monkeypatch):
    hidden, kernel, _ = example()
    monkeypatch.setattr(losses, "CHUNK_ROWS", 1)
    for limit in (1, 3 * B * V, 5 * B * V, 2**22):
        monkeypatch.setattr(losses, "CHUNK_LOGITS", limit)
        count = losses._chunk_count(hidden, kernel, None)
        assert T % count == 0 and (B * (T // count) * V <= limit or count == T)


def test_a_chunk_is_what_one_device_holds_and_no_fewer_rows_than_pay():
    hidden, kernel = jax.ShapeDtypeStruct((1024, 4096, 64), jnp.float32), jax.ShapeDtypeStruct((64, 100_352), jnp.float32)
    mesh = sharding.make_mesh(config.MeshConfig(data=2, fsdp=2, tensor=2))
    rows = 1024 * 4096 // 4
    assert losses._chunk_count(hidden, kernel, mesh) == min(rows // losses.CHUNK_ROWS, 4096) == 1024
    small = jax.ShapeDtypeStruct((64, 128), jnp.float32)
    assert losses._chunk_count(hidden, small, mesh) == rows * 64 // losses.CHUNK_LOGITS == 16


def test_bfloat16_hidden_states():
    hidden, kernel, targets = example(jnp.bfloat16)
    for trainable in (True, False):
        total, _, _ = losses.cross_entropy(hidden, kernel, targets, head_trainable=trainable)
        assert total.dtype == jnp.float32
        exact = plain(hidden.astype(jnp.float32), kernel, targets, 0.0)[0]
        np.testing.assert_allclose(total, exact, atol=0.1)
        gradient = jax.grad(lambda h: losses.cross_entropy(h, kernel, targets, head_trainable=trainable)[0].sum())(hidden)  # noqa: B023
        assert gradient.dtype == jnp.bfloat16


def test_only_the_first_value_has_a_gradient():
    hidden, kernel, targets = example()
    for trainable, part in ((True, 1), (False, 1), (False, 2)):
        gradient = jax.grad(
            lambda h: losses.cross_entropy(h, kernel, targets, z_weight=1.0, head_trainable=trainable)[part].sum()  # noqa: B023
        )(hidden)
        assert not np.asarray(gradient).any()


def test_sequence_mean_counts_only_weighted_tokens():
    values = jnp.array([[1.0, 2.0, 30.0], [4.0, 5.0, 6.0]])
    weights = jnp.array([[1.0, 1.0, 0.0], [0.0, 0.0, 0.0]])
    np.testing.assert_allclose(losses.sequence_mean(values, weights), [1.5, 0.0])


EVEN = jnp.array([0.5, 0.5])


def stats_of(load, probability):
    def rows(values):
        return jnp.tile(jnp.asarray(values, jnp.float32), (3, 2, 1))

    zero = jnp.zeros((3, 2))
    return router.RoutingStats(rows(load), rows(load), rows(probability), zero, zero)


def test_load_balance_is_one_when_uniform_and_the_number_of_experts_when_collapsed():
    np.testing.assert_allclose(losses.load_balance(stats_of([0.25] * 4, [0.25] * 4), EVEN), 1, rtol=1e-6)
    np.testing.assert_allclose(losses.load_balance(stats_of([1, 0, 0, 0], [1, 0, 0, 0]), EVEN), 4, rtol=1e-6)
    routing = router.route(jnp.ones((2, 3, 4)), jnp.zeros((4, 4)), jnp.zeros(4), 2, None)
    stats = jax.tree.map(lambda a: a[None], router.stats(routing, jnp.ones((2, 3))))
    np.testing.assert_allclose(losses.load_balance(stats, EVEN), 1, rtol=1e-6)
