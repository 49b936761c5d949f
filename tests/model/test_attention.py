"""Attention: the formula, the platforms' implementations, and rotary positions."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.model import attention


def qkv(batch, queries, keys, heads, kv_heads, size, seed=0):
    random = np.random.default_rng(seed)
    shapes = ((batch, queries, heads, size), (batch, keys, kv_heads, size), (batch, keys, kv_heads, size))
    return [jnp.asarray(random.normal(size=shape), jnp.float32) for shape in shapes]


def by_loop(q, k, v, mask):
    q, k, v = (np.asarray(a, np.float64) for a in (q, k, v))
    mask = np.broadcast_to(mask, (q.shape[0], 1, q.shape[1], k.shape[1]))
    out, ratio = np.zeros(q.shape), q.shape[2] // k.shape[2]
    for b, t, n in np.ndindex(q.shape[:3]):
        visible = np.flatnonzero(mask[b, 0, t])
        scores = k[b, visible, n // ratio] @ q[b, t, n] / np.sqrt(q.shape[3])
        weights = np.exp(scores - scores.max())
        out[b, t, n] = weights / weights.sum() @ v[b, visible, n // ratio]
    return out


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("implementation", [attention._by_einsum, attention._by_library, attention.attend])
def test_every_implementation_equals_the_loop(implementation, kv_heads):
    q, k, v = qkv(2, 5, 5, 4, kv_heads, 6)
    mask = attention.causal_mask(5, jnp.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0]]))
    np.testing.assert_allclose(implementation(q, k, v, mask), by_loop(q, k, v, mask), rtol=1e-5, atol=1e-6)


def test_one_query_over_a_longer_cache():
    q, k, v = qkv(2, 1, 7, 4, 2, 6)
    mask = (jnp.arange(7) <= 3)[None, None, None]
    expected = by_loop(q, k, v, mask)
    for implementation in (attention._by_einsum, attention._by_library):
        np.testing.assert_allclose(implementation(q, k, v, mask), expected, rtol=1e-5, atol=1e-6)


def plain(q, k, v, mask):
    """The formula, differentiated by JAX."""
    scores = jnp.einsum("BTKGH,BSKH->BKGTS", q.reshape(*q.shape[:2], k.shape[2], -1, q.shape[3]), k) * q.shape[3] ** -0.5
    weights = jax.nn.softmax(jnp.where(mask[:, :, None], scores, -jnp.inf), axis=-1)
    return jnp.einsum("BKGTS,BSKH->BTKGH", weights, v).reshape(q.shape)


@pytest.mark.parametrize("kv_heads", [1, 2, 4])
@pytest.mark.parametrize("length", [8, 2 * attention.CPU_BLOCK])
def test_values_and_gradients_are_those_of_the_formula(length, kv_heads):
    """Of the whole window at once, and of a window that is worked off in blocks of queries."""
    q, k, v = qkv(2, length, length, 4, kv_heads, 6)
    mask = attention.causal_mask(length, jnp.asarray(np.sort(np.random.default_rng(1).integers(0, 3, (2, length)), axis=1)))
    dy = qkv(2, length, length, 4, 4, 6, seed=1)[0]
    expected, found = (jax.vjp(lambda *x, f=f: f(*x, mask), q, k, v) for f in (plain, attention.attend))
    for mine, theirs in zip((found[0], *found[1](dy)), (expected[0], *expected[1](dy)), strict=True):
        np.testing.assert_allclose(mine, theirs, rtol=1e-4, atol=2e-5)


def test_no_query_of_a_block_is_influenced_by_what_comes_after_the_block():
    q, k, v = qkv(1, 2 * attention.CPU_BLOCK, 2 * attention.CPU_BLOCK, 2, 1, 4)
    poisoned = [x.at[:, attention.CPU_BLOCK :].set(jnp.nan) for x in (k, v)]
    mask = attention.causal_mask(q.shape[1], None)
    first = slice(attention.CPU_BLOCK)
    np.testing.assert_array_equal(attention.attend(q, *poisoned, mask)[:, first], attention.attend(q, k, v, mask)[:, first])


def test_rms_norm_is_computed_in_float32():
    x = jnp.asarray(np.random.default_rng(0).normal(size=(2, 3, 8)) * 300, jnp.bfloat16)
    weight = jnp.linspace(0.5, 2, 8)
    exact = np.asarray(x, np.float64)
    exact = exact / np.sqrt((exact**2).mean(-1, keepdims=True) + 1e-6) * np.asarray(weight)
    result = attention.rms_norm(x, weight, 1e-6)
    assert result.dtype == jnp.bfloat16
    np.testing.assert_array_equal(result, jnp.asarray(exact, jnp.float32).astype(jnp.bfloat16))


def test_rotary_scores_depend_on_distance_only():
    q, k, _ = qkv(1, 1, 1, 1, 1, 8)

    def score(i, j):
        at = [attention.rotary(jnp.array([[position]]), 8, 5e5) for position in (i, j)]
        return float((attention.rotate(q, *at[0]) * attention.rotate(k, *at[1])).sum())

    np.testing.assert_allclose(score(9, 4), score(105, 100), rtol=1e-4)
    assert abs(score(9, 4) - score(9, 5)) > 1e-3
    cos, sin = attention.rotary(jnp.array([[3]]), 8, 5e5)
    frequency = 5e5 ** (-np.arange(0, 8, 2) / 8)
    np.testing.assert_allclose(cos[0, 0], np.cos(3 * np.tile(frequency, 2)), rtol=1e-6)
    np.testing.assert_allclose(sin[0, 0], np.sin(3 * np.tile(frequency, 2)), rtol=1e-6)
    x = np.arange(8.0)
    turned = np.concatenate([-x[4:], x[:4]])
    expected = x * np.asarray(cos[0, 0]) + turned * np.asarray(sin[0, 0])
    np.testing.assert_allclose(
        attention.rotate(jnp.asarray(x, jnp.float32).reshape(1, 1, 1, 8), cos, sin)[0, 0, 0], expected, rtol=1e-5
    )
