"""Domain rows: each method finds its direction, and nobody's row describes a handful of documents."""

import numpy as np
import pytest

from flexjax import errors, sharding
from flexjax.experts import domains
from tests.train import tiny

LAYERS, STATES, WIDTH = 2, 400, 8


@pytest.fixture(scope="module")
def states():
    """States of a domain and of public text: two clouds that a direction of each layer separates."""
    rng = np.random.default_rng(0)
    mine, public = (rng.standard_normal((LAYERS, STATES, WIDTH)).astype(np.float32) for _ in range(2))
    mine[0, :, 0] += 3
    mine[1, :, 1] -= 3
    public[0, :, 0] -= 3
    public[1, :, 1] += 3
    return mine, public


def logits(rows, found):
    return np.einsum("LSD,LD->LS", found, rows)


def test_logistic_rows_are_the_log_odds_against_a_public_row_of_zero(states):
    mine, public = states
    rows = domains.logistic_rows(mine, public)
    assert rows.shape == (LAYERS, WIDTH) and rows.dtype == np.float32
    assert (logits(rows, mine) > 0).mean() > 0.99 and (logits(rows, public) < 0).mean() > 0.99
    assert rows[0].argmax() == 0 and rows[1].argmin() == 1


def test_logistic_rows_weigh_both_classes_alike_whatever_their_sizes(states):
    mine, public = states
    few = domains.logistic_rows(mine[:, :40], public)
    assert (logits(few, mine) > 0).mean() > 0.95 and (logits(few, public) < 0).mean() > 0.95
    twice = domains.logistic_rows(np.concatenate([mine, mine], axis=1), public)
    np.testing.assert_allclose(twice, domains.logistic_rows(mine, public), rtol=0.05, atol=1e-2)


def test_logistic_row_of_public_text_itself_claims_nothing(states):
    _, public = states
    np.testing.assert_allclose(domains.logistic_rows(public, public), 0, atol=1e-6)


def test_logistic_gradient_is_zero_at_the_row(states):
    mine, public = (part[0].astype(np.float64) for part in states)
    row = domains.logistic_rows(*states)[0].astype(np.float64)
    p_mine, p_public = (1 / (1 + np.exp(-x @ row)) for x in (mine, public))
    ridge = domains.RIDGE * np.mean(np.square(np.concatenate([mine, public])))
    gradient = 0.5 * mine.T @ (p_mine - 1) / STATES + 0.5 * public.T @ p_public / STATES + ridge * row
    np.testing.assert_allclose(gradient, 0, atol=1e-5)


@pytest.mark.parametrize("shape", [(WIDTH,), (LAYERS, WIDTH)])
def test_scaled_rows_give_logits_of_root_mean_square_one_in_every_layer(states, shape):
    _, public = states
    vectors = 1e3 * np.random.default_rng(1).standard_normal(shape)
    rows = domains.scaled(vectors, public)
    assert rows.shape == (LAYERS, WIDTH) and rows.dtype == np.float32
    np.testing.assert_allclose(np.sqrt(np.mean(np.square(logits(rows, public)), axis=1)), 1, rtol=1e-5)
    cosine = (rows * vectors).sum(axis=1) / np.linalg.norm(rows, axis=1) / np.linalg.norm(vectors * np.ones_like(rows), axis=1)
    np.testing.assert_allclose(cosine, 1, rtol=1e-5)


def test_random_vectors_differ_by_seed_and_repeat_by_seed():
    np.testing.assert_array_equal(domains.random_vector(5, 1), domains.random_vector(5, 1))
    assert (domains.random_vector(5, 1) != domains.random_vector(5, 2)).all()


@pytest.fixture(scope="module")
def topics():
    """Two sources that use different halves of the vocabulary."""
    return tiny.Letters(seed=1, documents=60, vocab=150), _Shifted(seed=2, documents=60, vocab=150)


class _Shifted(tiny.Letters):
    def document(self, index):
        return super().document(index) + 150


@pytest.mark.parametrize("width", [4, 32, 100])
def test_text_projection_has_a_column_per_dimension_even_with_few_documents(topics, width):
    projection = domains.text_projection(topics[0], np.arange(50), 304, width)
    assert projection.shape == (304, width) and projection.dtype == np.float32
    assert np.isfinite(projection).all() and np.abs(projection[:, : min(width, 50)]).max(axis=0).min() > 0
    assert width <= 60 or not projection[:, 60:].any()


def test_text_vectors_of_a_topic_are_alike_and_of_two_topics_are_not(topics):
    mixed = np.concatenate([np.stack([np.bincount(s.document(i), minlength=304) for i in range(50)]) for s in topics])

    class Both:
        def document(self, index):
            return np.repeat(np.arange(304), mixed[index])

    projection = domains.text_projection(Both(), np.arange(100), 304, 90)
    a, b, c = (
        domains.text_vector(s, d, projection)
        for s, d in zip((topics[0], topics[0], topics[1]), (np.arange(25), np.arange(25, 50), np.arange(25)), strict=True)
    )
    cosine = lambda x, y: x @ y / np.linalg.norm(x) / np.linalg.norm(y)  # noqa: E731
    assert a.shape == (90,) and np.linalg.norm(a) <= 1 + 1e-6
    assert cosine(a, b) > 0.5 > abs(cosine(a, c)) + 0.2


def test_fewer_than_a_thousand_documents_are_never_asked_for():
    source = tiny.Letters(documents=1100, length=8)
    for count in (0, 1, 999):
        with pytest.raises(errors.ConfigError, match=rf"row_documents={count} must be at least 1000"):
            domains.choose_owner(source, count, "math", 0)
    assert len(domains.choose_owner(source, 1000, "math", 0)) == 1000


def test_an_owner_of_too_few_documents_is_refused_by_name():
    with pytest.raises(errors.DataError, match="expert 'math' has 999 documents, its domain row needs 1000"):
        domains.choose_owner(tiny.Letters(documents=999, length=8), 1000, "math", 0)


def test_documents_are_chosen_without_repetition_and_by_seed():
    source = tiny.Letters(documents=1200, length=8)
    one, again, other = (domains.choose(source, 1000, seed) for seed in (0, 0, 1))
    assert len(set(one.tolist())) == 1000 and one.min() >= 0 and one.max() < 1200 and (np.diff(one) > 0).all()
    np.testing.assert_array_equal(one, again)
    assert (one != other).any()
    assert domains.choose(source, 5000, 0).tolist() == list(range(1200))


@pytest.mark.parametrize("method", domains.METHODS)
def test_known_methods_pass_and_others_are_refused(method):
    domains.check_method(method)
    with pytest.raises(errors.ConfigError, match=rf"anchor\.rows is '{method}s', expected one of logistic, mean"):
        domains.check_method(method + "s")


@pytest.fixture(scope="module")
def kept():
    source = tiny.Letters(documents=40, length=24)
    arguments = (tiny.ARCHITECTURES["dense"], tiny.params_of("dense"), source, np.arange(0, 40, 2))
    return lambda count, seed: domains.states(*arguments, tiny.SEQ_LEN, count, seed, sharding.one_device())


def test_states_are_as_many_as_asked_for_and_repeat_by_seed(kept):
    first, again = kept(50, 3), kept(50, 3)
    assert first.shape == (2, 50, 32) and np.isfinite(first).all()
    np.testing.assert_array_equal(first, again)
    assert len(np.unique(first[0], axis=0)) > 10


def test_states_are_those_that_the_router_reads(kept):
    """A state is the residual after attention of some token of a chosen document."""
    import jax

    from flexjax.model import transformer

    source, found = tiny.Letters(documents=40, length=24), kept(20, 3)
    run = jax.jit(
        lambda tokens: (
            transformer.forward(tiny.params_of("dense"), tokens, tiny.ARCHITECTURES["dense"], keep_states=True).states
        )
    )
    starts = np.stack([np.concatenate([[1], source.document(i)[s : s + 15]]) for i in range(0, 40, 2) for s in range(10)])
    possible = np.asarray(run(starts.astype(np.int32))).reshape(2, -1, 32)
    for state in found[0]:
        assert np.abs(possible[0] - state).max(axis=1).min() < 1e-5
