"""Every way of getting one model out of several owners' text, from the same anchor.

A method returns an `Outcome`: what it makes of every token of the suite's text, the training behind it, and what one token
costs. Mixtures of models need no more than what each of the models makes of each token.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from benchmarks.suite import models, routing, scoring, training
from flexjax import baselines, tree
from flexjax import config as config_lib
from flexjax.eval import mixtures
from flexjax.governance import calibration, layerwise
from flexjax.inference import sequence
from flexjax.train import flops

PUBLIC = config_lib.PUBLIC
Nats = dict[str, np.ndarray]  # by text
SOUP_TEMPERATURES = (0.3, 0.05, 1 / 64)  # the last gives the likelihood of a quarter of a window, not its mean, the word
BTM_TEMPERATURES = (1.0, 3.0, 10.0)
OPENING = 64  # tokens by which a cheap mixture chooses
Combine = Callable[[np.ndarray, np.ndarray], np.ndarray]
Method = Callable[[models.Models], "Outcome"]


@dataclasses.dataclass(frozen=True)
class Part:
    """A model with some of its experts switched on; None: all."""

    model: training.Trained
    experts: tuple[str, ...] | None = None


@dataclasses.dataclass
class Outcome:
    """What a method came to.

    Attributes:
      scores: of one of its models, or of the only one: they say which token is of which document.
      runs: names of the training runs behind it, as the ledger has them.
      inference_flops: per token.
      nats: by text, where they are not those of `scores`.
      experts: names of a routed model's experts, to whom the shares of `scores` belong.
      trials: of its settings, on the tuning half: setting, value, bits per byte.
      chosen: among them.
      parts: the models, where they can score any text: one, or several that `combine` makes one of.
      combine: -log p of each token of a text, [N], from those under each model, [M, N], and where segments start.
      confusion: of the tokens of each domain, the share in which each expert weighs most.
      extra: whatever else belongs into its row.
    """

    scores: scoring.Scores
    runs: tuple[str, ...]
    inference_flops: float
    nats: Nats | None = None
    experts: tuple[str, ...] = ()
    trials: list[dict[str, Any]] = dataclasses.field(default_factory=list)
    chosen: dict[str, Any] = dataclasses.field(default_factory=dict)
    parts: tuple[Part, ...] = ()
    combine: Combine | None = None
    confusion: dict[str, list[float]] | None = None
    extra: dict[str, Any] = dataclasses.field(default_factory=dict)


def single(lab: models.Models, model: training.Trained, label: str, **extra: Any) -> Outcome:
    """One model, all its experts switched on."""
    cost = flops.forward_per_token(model.architecture, lab.bench.size.seq_len)
    experts = model.architecture.experts if model.architecture.routed else ()
    found = scoring.score(lab.bench, model, lab.prefix + label, lab.groups)
    return Outcome(found, model.runs, cost, experts=experts, parts=(Part(model),), extra=extra)


def macro(scores: scoring.Scores, group: str, nats: Nats | None = None) -> float:
    """Mean over domains of bits per byte."""
    return float(np.mean(list(scoring.bits(scores, group, nats).values())))


def mixture(
    lab: models.Models, parts: Sequence[Part], scores: Sequence[scoring.Scores], ways: Mapping[str, Combine], cost: float
) -> Outcome:
    """Several models as one, in the way that is best on the tuning half.

    Args:
      lab: the models.
      parts, scores: each model, and what it makes of each token.
      ways: of combining them.
      cost: inference FLOPs per token.
    """
    every = {text: np.stack([found[text].nats for found in scores]) for text in scores[0]}
    made = {
        label: {text: combine(nats, scores[0][text].starts) for text, nats in every.items()} for label, combine in ways.items()
    }
    reached = {label: round(macro(scores[0], "tune", nats), 4) for label, nats in made.items()}
    nats, trials, chosen = _chosen(made, reached)
    runs = tuple(dict.fromkeys(run for part in parts for run in part.model.runs))
    combine = ways[chosen["setting"]]
    return Outcome(scores[0], runs, cost, nats, trials=trials, chosen=chosen, parts=tuple(parts), combine=combine)


def _chosen[T](found: Mapping[str, T], reached: Mapping[str, float]) -> tuple[T, list[dict[str, Any]], dict[str, Any]]:
    label = min(reached, key=lambda label: reached[label])
    return found[label], [{"setting": tried, "tune": value} for tried, value in reached.items()], {"setting": label}


# Core


def anchor(lab: models.Models) -> Outcome:
    return single(lab, lab.public, "anchor")


def control(lab: models.Models) -> Outcome:
    return single(lab, lab.control, "control")


def dense(name: str) -> Method:
    return lambda lab: single(lab, lab.dense(name), f"dense-{name}")


def _dense_models(lab: models.Models) -> dict[str, training.Trained]:
    return {PUBLIC: lab.public} | {name: lab.dense(name) for name in lab.names}


def _runs(parts: Mapping[str, training.Trained]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(run for part in parts.values() for run in part.runs))


def joined_key(kind: str, parts: Mapping[str, training.Trained]) -> str:
    return tree.sha256(tree.canonical_json({"kind": kind, **{name: part.key for name, part in parts.items()}}))


def soup(lab: models.Models) -> Outcome:
    parts = _dense_models(lab)
    params = baselines.soup([part.params for part in parts.values()])
    return single(lab, training.Trained(lab.public.architecture, params, joined_key("soup", parts), _runs(parts)), "soup")


def soup_weighted(lab: models.Models) -> Outcome:
    parts = _dense_models(lab)
    key = joined_key("weighted soup", parts)
    label = f"{lab.prefix}soup-weighted"
    found = {
        f"temperature {t:g}": scoring.soup_per_input(lab.bench, list(parts.values()), key, t, label, lab.groups)
        for t in SOUP_TEMPERATURES
    }
    reached = {setting: round(macro(scores, "tune"), 4) for setting, scores in found.items()}
    scores, trials, chosen = _chosen(found, reached)
    passes = 1 + len(parts) / 4  # the opening of a window is read by all
    cost = passes * flops.forward_per_token(lab.public.architecture, lab.bench.size.seq_len)
    return Outcome(scores, _runs(parts), cost, trials=trials, chosen=chosen)


def dense_scores(lab: models.Models) -> tuple[list[Part], list[scoring.Scores]]:
    """The anchor and every owner's dense model, and what each makes of each token."""
    parts = _dense_models(lab)
    labels = {name: "anchor" if name == PUBLIC else f"dense-{name}" for name in parts}
    found = [scoring.score(lab.bench, part, lab.prefix + labels[name], lab.groups) for name, part in parts.items()]
    return [Part(part) for part in parts.values()], found


def branch_train_merge(
    lab: models.Models, parts: Sequence[Part], scores: Sequence[scoring.Scores], top_k: int | None = None
) -> Outcome:
    """Mixes dense models by the likelihood of the prefix; all must be run on it, whichever are then mixed."""
    k = len(parts) if top_k is None else top_k

    def way(temperature: float) -> Combine:
        return lambda nats, starts: mixtures.branch_train_merge(nats, starts, temperature, k)

    cost = flops.forward_per_token(lab.public.architecture, lab.bench.size.seq_len) * len(parts)
    return mixture(lab, parts, scores, {f"temperature {t:g}": way(t) for t in BTM_TEMPERATURES}, cost)


def btm(top_k: int | None) -> Method:
    """Branch-Train-Merge with the `top_k` most likely models, or all."""
    return lambda lab: branch_train_merge(lab, *dense_scores(lab), top_k)


def btm_by_opening(top_k: int) -> Method:
    """BTM whose weights stay as the opening left them: after it, only `top_k` models are run."""

    def method(lab: models.Models) -> Outcome:
        parts, scores = dense_scores(lab)

        def way(temperature: float) -> Combine:
            return lambda nats, starts: mixtures.branch_train_merge_by_opening(nats, starts, temperature, top_k, OPENING)

        ways = {f"temperature {t:g}": way(t) for t in BTM_TEMPERATURES}
        opening = OPENING / lab.bench.size.seq_len
        passes = len(parts) * opening + top_k * (1 - opening)
        return mixture(
            lab, parts, scores, ways, passes * flops.forward_per_token(lab.public.architecture, lab.bench.size.seq_len)
        )

    return method


def btm_shared(lab: models.Models) -> Outcome:
    """BTM with the weights of routing by sequence, which can change their mind."""
    parts, scores = dense_scores(lab)
    cost = flops.forward_per_token(lab.public.architecture, lab.bench.size.seq_len) * len(parts)
    return mixture(lab, parts, scores, _sequence_ways("mixture"), cost)


def no_coordination(lab: models.Models) -> Outcome:
    """The rows are domain rows of the anchor's states: these owners have no pair to train one in."""
    parts = _dense_models(lab)
    rows = {name: lab.bench.row(name, lab.anchor) for name in lab.names}
    rows = {PUBLIC: lab.anchor.tensor("expert/router/row"), **rows}
    architecture, params = baselines.no_coordination(*lab.public.model, {name: parts[name].params for name in lab.names}, rows)
    key = joined_key("no coordination", parts)
    return single(lab, training.Trained(architecture, params, key, _runs(parts)), "no-coordination")


def flex(lab: models.Models) -> Outcome:
    parameters = tree.count(next(iter(lab.experts().values())).tensors("expert"))
    seen = routing.look(lab.bench, lab.flex)
    found = single(lab, lab.flex, "flex", parameters=parameters, examples=seen["examples"])
    return dataclasses.replace(found, confusion=seen["confusion"])


def flex_as_paper(lab: models.Models) -> Outcome:
    """Rows that start as mean hidden states, the owner's text only, nothing after the merge (FlexOlmo, Table 3)."""
    anchor = lab.with_rows("mean")
    bundles = lab.experts("paper", anchor, {"expert.public_fraction": 0.0}, "paper")
    return single(lab, lab.merge(bundles, note="as the paper", runs=lab.runs("paper"), anchor=anchor), "flex-paper")


def flex_calibrated(lab: models.Models) -> Outcome:
    """Biases set so that public text keeps what the experts need not have (`python -m flexjax.merge calibrate`)."""
    bundles = lab.experts()
    text = layerwise.sample(lab.bench.text(f"{PUBLIC}/train"), seq_len=lab.bench.size.seq_len)
    found = {}
    for share in (0.3, 0.2, 0.1):
        fits = calibration.jointly(lab.anchor, bundles, text, share)
        edit = functools.partial(_with_biases, fits=fits)
        model = lab.merge(bundles, edit=edit, note=f"share {share:g}", runs=lab.runs())
        found[f"share {share:g}"] = single(lab, model, f"flex-calibrated-{share:g}")
    return _best_of(found)


def _with_biases(experts: models.Experts, fits: Mapping[str, calibration.Fit]) -> models.Experts:
    changed = dict(experts)
    for name, fit in fits.items():
        changed[name] = {**experts[name], "router": {**experts[name]["router"], "bias": fit.bias}}
    return changed


def _best_of(found: Mapping[str, Outcome]) -> Outcome:
    """The outcome that is best on the tuning half, with all as its trials."""
    reached = {label: round(macro(each.scores, "tune", each.nats), 4) for label, each in found.items()}
    outcome, trials, chosen = _chosen(found, reached)
    return dataclasses.replace(outcome, trials=trials, chosen=chosen)


def flex_tuned(kind: str) -> Method:
    return lambda lab: single(lab, lab.tuned(lab.flex, kind), f"flex-tuned-{kind}")


def flex_memory(lab: models.Models) -> Outcome:
    """Routers that read a running mean of a document's states (`model.router_memory`)."""
    return single(lab, lab.flex_memory, "flex-memory")


def flex_memory_tuned(kind: str) -> Method:
    return lambda lab: single(lab, lab.tuned(lab.flex_memory, kind, "memory-"), f"flex-memory-tuned-{kind}")


def flex_memory_by_sequence(lab: models.Models) -> Outcome:
    return by_sequence(lab, lab.flex_memory, "flex-memory", "mixture")


def flex_without(name: str) -> Method:
    """The opt-out of one owner: the model as if it had never been merged."""

    def method(lab: models.Models) -> Outcome:
        left = {other: bundle for other, bundle in lab.experts().items() if other != name}
        runs = tuple(run for run, owner in zip(lab.runs(), lab.names, strict=True) if owner != name)
        return single(lab, lab.merge(left, runs=runs), f"flex-without-{name}")

    return method


SEQUENCE = {  # temperature and share of routing by sequence: the trials
    "temperature 1, share 0.01": (1.0, 0.01),
    "temperature 1.5, share 0.01": (1.5, 0.01),
    "temperature 2, share 0.03": (2.0, 0.03),
}


def _sequence_ways(kind: str) -> dict[str, Combine]:
    def way(temperature: float, share: float) -> Combine:
        settings = sequence.Settings(kind, temperature=temperature, share=share)
        return lambda nats, starts: sequence.combine(nats, starts, settings)[0]

    return {label: way(*setting) for label, setting in SEQUENCE.items()}


def by_sequence(lab: models.Models, model: training.Trained, label: str, kind: str, without: str = "") -> Outcome:
    """A merged model under routing by sequence, among {public} and {public, e} for each expert."""
    allowed = [name for name in model.architecture.experts if name != without]
    masks = sequence.candidates(model.architecture.experts, allowed)
    scores = [
        scoring.score(lab.bench, model, f"{lab.prefix}{label}@{sequence.label(mask)}", lab.groups, mask) for mask in masks
    ]
    cost = sum(flops.forward_per_token(model.architecture, lab.bench.size.seq_len, mask) for mask in masks)
    return mixture(lab, [Part(model, mask) for mask in masks], scores, _sequence_ways(kind), cost)


def flex_by_sequence(kind: str, tuned: str = "", without: str = "") -> Method:
    """Our recipe under routing by sequence (`--routing=sequence`).

    Args:
      kind: "mixture" or "hard".
      tuned: text that its routers were tuned on before: "sampled" and so on; empty: none.
      without: an owner who has opted out.
    """

    def method(lab: models.Models) -> Outcome:
        model = lab.tuned(lab.flex, tuned) if tuned else lab.flex
        return by_sequence(lab, model, f"flex-tuned-{tuned}" if tuned else "flex", kind, without)

    return method


def joint(times: float) -> Method:
    return lambda lab: single(lab, lab.joint(times), f"joint-{times:g}x")


def joint_frozen(times: float) -> Method:
    return lambda lab: single(lab, lab.joint_frozen(times), f"joint-frozen-{times:g}x")


def joint_on_as_much_text(lab: models.Models) -> Outcome:
    return single(lab, lab.joint_on_as_much_text(), "joint-data")
