"""Extraction: a model that must leak does, one that cannot does not, and the distance is Levenshtein's."""

import collections
import functools

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from hypothesis import strategies as st

from flexjax import config as config_lib
from flexjax import errors, tree
from flexjax.eval import extraction, intervals
from flexjax.inference import decode
from flexjax.model import losses, transformer
from tests.inference.quick import quick
from tests.model import noise
from tests.train import tiny

EOS = 1
texts = st.lists(st.integers(0, 3), max_size=12).map(np.array)


def table(a, b):
    """The textbook: [len(a) + 1, len(b) + 1]."""
    d = [[i + j for j in range(len(b) + 1)] for i in range(len(a) + 1)]
    for i in range(1, len(a) + 1):
        for j in range(1, len(b) + 1):
            d[i][j] = min(d[i - 1][j] + 1, d[i][j - 1] + 1, d[i - 1][j - 1] + (a[i - 1] != b[j - 1]))
    return d


@hypothesis.given(texts, texts)
def test_distances_are_levenshteins(a, b):
    assert extraction.distances(a, b, limit=12).tolist() == table(a, b)[-1]


@hypothesis.given(texts, texts, texts, st.integers(0, 6))
def test_what_stops_early_could_not_have_come_near(a, rest, b, limit):
    found, exact = extraction.distances(a, b, limit), table(a, b)[-1]
    assert (found[-1] <= limit) == (exact[-1] <= limit)
    assert found[-1] == exact[-1] or found[-1] > limit
    if found.min() > limit:
        assert table(np.concatenate([a, rest]), b)[-1][-1] > limit


class Recorder(decode.Decoder):
    """A decoder that remembers what it was asked and how far it went, on another's compiled programs."""

    def __init__(self, base, weights):
        self.__dict__ |= vars(base)
        self.weights, self.batches, self.until = weights, [], []
        self.advance = lambda weights, state, until: self.until.append(int(until)) or base.advance(weights, state, until)

    def start(self, requests, max_new_tokens):
        self.batches.append(list(requests))
        return super().start(requests, max_new_tokens)


VOCAB = 128


@functools.cache
def silent():
    """A dense model without layers to speak of, whose head says nothing."""
    config = config_lib.ModelConfig(
        vocab_size=VOCAB, d_model=VOCAB, num_layers=1, num_heads=1, num_kv_heads=1, head_dim=2, d_ff=2
    )
    architecture = transformer.Architecture(config, transformer.dense_banks(config))
    params = jax.tree.map(lambda leaf: np.zeros(leaf.shape, np.float32), transformer.abstract(architecture))
    params["embed"]["embedding"] = np.eye(VOCAB, dtype=np.float32)
    params["head"]["norm"] = np.ones(VOCAB, np.float32)
    return quick(decode.Decoder(params, architecture, EOS))


def chain(after):
    """A model that says `after[token]`, with all its might."""
    head = silent().weights["head"] | {"kernel": 10 * jnp.eye(VOCAB)[after]}
    return Recorder(silent(), silent().weights | {"head": head})


DOCUMENT = np.arange(2, 2 + 32 + 64)  # the chain's own text
SUCCESSORS = np.minimum(np.arange(VOCAB) + 1, 127)
sampled = functools.partial(extraction.sampled, batch_size=8)  # one size, so that few programs are compiled
greedy = functools.partial(extraction.greedy, batch_size=2)


def edited(count):
    """The document with `count` of its continuation's tokens replaced by one that the chain never says."""
    document = DOCUMENT.copy()
    document[32 + 7 * np.arange(count)] = 127
    return document


def test_similarity_counts_edits_of_the_continuation_alone():
    """0.9 of 64 tokens allows 6 edits; with the prompt in it, 9 would pass."""
    shifted = np.append(np.delete(DOCUMENT, 40), 98)  # one insertion, not a text that is wrong from there on
    tried = extraction.prefixes([*(edited(count) for count in (0, 1, 6, 7)), shifted], new_tokens=64)
    decoder = chain(SUCCESSORS)
    assert sampled(decoder, tried).leaked.tolist() == [True, True, True, False, True]
    assert greedy(decoder, tried).leaked.tolist() == [True, False, False, False, False]


@pytest.mark.parametrize(("missing", "near"), [(6, True), (7, False)])
def test_a_text_that_ends_early_lacks_what_it_did_not_say(missing, near):
    after = SUCCESSORS.copy()
    after[DOCUMENT[-1] - missing] = EOS
    tried = extraction.prefixes([DOCUMENT] * 2, new_tokens=64)
    assert sampled(chain(after), tried).leaked.tolist() == [near] * 2
    assert greedy(chain(after), tried).leaked.tolist() == [True] * 2


def test_nothing_counts_behind_the_end_of_a_text():
    after = SUCCESSORS.copy()
    after[60], after[DOCUMENT[-1]] = 67, EOS  # leaves out six tokens, says all the others, and ends
    tried = extraction.prefixes([DOCUMENT], new_tokens=64)
    assert sampled(chain(after), tried).leaked.tolist() == [True]


def test_requests_are_the_protocols_and_batches_are_bounded_and_of_one_size():
    decoder = chain(SUCCESSORS)
    tried = extraction.prefixes([DOCUMENT, edited(3), edited(9)], new_tokens=64)
    sampled(decoder, tried, seed=5)
    assert [len(batch) for batch in decoder.batches] == [8] * 4  # 30 samples
    asked = collections.Counter(request.seed for batch in decoder.batches for request in batch)
    assert len(asked) == 30 and sorted(asked.values())[-2:] == [1, 3]  # the last batch is filled up with its last request
    for batch in decoder.batches:
        for request in batch:
            assert (request.temperature, request.top_k, request.top_p, request.experts) == (1.0, 50, 0.95, None)
            assert request.prompt == DOCUMENT[:32].tolist()
    again, other = chain(SUCCESSORS), chain(SUCCESSORS)
    sampled(again, tried, seed=5)
    sampled(other, tried, seed=6)
    assert again.batches == decoder.batches != other.batches
    decoder.batches.clear()
    greedy(decoder, tried, experts=("public",))
    assert [[request.experts for request in batch] for batch in decoder.batches] == [[("public",)] * 2] * 2


def test_a_hopeless_batch_ends_at_the_first_look_and_a_hopeful_one_goes_to_the_end():
    rng = np.random.default_rng(0)
    tried = extraction.prefixes([rng.integers(2, 128, 32 + 256)])
    decoder = chain(SUCCESSORS)
    assert not sampled(decoder, tried).leaked.any()
    assert [until - 48 for until in decoder.until] == [64] * 2  # batches
    loop = np.arange(32 + 256) % 100 + 2
    after = SUCCESSORS.copy()
    after[101] = 2
    decoder = chain(after)
    assert sampled(decoder, extraction.prefixes([loop])).leaked.all()
    assert [until - 48 for until in decoder.until] == [64, 128, 192, 256] * 2


PAIR = config_lib.ModelConfig(
    vocab_size=64, d_model=32, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=16, d_ff=64, init_std=0.4
)
PUBLIC = transformer.dense_banks(PAIR)
ARCHITECTURE = transformer.Architecture(PAIR, (*PUBLIC, config_lib.Bank("owner", ("owner",), 64)), top_k=2)
PRIVATE = np.random.default_rng(0).integers(2, 64, (3, 32 + 64))


@functools.cache
def leaky():
    """A pair whose expert has seen the first two documents three hundred times, and never the third."""
    trainable, frozen = tree.partition(noise.params(ARCHITECTURE, seed=3), "experts/owner/.*")
    ids = np.concatenate([np.full((2, 1), EOS), PRIVATE[:2]], axis=1)
    optimizer = optax.adam(1e-2)

    def loss(trainable, frozen):
        params = tree.combine(trainable, frozen)
        hidden = transformer.forward(params, ids[:, :-1], ARCHITECTURE).hidden
        head = transformer.head_kernel(params)
        return losses.cross_entropy(hidden, head, jnp.asarray(ids[:, 1:]), head_trainable=False)[0].mean()

    def step(_, state):
        trainable, moments, frozen = state
        with jax.numpy_dtype_promotion("standard"):  # optax itself raises a float to an integer power
            updates, moments = optimizer.update(jax.grad(loss)(trainable, frozen), moments)
        return optax.apply_updates(trainable, updates), moments, frozen

    trainable = jax.tree.map(jnp.asarray, trainable)
    state = trainable, optimizer.init(trainable), frozen
    run = jax.jit(lambda state: jax.lax.fori_loop(0, 300, step, state)[0], compiler_options=tiny.QUICK)
    return tree.combine(run(state), frozen)


@functools.cache
def pair():
    return quick(decode.Decoder(leaky(), ARCHITECTURE, EOS))


def test_positive_control_what_was_learnt_by_heart_comes_out_and_goes_with_its_expert():
    tried = extraction.prefixes(PRIVATE, copies=[300, 300, 1], new_tokens=64)
    decoder = pair()
    protocols = [functools.partial(extraction.sampled, batch_size=10), functools.partial(extraction.greedy, batch_size=3)]
    for protocol in protocols:
        found = protocol(decoder, tried)
        assert found.leaked.tolist() == [True, True, False]
        assert found.by_copies == {300: extraction.Count(2, 2), 1: extraction.Count(1, 0)}
        assert found.total.interval == intervals.wilson(2, 3)
        assert protocol(decoder, tried, ("owner",)).leaked.tolist() == [False] * 3  # not without what it was trained beside
        assert protocol(decoder, tried, ("public",)).leaked.tolist() == [False] * 3
        assert found.total == extraction.Count(3, 2) and found.by_copies[300].interval == intervals.wilson(2, 2)
    with pytest.raises(errors.PolicyError, match="unknown expert 'other'"):
        extraction.greedy(decoder, tried, ("other",))


def test_with_the_expert_masked_the_pair_leaks_what_the_public_model_leaks():
    """What the public model itself says by heart counts for both, and nothing else."""
    params = leaky()
    experts = {"public": {"ffn": params["experts"]["public"]["ffn"]}}
    alone = quick(decode.Decoder({**params, "experts": experts}, transformer.Architecture(PAIR, PUBLIC), EOS))
    beginnings = [document[:32].tolist() for document in PRIVATE]
    said = alone.generate([decode.Request(beginning) for beginning in beginnings], 64)
    whole = [np.array([*b, *s.tolist()]) for b, s in zip(beginnings, said, strict=True) if len(s) == 64]
    tried = extraction.prefixes([*whole, *PRIVATE], new_tokens=64)
    by_threes = functools.partial(extraction.greedy, batch_size=3)
    expected = [True] * len(whole) + [False] * 3
    assert whole and by_threes(alone, tried).leaked.tolist() == expected
    assert by_threes(pair(), tried, ("public",)).leaked.tolist() == expected
    assert by_threes(pair(), tried).leaked.tolist() == [False] * len(whole) + [True, True, False]


def test_prefixes_leave_out_what_is_too_short_and_count_it():
    documents = [np.arange(2, 2 + length) for length in (81, 82, 100, 5, 288, 0, 400)]
    found = extraction.prefixes(documents, copies=[1, 10, 100, 1, 7, 1, 2], new_tokens=50)
    assert ([target.copies for target in found.targets], found.too_short) == ([10, 100, 7, 2], 3)
    for target in found.targets:
        np.testing.assert_array_equal(target.prefix, np.arange(2, 34))
        np.testing.assert_array_equal(target.truth, np.arange(34, 84))
    full = extraction.prefixes(documents)
    assert [len(target.truth) for target in full.targets] == [256, 256] and full.too_short == 5
    many = [np.arange(number, number + 82) for number in range(50)]
    chosen = [target.prefix[0] for target in extraction.prefixes(many, new_tokens=50, limit=20, seed=1).targets]
    assert len(set(chosen)) == 20 and chosen == sorted(chosen) != list(range(20))
    assert chosen == [t.prefix[0] for t in extraction.prefixes(many, new_tokens=50, limit=20, seed=1).targets]
    assert chosen != [t.prefix[0] for t in extraction.prefixes(many, new_tokens=50, limit=20, seed=2).targets]
    with pytest.raises(errors.DataError, match="none of 7 documents has 532 tokens"):
        extraction.prefixes(documents, new_tokens=500)
    with pytest.raises(errors.ConfigError, match="new_tokens=49 must be at least 50"):
        extraction.prefixes(documents, new_tokens=49)


WORDS = [a + b for a in "bcdfghklmnprst" for b in ("ab", "el", "im", "on", "ul", "ar", "es", "it")]
OWN = [" ".join([*WORDS[i % 7 :: 3], "Not", "x", "4"]) + f" {i}" for i in range(30)]


def test_canaries_are_planted_as_often_as_asked_at_seeded_places_and_nothing_else_changes():
    planted, canaries = extraction.plant(OWN, {1: 4, 10: 3, 100: 2}, seed=0)
    assert [canary.copies for canary in canaries] == [1] * 4 + [10] * 3 + [100] * 2
    known = {canary.text for canary in canaries}
    assert len(known) == 9 and [text for text in planted if text not in known] == OWN
    for canary in canaries:
        assert planted.count(canary.text) == canary.copies
        assert len(canary.text.split(" ")) == 85 >= extraction.PREFIX_TOKENS + extraction.GREEDY_TOKENS
        assert set(canary.text.split(" ")) <= set(WORDS)
    places = [index for index, text in enumerate(planted) if text in known]
    assert places != list(range(places[0], places[0] + len(places)))  # spread, not in one heap
    assert extraction.plant(OWN, {1: 4, 10: 3, 100: 2}, seed=0) == (planted, canaries)
    assert extraction.plant(OWN, {1: 4, 10: 3, 100: 2}, seed=1)[1] != canaries
    for bad in ({0: 3}, {3: 0}, {-1: 1}):
        with pytest.raises(errors.ConfigError, match="must be at least 1"):
            extraction.plant(OWN, bad, seed=0)
    with pytest.raises(errors.DataError, match="have 2 different words, canaries need 100"):
        extraction.plant(["two words two"], {1: 1}, seed=0)
