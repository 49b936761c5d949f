"""What every model makes of every token of a suite's text, kept, so that mixtures of models cost nothing more.

A text is known as `group/name`: `report/math`, `tune/math`, `unseen/math`, `mixed/interleaved`, `mixed/real`.
"""

import functools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from benchmarks.suite import mixed, training
from flexjax.data import pipeline, tokens
from flexjax.eval import bits_per_byte, mixtures

Scores = dict[str, bits_per_byte.TokenScores]  # by text
ARRAYS = "tokens.npz"
BATCH = 16
FIELDS = ("nats", "starts", "documents", "document_bytes", "shares")


def texts(bench: training.Bench, group: str) -> dict[str, tokens.TokenSource]:
    """The texts of a group, in the suite's order."""
    if group == "mixed":
        return {f"mixed/{name}": source for name, source in mixed.prepare(bench).items()}
    names = [name for name in bench.suite.domains if group != "unseen" or name in bench.suite.unseen]
    return {f"{group}/{name}": bench.text(f"{name}/{group}") for name in names}


def score(
    bench: training.Bench,
    model: training.Trained,
    label: str,
    groups: Iterable[str],
    experts: Sequence[str] | None = None,
) -> Scores:
    """Scores a model on groups of texts.

    Args:
      bench: the suite.
      model: of `training`.
      label: names the stage.
      groups: of texts.
      experts: that are switched on; None: all.
    """

    @functools.cache
    def scorer() -> bits_per_byte.Scorer:  # once, and only if something is not scored yet
        return bits_per_byte.Scorer(model.architecture, model.params, bench.size.seq_len, BATCH)

    inputs = {"model": model.key, "top_k": model.architecture.top_k, "experts": None if experts is None else list(experts)}
    return _each_group(bench, label, groups, inputs, lambda source: scorer().tokens(source, experts=experts))


def soup_per_input(
    bench: training.Bench, models: Sequence[training.Trained], key: str, temperature: float, label: str, groups: Iterable[str]
) -> Scores:
    """Scores dense models with a soup for each window, chosen by its opening."""
    architecture = models[0].architecture

    @functools.cache
    def stacked() -> training.Params:
        return jax.tree.map(lambda *leaves: jnp.stack(leaves), *[model.params for model in models])

    run = jax.jit(lambda models, batch: mixtures.soup_per_input(models, batch, architecture, temperature))

    def tokens_of(source: tokens.TokenSource) -> bits_per_byte.TokenScores:
        batches = pipeline.evaluation_batches(source, seq_len=bench.size.seq_len, batch_size=BATCH)
        every = ((batch, run(stacked(), batch), batch["weights"].sum()[None, None]) for batch in batches)
        return bits_per_byte.gather(source, batches, every)

    return _each_group(bench, f"{label}-{temperature:g}", groups, {"models": key, "temperature": temperature}, tokens_of)


def _each_group(
    bench: training.Bench,
    label: str,
    groups: Iterable[str],
    inputs: Mapping[str, Any],
    tokens_of: Callable[[tokens.TokenSource], bits_per_byte.TokenScores],
) -> Scores:
    """One stage for each group of texts."""
    found: Scores = {}
    for group in groups:
        sources = texts(bench, group)
        digests = {name: source.digest for name, source in sources.items()}

        def make(directory: epath.Path, sources: Mapping[str, tokens.TokenSource] = sources) -> dict[str, Any]:
            keep(directory, {name: tokens_of(source) for name, source in sources.items()})
            return {}

        known = {**inputs, "texts": digests, "seq_len": bench.size.seq_len}
        found |= kept(bench.stages.run(f"score-{label}-{group}", known, make))
    return found


def keep(directory: epath.Path, scores: Scores) -> None:
    """Writes scores into a stage."""
    flat = {f"{text}:{field}": getattr(found, field) for text, found in scores.items() for field in FIELDS}
    part = directory / f"part-{ARRAYS}"
    np.savez_compressed(part, **flat)
    part.rename(directory / ARRAYS)


def kept(directory: epath.Path) -> Scores:
    """Reads what `keep` wrote."""
    with np.load(directory / ARRAYS, allow_pickle=False) as found:
        names = dict.fromkeys(key.rpartition(":")[0] for key in found.files)
        return {text: bits_per_byte.TokenScores(*(found[f"{text}:{field}"] for field in FIELDS)) for text in names}


def by_document(scores: bits_per_byte.TokenScores, nats: np.ndarray | None = None) -> dict[str, list[float]]:
    """Sums over each document: nats (those of the scores unless others are given) and bytes."""
    sums = np.bincount(scores.documents, scores.nats if nats is None else nats, minlength=len(scores.document_bytes))
    return {"nats": [round(float(value), 3) for value in sums], "bytes": [int(size) for size in scores.document_bytes]}


def bits(scores: Scores, group: str, nats: Mapping[str, np.ndarray] | None = None) -> dict[str, float]:
    """Bits per byte of each text of a group."""
    found = {}
    for text, score_ in scores.items():
        if text.startswith(f"{group}/"):
            values = score_.nats if nats is None else nats[text]
            found[text] = float(np.sum(values, dtype=np.float64) / np.log(2) / score_.document_bytes.sum())
    return found
