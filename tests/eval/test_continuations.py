"""Likelihoods of continuations against a direct log-softmax of the model's logits, and greedy continuations in batches."""

import functools

import jax
import numpy as np
import pytest

from flexjax import config as config_lib
from flexjax import errors, tree
from flexjax.eval import continuations, mixtures
from flexjax.inference import decode, sequence
from flexjax.model import router, transformer
from tests.inference.quick import quick
from tests.model import noise
from tests.train import tiny

EOS, WINDOW = 1, 80
TINY = config_lib.ModelConfig(
    vocab_size=31, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=12, init_std=0.4
)
PUBLIC = transformer.dense_banks(TINY)
DENSE = transformer.Architecture(TINY, PUBLIC)
MERGED = transformer.Architecture(TINY, (*PUBLIC, config_lib.Bank("owners", ("alpha", "beta"), 12)), top_k=2)
PARAMS = noise.params(MERGED, seed=2)
WITHOUT_ROUTER = {"experts": {"public": {"ffn": PARAMS["experts"]["public"]["ffn"]}}}


def quick_scorer(architecture, params):
    found = continuations.ModelScorer(architecture, params, EOS, WINDOW, batch_size=2)
    found._nats = jax.jit(found._nats.__wrapped__, compiler_options=tiny.QUICK)
    return found


@functools.cache
def scorer():
    return quick_scorer(MERGED, PARAMS)


def rows(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [(rng.integers(2, 31, context), rng.integers(2, 31, after).tolist()) for context, after in lengths]


@functools.cache
def log_softmax():
    def run(params, tokens, allowed):
        hidden = transformer.forward(params, tokens, MERGED, allowed=allowed).hidden
        return jax.nn.log_softmax(transformer.logits(params, hidden)[0])

    return jax.jit(run, compiler_options=tiny.QUICK)


def direct(row, experts=None):
    """-log p of every token of one row, from all logits; padded behind, which a causal model cannot see."""
    ids = np.array([EOS, *row[0], *row[1]])
    padded = np.full((1, 96), EOS)
    padded[0, : len(ids)] = ids
    mask = router.allowed_mask(MERGED.experts, MERGED.experts if experts is None else experts, 1)
    logp = np.asarray(log_softmax()(PARAMS, padded, mask))
    return -logp[np.arange(len(ids) - 1), ids[1:]]


LENGTHS = [(5, 3), (0, 2), (31, 1), (32, 4), (60, 20), (1, 64), (7, 7)]  # all widths, and one that fills the window


@pytest.mark.parametrize("experts", [None, ("public",), ("alpha", "beta"), ("public", "beta")])
def test_likelihoods_are_those_of_the_logits(experts):
    found = rows(*LENGTHS)
    model = scorer().restricted(experts)
    for (context, after), nats, sum_ in zip(found, model.tokens(found), model.score(found), strict=True):
        expected = direct((context, after), experts)
        np.testing.assert_allclose(nats, expected, rtol=2e-5, atol=2e-5)
        assert nats.shape == (len(context) + len(after),)
        assert sum_ == pytest.approx(expected[len(context) :].sum(), rel=1e-5)
    assert scorer().score([]) == []


def test_batch_mates_do_not_change_a_score_and_order_is_kept():
    found = rows(*LENGTHS * 3)
    together = scorer().score(found)
    assert together[::-1] == scorer().score(found[::-1])
    alone = [scorer().score([row])[0] for row in found[:7]]
    np.testing.assert_allclose(together[:7], alone, rtol=1e-6)


def test_masked_experts_give_what_the_public_model_gives_whatever_they_hold():
    public = {**{part: PARAMS[part] for part in ("embed", "layers", "head")}, **WITHOUT_ROUTER}
    expected = quick_scorer(DENSE, public).score(rows(*LENGTHS))
    np.testing.assert_allclose(scorer().restricted(["public"]).score(rows(*LENGTHS)), expected, rtol=1e-5)
    full = scorer().score(rows(*LENGTHS))
    assert np.abs(np.array(full) / expected - 1).max() > 1e-2  # the experts do say something else
    flat = tree.flatten(PARAMS)
    nan = {path: np.full_like(leaf, np.nan) for path, leaf in flat.items() if path.startswith("experts/owners/")}
    broken = scorer().restricted(("public",))  # a copy, on the same compiled programs
    broken._params = tree.unflatten(flat | nan)
    assert broken.score(rows(*LENGTHS)) == scorer().restricted(("public",)).score(rows(*LENGTHS))
    assert np.isnan(broken.restricted(None).score(rows((5, 3)))[0])


def test_what_does_not_fit_or_is_unknown_is_refused():
    with pytest.raises(errors.DataError, match="81 tokens does not fit the window of 80"):
        scorer().score(rows((5, 3), (60, 21)))
    with pytest.raises(errors.PolicyError, match="unknown expert 'gamma'"):
        scorer().restricted(("gamma",))
    with pytest.raises(errors.PolicyError, match="no expert"):
        continuations.ModelScorer(MERGED, PARAMS, EOS, WINDOW, experts=())


def test_mixtures_of_models_and_of_masks_are_scored_row_by_row():
    found = rows(*LENGTHS)
    parts = [scorer().restricted(names) for names in (("public",), ("alpha",), None)]
    first = continuations.Mixture(parts, lambda nats, starts: nats[0])
    np.testing.assert_allclose(first.score(found), parts[0].score(found), rtol=1e-6)
    mixed = continuations.Mixture(parts, lambda nats, starts: mixtures.branch_train_merge(nats, starts, 1.0, 3))
    for row, nats in zip(found, mixed.score(found), strict=True):  # by hand: the context's evidence, then p = sum w p
        each = np.stack([part.tokens([row])[0] for part in parts]).astype(np.float64)
        whole, context = np.exp(-each.sum(axis=1)), np.exp(-each[:, : len(row[0])].sum(axis=1))
        assert nats == pytest.approx(-np.log(whole.mean() / context.mean()), rel=1e-5)
    routed = continuations.Mixture(parts, lambda nats, starts: sequence.combine(nats, starts, sequence.Settings(share=0.0))[0])
    np.testing.assert_allclose(routed.score(found), mixed.score(found), rtol=1e-6)
    assert mixed.window == WINDOW and mixed.score([]) == []


def test_greedy_answers_are_those_of_one_prompt_alone():
    decoder = quick(decode.Decoder(PARAMS, MERGED, EOS))
    prompts = [context for context, _ in rows((9, 0), (2, 0), (5, 0), (4, 0), (7, 0))]
    for experts in (None, ("public",)):
        answers = continuations.Greedy(decoder, experts, batch_size=2).generate(prompts, 6)
        for prompt, answer in zip(prompts, answers, strict=True):
            expected = decoder.generate([decode.Request(prompt.tolist(), experts)], 6)[0]
            assert answer.tolist() == expected.tolist()
    everyone = continuations.Greedy(decoder, batch_size=2).generate(prompts, 6)
    assert any(a.tolist() != b.tolist() for a, b in zip(answers, everyone, strict=True))  # the mask reaches the decoder
    assert continuations.Greedy(decoder).generate([], 6) == []
