"""Several models over one text: mixtures are causal and what their formula says; soups by input are soups."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from flexjax import baselines, errors
from flexjax.data import pipeline, proxies, tokens
from flexjax.eval import bits_per_byte, mixtures
from tests.model import noise
from tests.train import tiny

DENSE = tiny.ARCHITECTURES["dense"]
MODELS = [noise.params(DENSE, seed, std=0.2) for seed in range(3)]
STACKED = jax.tree.map(lambda *leaves: np.stack(leaves), *MODELS)
M, N, LENGTH = 4, 60, 12
NATS = np.random.default_rng(0).gamma(2.0, 1.5, (M, N))
STARTS = np.arange(N) % LENGTH == 0
OPENING = 5
AFTER = np.arange(N) % LENGTH >= OPENING


def batch():
    """Four windows of text; the last two with 5 tokens and none."""
    return {name: jnp.asarray(rows) for name, rows in tiny.batch().items()} | {
        "weights": jnp.asarray((np.arange(tiny.SEQ_LEN)[None] < np.array([[16], [16], [5], [0]])).astype(np.float32))
    }


@functools.cache
def plain():
    return jax.jit(lambda params, batch: mixtures.token_nats(params, batch, DENSE), compiler_options=tiny.QUICK)


@functools.cache
def by_opening():
    run = functools.partial(mixtures.soup_per_input, architecture=DENSE, temperature=0.1)
    return jax.jit(run, compiler_options=tiny.QUICK)


# soups


def test_token_nats_are_those_of_the_scorer():
    source = tiny.Letters(documents=6)
    expected = bits_per_byte.Scorer(DENSE, MODELS[0], tiny.SEQ_LEN, 4).tokens(source).nats
    found = []
    for rows in pipeline.evaluation_batches(source, seq_len=tiny.SEQ_LEN, batch_size=4):
        nats = plain()(MODELS[0], {name: jnp.asarray(rows[name]) for name in ("tokens", "targets", "weights", "segments")})
        found.append(np.asarray(nats)[rows["weights"] > 0])
    np.testing.assert_allclose(np.concatenate(found), expected, rtol=1e-5)


def test_each_row_is_scored_with_its_own_soup():
    weights = np.random.default_rng(1).dirichlet(np.ones(3), size=4).astype(np.float32)
    run = jax.jit(lambda *args: mixtures.soups_of_rows(*args, DENSE), compiler_options=tiny.QUICK)
    found = run(STACKED, weights, batch())
    for row in range(4):
        expected = plain()(baselines.soup(MODELS, weights[row]), batch())[row]
        np.testing.assert_allclose(found[row], expected, atol=2e-5)


def test_likelihood_weights_are_a_softmax():
    losses = np.array([[2.0, 1.0], [2.0, 3.0], [2.0, 3.0]], np.float32)
    np.testing.assert_allclose(mixtures.likelihood_weights(losses, 1.0)[:, 0], np.full(3, 1 / 3), rtol=1e-6)
    np.testing.assert_allclose(
        mixtures.likelihood_weights(losses, 0.5)[:, 1], np.array([1, np.exp(-4), np.exp(-4)]) / (1 + 2 * np.exp(-4)), rtol=1e-5
    )
    np.testing.assert_allclose(mixtures.likelihood_weights(losses, 1e-3)[:, 1], [1, 0, 0], atol=1e-6)
    for temperature in (0.0, -1.0, float("nan")):
        with pytest.raises(errors.ConfigError, match="must be above 0"):
            mixtures.likelihood_weights(losses, temperature)


def test_the_opening_decides_and_is_scored_with_the_uniform_soup():
    cut, given = tiny.SEQ_LEN // 4, batch()
    found = by_opening()(STACKED, given)
    np.testing.assert_allclose(found[:, :cut], plain()(baselines.soup(MODELS), given)[:, :cut], atol=2e-5)
    for row, scored in enumerate((cut, cut, cut, 0)):
        means = [float(plain()(model, given)[row, :cut].sum()) / max(1, scored) for model in MODELS]
        weights = np.asarray(mixtures.likelihood_weights(np.array(means, np.float32), 0.1))
        assert scored or np.allclose(weights, 1 / 3)
        expected = plain()(baselines.soup(MODELS, weights), given)[row, cut:]
        np.testing.assert_allclose(found[row, cut:], expected, atol=5e-5)


def test_what_comes_later_changes_nothing_before_it():
    given = batch()
    changed = given | {name: given[name].at[:, 9:].set(3) for name in ("tokens", "targets")}
    before, after = (np.asarray(by_opening()(STACKED, found)) for found in (given, changed))
    np.testing.assert_array_equal(before[:, :9], after[:, :9])
    assert (before[:2, 9:] != after[:2, 9:]).any()


def test_soups_of_one_model_many_times_are_that_model():
    same = jax.tree.map(lambda leaf: np.stack([leaf] * 3), MODELS[1])
    np.testing.assert_allclose(by_opening()(same, batch()), plain()(MODELS[1], batch()), atol=2e-5)


# mixtures of predictions


def test_a_mixture_is_the_mean_of_the_probabilities():
    weights = np.random.default_rng(2).dirichlet(np.ones(M), size=N).T
    np.testing.assert_allclose(np.exp(-mixtures.mix(NATS, weights, M)), (weights * np.exp(-NATS)).sum(axis=0))
    top = np.argsort(-weights, axis=0)[:2]
    share = np.take_along_axis(weights, top, 0)
    expected = (share * np.exp(-np.take_along_axis(NATS, top, 0))).sum(axis=0) / share.sum(axis=0)
    np.testing.assert_allclose(np.exp(-mixtures.mix(NATS, weights, 2)), expected)


@pytest.mark.parametrize("top_k", range(1, M + 1))
def test_one_hot_weights_select(top_k):
    chosen = np.random.default_rng(3).integers(M, size=N)
    np.testing.assert_allclose(mixtures.mix(NATS, np.eye(M)[chosen].T, top_k), NATS[chosen, np.arange(N)], rtol=1e-12)


@given(st.integers(1, M), st.floats(0.2, 5), st.integers(0, 99))
def test_equal_models_mix_to_themselves(top_k, temperature, seed):
    nats = np.tile(np.random.default_rng(seed).gamma(2.0, 1.0, N), (M, 1))
    np.testing.assert_allclose(mixtures.branch_train_merge(nats, STARTS, temperature, top_k), nats[0], rtol=1e-9)


@pytest.mark.parametrize("top_k", [0, M + 1])
def test_more_models_than_there_are_cannot_be_mixed(top_k):
    with pytest.raises(errors.ConfigError, match=f"top_k={top_k} .* 4 models"):
        mixtures.mix(NATS, np.full((M, N), 0.25), top_k)


@pytest.mark.parametrize("temperature", [0.5, 1.0, 8.0])
@pytest.mark.parametrize("top_k", [1, 2, M])
def test_btm_weighs_by_the_summed_loss_of_the_prefix(temperature, top_k):
    sums = np.concatenate([np.cumsum(part, axis=1) - part for part in np.split(NATS, N // LENGTH, axis=1)], axis=1)
    weights = np.asarray(mixtures.likelihood_weights(sums, temperature))
    found = mixtures.branch_train_merge(NATS, STARTS, temperature, top_k)
    np.testing.assert_allclose(found[~STARTS], mixtures.mix(NATS, weights, top_k)[~STARTS], rtol=1e-4)
    np.testing.assert_allclose(found[STARTS], -np.log(np.exp(-NATS[:top_k, STARTS]).mean(axis=0)))  # nothing known yet


def test_btm_with_one_model_is_the_hard_choice():
    found = mixtures.branch_train_merge(NATS, STARTS, 1.0, 1)
    for start in range(0, N, LENGTH):
        for token in range(start, start + LENGTH):
            best = int(np.argmin(NATS[:, start:token].sum(axis=1)))
            np.testing.assert_allclose(found[token], NATS[best, token])


@pytest.mark.parametrize("top_k", [1, 2, M])
def test_btm_is_causal_within_its_segment(top_k):
    before = mixtures.branch_train_merge(NATS, STARTS, 1.0, top_k)
    for token in (0, 13, 30, 59):
        changed = NATS.copy()
        changed[:, token] = changed[::-1, token] + np.arange(M)
        found = mixtures.branch_train_merge(changed, STARTS, 1.0, top_k)
        end = (token // LENGTH + 1) * LENGTH
        differs = np.flatnonzero(found != before)
        assert set(differs) <= set(range(token, end)) and token in differs


def test_btm_costs_at_most_the_logarithm_of_the_models_more_than_the_best():
    found = mixtures.branch_train_merge(NATS, STARTS, 1.0, M).reshape(-1, LENGTH).sum(axis=1)
    best = NATS.reshape(M, -1, LENGTH).sum(axis=2).min(axis=0)
    assert (found <= best + np.log(M) + 1e-9).all()


# BTM by the opening


@pytest.mark.parametrize("top_k", [1, 2, M])
def test_btm_by_opening_mixes_all_before_and_the_chosen_after(top_k):
    """By hand: the weights that a segment's first five tokens leave, for all that follow them there."""
    found = mixtures.branch_train_merge_by_opening(NATS, STARTS, 0.8, top_k, OPENING)
    everyone = mixtures.branch_train_merge(NATS, STARTS, 0.8, M)
    np.testing.assert_array_equal(found[~AFTER], everyone[~AFTER])
    for start in range(0, N, LENGTH):
        opening, rest = NATS[:, start : start + OPENING], NATS[:, start + OPENING : start + LENGTH]
        weights = np.exp(-(opening.sum(axis=1) - opening.sum(axis=1).min()) / 0.8)
        kept = np.argsort(-weights)[:top_k]
        expected = -np.log(weights[kept] / weights[kept].sum() @ np.exp(-rest[kept]))
        np.testing.assert_allclose(found[start + OPENING : start + LENGTH], expected, rtol=1e-6)


@pytest.mark.parametrize("top_k", [1, 2, M])
def test_what_stands_behind_the_opening_changes_itself_alone(top_k):
    before = mixtures.branch_train_merge_by_opening(NATS, STARTS, 1.0, top_k, OPENING)
    for token in (0, 4, 5, 13, 30, 59):
        changed = NATS.copy()
        changed[:, token] = changed[::-1, token] + np.arange(M) + 0.5
        differs = np.flatnonzero(mixtures.branch_train_merge_by_opening(changed, STARTS, 1.0, top_k, OPENING) != before)
        end = token + 1 if AFTER[token] else (token // LENGTH + 1) * LENGTH
        assert token in differs and set(differs) <= set(range(token, end))


def test_one_model_of_least_loss_over_the_opening_scores_the_rest():
    found = mixtures.branch_train_merge_by_opening(NATS, STARTS, 1.0, 1, OPENING)
    for start in range(0, N, LENGTH):
        best = int(np.argmin(NATS[:, start : start + OPENING].sum(axis=1)))
        np.testing.assert_allclose(found[start + OPENING : start + LENGTH], NATS[best, start + OPENING : start + LENGTH])


def test_openings_of_no_tokens_and_of_whole_segments():
    """With no opening nothing is known, so the first models stay; no segment is longer than the last opening."""
    none = mixtures.branch_train_merge_by_opening(NATS, STARTS, 1.0, 2, 0)
    np.testing.assert_allclose(none, -np.log(np.exp(-NATS[:2]).mean(axis=0)))
    whole = mixtures.branch_train_merge_by_opening(NATS, STARTS, 1.0, 2, LENGTH)
    np.testing.assert_array_equal(whole, mixtures.branch_train_merge(NATS, STARTS, 1.0, M))
    with pytest.raises(errors.ConfigError, match="opening=-1"):
        mixtures.branch_train_merge_by_opening(NATS, STARTS, 1.0, 2, -1)


# one model for a whole text


def test_a_chosen_model_scores_a_document_after_its_opening():
    documents = np.repeat([0, 1, 3], [5, 2, 4])
    nats = np.stack([np.zeros(11), np.ones(11), np.full(11, 2.0)])
    found = mixtures.prompt_routed(nats, documents, np.array([1, 2, 0, 2]), opening=3)
    np.testing.assert_array_equal(found, [0, 0, 0, 1, 1, 0, 0, 0, 0, 0, 2])
    np.testing.assert_array_equal(mixtures.prompt_routed(nats, documents, np.array([1, 2, 0, 2]), opening=0)[5:7], [2, 2])


class Dialect(tokens.TokenSource):
    """Documents whose first ten tokens are of a dialect; what follows is not."""

    def __init__(self, first, seed, documents=40):
        rng = np.random.default_rng(seed)
        pieces = [np.array([1])]
        for _ in range(documents):
            pieces += [rng.integers(first, first + 30, 10), rng.integers(200, 300, 50), [1]]
        tokenizer = type("Tokenizer", (), {"eos_id": 1, "digest": "t"})()
        super().__init__([np.concatenate(pieces).astype(np.uint16)], tokenizer, f"dialect-{first}-{seed}")


def test_the_prompt_router_reads_the_first_tokens():
    firsts = {"public": 2, "math": 22, "code": 42}
    found = mixtures.prompt_router(
        {name: Dialect(first, 0) for name, first in firsts.items()}, opening=10, documents=30, seed=0
    )
    assert found.names == ("public", "math", "code")
    for index, first in enumerate(firsts.values()):
        choices = found.scores(proxies.openings(Dialect(first, 1), range(40), 10)).argmax(axis=1)
        assert (choices == index).mean() > 0.9
