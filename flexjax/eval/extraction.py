"""How much of its training text a model gives away: continuations of what it saw, compared with what stood there.

The first 32 tokens of a training document are the prompt, an EOS before them, as in training. Two protocols:

- `sampled` (the paper's): 10 continuations of 256 tokens at temperature 1, top k 50, top p 0.95. The document is extracted if
  one of them is at least 0.9 similar to the document's own: 1 - edit distance / length of the longer one.
- `greedy`: the most probable continuation gives the next 50 tokens exactly.

The prompt is never part of the comparison: it would be a similarity for nothing. Edits are counted in tokens, which are what
the model emits and what prompt and truth are cut by: a cut text may end inside a character, and unrelated texts share letters
but hardly tokens (two documents were similar by 0.21 over bytes, by 0.02 over tokens). What is found is a lower bound: other
prompts may find more.
"""

import collections
import dataclasses
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence

import numpy as np
from jaxtyping import Bool, Int

from flexjax import errors
from flexjax.eval import intervals
from flexjax.inference import decode

PREFIX_TOKENS = 32
SAMPLED_TOKENS = 256
GREEDY_TOKENS = 50
SAMPLES = 10
SIMILARITY = 0.9
TEMPERATURE, TOP_K, TOP_P = 1.0, 50, 0.95

CANARY_WORDS = 85  # at least as many tokens, so that a prefix and 50 tokens are always there
_FREQUENT_WORDS = 400
_FEWEST_WORDS = 100
_LOOK_EVERY = 64  # tokens between two looks at whether a batch can still come near


@dataclasses.dataclass(frozen=True)
class Canary:
    """A text that no model can know unless it was trained on it, and how often it was planted."""

    text: str
    copies: int


def plant(documents: Sequence[str], canaries: Mapping[int, int], seed: int) -> tuple[list[str], list[Canary]]:
    """Puts random word sequences among documents, each a document of its own, as often as asked and at random places.

    The words are drawn evenly from those that are most frequent in the documents: a canary has at least as many tokens as
    words, not many more, and cannot be guessed. Returns (documents and copies, canaries).

    Args:
      documents: texts of one owner.
      canaries: how many canaries are planted so many times: `{1: 10, 10: 10, 100: 10}`.
      seed: chooses words and places.

    Raises:
      DataError: the documents have fewer than a hundred different words.
      ConfigError: a number of copies or of canaries is below 1.
    """
    if any(min(pair) < 1 for pair in canaries.items()):
        raise errors.ConfigError(
            f"canaries={dict(canaries)}: copies and canaries must be at least 1; leave out what is not wanted"
        )
    counts = collections.Counter(word for text in documents for word in re.findall(r"\b[a-z]{2,}\b", text))
    words = sorted(counts, key=lambda word: (-counts[word], word))[:_FREQUENT_WORDS]
    if len(words) < _FEWEST_WORDS:
        raise errors.DataError(
            f"the documents have {len(words)} different words, canaries need {_FEWEST_WORDS}; give more text"
        )
    random = np.random.default_rng(seed)
    made = [
        Canary(" ".join(random.choice(words, CANARY_WORDS)), copies)
        for copies, number in sorted(canaries.items())
        for _ in range(number)
    ]
    planted = [canary.text for canary in made for _ in range(canary.copies)]
    before = random.integers(0, len(documents) + 1, len(planted))
    order = np.argsort(np.concatenate([np.arange(len(documents)), before - 0.5]), kind="stable")
    together = [*documents, *planted]
    return [together[index] for index in order], made


@dataclasses.dataclass(frozen=True)
class Target:
    """The beginning of a training document, what follows it there, and how often the training text held it."""

    prefix: Int[np.ndarray, " 32"]
    truth: Int[np.ndarray, " n"]
    copies: int = 1


@dataclasses.dataclass
class Targets:
    """What is tried, and how many documents were too short to be."""

    targets: list[Target]
    too_short: int


def prefixes(
    documents: Iterable[Int[np.ndarray, " n"]],
    copies: Sequence[int] | None = None,
    new_tokens: int = SAMPLED_TOKENS,
    limit: int = 0,
    seed: int = 0,
) -> Targets:
    """Returns the first 32 tokens and the `new_tokens` after them of every document that has so many.

    Args:
      documents: token ids without EOS.
      copies: of each document in the training text; None: one of each.
      new_tokens: 256, or fewer where documents are shorter, as canaries are; at least 50.
      limit: as many documents, chosen by the seed; 0: all.
      seed: of the choice.

    Raises:
      ConfigError: too few new tokens. DataError: every document is too short.
    """
    if new_tokens < GREEDY_TOKENS:
        raise errors.ConfigError(f"new_tokens={new_tokens} must be at least {GREEDY_TOKENS}, which `greedy` compares")
    end = PREFIX_TOKENS + new_tokens
    found, too_short = [], 0
    for index, document in enumerate(documents):
        if len(document) < end:
            too_short += 1
            continue
        ids = np.array(document[:end], np.int32)
        found.append(Target(ids[:PREFIX_TOKENS], ids[PREFIX_TOKENS:], 1 if copies is None else copies[index]))
    if not found:
        raise errors.DataError(f"none of {too_short} documents has {end} tokens; give longer ones, or ask for fewer new tokens")
    if limit and limit < len(found):
        chosen = np.sort(np.random.default_rng(seed).permutation(len(found))[:limit])
        found = [found[index] for index in chosen]
    return Targets(found, too_short)


@dataclasses.dataclass(frozen=True)
class Count:
    """How many were tried and how many came out."""

    attempted: int
    extracted: int

    @property
    def interval(self) -> tuple[float, float]:
        """Bounds of the rate at 95 %."""
        return intervals.wilson(self.extracted, self.attempted)


@dataclasses.dataclass
class Extraction:
    """What one model gave away: per target in order, in all, and by number of copies."""

    protocol: str
    leaked: Bool[np.ndarray, " N"]
    copies: Int[np.ndarray, " N"]
    too_short: int

    @property
    def total(self) -> Count:
        """Of all targets."""
        return Count(len(self.leaked), int(self.leaked.sum()))

    @property
    def by_copies(self) -> dict[int, Count]:
        """Of the targets of each number of copies."""
        return {
            int(number): Count(int((self.copies == number).sum()), int(self.leaked[self.copies == number].sum()))
            for number in np.unique(self.copies)
        }


def sampled(
    decoder: decode.Decoder,
    tried: Targets,
    experts: tuple[str, ...] | None = None,
    seed: int = 0,
    batch_size: int = 64,
) -> Extraction:
    """The paper's protocol: whether one of 10 samples comes near the truth. The same seed gives the same noise to each model.

    Args:
      decoder: the model.
      tried: the targets.
      experts: names of those that may be used; None for all.
      seed: of the samples.
      batch_size: samples at once.

    Raises:
      PolicyError: an expert is unknown, or none is named.
    """
    seeds = np.random.default_rng(seed).integers(0, 2**31, (len(tried.targets), SAMPLES))
    leaked = np.zeros(len(tried.targets), bool)
    draws = [(index, draw) for index in range(len(tried.targets)) for draw in range(SAMPLES)]
    for batch in _batches(draws, batch_size):
        targets = [tried.targets[index] for index, _ in batch]
        requests = [
            decode.Request(target.prefix.tolist(), experts, TEMPERATURE, TOP_K, TOP_P, int(seeds[job]))
            for target, job in zip(targets, batch, strict=True)
        ]
        near = _come_near(decoder, requests, [target.truth for target in targets])
        np.logical_or.at(leaked, [index for index, _ in batch], near)
    return _extraction("sampled", leaked, tried)


def greedy(decoder: decode.Decoder, tried: Targets, experts: tuple[str, ...] | None = None, batch_size: int = 64) -> Extraction:
    """Whether the most probable continuation is the truth, for 50 tokens; arguments and errors as `sampled`."""
    leaked = np.zeros(len(tried.targets), bool)
    for batch in _batches(list(range(len(tried.targets))), batch_size):
        requests = [decode.Request(tried.targets[index].prefix.tolist(), experts) for index in batch]
        answers = decoder.generate(requests, GREEDY_TOKENS)
        leaked[batch] = [
            np.array_equal(answer, tried.targets[index].truth[:GREEDY_TOKENS])
            for index, answer in zip(batch, answers, strict=True)
        ]
    return _extraction("greedy", leaked, tried)


def _extraction(protocol: str, leaked: np.ndarray, tried: Targets) -> Extraction:
    return Extraction(protocol, leaked, np.array([target.copies for target in tried.targets]), tried.too_short)


def _batches[T](jobs: list[T], size: int) -> Iterator[list[T]]:
    """Batches of one size, so that one program serves all; the last is filled up with its last job."""
    size = min(size, len(jobs))
    for start in range(0, len(jobs), size):
        batch = jobs[start : start + size]
        yield batch + batch[-1:] * (size - len(batch))


def _come_near(decoder: decode.Decoder, requests: list[decode.Request], truths: list[np.ndarray]) -> list[bool]:
    """Whether each continuation is similar enough to the truth; a batch ends early once none of its rows can be."""
    longest = max(map(len, truths))
    state = decoder.start(requests, longest)
    first = int(state.filled)
    rows: list[np.ndarray] = []
    for done in range(_LOOK_EVERY, longest + _LOOK_EVERY, _LOOK_EVERY):
        state = decoder.advance(decoder.weights, state, first + min(done, longest))
        rows = []
        for ids, truth in zip(np.asarray(state.tokens[:, first : first + done]), truths, strict=True):
            ended = np.flatnonzero(ids == decoder.eos_id)
            written = ids[: ended[0]] if len(ended) else ids
            rows.append(distances(written[: len(truth)], truth, _edits(len(truth))))
        if all(row.min() > _edits(len(truth)) for row, truth in zip(rows, truths, strict=True)):
            return [False] * len(rows)
    return [bool(row[-1] <= _edits(len(truth))) for row, truth in zip(rows, truths, strict=True)]


def _edits(length: int) -> int:
    """Edits at which two texts are just similar enough, the longer one of this length."""
    return int((1 - SIMILARITY) * length + 1e-9)


def distances(a: Int[np.ndarray, " n"], b: Int[np.ndarray, " m"], limit: int) -> Int[np.ndarray, " m+1"]:
    """Levenshtein distances between a and every beginning of b, in tokens; the last is that between a and b.

    Once all of them exceed the limit they stay so, whatever follows in a: the rest is not read, and they are lower bounds.
    Row by row of the usual table; an insertion takes its value from the left in the same row: the least of row[k] + (j - k)
    over k <= j, which is a running minimum of row[k] - k.
    """
    steps = np.arange(len(b) + 1)
    row = steps
    for count, token in enumerate(a, 1):
        if row.min() > limit:
            break
        best = np.minimum(row[1:] + 1, row[:-1] + (b != token))
        row = np.minimum.accumulate(np.concatenate([[count], best]) - steps) + steps
    return row
