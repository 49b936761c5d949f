"""The routing rule: what is forbidden has probability exactly 0 and is never chosen (G1), whatever the weights hold."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import config as config_lib
from flexjax import errors
from flexjax.model import router

D = 4
GRID = [(experts, top_k) for experts in (2, 3, 5, 8) for top_k in (1, 2, 4, 9)]
DRAWS, BATCH = 5, 125  # times 16 combinations: 10 000 examples, each with a mask of its own


def example(experts, seed):
    """A batch of requests of 2 tokens. In odd draws one expert is poisoned, and forbidden to everybody."""
    random = np.random.default_rng([experts, seed])
    h = random.normal(size=(BATCH, 2, D)).astype(np.float32)
    rows = (random.normal(size=(experts, D)) * 10.0 ** random.integers(-2, 5)).astype(np.float32)
    bias = -np.abs(random.normal(size=experts)).astype(np.float32)
    allowed = random.random((BATCH, experts)) < random.random((BATCH, 1))
    poisoned, safe = random.permutation(experts)[:2]
    if seed % 2:
        allowed[:, poisoned] = False
        rows[poisoned] = bias[poisoned] = random.choice([np.nan, np.inf, -np.inf, 1e30])
    allowed[~allowed.any(axis=1), safe] = True
    return h, rows, bias, allowed


def violations(routing, top_k, allowed):
    """What a decision does wrong, as a list of words; the same judge for the rule and for its broken variants."""
    p, indices, gates = (np.asarray(a) for a in (routing.probabilities, routing.indices, routing.gates))
    experts, wrong = allowed.shape[1], []
    mask = np.broadcast_to(allowed[:, None], p.shape)
    if (p[~mask] != 0).any():
        wrong.append("a forbidden probability is not exactly 0")
    if not np.allclose(np.where(mask, p, 0).sum(axis=-1), 1, atol=1e-5):
        wrong.append("a forbidden expert scales the others")
    padded = np.concatenate([mask, np.ones((*mask.shape[:2], 1), bool)], axis=-1)  # the sentinel is always allowed
    if not np.take_along_axis(padded, indices, axis=-1).all():
        wrong.append("a forbidden expert is chosen")
    if (gates[indices == experts] != 0).any() or (gates[indices < experts] == 0).any():
        wrong.append("the sentinel and gate 0 differ")
    expected = np.minimum(top_k, (p > 0).sum(axis=-1))
    if not ((indices < experts).sum(axis=-1) == expected).all():
        wrong.append("not min(k, allowed) experts are chosen")
    if (np.diff(np.sort(indices, axis=-1), axis=-1) == 0)[np.sort(indices, axis=-1)[..., 1:] < experts].any():
        wrong.append("an expert is chosen twice")
    return wrong


@functools.cache
def compiled(rule, top_k):
    return jax.jit(lambda h, rows, bias, allowed: rule(h, rows, bias, top_k, allowed))


def judge(rule):
    """All violations of a rule over the 10 000 examples."""
    found = []
    for experts, top_k in GRID:
        for seed in range(DRAWS):
            h, rows, bias, allowed = example(experts, seed)
            found += violations(compiled(rule, top_k)(h, rows, bias, allowed), top_k, allowed)
    return found


def test_ten_thousand_masks():
    assert len(GRID) * DRAWS * BATCH == 10_000
    assert judge(router.route) == []


def _decide(probabilities, top_k):
    gates, indices = jax.lax.top_k(probabilities, min(top_k, probabilities.shape[-1]))
    indices = jnp.where(gates == 0, probabilities.shape[-1], indices)
    return router.Routing(probabilities, indices, gates, jnp.zeros(probabilities.shape[:2]))


def _logits(h, rows, bias):
    return jnp.einsum("BTD,ED->BTE", h, rows) + bias[None, None]


def masked_after_softmax(h, rows, bias, top_k, allowed):
    return _decide(jnp.where(allowed[:, None], jax.nn.softmax(_logits(h, rows, bias), axis=-1), 0), top_k)


def additive_mask(h, rows, bias, top_k, allowed):
    return _decide(jax.nn.softmax(_logits(h, rows, bias) + jnp.where(allowed[:, None], 0, -1e9), axis=-1), top_k)


def k_not_limited(h, rows, bias, top_k, allowed):
    good = router.route(h, rows, bias, top_k, allowed)
    gates, indices = jax.lax.top_k(good.probabilities, min(top_k, allowed.shape[1]))
    return router.Routing(good.probabilities, indices, gates, good.log_normalizer)


def mask_of_another_request(h, rows, bias, top_k, allowed):
    return router.route(h, rows, bias, top_k, jnp.roll(allowed, 1, axis=0))


def mask_of_the_first_request(h, rows, bias, top_k, allowed):
    return router.route(h, rows, bias, top_k, jnp.broadcast_to(allowed[:1], allowed.shape))


def mask_ignored(h, rows, bias, top_k, allowed):
    return router.route(h, rows, bias, top_k, None)


BROKEN = [
    masked_after_softmax, additive_mask, k_not_limited, mask_of_another_request, mask_of_the_first_request, mask_ignored
]  # fmt: skip


@pytest.mark.parametrize("rule", BROKEN, ids=lambda rule: rule.__name__)
def test_the_judge_catches_broken_masks(rule):
    """Each variant on the cheapest part of the grid that may show it: were one to pass, the examples would be too tame."""
    found = []
    for experts, top_k in [(5, 4), (8, 2)]:
        for seed in range(DRAWS):
            h, rows, bias, allowed = example(experts, seed)
            found += violations(compiled(rule, top_k)(h, rows, bias, allowed), top_k, allowed)
    assert found


def test_an_allowed_nan_does_not_let_a_forbidden_expert_in():
    rows = jnp.ones((3, D)).at[1].set(jnp.nan)
    allowed = np.array([[True, True, False], [True, False, True]])
    routing = router.route(jnp.ones((2, 1, D)), rows, jnp.zeros(3), 3, allowed)
    assert routing.probabilities[0, 0, 2] == 0 and 2 not in np.asarray(routing.indices[0])
    assert np.isnan(routing.gates[0]).any() and violations(jax.tree.map(lambda a: a[1:], routing), 3, allowed[1:]) == []


def test_forbidding_equals_deleting():
    h, rows, bias, _ = example(5, 0)
    allowed = np.tile([True, False, True, True, False], (BATCH, 1))
    masked = router.route(h, rows, bias, 2, allowed)
    deleted = router.route(h, rows[[0, 2, 3]], bias[[0, 2, 3]], 2, None)
    np.testing.assert_allclose(masked.probabilities[..., [0, 2, 3]], deleted.probabilities, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(masked.log_normalizer, deleted.log_normalizer, rtol=1e-5)
    np.testing.assert_array_equal(masked.indices, np.array([0, 2, 3])[np.asarray(deleted.indices)])


def test_gradients_of_the_masked_scores_equal_autodiff():
    h, rows, bias, allowed = example(5, 2)

    def plain(h, rows, bias):
        logits = jnp.where(allowed[:, None], _logits(h, rows, bias), -jnp.inf)
        return (jax.nn.softmax(logits, axis=-1) ** 2).sum() + jax.nn.logsumexp(logits, axis=-1).sum()

    def ours(h, rows, bias):
        routing = router.route(h, rows, bias, 2, allowed)
        return (routing.probabilities**2).sum() + routing.log_normalizer.sum()

    for a, b in zip(jax.grad(ours, (0, 1, 2))(h, rows, bias), jax.grad(plain, (0, 1, 2))(h, rows, bias), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())


def test_canonical_order_and_positions():
    banks = (
        config_lib.Bank("w3", ("zoo", "beta"), 3),
        config_lib.Bank("public", ("public",), 5, biased=False),
        config_lib.Bank("w5", ("alpha",), 5),
    )
    assert router.expert_names(banks) == ("public", "alpha", "beta", "zoo")
    assert router.positions(banks) == (2, 3, 1, 0)


def test_allowed_mask():
    names = ("public", "code", "math")
    np.testing.assert_array_equal(router.allowed_mask(names, ["math", "public"], 2), [[True, False, True]] * 2)
    with pytest.raises(errors.PolicyError, match="unknown expert 'news'"):
        router.allowed_mask(names, ["public", "news"], 1)
    with pytest.raises(errors.PolicyError, match="no expert"):
        router.allowed_mask(names, [], 1)


def test_dense_gates_and_stats():
    routing = router.route(jnp.ones((1, 2, D)), jnp.zeros((4, D)), jnp.array([0.0, -1, -2, -3]), 2, None)
    p = np.exp([0.0, -1, -2, -3]) / np.exp([0.0, -1, -2, -3]).sum()
    np.testing.assert_allclose(router.dense_gates(routing)[0, 0], [p[0], p[1], 0, 0], rtol=1e-6)
    stats = router.stats(routing, jnp.array([[1.0, 0.0]]))
    np.testing.assert_allclose(stats.share[0], [p[0] / (p[0] + p[1]), p[1] / (p[0] + p[1]), 0, 0], rtol=1e-6)
    np.testing.assert_allclose(stats.load[0], [0.5, 0.5, 0, 0])
    np.testing.assert_allclose(stats.probability[0], p, rtol=1e-6)
    np.testing.assert_allclose(stats.entropy[0], -(p * np.log(p)).sum(), rtol=1e-6)
    np.testing.assert_allclose(stats.z[0], np.log(np.exp([0.0, -1, -2, -3]).sum()) ** 2, rtol=1e-5)
    assert np.isfinite(router.stats(routing, jnp.zeros((1, 2))).entropy).all()


def test_bias_maps_are_inverses_and_never_positive():
    raw = jnp.linspace(-8, 8, 33)
    bias = router.effective_bias(raw)
    assert (bias < 0).all() and (jax.vmap(jax.grad(router.effective_bias))(raw) != 0).all()
    np.testing.assert_allclose(router.raw_bias(bias), raw, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("memory", [0.0, 0.3, 0.98])
def test_a_router_with_a_memory_reads_the_weighted_mean_of_its_document_so_far(memory):
    random = np.random.default_rng(5)
    segments = np.sort(random.integers(0, 5, size=(6, 20)), axis=1)
    h = random.normal(size=(6, 20, D)).astype(np.float32)
    place = np.asarray(router.place_in_document(segments))
    read = np.asarray(router.remember(h, place, memory))
    before = np.full((6, 1, D), 7, np.float32)
    for t in range(20):
        for b in range(6):
            first = int(np.argmax(segments[b] == segments[b, t]))
            assert place[b, t] == t - first
            weights = memory ** np.arange(t - first, -1, -1, dtype=np.float64)
            np.testing.assert_allclose(read[b, t], weights @ h[b, first : t + 1] / weights.sum(), rtol=1e-4, atol=1e-5)
        before = router.remember_one(h[:, t : t + 1], before, place[:, t : t + 1], memory)
        np.testing.assert_allclose(before[:, 0], read[:, t], rtol=1e-4, atol=1e-5)
        np.testing.assert_array_equal(np.asarray(before)[place[:, t] == 0, 0], h[place[:, t] == 0, t])


def test_a_memory_holds_nothing_of_another_document():
    segments, h = np.array([[0] * 5 + [1] * 7]), np.random.default_rng(6).normal(size=(1, 12, D)).astype(np.float32)
    other = np.concatenate([1e6 * h[:, :5], h[:, 5:]], axis=1)
    place = router.place_in_document(segments)
    a, b = (np.asarray(router.remember(x, place, 0.98)) for x in (h, other))
    np.testing.assert_array_equal(a[:, 5:], b[:, 5:])
