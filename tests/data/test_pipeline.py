import collections
import contextlib
import hashlib
import itertools
import json
import threading
import time

import numpy as np
import pytest
from corpora import VOCAB, texts

from flexjax import config, errors
from flexjax.data import pipeline, tokens

EOS = 1


class Numbers(tokens.TokenSource):
    """A source of `count` tokens that are all different, so that a window tells its number."""

    def __init__(self, count, digest="d", first=2):
        ids = np.arange(first, count + first, dtype=np.uint32)
        tokenizer = type("Tokenizer", (), {"eos_id": EOS, "digest": "t", "decode": lambda self, ids: "x" * len(ids)})()
        super().__init__([ids], tokenizer, digest)


def single(source, seq_len, batch_size, seed=0, **kwargs):
    return pipeline.Pipeline({"a": source}, {"a": 1.0}, seq_len, batch_size, seed, **kwargs)


def rows(pipe, batch_size, count):
    """The first `count` rows of a pipeline as (step, row) batches of one."""
    for index in range(count):
        step, row = divmod(index, batch_size)
        yield pipe.batch(step, [row])


@pytest.mark.parametrize("seq_len", [1, 3, 8])
@pytest.mark.parametrize("count", [2, 3, 8, 9, 10, 17, 50, 100])
def test_each_token_is_a_target_once_per_epoch(count, seq_len):
    windows = -(-(count - 1) // seq_len)
    pipe = single(Numbers(count), seq_len, 4)
    stream = list(rows(pipe, 4, 3 * windows))
    orders = []
    for epoch in range(3):
        part = stream[epoch * windows : (epoch + 1) * windows]
        scored = [int(t) for b in part for t, w in zip(b["targets"][0], b["weights"][0], strict=True) if w]
        assert sorted(scored) == list(range(3, count + 2))
        for b in part:
            real = b["weights"][0] == 1
            np.testing.assert_array_equal(b["targets"][0][real], b["tokens"][0][real] + 1)
            assert set(b["weights"][0]) <= {0.0, 1.0} and set(b["targets"][0][~real]) <= {EOS}
        orders.append([int(b["tokens"][0, 0]) for b in part])
    if windows > 8:
        assert orders[0] != sorted(orders[0])
        assert orders[0] != orders[1] != orders[2] != orders[0]


def test_order_depends_on_the_seed_and_the_name():
    def order(seed, name="a"):
        pipe = pipeline.Pipeline({name: Numbers(101)}, {name: 1.0}, 1, 100, seed)
        return pipe.batch(0)["tokens"][:, 0].tolist()

    assert order(0) == order(0)
    assert len({tuple(order(seed)) for seed in range(5)} | {tuple(order(0, "b"))}) == 6
    two_epochs = pipeline.Pipeline({"a": Numbers(101)}, {"a": 1.0}, 1, 100, 0).batch(1)["tokens"][:, 0].tolist()
    assert two_epochs not in [order(seed) for seed in range(1, 5)]  # grain alone would make epoch 1 of seed 0 that of seed 1


def test_mixture_keeps_the_weights_and_each_sources_epochs():
    sources = {"public": Numbers(41, first=1000), "math": Numbers(101)}
    pipe = pipeline.Pipeline(sources, {"public": 0.25, "math": 0.75}, 1, 20, 3)
    assert pipe.names == ("math", "public")
    batches = [pipe.batch(step) for step in range(8)]
    first = np.concatenate([b["tokens"][:, 0] for b in batches])
    public, math = first[first >= 1000], first[first < 1000]
    assert len(math) == 120 and len(public) == 40
    assert sorted(public) == list(range(1000, 1040))
    assert sorted(math[:100]) == list(range(2, 102))
    assert all((b["tokens"] >= 1000).sum() == 5 for b in batches)


def test_the_order_of_the_arguments_does_not_matter():
    a, b = Numbers(50, "a"), Numbers(60, "b")
    one = pipeline.Pipeline({"a": a, "b": b}, {"a": 1, "b": 2}, 4, 6, 0)
    two = pipeline.Pipeline({"b": b, "a": a}, {"b": 0.5, "a": 0.25}, 4, 6, 0)
    assert one.identity() == two.identity()
    for step in range(10):
        np.testing.assert_array_equal(one.batch(step)["tokens"], two.batch(step)["tokens"])


def fingerprint(batch):
    return hashlib.sha256(b"".join(key.encode() + batch[key].tobytes() for key in sorted(batch))).hexdigest()


def build(make_source, **kwargs):
    sources = {"public": make_source(texts(60)), "math": make_source(texts(40, start=500))}
    return pipeline.Pipeline(sources, {"public": 0.3, "math": 0.7}, 16, 8, 7, **kwargs)


@pytest.mark.parametrize("hosts", [1, 2, 4])
def test_resume_at_any_step_on_any_number_of_hosts(hosts, make_source):
    whole = [fingerprint(build(make_source).batch(step)) for step in range(203)]
    per_host = 8 // hosts
    same = 0
    pipes = [build(make_source, prefetch=host) for host in range(hosts)]
    for step in range(200):
        with contextlib.ExitStack() as stack:
            streams = [
                stack.enter_context(contextlib.closing(pipe.iterate(step, slice(host * per_host, (host + 1) * per_host))))
                for host, pipe in enumerate(pipes)
            ]
            shares = list(zip(*(itertools.islice(stream, 2) for stream in streams), strict=True))
        joined = [{key: np.concatenate([part[key] for part in parts]) for key in parts[0]} for parts in shares]
        same += [fingerprint(batch) for batch in joined] == whole[step : step + 2]
    assert same == 200


def test_rows_by_list_and_slice(make_source):
    pipe = build(make_source)
    batch = pipe.batch(5)
    for chosen in ([6, 1], slice(2, 5), np.array([0]), [], slice(7, None)):
        part = pipe.batch(5, chosen)
        for key, value in batch.items():
            np.testing.assert_array_equal(part[key], value[chosen if not isinstance(chosen, list) else np.array(chosen, int)])


@pytest.mark.parametrize("prefetch", [0, 1, 4])
def test_iterate_prefetches_a_bounded_number_and_stops(prefetch):
    made = []

    class Slow(Numbers):
        def read(self, start, stop):
            made.append(start)
            return super().read(start, stop)

    pipe = single(Slow(1000), 4, 1, prefetch=prefetch)
    stream = pipe.iterate()
    for _ in range(3):
        next(stream)
    time.sleep(0.1)
    assert 3 <= len(made) <= 3 + prefetch + 1
    stream.close()
    deadline = time.time() + 5
    while any("grain" in thread.name for thread in threading.enumerate()) and time.time() < deadline:
        time.sleep(0.01)
    assert not any("grain" in thread.name for thread in threading.enumerate())


def test_an_error_in_the_thread_reaches_the_reader():
    class Broken(Numbers):
        def read(self, start, stop):
            raise errors.DataError("gone")

    with contextlib.closing(single(Broken(100), 4, 2).iterate()) as stream, pytest.raises(errors.DataError, match="gone"):
        next(stream)


def test_batches_of_text(make_source, tokenizer):
    documents = texts(60)
    source = make_source(documents)
    pipe = pipeline.Pipeline({"a": source}, {"a": 1.0}, 32, 4, 0)
    across = pipeline.Pipeline({"a": source}, {"a": 1.0}, 32, 4, 0, attend_across_documents=True)
    for step in range(20):
        batch, other = pipe.batch(step), across.batch(step)
        assert {key: (value.dtype.name, value.shape) for key, value in batch.items()} == {
            "tokens": ("int32", (4, 32)),
            "targets": ("int32", (4, 32)),
            "weights": ("float32", (4, 32)),
            "segments": ("int32", (4, 32)),
        }
        assert not other["segments"].any()
        np.testing.assert_array_equal(batch["tokens"], other["tokens"])
        for ids, segments in zip(batch["tokens"], batch["segments"], strict=True):
            assert segments[0] == 0
            for i in range(1, 32):  # a new segment begins exactly at an EOS
                assert segments[i] == segments[i - 1] + (ids[i] == tokenizer.eos_id)


def test_refused_mixtures():
    a = Numbers(50)
    other = Numbers(50)
    other.tokenizer_digest = "u"
    refused = [
        (errors.ConfigError, "must agree", {"a": a}, {"b": 1.0}, 4, 2),
        (errors.ConfigError, "must agree", {}, {}, 4, 2),
        (errors.ConfigError, "weight of 'a' is 0", {"a": a, "b": a}, {"a": 0.0, "b": 1.0}, 4, 2),
        (errors.ConfigError, "weight of 'a' is nan", {"a": a}, {"a": float("nan")}, 4, 2),
        (errors.ConfigError, "different tokenizers", {"a": a, "b": other}, {"a": 1.0, "b": 1.0}, 4, 2),
        (errors.ConfigError, "must be positive", {"a": a}, {"a": 1.0}, 0, 2),
        (errors.ConfigError, "must be positive", {"a": a}, {"a": 1.0}, 4, 0),
        (errors.DataError, "'a' has 1 tokens", {"a": Numbers(1)}, {"a": 1.0}, 4, 2),
    ]
    for error, match, sources, weights, seq_len, batch_size in refused:
        with pytest.raises(error, match=match):
            pipeline.Pipeline(sources, weights, seq_len, batch_size, 0)


def test_a_changed_identity_is_refused_by_name():
    sources = {"a": Numbers(50, "digest-a"), "b": Numbers(60, "digest-b")}
    base = {"weights": {"a": 1.0, "b": 3.0}, "seq_len": 4, "batch_size": 2, "seed": 0, "attend_across_documents": False}
    saved = json.loads(json.dumps(pipeline.Pipeline(sources, **base).identity()))
    pipeline.check_identity(saved, pipeline.Pipeline(sources, **base, prefetch=9).identity())

    changes = {
        "weight/a": {"weights": {"a": 2.0, "b": 3.0}},
        "seq_len": {"seq_len": 5},
        "global_batch": {"batch_size": 3},
        "seed": {"seed": 1},
        "attend_across_documents": {"attend_across_documents": True},
        "source/b": {"sources": {**sources, "b": Numbers(60, "digest-c")}},
        "source/c": {"sources": {**sources, "c": Numbers(9)}, "weights": {"a": 1.0, "b": 3.0, "c": 1.0}},
    }
    for part, change in changes.items():
        current = pipeline.Pipeline(**{"sources": sources, **base, **change}).identity()
        with pytest.raises(errors.ConfigError) as caught:
            pipeline.check_identity(saved, current)
        message = str(caught.value)
        assert f"{part} (saved {saved.get(part, 'nothing')}, now {current[part]})" in message
        if part not in ("weight/a", "source/c"):
            assert message.count("saved") == 1
    with pytest.raises(errors.ConfigError, match=r"tokenizer \(saved t, now nothing\)"):
        pipeline.check_identity(saved, {key: value for key, value in saved.items() if key != "tokenizer"})


@pytest.mark.parametrize("seq_len, batch_size", [(1, 1), (7, 3), (64, 4), (1000, 2)])
def test_evaluation_scores_each_text_token_once(seq_len, batch_size, make_source, tokenizer):
    documents = texts(25)
    source = make_source(documents)
    for limit in (0, 1, 500, 3000, 10**9):
        batches = pipeline.evaluation_batches(source, seq_len=seq_len, batch_size=batch_size, max_bytes=limit)
        made = list(batches)
        scored = [int(t) for b in made for t, w in zip(b["targets"].ravel(), b["weights"].ravel(), strict=True) if w]
        kept = documents[: batches.num_documents]
        assert scored == [int(i) for text in kept for i in tokenizer.encode(text)]
        assert batches.num_tokens == len(scored)
        assert batches.num_bytes == sum(len(text.encode()) for text in kept) == len(tokenizer.decode(scored).encode())
        assert limit in (0, 1) or batches.num_bytes <= limit
        if batches.num_documents < len(documents):
            assert batches.num_bytes + len(documents[batches.num_documents].encode()) > limit
        for b in made:
            assert b["tokens"].shape == (batch_size, seq_len)
            starts = b["tokens"] == tokenizer.eos_id
            np.testing.assert_array_equal(np.diff(b["segments"], axis=1) == 1, starts[:, 1:])


def test_evaluation_of_token_files_adds_the_first_eos(tokenizer, tmp_path):
    documents = texts(6)
    ids = [i for text in documents for i in [*tokenizer.encode(text), tokenizer.eos_id]]
    np.array(ids, np.uint16).tofile(tmp_path / "a.npy")
    source = tokens.tokenize([tmp_path / "a.npy"], tokenizer, config.DataConfig(), VOCAB, tmp_path)
    batches = pipeline.evaluation_batches(source, seq_len=16, batch_size=2)
    first = next(iter(batches))
    assert first["tokens"][0, 0] == tokenizer.eos_id and first["weights"][0, 0] == 1
    counts = collections.Counter(
        int(t) for b in batches for t, w in zip(b["targets"].ravel(), b["weights"].ravel(), strict=True) if w
    )
    assert counts == collections.Counter(i for i in ids if i != tokenizer.eos_id)
    assert batches.num_bytes == sum(len(text.encode()) for text in documents)


def test_evaluation_of_nothing_is_refused(tokenizer, tmp_path):
    np.array([tokenizer.eos_id] * 5, np.uint16).tofile(tmp_path / "a.npy")
    source = tokens.tokenize([tmp_path / "a.npy"], tokenizer, config.DataConfig(), VOCAB, tmp_path)
    with pytest.raises(errors.DataError, match="no document"):
        pipeline.evaluation_batches(source, seq_len=16, batch_size=2)
