"""Scores of benchmark items: which answer a model holds most likely, and what it answers by itself.

- Multiple choice: the choice with the least -log p per UTF-8 byte (`acc_norm`, the measure that counts) or in all (`acc`).
  In all, every further byte costs, so that the shortest choice wins whatever was asked; and a byte, unlike a token, is
  the same for models with other tokenizers.
- Generative: bits per byte of the right answer, which tells models apart long before one of them answers rightly; and for
  some tasks whether greedy decoding gives it. Code is judged by its likelihood alone: nothing that a model wrote is run.

An item that does not fit the window is counted as too long and left out, never cut. A greedy answer is read no further than
the window reaches behind its own context, whatever the other items: positions beyond it were never trained.

What a model answers rightly is held against guessing, and against a model to which all tokens are alike: that one knows
nothing but how the choices are written, and where right answers are written unlike wrong ones, any untrained model is far
above chance.
"""

import dataclasses
import decimal
import math
import re
import string

import numpy as np
from jaxtyping import Bool, Float, Int

from flexjax import errors
from flexjax.data import tokenizer as tokenizer_lib
from flexjax.eval import continuations, intervals
from flexjax.eval import items as items_lib

NUMBER, EXACT, WORD = "exact number", "exact match", "last word"
GREEDY = {"gsm8k_test": (NUMBER, 256), "bbh_mini": (EXACT, 128), "lambada": (WORD, 16)}  # measure, tokens to answer in

_MARKS = string.punctuation + "\u2018\u2019\u201c\u201d\u2026\u2013\u2014"
_NUMBER = re.compile(r"\s*\$?\s*(-?\d[\d,]*(?:\.\d+)?)")


@dataclasses.dataclass
class Result:
    """What one model makes of one task; arrays have one entry per scored item, so that models can be paired by `ids`.

    Attributes:
      ids: of the items that were scored.
      too_long: items that do not fit the window and are in no other number here.
      nats, num_bytes: -log p of the right continuation, and its UTF-8 bytes.
      measure: "acc_norm", one of `GREEDY`, or empty where only bits per byte are measured.
      correct: by that measure.
      correct_unnormalised: `acc`, of multiple choice.
      chance: mean of the items' chances; None without items.
      uniform: `acc_norm` of a model to which all tokens are alike, in multiple choice.
    """

    task: str
    kind: str
    domain: str
    ids: tuple[str, ...]
    too_long: int
    nats: Float[np.ndarray, " N"]
    num_bytes: Int[np.ndarray, " N"]
    measure: str
    correct: Bool[np.ndarray, " N"] | None
    correct_unnormalised: Bool[np.ndarray, " N"] | None
    chance: float | None
    uniform: float | None

    @property
    def bits_per_byte(self) -> float | None:
        """Of all right continuations together; None without items."""
        return float(self.nats.sum() / math.log(2) / self.num_bytes.sum()) if self.ids else None

    @property
    def accuracy(self) -> float | None:
        """The share of items answered rightly; None without items, or where no answer is asked for."""
        return None if self.correct is None or not self.ids else float(self.correct.mean())

    @property
    def interval(self) -> tuple[float, float] | None:
        """Bounds of the accuracy at 95 %."""
        return None if self.correct is None else intervals.wilson(int(self.correct.sum()), len(self.ids))

    @property
    def informative(self) -> bool | None:
        """Whether the whole interval of the accuracy lies above chance and `uniform`; None where no answer is asked for."""
        if self.interval is None:
            return None
        return self.chance is not None and self.interval[0] > max(self.chance, self.uniform or 0.0)


def evaluate(
    task: items_lib.Task,
    tokenizer: tokenizer_lib.Tokenizer,
    scorer: continuations.Scorer,
    generator: continuations.Generator | None = None,
) -> Result:
    """Scores a model on a task. Without a generator, generative tasks are measured in bits per byte alone.

    Text and continuation become tokens apart from each other, since a continuation begins a word.

    Raises:
      NumericError: the likelihood of an item is no finite number. DataError: an answer that should be a number is none.
      PolicyError: as scorer and generator.
    """
    contexts = tokenizer.encode_batch([item.text for item in task.items])
    flat = iter(tokenizer.encode_batch([text for item in task.items for text in item.continuations]))
    ends = [[next(flat) for _ in item.continuations] for item in task.items]
    fits = [len(c) + max(map(len, e)) <= scorer.window for c, e in zip(contexts, ends, strict=True)]
    kept = [index for index, fit in enumerate(fits) if fit]
    items = [task.items[index] for index in kept]
    scores = iter(scorer.score([(contexts[index], end) for index in kept for end in ends[index]]))
    nats = [np.array([next(scores) for _ in item.continuations]) for item in items]
    for item, values in zip(items, nats, strict=True):
        if not np.isfinite(values).all():
            raise errors.NumericError(f"task {task.name}: the likelihood of item {item.id} is no finite number")
    num_bytes = [np.array([len(text.encode()) for text in item.continuations]) for item in items]
    measure, correct, plain, alike = "", None, None, None
    if task.kind == items_lib.CHOICE:
        measure = "acc_norm"
        correct = np.array([_wins(n / b, i.gold) for n, b, i in zip(nats, num_bytes, items, strict=True)], bool)
        plain = np.array([_wins(n, i.gold) for n, i in zip(nats, items, strict=True)], bool)
        num_tokens = [np.array([len(end) for end in ends[index]]) for index in kept]
        alike = [_draws(t / b, i.gold) for t, b, i in zip(num_tokens, num_bytes, items, strict=True)]
    elif generator is not None and task.name in GREEDY:
        measure, most = GREEDY[task.name]
        _check_answers(task.name, measure, items)
        room = [min(most, scorer.window - len(contexts[index])) for index in kept]  # at least the right answer fits
        answers = generator.generate([contexts[index] for index in kept], max(room)) if kept else []
        texts = [tokenizer.decode(answer[:size]) for answer, size in zip(answers, room, strict=True)]
        correct = np.array([matches(measure, text, item.answer) for text, item in zip(texts, items, strict=True)], bool)
    return Result(
        task=task.name,
        kind=task.kind,
        domain=task.domain,
        ids=tuple(item.id for item in items),
        too_long=len(task.items) - len(items),
        nats=np.array([n[item.gold] for n, item in zip(nats, items, strict=True)], np.float64),
        num_bytes=np.array([b[item.gold] for b, item in zip(num_bytes, items, strict=True)], np.int64),
        measure=measure,
        correct=correct,
        correct_unnormalised=plain,
        chance=float(np.mean([item.chance for item in items])) if items else None,
        uniform=float(np.mean(alike)) if alike else None,
    )


def _check_answers(task: str, measure: str, items: list[items_lib.Item]) -> None:
    for item in items:
        if measure == NUMBER and _number(item.answer) is None:
            raise errors.DataError(
                f"task {task}: the answer of item {item.id} is no number, measure '{NUMBER}' needs one; mend the task file"
            )


def _wins(costs: np.ndarray, gold: int) -> bool:
    """Whether the right choice costs less than every other; a tie is no answer."""
    return bool((np.delete(costs, gold) > costs[gold]).all())


def _draws(costs: np.ndarray, gold: int) -> float:
    """How often the right choice comes out if one of the cheapest is drawn."""
    cheapest = costs == costs.min()
    return float(cheapest[gold] / cheapest.sum())


def matches(measure: str, completion: str, answer: str) -> bool:
    """Whether a completion gives the answer.

    - "exact number": the number after the first "Answer:" has the value of the answer;
    - "exact match": the first line that is not blank is the answer;
    - "last word": the first word is the answer, but for punctuation around it.
    """
    if measure == NUMBER:
        said = _number(completion.partition("Answer:")[2])
        return said is not None and said == _number(answer)
    line = completion.strip().partition("\n")[0].strip()
    if measure == EXACT:
        return line == answer.strip()
    return line.partition(" ")[0].strip(_MARKS) == answer.strip().strip(_MARKS)


def _number(text: str) -> decimal.Decimal | None:
    found = _NUMBER.match(text)
    return decimal.Decimal(found[1].replace(",", "")) if found else None
