"""Draws follow the distribution that temperature, top k and top p define."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.inference import sampling

P = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
DRAWS = 20_000
draw = jax.jit(sampling.sample)


def frequencies(temperature=1.0, top_k=0, top_p=1.0, p=P):
    settings = sampling.Sampling(
        jnp.full(DRAWS, temperature), jnp.full(DRAWS, top_k), jnp.full(DRAWS, top_p), jnp.arange(DRAWS)
    )
    tokens = draw(jnp.tile(jnp.log(jnp.asarray(p, jnp.float32))[None], (DRAWS, 1)), settings, jnp.zeros(DRAWS, jnp.int32))
    return np.bincount(np.asarray(tokens), minlength=len(p)) / DRAWS


def renormalised(kept, temperature=1.0):
    p = np.where(np.isin(np.arange(len(P)), kept), P, 0) ** (1 / temperature)
    return p / p.sum()


@pytest.mark.parametrize(
    ("settings", "kept"),
    [
        ({}, [0, 1, 2, 3, 4]),
        ({"temperature": 0.5}, [0, 1, 2, 3, 4]),
        ({"temperature": 2.0}, [0, 1, 2, 3, 4]),
        ({"top_k": 1}, [1]),
        ({"top_k": 3}, [1, 3, 4]),
        ({"top_k": 9}, [0, 1, 2, 3, 4]),
        ({"top_p": 0.3}, [1]),
        ({"top_p": 0.41}, [1, 3]),
        ({"top_p": 0.8}, [1, 3, 4]),
        ({"top_p": 1e-6}, [1]),
        ({"top_k": 2, "top_p": 0.6}, [1]),  # of 0.4 and 0.25 renormalised, 0.615 is enough
        ({"top_k": 2, "top_p": 0.62}, [1, 3]),
        ({"temperature": 0.5, "top_p": 0.5}, [1]),  # sharpened, 0.4 becomes 0.57
        ({"temperature": 0.5, "top_k": 4, "top_p": 0.9}, [1, 3, 4]),
    ],
    ids=str,
)
def test_frequencies(settings, kept):
    expected, found = renormalised(kept, settings.get("temperature", 1.0)), frequencies(**settings)
    assert not found[expected == 0].any()
    np.testing.assert_allclose(found, expected, atol=4 * np.sqrt(0.25 / DRAWS))


def test_temperature_zero_is_greedy_and_ties_go_to_the_smaller_id():
    assert frequencies(temperature=0.0)[1] == 1
    assert frequencies(temperature=0.0, top_k=2, top_p=0.5)[1] == 1
    assert frequencies(temperature=0.0, p=[0.2, 0.4, 0.4])[1] == 1
    assert frequencies(top_k=1, p=[0.2, 0.4, 0.4])[1] == 1


def test_rows_draw_on_their_own():
    """Each row's draw is that of the row alone, whatever branch its batch-mates need."""
    logits = jnp.asarray(np.random.default_rng(0).normal(size=(4, 50)), jnp.float32)
    settings = sampling.Sampling(
        jnp.array([1.0, 0.0, 0.5, 2.0]), jnp.array([0, 0, 5, 0]), jnp.array([1.0, 1.0, 1.0, 0.5]), jnp.array([1, 2, 3, 1])
    )
    step = jnp.array([4, 4, 9, 4])
    together = draw(logits, settings, step)
    for row in range(4):
        one = jax.tree.map(lambda leaf: leaf[row : row + 1], settings)  # noqa: B023
        assert together[row] == draw(logits[row : row + 1], one, step[row : row + 1])[0]


def test_steps_and_seeds_draw_independently():
    settings = sampling.Sampling(jnp.ones(2000), jnp.zeros(2000, jnp.int32), jnp.ones(2000), jnp.repeat(jnp.arange(2), 1000))
    tokens = np.asarray(draw(jnp.zeros((2000, 10)), settings, jnp.tile(jnp.arange(1000), 2))).reshape(2, 1000)
    assert abs((tokens[0] == tokens[1]).mean() - 0.1) < 0.05
    assert abs((tokens[:, 1:] == tokens[:, :-1]).mean() - 0.1) < 0.05
