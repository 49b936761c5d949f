"""Cached decoding equals the full forward pass, and nobody's answer depends on who shares the batch."""

import copy
import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import config as config_lib
from flexjax import errors, tree
from flexjax.inference import decode
from flexjax.model import kernels, router, transformer
from tests.inference.quick import quick
from tests.model import noise
from tests.train import tiny

EOS = 1
TINY = config_lib.ModelConfig(
    vocab_size=31, d_model=16, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=4, d_ff=12, init_std=0.4
)
PUBLIC = transformer.dense_banks(TINY)
NAMES = ("public", "alpha", "beta", "gamma")
SIZES = (*PUBLIC, config_lib.Bank("r3", ("alpha", "gamma"), 12, rank=3), config_lib.Bank("w6", ("beta",), 6))
BANKS = (config_lib.Bank("w6", ("beta",), 6), *PUBLIC, config_lib.Bank("w12", ("alpha", "gamma"), 12))
MODELS = {
    "dense": transformer.Architecture(TINY, PUBLIC),
    "pair": transformer.Architecture(TINY, (*PUBLIC, config_lib.Bank("w12", ("alpha",), 12)), top_k=2),
    "merged": transformer.Architecture(TINY, BANKS, top_k=2),
    "low rank": transformer.Architecture(TINY, SIZES, top_k=2),
    "memory": transformer.Architecture(dataclasses.replace(TINY, router_memory=0.8), BANKS, top_k=2),
}
PROMPTS = [[5, 9, 2, 30, 4], [7], [], [3] * 20, [11, 12, 13, 14]]


@functools.cache
def params_of(name):
    return noise.params(MODELS[name], seed=2)


@functools.cache
def decoder(name):
    return quick(decode.Decoder(params_of(name), MODELS[name], eos_id=EOS))


def with_params(name, params):
    """Another model of the same architecture, on the same compiled programs."""
    other = copy.copy(decoder(name))
    other.weights = decode.serving_layout(params, MODELS[name])
    return other


@functools.cache
def compiled_step(name):
    return jax.jit(decoder(name).step, compiler_options=tiny.QUICK)


@functools.cache
def full_forward(name):
    def run(params, tokens, allowed):
        return transformer.logits(params, transformer.forward(params, tokens, MODELS[name], allowed=allowed).hidden)

    return jax.jit(run, compiler_options=tiny.QUICK)


def full_logits(name, ids, experts, params=None):
    """Next-token logits [T, V] after each of `ids`, without a cache; padded behind, which a causal model cannot see."""
    tokens = np.full((1, 48), EOS)
    tokens[0, : len(ids)] = ids
    names = MODELS[name].experts
    mask = router.allowed_mask(names, names if experts is None else experts, 1)
    return np.asarray(full_forward(name)(params or params_of(name), tokens, mask))[0, : len(ids)]


def greedy_by_forward(name, prompt, experts, count):
    ids = [EOS, *prompt]
    for _ in range(count):
        ids.append(int(full_logits(name, ids, experts)[-1].argmax()))
        if ids[-1] == EOS:
            break
    return [i for i in ids[len(prompt) + 1 :] if i != EOS]


REQUESTS = {
    "dense": [None] * 5,
    "pair": [None, ("public",), ("alpha",), None, ("public", "alpha")],
    "merged": [None, ("public", "beta"), ("alpha", "beta", "gamma"), ("public",), ("public", "gamma")],
    "low rank": [None, ("gamma",), ("alpha", "beta"), ("public",), ("beta",)],
    "memory": [None, ("public", "beta"), ("alpha", "beta", "gamma"), ("public",), ("public", "gamma")],
}


@pytest.mark.parametrize("name", MODELS)
def test_cached_logits_and_greedy_tokens_equal_the_full_forward(name):
    requests = [decode.Request(prompt, experts) for prompt, experts in zip(PROMPTS, REQUESTS[name], strict=True)]
    answers = decoder(name).generate(requests, 12)
    for request, answer in zip(requests, answers, strict=True):
        assert answer.tolist() == greedy_by_forward(name, request.prompt, request.experts, 12)
    state, step = decoder(name).start(requests, 12), compiled_step(name)
    for _ in range(6):
        logits, _ = step(decoder(name).weights, state)
        for row, request in enumerate(requests):
            ids = np.asarray(state.tokens[row, int(state.start[row]) : int(state.filled)])
            expected = full_logits(name, ids, request.experts)[-1]
            np.testing.assert_allclose(logits[row], expected, rtol=1e-5, atol=1e-5 * np.abs(expected).max())
        state = decoder(name).advance(decoder(name).weights, state, int(state.filled) + 1)


def test_batch_mates_do_not_change_an_answer():
    settings = [dict(temperature=1.0), dict(), dict(temperature=0.7, top_k=5), dict(temperature=1.3, top_p=0.6), dict()]
    requests = [
        decode.Request(prompt, experts, seed=10 + i, **settings[i])
        for i, (prompt, experts) in enumerate(zip(PROMPTS, REQUESTS["merged"], strict=True))
    ]
    together = decoder("merged").generate(requests, 12)
    reverse = decoder("merged").generate(requests[::-1], 12)[::-1]
    assert [answer.tolist() for answer in together] == [answer.tolist() for answer in reverse]
    for row in (0, 2, 4):
        assert decoder("merged").generate([requests[row]], 12)[0].tolist() == together[row].tolist()


def test_same_seed_same_text_and_other_seed_other_text():
    requests = [decode.Request([3] * 20, temperature=1.5, seed=seed) for seed in (3, 3, 4, 5, 6)]
    a, b, *others = (answer.tolist() for answer in decoder("merged").generate(requests, 12))
    again = decoder("merged").generate(requests, 12)[0].tolist()
    assert a == b == again and any(a != other for other in others)


def test_stream_yields_what_generate_returns():
    for request in (decode.Request([5, 9], seed=1, temperature=1.0), decode.Request([])):
        assert list(decoder("merged").stream(request, 12)) == decoder("merged").generate([request], 12)[0].tolist()


@pytest.mark.parametrize(("name", "bank"), [("merged", "w12"), ("low rank", "r3")])
def test_a_masked_expert_full_of_nan_never_leaks(name, bank):
    flat = tree.flatten(params_of(name))
    slot = 1  # gamma's
    nan = {p: leaf.copy() for p, leaf in flat.items() if p.startswith(f"experts/{bank}/")}
    for leaf in nan.values():
        leaf[:, slot] = np.nan
    broken = with_params(name, tree.unflatten({**flat, **nan}))
    three = ("public", "alpha", "beta")
    requests = [
        decode.Request(p, three, temperature=t, seed=3) for p, t in zip(PROMPTS, [0.0, 1.0, 0.0, 1.0, 0.0], strict=True)
    ]
    clean = [answer.tolist() for answer in decoder(name).generate(requests, 12)]
    assert [answer.tolist() for answer in broken.generate(requests, 12)] == clean
    mixed = [*requests[:4], decode.Request([3])]  # the last one allows it, and gets what it asked for
    assert [answer.tolist() for answer in broken.generate(mixed, 12)[:4]] == clean[:4]
    logits, _ = compiled_step(name)(broken.weights, broken.start(mixed, 12))
    assert np.isfinite(logits[:4]).all() and np.isnan(logits[4]).all()


def rigged(favourite, then):
    """A dense model that says `favourite` after anything but itself, and `then` after that."""
    params = jax.tree.map(np.zeros_like, params_of("dense"))
    embedding = jnp.zeros((31, 16)).at[:, 0].set(1).at[favourite].set(0).at[favourite, 1].set(1)
    kernel = jnp.zeros((16, 31)).at[0, favourite].set(5).at[1, then].set(5)
    return with_params("dense", {**params, "embed": {"embedding": embedding}, "head": {"norm": jnp.ones(16), "kernel": kernel}})


def test_generation_stops_at_eos_and_rows_stop_on_their_own():
    model = rigged(favourite=6, then=EOS)
    requests = [decode.Request(prompt) for prompt in ([6], [4], [], [6], [3] * 20)]
    assert [answer.tolist() for answer in model.generate(requests, 12)] == [[], [6], [6], [], [6]]
    assert list(model.stream(requests[1], 12)) == [6]
    state = model.advance(model.weights, model.start(requests, 12), 44)
    assert int(state.filled) == 2 * decode.PROMPT_BUCKET + 2  # the loop ended with the last row, not with the last slot


def test_it_ends_at_max_new_tokens():
    model = rigged(favourite=6, then=6)
    for count in (1, 12):
        assert model.generate([decode.Request([])], count)[0].tolist() == [6] * count
        assert list(model.stream(decode.Request([]), count)) == [6] * count


def test_bfloat16_decodes_and_padding_of_the_vocabulary_is_never_drawn():
    model = quick(decode.Decoder(params_of("merged"), MODELS["merged"], eos_id=EOS, vocab_size=4, dtype=jnp.bfloat16))
    requests = [decode.Request(prompt, temperature=9.0) for prompt in ([5, 9], [7, 7, 7])]
    state = model.start(requests, 6)
    assert {leaf.dtype for leaf in jax.tree.leaves(state.cache)} == {jnp.dtype(jnp.bfloat16)}
    logits, _ = jax.jit(model.step, compiler_options=tiny.QUICK)(model.weights, state)
    exact = [full_logits("merged", [EOS, *request.prompt], None)[-1] for request in requests]
    assert logits.dtype == jnp.float32 and np.abs(np.asarray(logits) - np.stack(exact)).mean() < 0.5
    for seed in range(4):
        answers = model.generate([dataclasses.replace(request, seed=seed) for request in requests], 6)
        assert all((answer < 4).all() for answer in answers)


@pytest.mark.parametrize("name", ["merged", "low rank"])
def test_serving_layout_holds_the_same_numbers_one_leaf_per_layer_and_expert(name):
    params, layout = params_of(name), decoder(name).weights
    for index, layer in enumerate(layout["experts"]):
        for path, leaves in tree.flatten(layer).items():
            expected = tree.flatten(params["experts"])[path][index]
            found = jnp.stack([kernels.to_prefill(leaf) for leaf in leaves]) if isinstance(leaves, tuple) else leaves
            np.testing.assert_array_equal(found, expected)
            assert isinstance(leaves, tuple) == ("/ffn/" in path)
    assert len(layout["layers"]) == TINY.num_layers


@pytest.mark.parametrize(
    ("request_", "count", "error", "message"),
    [
        (decode.Request([2], ("public", "news")), 1, errors.PolicyError, "unknown expert 'news'"),
        (decode.Request([2], ()), 1, errors.PolicyError, "no expert"),
        (decode.Request([31]), 1, errors.ConfigError, "outside of 0..30"),
        (decode.Request([-1]), 1, errors.ConfigError, "outside of 0..30"),
        (decode.Request([2]), 0, errors.ConfigError, "max_new_tokens=0"),
        (decode.Request([2], temperature=-1.0), 1, errors.ConfigError, "temperature=-1.0"),
        (decode.Request([2], temperature=float("nan")), 1, errors.ConfigError, "temperature=nan"),
        (decode.Request([2], top_k=-1), 1, errors.ConfigError, "top_k=-1"),
        (decode.Request([2], top_p=0.0), 1, errors.ConfigError, "top_p=0.0"),
        (decode.Request([2], seed=-1), 1, errors.ConfigError, "seed=-1"),
    ],
)
def test_senseless_requests_are_refused(request_, count, error, message):
    with pytest.raises(error, match=message):
        decoder("merged").generate([request_], count)
