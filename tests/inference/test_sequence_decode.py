"""Candidates generate one text together: as full forward passes and `sequence.combine` say, and nobody else matters."""

import copy
import dataclasses
import functools

import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import tree
from flexjax.inference import decode, sampling, sequence, sequence_decode
from tests.inference import test_decode as plain
from tests.inference.quick import quick

HOW = {"mixture": sequence.Settings(), "hard": sequence.Settings("hard", share=0.05, stride=3)}
THREE = ("public", "alpha", "beta")
LENGTH = 12


@functools.cache
def decoder(name, kind="mixture"):
    return quick(sequence_decode.SequenceDecoder(plain.params_of(name), plain.MODELS[name], plain.EOS, how=HOW[kind]))


def with_params(name, params):
    """Another model of the same architecture, on the same compiled programs."""
    other = copy.copy(decoder(name))
    other.weights = decode.serving_layout(params, plain.MODELS[name])
    return other


def oracle(request, ids, how):
    """Weights behind the last id, and the log distribution of each id, from full forward passes and `combine`."""
    names, text = plain.NAMES, [plain.EOS, *request.prompt, *ids]
    masks = sequence.candidates(names, names if request.experts is None else request.experts)
    logits = np.stack([plain.full_logits("merged", text, mask) for mask in masks]).astype(np.float64)
    log_p = logits - np.logaddexp.reduce(logits, axis=-1, keepdims=True)  # [C, T, V]
    nats = -np.take_along_axis(log_p, np.array([*text[1:], 0])[None, :, None], axis=2)[..., 0]
    _, weights = sequence.combine(nats, np.arange(len(text)) == 0, how)
    used = weights
    if how.kind == "hard":
        choices = np.argmax(weights[:, :: how.stride], axis=0).repeat(how.stride)[: len(text)]
        used = np.eye(len(masks))[:, choices]
    mixed = np.log(np.einsum("CT,CTV->TV", used, np.exp(log_p)))
    return weights[:, -1], mixed[len(request.prompt) : -1]


@pytest.mark.parametrize(("kind", "experts"), [("mixture", THREE), ("hard", None)])
def test_draws_and_weights_are_those_of_full_forward_passes(kind, experts):
    requests = [
        decode.Request([5, 9, 2, 30, 4], experts),
        decode.Request([7], experts, temperature=1.0, top_k=7, seed=1),
        decode.Request([], experts, temperature=2.0, seed=3),
        decode.Request([11, 12, 13, 14], experts, temperature=0.7, top_k=20, seed=4),
    ]
    lengths = []
    for request in requests:
        *_, (_, weights) = pieces = list(decoder("merged", kind).follow(request, LENGTH))
        ids = [token for piece, _ in pieces for token in piece]
        lengths.append(len(ids))
        expected, mixed = oracle(request, ids, HOW[kind])
        np.testing.assert_allclose(weights, expected, rtol=1e-3, atol=1e-5)
        assert np.ptp(weights) > 0.05, "candidates differ"
        every = [jnp.full(len(ids), value) for value in (request.temperature, request.top_k, 1.0, request.seed)]
        steps = len(request.prompt) + 1 + jnp.arange(len(ids))
        assert sampling.sample(jnp.asarray(mixed, jnp.float32), sampling.Sampling(*every), steps).tolist() == ids
    assert 0 < lengths[2] < LENGTH, "one of them ends, and its EOS is no evidence"


def test_one_candidate_gives_the_tokens_of_the_plain_decoder():
    requests = [
        decode.Request(prompt, (expert,), temperature, top_p=0.9, seed=10 + i)
        for i, (prompt, expert, temperature) in enumerate(
            zip(plain.PROMPTS, ["public", "beta", "gamma", "alpha", "beta"], [0.0, 1.0, 2.0, 0.5, 9.0], strict=True)
        )
    ]
    expected = [answer.tolist() for answer in plain.decoder("merged").generate(requests, LENGTH)]
    assert [answer.tolist() for answer in decoder("merged").generate(requests, LENGTH)] == expected


def test_batch_mates_do_not_change_an_answer():
    """Not even where they have more candidates."""
    experts = [THREE, ("public",), ("beta", "gamma"), None, ("public", "gamma")]
    requests = [
        decode.Request(prompt, experts[i], temperature=[0.0, 1.0, 1.0, 0.7, 1.3][i], top_k=[0, 0, 5, 0, 0][i], seed=i)
        for i, prompt in enumerate(plain.PROMPTS)
    ]
    answers = [answer.tolist() for answer in decoder("merged").generate(requests, LENGTH)]
    alone = [token for piece, _ in decoder("merged").follow(requests[0], LENGTH) for token in piece]
    assert alone == answers[0] == list(decoder("merged").stream(requests[0], LENGTH))
    public = [dataclasses.replace(request, experts=("public",)) for request in requests]
    assert plain.decoder("merged").generate(public, LENGTH)[1].tolist() == answers[1]
    reverse = [answer.tolist() for answer in decoder("merged").generate(requests[::-1], LENGTH)]
    assert reverse[::-1] == answers


@pytest.mark.parametrize(("name", "bank"), [("merged", "w12"), ("low rank", "r3")])
def test_what_is_not_allowed_may_hold_anything(name, bank):
    flat = tree.flatten(plain.params_of(name))
    gamma = {path: leaf.copy() for path, leaf in flat.items() if path.startswith(f"experts/{bank}/")}
    for leaf in gamma.values():
        leaf[:, 1] = np.nan
    broken = with_params(name, tree.unflatten({**flat, **gamma}))
    for request in (decode.Request([5, 9], THREE, 1.0, seed=3), decode.Request([7], THREE)):
        clean = decoder(name).follow(request, LENGTH)
        for (ids, weights), (expected_ids, expected) in zip(broken.follow(request, LENGTH), clean, strict=True):
            assert ids == expected_ids
            np.testing.assert_array_equal(weights, expected)
    *_, (_, weights) = broken.follow(decode.Request([5, 9], ("public", "beta", "gamma")), LENGTH)
    assert np.isnan(weights).any(), "allowed, it is seen"


def test_bfloat16_decodes():
    params, architecture = plain.params_of("merged"), plain.MODELS["merged"]
    model = quick(sequence_decode.SequenceDecoder(params, architecture, plain.EOS, vocab_size=4, dtype=jnp.bfloat16))
    *_, (ids, weights) = model.follow(decode.Request([2, 3], THREE, temperature=9.0), 6)
    assert all(token < 4 for token in ids) and weights.dtype == np.float32
    np.testing.assert_allclose(weights.sum(), 1, rtol=1e-5)
