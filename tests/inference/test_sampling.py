"""Draws follow the distribution that temperature, top k and top p define."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax.inference import sampling

P = np.array([0.05, 0.4, 0.1, 0.25, 0.2])
DRAWS = 20_000
draw = jax.jit(sampling.sample)
restrict = jax.jit(sampling._restrict)


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


@pytest.mark.parametrize("beside", [{"top_p": 0.5}, {"top_k": 65}, {"top_k": 200, "top_p": 0.9}, {}], ids=str)
def test_what_a_row_keeps_does_not_depend_on_what_others_need(beside):
    """Each row's top p is a sum of its own probabilities, which selection and sorting may round apart."""
    rows, vocab = 32, 700
    logits = np.random.default_rng(1).normal(size=(rows, vocab)).astype(np.float32)
    top = np.sort(np.exp(logits), axis=1)[:, ::-1][:, :30]
    top_p = np.cumsum(top / top.sum(axis=1, keepdims=True), axis=1)[np.arange(rows), np.arange(rows) % 20].astype(np.float32)
    selected = {"top_k": np.full(rows, 30), "top_p": top_p}
    sorted_ = {"top_k": np.zeros(rows, int), "top_p": top_p}

    def kept(which, **last):
        asked = {name: np.append(values, last.get(name, name == "top_p")) for name, values in which.items()}
        top_k, top_p = jnp.array(asked["top_k"], jnp.int32), jnp.array(asked["top_p"], jnp.float32)
        settings = sampling.Sampling(jnp.ones(rows + 1), top_k, top_p, jnp.zeros(rows + 1, jnp.int32))
        return np.isfinite(np.asarray(restrict(np.concatenate([logits, logits[:1]]), settings)))[:rows]

    for which in (selected, sorted_):
        np.testing.assert_array_equal(kept(which, **beside), kept(which, top_k=3))
    for row in (0, 7, 31):
        alone = sampling.Sampling(jnp.ones(1), jnp.full(1, 30), jnp.array(top_p[row : row + 1]), jnp.zeros(1, jnp.int32))
        found = np.isfinite(np.asarray(restrict(logits[row : row + 1], alone)))[0]
        np.testing.assert_array_equal(found, kept(selected, **beside)[row])


def test_steps_and_seeds_draw_independently():
    settings = sampling.Sampling(jnp.ones(2000), jnp.zeros(2000, jnp.int32), jnp.ones(2000), jnp.repeat(jnp.arange(2), 1000))
    tokens = np.asarray(draw(jnp.zeros((2000, 10)), settings, jnp.tile(jnp.arange(1000), 2))).reshape(2, 1000)
    assert abs((tokens[0] == tokens[1]).mean() - 0.1) < 0.05
    assert abs((tokens[:, 1:] == tokens[:, :-1]).mean() - 0.1) < 0.05
