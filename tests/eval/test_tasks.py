"""Benchmark items through the scorer: what wins, what is counted, what is measured where, and against which chance."""

import gzip
import json
import math

import numpy as np
import pytest

from flexjax import config as config_lib
from flexjax import errors
from flexjax.eval import continuations, intervals, items, tasks
from flexjax.inference import decode
from flexjax.model import transformer
from tests.eval.bytes_tokenizer import VOCAB, Bytes
from tests.inference.quick import quick
from tests.model import noise

TOKENIZER = Bytes()


def write(directory, name, rows):
    content = "".join(json.dumps({"id": f"{name}/{i}", **row}) + "\n" for i, row in enumerate(rows))
    (directory / f"{name}.jsonl.gz").write_bytes(gzip.compress(content.encode(), mtime=0))
    return items.read(directory, name)


class Oracle:
    """A scorer that reads: `nats_of(context, continuation)` of the texts."""

    def __init__(self, nats_of, window=1000, tokenizer=TOKENIZER):
        self.nats_of, self.window, self.tokenizer, self.rows = nats_of, window, tokenizer, []

    def score(self, rows):
        texts = [(self.tokenizer.decode(context), self.tokenizer.decode(after)) for context, after in rows]
        self.rows += texts
        return [self.nats_of(*text) for text in texts]


class Parrot:
    """A generator that gives each prompt the answer it was told."""

    def __init__(self, answers):
        self.answers, self.asked = answers, []

    def generate(self, prompts, max_new_tokens):
        self.asked.append((len(prompts), max_new_tokens))
        return [np.array(TOKENIZER.encode(self.answers[TOKENIZER.decode(prompt)])) for prompt in prompts]


def choices(*rows):
    return [{"query": query, "choices": list(given), "gold": gold} for query, given, gold in rows]


LENGTHS = choices(  # the right one is long, short, in between
    ("one:", ["aa", "b" * 19], 1), ("two:", ["a" * 9, "b"], 1), ("three:", ["aa", "b" * 7, "c" * 30], 1)
)


def test_per_byte_and_in_all_are_different_measures(tmp_path):
    task = write(tmp_path, "arc_easy", LENGTHS)
    constant = tasks.evaluate(task, TOKENIZER, Oracle(lambda context, after: 4.0))  # the longest wins per byte, none in all
    right = dict(zip(constant.ids, constant.correct.tolist(), strict=True))
    assert right == {"arc_easy/0": True, "arc_easy/1": False, "arc_easy/2": False}
    assert constant.correct_unnormalised.tolist() == [False] * 3  # ties are no answers
    per_byte = tasks.evaluate(task, TOKENIZER, Oracle(lambda context, after: 2.0 * len(after)))
    assert per_byte.correct.tolist() == [False] * 3
    right = dict(zip(per_byte.ids, per_byte.correct_unnormalised.tolist(), strict=True))
    assert right == {"arc_easy/0": False, "arc_easy/1": True, "arc_easy/2": False}  # the shortest
    assert per_byte.bits_per_byte == pytest.approx(2 / math.log(2))
    knows = tasks.evaluate(task, TOKENIZER, Oracle(lambda context, after: len(after) * (1 if after[1] == "b" else 2)))
    assert knows.accuracy == 1.0 and knows.measure == "acc_norm"
    assert dict(zip(knows.ids, knows.nats, strict=True)) == {"arc_easy/0": 20.0, "arc_easy/1": 2.0, "arc_easy/2": 8.0}
    assert knows.num_bytes.tolist() == knows.nats.tolist()


def test_every_choice_is_scored_after_its_query_and_bytes_are_utf8(tmp_path):
    task = write(tmp_path, "arc_easy", choices(("Qu'est-ce?", ["\u00e9t\u00e9", "hiver"], 0)))
    oracle = Oracle(lambda context, after: float(len(after)))
    result = tasks.evaluate(task, TOKENIZER, oracle)
    assert oracle.rows == [("Qu'est-ce?", " \u00e9t\u00e9"), ("Qu'est-ce?", " hiver")]
    assert result.num_bytes.tolist() == [6] and result.nats.tolist() == [4.0]
    assert result.correct.tolist() == [True]  # 4 nats on 6 bytes against 6 on 6


def test_too_long_items_are_counted_and_never_cut(tmp_path):
    rows = choices(("x" * 10, ["aa", "b" * 9], 0), ("x" * 10, ["aa", "b" * 10], 0), ("x" * 20, ["a", "b"], 0))
    task = write(tmp_path, "arc_easy", rows)
    oracle = Oracle(lambda context, after: float(len(after)), window=20)
    result = tasks.evaluate(task, TOKENIZER, oracle)
    assert (result.ids, result.too_long) == (("arc_easy/0",), 2)
    assert {len(context + after) for context, after in oracle.rows} == {13, 20}
    assert len(result.correct) == len(result.nats) == 1
    nothing = tasks.evaluate(task, TOKENIZER, Oracle(lambda context, after: 1.0, window=5))
    assert (nothing.ids, nothing.too_long, nothing.accuracy, nothing.bits_per_byte) == ((), 3, None, None)
    assert (nothing.interval, nothing.chance, nothing.uniform, nothing.informative) == ((0.0, 1.0), None, None, False)


def test_chance_and_whether_it_is_beaten_are_computed_from_the_items(tmp_path):
    rows = choices(*((f"{i}:", ["no", "yes", "ja", "si", "da"][: 2 + i % 4], 1) for i in range(40)))
    task = write(tmp_path, "arc_easy", rows)
    for wrong, informative in ((10, True), (20, True), (24, False), (40, False)):
        slow = {row["query"] for row in rows[:wrong]}
        model = Oracle(
            lambda context, after, slow=slow: 9.0 if after == " yes" and context in slow else 1.0 + (after != " yes")
        )
        result = tasks.evaluate(task, TOKENIZER, model)
        assert result.chance == pytest.approx((1 / 2 + 1 / 3 + 1 / 4 + 1 / 5) / 4)
        assert result.accuracy == (40 - wrong) / 40
        assert result.interval == intervals.wilson(40 - wrong, 40)
        assert result.informative is informative


class Pairs(Bytes):
    """Two z are one token."""

    def _encode_parts(self, parts):
        return [[byte + 2 for byte in part.encode().replace(b"zz", b"\xff")] for part in parts]

    def _decode_ids(self, ids):
        return bytes(i - 2 for i in ids).replace(b"\xff", b"zz").decode()


def test_what_a_model_without_knowledge_gets_by_the_spelling_informs_about_nothing(tmp_path):
    rows = choices(*((f"{i}:", ["no", "zzz" if i < 30 else "yes", "yez"], 1) for i in range(40)))
    task = write(tmp_path, "arc_easy", rows)
    pairs = Pairs()
    blind = Oracle(lambda context, after: 1.0 * len(pairs.encode(after)), tokenizer=pairs)
    result = tasks.evaluate(task, pairs, blind)
    assert result.accuracy == 0.75 and result.interval[0] > result.chance
    assert result.uniform == pytest.approx((30 + 10 / 3) / 40)  # of three that are equally cheap, one in three is drawn
    assert result.informative is False
    knows = Oracle(lambda context, after: 1.0 + (after not in (" zzz", " yes")), tokenizer=pairs)
    assert tasks.evaluate(task, pairs, knows).informative is True


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_likelihood_that_is_no_number_is_named_not_counted(tmp_path, bad):
    task = write(tmp_path, "arc_easy", LENGTHS)
    with pytest.raises(errors.NumericError, match="task arc_easy: the likelihood of item arc_easy/1 is no finite number"):
        tasks.evaluate(task, TOKENIZER, Oracle(lambda context, after: bad if context == "two:" else 1.0))


def test_greedy_answers_are_compared_as_the_task_says(tmp_path):
    rows = [{"prompt": f"Q {i}:", "answer": str(12 * i), "solution": f"{i} x 12"} for i in range(4)]
    task = write(tmp_path, "gsm8k_test", rows)
    wants = {"Q 0:": " 0\nAnswer: 0.0", "Q 1:": " 12", "Q 2:": " Answer: 25", "Q 3:": " x\nAnswer: 36\n\nAnswer: 5"}
    parrot = Parrot(wants)
    result = tasks.evaluate(task, TOKENIZER, Oracle(lambda context, after: 1.0 * len(after)), parrot)
    assert dict(zip(result.ids, result.correct.tolist(), strict=True)) == {
        "gsm8k_test/0": True, "gsm8k_test/1": False, "gsm8k_test/2": False, "gsm8k_test/3": True
    }  # fmt: skip
    assert (result.measure, result.accuracy, result.chance, result.informative) == ("exact number", 0.5, 0.25, False)
    assert parrot.asked == [(4, 256)]
    assert (len(result.ids), result.bits_per_byte) == (4, pytest.approx(1 / math.log(2)))
    without = tasks.evaluate(task, TOKENIZER, Oracle(lambda context, after: 1.0 * len(after)))
    assert (without.measure, without.accuracy, without.interval, without.informative) == ("", None, None, None)
    assert without.bits_per_byte == result.bits_per_byte


def test_greedy_answers_are_read_no_further_than_the_window_reaches(tmp_path):
    """Of prompts of 6, 9 and 15 tokens in a window of 20: the last answer of 6 letters is cut, whoever else is asked."""
    words = {"a" * 6: "kiwi", "b" * 9: "banana", "c" * 15: "kiwi"}
    task = write(tmp_path, "lambada", [{"prompt": prompt, "answer": answer} for prompt, answer in words.items()])
    parrot = Parrot({"a" * 6: " kiwi", "b" * 9: " banana", "c" * 15: " kiwis"})
    result = tasks.evaluate(task, TOKENIZER, Oracle(lambda context, after: 1.0, window=20), parrot)
    assert result.accuracy == 1.0 and parrot.asked == [(3, 14)]
    wide = tasks.evaluate(task, TOKENIZER, Oracle(lambda context, after: 1.0, window=21), parrot)
    assert dict(zip(wide.ids, wide.correct.tolist(), strict=True))["lambada/2"] is False
    assert parrot.asked[1:] == [(3, 15)]
    tasks.evaluate(task, TOKENIZER, Oracle(lambda context, after: 1.0), parrot)
    assert parrot.asked[2:] == [(3, 16)]  # what the task says, where the window is wide


def test_code_is_judged_by_likelihood_and_never_generated_or_run(tmp_path):
    task = write(tmp_path, "humaneval", [{"prompt": "def f():\n", "answer": "    raise SystemExit\n", "test": "f()"}])
    parrot = Parrot({})
    result = tasks.evaluate(task, TOKENIZER, Oracle(lambda context, after: 21.0), parrot)
    assert parrot.asked == [] and result.correct is None
    assert result.bits_per_byte == pytest.approx(1 / math.log(2))


@pytest.mark.parametrize(
    ("measure", "completion", "answer", "expected"),
    [
        (tasks.NUMBER, " 2 + 2 = 4\nAnswer: 4", "4", True),
        (tasks.NUMBER, " 2 + 2 = 4\nAnswer: 4.", "4", True),
        (tasks.NUMBER, "\nAnswer: $1,234.50 in all", "1234.5", True),
        (tasks.NUMBER, "\nAnswer: -3", "3", False),
        (tasks.NUMBER, "\nAnswer: 45", "4", False),
        (tasks.NUMBER, "\nAnswer: 4\nAnswer: 5", "5", False),
        (tasks.NUMBER, "\nAnswer: none", "5", False),
        (tasks.NUMBER, " 5", "5", False),
        (tasks.NUMBER, "\nAnswer:", "5", False),
        (tasks.EXACT, " True\nQ: False", "True", True),
        (tasks.EXACT, "\n True ", "True", True),
        (tasks.EXACT, " True or so", "True", False),
        (tasks.EXACT, " true", "True", False),
        (tasks.EXACT, "", "True", False),
        (tasks.WORD, " Gary.\u201d He", "Gary", True),
        (tasks.WORD, " Gary,\n", "Gary", True),
        (tasks.WORD, " Gary's", "Gary", False),
        (tasks.WORD, " said Gary", "Gary", False),
        (tasks.WORD, " Melissa", "\u201cMelissa", True),
        (tasks.WORD, "", "Gary", False),
    ],
)
def test_what_counts_as_an_answer(measure, completion, answer, expected):
    assert tasks.matches(measure, completion, answer) is expected


def test_a_number_task_needs_numbers(tmp_path):
    rows = [{"prompt": f"Q {i}:", "answer": answer, "solution": "so"} for i, answer in enumerate(("4", "four"))]
    task, parrot = write(tmp_path, "gsm8k_test", rows), Parrot({})
    with pytest.raises(errors.DataError, match="task gsm8k_test: the answer of item gsm8k_test/1 is no number"):
        tasks.evaluate(task, TOKENIZER, Oracle(lambda context, after: 1.0), parrot)
    assert parrot.asked == []
    assert tasks.matches(tasks.NUMBER, "no answer", "four") is False


def test_the_whole_way_with_a_model_and_with_a_masked_expert(tmp_path):
    config = config_lib.ModelConfig(
        vocab_size=VOCAB, d_model=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=12, init_std=0.4
    )
    public = transformer.dense_banks(config)
    dense = transformer.Architecture(config, public)
    merged = transformer.Architecture(config, (*public, config_lib.Bank("owner", ("owner",), 12)), top_k=2)
    params = noise.params(merged, seed=1)
    alone = {
        **{part: params[part] for part in ("embed", "layers", "head")},
        "experts": {"public": {"ffn": params["experts"]["public"]["ffn"]}},
    }
    mc = write(tmp_path, "arc_easy", LENGTHS)
    words = write(tmp_path, "lambada", [{"prompt": f"the {word} is the", "answer": word} for word in ("cat", "dog")])
    models = {
        len(architecture.experts): (
            continuations.ModelScorer(architecture, weights, 1, window=32, batch_size=4),
            quick(decode.Decoder(weights, architecture, 1)),
        )
        for architecture, weights in ((dense, alone), (merged, params))
    }
    found = {}
    for name, architecture, experts in (("dense", dense, None), ("masked", merged, ("public",)), ("merged", merged, None)):
        scorer, decoder = models[len(architecture.experts)]
        greedy = continuations.Greedy(decoder, experts)
        found[name] = [tasks.evaluate(task, TOKENIZER, scorer.restricted(experts), greedy) for task in (mc, words)]
    assert [result.too_long for result in found["dense"]] == [1, 0]  # "three:" and 31 bytes
    assert found["dense"][1].measure == tasks.WORD and found["dense"][1].accuracy == 0.0
    for dense_result, masked, merged_result in zip(*found.values(), strict=True):
        np.testing.assert_allclose(masked.nats, dense_result.nats, rtol=1e-5)
        assert masked.correct.tolist() == dense_result.correct.tolist() and masked.ids == dense_result.ids
        assert np.abs(merged_result.nats / dense_result.nats - 1).max() > 1e-3
