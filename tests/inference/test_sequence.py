"""Candidates stay inside of what is allowed; mixtures of them are causal, and cost little more than the best."""

import itertools

import hypothesis
import numpy as np
import pytest
from hypothesis import strategies

from flexjax import errors
from flexjax.inference import sequence

NAMES = ("public", "code", "math", "news")
SETTINGS = [
    sequence.Settings(),
    sequence.Settings(share=0.0),
    sequence.Settings(temperature=2.5, share=0.3),
    sequence.Settings("hard"),
    sequence.Settings("hard", temperature=0.5, share=0.1, stride=3),
]


def draw(seed, candidates=3, tokens=60, segments=7, scale=3.0):
    """Costs of tokens, and segments of many lengths, one token among them."""
    random = np.random.default_rng(seed)
    starts = np.zeros(tokens, bool)
    starts[random.permutation(tokens)[: segments - 1]] = True
    starts[[0, -1]] = True
    return random.exponential(scale, size=(candidates, tokens)).astype(np.float32), starts


def oracle(nats, starts, settings, prior):
    """Token by token, with probabilities."""
    cost, weights = [], []
    for column, start in zip(nats.T.astype(np.float64), starts, strict=True):
        time, w = (0, prior) if start else (time + 1, w)  # noqa: F821
        weights.append(w)
        if settings.kind == "mixture":
            cost.append(-np.log(w @ np.exp(-column)))
        else:
            best = np.argmax(w) if time % settings.stride == 0 else best  # noqa: F821
            cost.append(column[best])
        w = w * np.exp(-column / settings.temperature)
        w = (1 - settings.share) * w / w.sum() + settings.share * prior
    return np.array(cost), np.array(weights).T


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
@pytest.mark.parametrize("prior", [None, (0.5, 0.3, 0.2), (0.0, 0.25, 0.75)])
def test_agrees_with_the_oracle(settings, prior):
    for seed in range(5):
        nats, starts = draw(seed)
        cost, weights = sequence.combine(nats, starts, settings, prior)
        expected_cost, expected = oracle(nats, starts, settings, np.full(3, 1 / 3) if prior is None else np.array(prior))
        np.testing.assert_allclose(cost, expected_cost, rtol=1e-10)
        np.testing.assert_allclose(weights, expected, rtol=1e-9, atol=1e-12)
        np.testing.assert_allclose(weights.sum(axis=0), 1)


@pytest.mark.parametrize("settings", SETTINGS, ids=str)
def test_later_tokens_change_nothing_earlier_and_starts_forget(settings):
    nats, starts = draw(1)
    cost, weights = sequence.combine(nats, starts, settings)
    for cut in (0, 1, 17, 59):
        other = nats.copy()
        other[:, cut:] = draw(9)[0][:, cut:]
        changed_cost, changed = sequence.combine(other, starts, settings)
        assert np.array_equal(changed_cost[:cut], cost[:cut])
        assert np.array_equal(changed[:, : cut + 1], weights[:, : cut + 1]), "weights stand before their token"
    assert (changed_cost[59:] != cost[59:]).all()
    first = np.flatnonzero(starts)
    assert np.array_equal(weights[:, first], np.full((3, len(first)), np.exp(np.log(1 / 3))))
    for begin, end in itertools.pairwise([*first, 60]):
        alone, _ = sequence.combine(nats[:, begin:end], starts[begin:end], settings)
        np.testing.assert_array_equal(alone, cost[begin:end])


@hypothesis.given(strategies.integers(0, 10_000), strategies.sampled_from([0.1, 3.0, 300.0]))
def test_a_text_costs_at_most_log_candidates_more_than_under_the_best(seed, scale):
    """The Bayes bound, for evidence of thousands of nats too, where probabilities would vanish."""
    nats, starts = draw(seed, candidates=4, scale=scale)
    cost, _ = sequence.combine(nats, starts, sequence.Settings(share=0.0))
    segment = np.cumsum(starts) - 1
    best = np.array([np.bincount(segment, row) for row in nats]).min(axis=0)
    assert (np.bincount(segment, cost) <= best + np.log(4) + 1e-6).all()
    assert (cost >= nats.min(axis=0) - 1e-9).all()


def test_fixed_share_changes_its_mind_and_bayes_hardly_does():
    """A text that turns from one domain to another after 200 tokens."""
    nats = np.full((2, 400), 5.0)
    nats[0, :200] = nats[1, 200:] = 1.0
    starts = np.arange(400) == 0
    mixed, weights = sequence.combine(nats, starts, sequence.Settings())
    bayes, _ = sequence.combine(nats, starts, sequence.Settings(share=0.0))
    assert mixed.sum() < 400 + 20 and weights[1, 205] > 0.9
    assert bayes.sum() > 400 + 4 * 150
    hard, _ = sequence.combine(nats, starts, sequence.Settings("hard"))
    slow, _ = sequence.combine(nats, starts, sequence.Settings("hard", stride=64))
    assert np.flatnonzero(hard == 5).tolist() == [200, 201], "a weight of 0.01 takes two tokens to win"
    assert np.flatnonzero(slow == 5).tolist() == list(range(200, 256)), "256 is the next choice"


def test_ties_go_to_the_first_and_nothing_gives_nothing():
    cost, weights = sequence.combine(np.array([[1.0, 2.0], [3.0, 1.0]]), np.array([True, True]), sequence.Settings("hard"))
    assert cost.tolist() == [1, 2] and (weights == 0.5).all()
    cost, weights = sequence.combine(np.zeros((2, 0), np.float32), np.zeros(0, bool))
    assert cost.shape == (0,) and weights.shape == (2, 0)
    nats, starts = draw(3, candidates=1)
    cost, weights = sequence.combine(nats, starts)
    np.testing.assert_allclose(cost, nats[0], rtol=1e-12)
    assert (weights == 1).all()


@pytest.mark.parametrize(
    ("allowed", "expected"),
    [
        (NAMES, "public public+code public+math public+news"),
        (("math", "public", "code"), "public public+code public+math"),
        (("math", "public"), "public public+math"),
        (("public",), "public"),
        (("news", "math"), "math news"),
        (("math", "math"), "math"),
    ],
)
def test_candidates(allowed, expected):
    found = sequence.candidates(NAMES, allowed)
    assert " ".join(map(sequence.label, found)) == expected
    assert all(set(mask) <= set(allowed) for mask in found) and len(set(found)) == len(found)


@pytest.mark.parametrize(("allowed", "message"), [(("public", "law"), "unknown expert 'law'"), ((), "no expert is allowed")])
def test_candidates_are_refused_with_the_request(allowed, message):
    with pytest.raises(errors.PolicyError, match=message):
        sequence.candidates(NAMES, allowed)


@pytest.mark.parametrize(
    "senseless",
    [
        {"kind": "soft"},
        {"temperature": 0.0},
        {"temperature": float("nan")},
        {"temperature": float("inf")},
        {"share": -0.1},
        {"share": 1.0},
        {"share": float("nan")},
        {"kind": "hard", "stride": 0},
        {"kind": "mixture", "stride": 2},
    ],
    ids=str,
)
def test_senseless_settings_are_refused(senseless):
    with pytest.raises(errors.ConfigError, match=f"{list(senseless)[-1]}="):
        sequence.Settings(**senseless)


@pytest.mark.parametrize("prior", [(0.5, 0.5), (0.5, 0.6, -0.1), (0.2, 0.2, 0.2), (0.5, 0.5, float("nan"))])
def test_a_prior_is_a_distribution(prior):
    with pytest.raises(errors.ConfigError, match="3 candidates"):
        sequence.combine(*draw(0), prior=prior)
    cost, weights = sequence.combine(*draw(0), prior=(0.0, 0.0, 1.0))
    assert not weights[:2].any()
    np.testing.assert_allclose(cost, draw(0)[0][2], rtol=1e-12)


def test_flags_agree():
    assert sequence.from_flags("token", None) is None
    assert sequence.from_flags("sequence", None) == sequence.Settings("mixture")
    assert sequence.from_flags("sequence", "hard") == sequence.Settings("hard")
    with pytest.raises(errors.ConfigError, match="--sequence=hard needs --routing=sequence"):
        sequence.from_flags("token", "hard")
