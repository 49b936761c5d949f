"""The router health gate: what experts claim of public text, from their rows and biases and the anchor's public states alone.

    claim of e = row_e - row_public        log-odds of e against public at a state h = h . claim_e + b_e

The states are those that the anchor keeps as `statistics/states` [L, S, D]: its own, of public tokens. So the gate reads a few
rows, no expert's weights, and nobody's text. It finds routers that do not route: it can prove no expert benign, and a healthy
row says nothing of the weights behind it.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from jaxtyping import Float

from flexjax import config as config_lib
from flexjax import errors
from flexjax.experts import store
from flexjax.governance import margins as margins_lib
from flexjax.model import router

# Honest: eleven experts on five anchors (rows logistic, mean and random; the built-in corpus and another one; 150 to 450
# steps), probed alone and together, as trained and calibrated to 10, 5 and 1 % of public text. Bad: each with its row times 10
# and 30, turned to the mean public state at its own length, set to 0 or to another's, and with a bias of -12 and -50.
COLLAPSED_SHARE = 0.95  # honest at most 0.51; a row along the mean public state 0.89 to 0.99, five times as long up to 1
LEAST_ENTROPY = 0.002  # honest at least 0.55 as trained and 0.036 calibrated to 1 %; nobody but public heard 6e-4 and less
LAYER_SHARE = 0.95  # honest at most 0.77; a row along the mean public state 0.94 to 1
MEAN_SHARE = 0.75  # honest at most 0.55; a row along the mean public state 0.82 to 0.92
MOST_SPREAD = 20.0  # honest at most 2.1 in any layer; rows times 30 give 32 to 62
LEAST_SPREAD = 0.1  # honest at least 1.08 in the layer where it is largest; a row of 0 gives 0
MOST_NORM = 6.0  # honest at most 1.29; rows times 10 give 11, times 30 34
LEAST_PROBABILITY = 1e-3  # honest at least 0.97 as trained and 0.12 calibrated to 1 %; a bias of -50 gives less than 1e-18
MOST_COSINE = 0.99  # honest at most 0.40 in the layer where it is least; equal rows give 1

MOST_STATES = 1024  # of a layer

REPLACE = "remove it or ask its owner for another bundle"
KINDS = {  # of findings: what is measured, and on which side of its bound an honest expert lies
    "collapse": ("median over layers of its share of public text", "at most"),
    "one choice": ("median over layers of the router's entropy, of its maximum,", "at least"),
    "hijack": ("share of public text beside public alone", "at most"),
    "loud row": ("standard deviation of its log-odds", "at most"),
    "blind row": ("largest standard deviation of what its row reads", "at least"),
    "norm": ("length of its row by the median of the others'", "at most"),
    "silent": ("largest probability at any token beside public alone", "at least"),
    "twins": ("smallest cosine of its row and another's", "at most"),
}

PerLayer = Float[np.ndarray, "L E"]


@dataclasses.dataclass(frozen=True)
class Finding:
    """One thing that no honest expert does: kind, expert, layer (None: all), what was measured, its bound, what to do."""

    kind: str
    expert: str
    layer: int | None
    value: float
    threshold: float
    advice: str

    def __str__(self) -> str:
        where = "over all layers" if self.layer is None else f"in layer {self.layer}"
        measure, sign = KINDS[self.kind]
        return (
            f"router health, {self.kind}: expert '{self.expert}' {where}: {measure} {self.value:.4g}, "
            f"expected {sign} {self.threshold:g}; {self.advice}"
        )


@dataclasses.dataclass(frozen=True)
class Report:
    """What a router does on public text; arrays over layers, and over experts other than `public` in canonical order.

    Attributes:
      experts: names, `public` not among them.
      share: mean probability among all experts.
      beside: mean probability beside `public` alone, so that no hijacker hides another, or silences an honest expert.
      most: largest probability beside `public` alone at any token.
      entropy: of the probabilities in units of log(number of experts), mean over tokens, [L].
      spread: standard deviation of h . claim over tokens.
      reading: standard deviation of h . row over tokens: where `public` has a row, a row of 0 is a claim all the same.
      norm: length of the claim divided by the median of the other experts'; NaN where there are not two others.
      cosine: between claims, [L, E, E].
      bias: effective.
      own_text: probability beside `public` at the highest quantile of the margins in its manifest; NaN if there are none.
      findings: what is wrong.
    """

    experts: tuple[str, ...]
    share: PerLayer
    beside: PerLayer
    most: PerLayer
    entropy: Float[np.ndarray, " L"]
    spread: PerLayer
    reading: PerLayer
    norm: PerLayer
    cosine: Float[np.ndarray, "L E E"]
    bias: PerLayer
    own_text: PerLayer
    findings: tuple[Finding, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """As JSON; what is not known is null."""
        found: dict[str, Any] = {"experts": list(self.experts), "findings": [dataclasses.asdict(f) for f in self.findings]}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            if isinstance(value, np.ndarray):
                plain = value.astype(object)
                plain[np.isnan(value)] = None
                found[field.name] = plain.tolist()
        return found


def probe(
    anchor: store.Artefact,
    bundles: Mapping[str, store.Artefact],
    states: Float[np.ndarray, "L S D"] | None = None,
) -> Report:
    """Measures experts on at most `MOST_STATES` public states of each layer, evenly spaced, and judges what it measures.

    One layer of the states is in memory at a time: it is one file, so it is read and verified whole, and let go.

    Args:
      anchor: whose router rows and public states they are.
      bundles: by name, with the biases that are used (`models.effective`).
      states: public states that the routers read; None: the anchor's.

    Raises:
      ConfigError: there is no expert, or the anchor has no public states and none are given.
      IntegrityError: bytes are not as declared.
    """
    names = router.canonical_order(bundles)
    if not names:
        raise errors.ConfigError("router health needs an expert; the model has none but public")
    if states is None and "statistics/states" not in anchor.manifest["tensors"]:
        raise errors.ConfigError(
            f"{anchor.label} carries no public statistics, so its routers cannot be probed; "
            f"add them: --config=configs/public.py --config.anchor.path={anchor.directory}"
        )
    public = _rows(anchor)
    rows = np.stack([_rows(bundles[name]) for name in names], axis=1)  # [L, E, D]
    biases = np.stack([_effective(bundles[name]) for name in names], axis=1)
    layers = []
    for layer, bias in enumerate(biases):
        h = _spaced(anchor.slice_at("statistics/states", layer)[0] if states is None else states[layer])
        layers.append(_measure(h, rows[layer], public[layer], bias))
    stacked: dict[str, Any] = {key: np.stack([layer[key] for layer in layers]) for key in layers[0]}
    told = np.stack([_told(bundles[name], biases[:, e]) for e, name in enumerate(names)], axis=1)
    report = Report(names, bias=biases, own_text=told, **stacked)
    return dataclasses.replace(report, findings=tuple(_judge(report)))


def _spaced(states: Float[np.ndarray, "S D"]) -> Float[np.ndarray, "N D"]:
    """At most `MOST_STATES` of them, from the first to the last, as a float64 copy."""
    count = len(states)
    return states[np.linspace(0, count - 1, min(count, MOST_STATES)).round().astype(np.int64)].astype(np.float64)


def _rows(holder: store.Artefact) -> Float[np.ndarray, "L D"]:
    rows = holder.tensor("expert/router/row")
    store.check_content("expert/router/row", rows, holder.label)
    return rows.astype(np.float64)


def _effective(bundle: store.Artefact) -> Float[np.ndarray, " L"]:
    bias = bundle.tensor("expert/router/bias")
    store.check_content("expert/router/bias", bias, bundle.label)
    return bias.astype(np.float64)


def _told(bundle: store.Artefact, bias: Float[np.ndarray, " L"]) -> Float[np.ndarray, " L"]:
    """Probability at the highest quantile of the margins that a manifest states, under the effective bias."""
    stated = bundle.manifest.get("margins")
    if stated is None:
        return np.full(bias.shape, np.nan)
    own = dataclasses.replace(bundle, instead={}).tensor("expert/router/bias").astype(np.float64)
    return margins_lib.sigmoid(np.array(stated["values"], np.float64)[:, -1] - own + bias)


def _measure(h: np.ndarray, rows: np.ndarray, public: np.ndarray, biases: np.ndarray) -> dict[str, np.ndarray]:
    """One layer."""
    claims = rows - public
    score = h @ claims.T
    logits = np.concatenate([np.zeros((len(h), 1)), score + biases], axis=1)
    logs = logits - np.logaddexp.reduce(logits, axis=1)[:, None]
    p = np.exp(logs)
    norms = np.linalg.norm(claims, axis=1)
    relative = np.full(len(norms), np.nan)
    if len(norms) > 2:  # of two, nobody can say which is the odd one
        others = np.array([np.median(np.delete(norms, e)) for e in range(len(norms))])
        relative = np.where(others > 0, norms / np.where(others > 0, others, 1), np.nan)
    unit = claims / np.where(norms > 0, norms, 1)[:, None]
    beside = margins_lib.sigmoid(score + biases)
    return {
        "share": p[:, 1:].mean(axis=0),
        "beside": beside.mean(axis=0),
        "most": beside.max(axis=0),
        "entropy": -(p * logs).sum(axis=1).mean() / np.log(p.shape[1]),
        "spread": score.std(axis=0),
        "reading": (h @ rows.T).std(axis=0),
        "norm": relative,
        "cosine": unit @ unit.T,
    }


def _judge(report: Report) -> list[Finding]:
    """Everything beyond a bound, gravest kinds first."""
    found: list[Finding] = []

    def note(kind: str, expert: str, layer: int | None, value: float, threshold: float, advice: str) -> None:
        found.append(Finding(kind, expert, layer, float(value), threshold, advice))

    common = np.median(report.share, axis=0)
    for name, median in zip(report.experts, common, strict=True):
        if median > COLLAPSED_SHARE:
            note("collapse", name, None, median, COLLAPSED_SHARE, REPLACE)
    taken = np.append(report.share.mean(axis=0), 1 - report.share.mean(axis=0).sum())
    winner = (*report.experts, config_lib.PUBLIC)[int(taken.argmax())]
    heard = (np.nan_to_num(report.own_text).max(axis=0) >= LEAST_PROBABILITY).all()  # each on its own text: as it should be
    entropy = np.median(report.entropy)
    if entropy < LEAST_ENTROPY and not (winner == config_lib.PUBLIC and heard):
        note("one choice", winner, None, entropy, LEAST_ENTROPY, "look at the biases and norms of all experts")
    for e, name in enumerate(report.experts):
        share, worst = report.beside[:, e], int(report.beside[:, e].argmax())
        if share[worst] > LAYER_SHARE:
            note("hijack", name, worst, share[worst], LAYER_SHARE, f"{REPLACE}, or calibrate the biases on public text")
        elif share.mean() > MEAN_SHARE:
            note("hijack", name, None, share.mean(), MEAN_SHARE, f"{REPLACE}, or calibrate the biases on public text")
        loudest = int(report.spread[:, e].argmax())
        if report.spread[loudest, e] > MOST_SPREAD:
            note("loud row", name, loudest, report.spread[loudest, e], MOST_SPREAD, REPLACE)
        if (blind := min(report.spread[:, e].max(), report.reading[:, e].max())) < LEAST_SPREAD:
            note("blind row", name, None, blind, LEAST_SPREAD, REPLACE)
        norms = np.nan_to_num(report.norm[:, e])
        if norms.max() > MOST_NORM:
            note("norm", name, int(norms.argmax()), norms.max(), MOST_NORM, REPLACE)
        reached = np.fmax(report.most[:, e], report.own_text[:, e]).max()
        if reached < LEAST_PROBABILITY:
            note(
                "silent",
                name,
                None,
                reached,
                LEAST_PROBABILITY,
                "remove it, ask its owner for margins, or revert its calibration",
            )
    cosine = report.cosine.min(axis=0)
    for a, b in zip(*np.triu_indices(len(report.experts), 1), strict=True):
        if cosine[a, b] > MOST_COSINE:
            advice = f"no token can tell it from '{report.experts[b]}': keep one of them"
            note("twins", report.experts[a], None, cosine[a, b], MOST_COSINE, advice)
    return found


def check(report: Report) -> None:
    """Raises IntegrityError for the first finding: what the rows hold is not what training makes, whoever asks for it."""
    if report.findings:
        more = f" ({len(report.findings) - 1} more findings)" if len(report.findings) > 1 else ""
        raise errors.IntegrityError(f"{report.findings[0]}{more}")


def table(report: Report) -> str:
    """A line per expert with means over layers, the extremes that the bounds are on, and the findings."""
    heads = ("expert", "share", "beside", "largest", "own text", "spread", "norm", "bias")
    lines = ["".join(f"{head:>{16 if head == 'expert' else 11}}" for head in heads)]
    for e, name in enumerate(report.experts):
        own, norm = report.own_text[:, e], report.norm[:, e]
        cells = (
            f"{report.share[:, e].mean():.1%}",
            f"{report.beside[:, e].mean():.1%}",
            f"{report.most[:, e].max():.1%}",
            "-" if np.isnan(own).all() else f"{np.nanmax(own):.1%}",
            f"{report.spread[:, e].max():.2f}",
            "-" if np.isnan(norm).all() else f"{np.nanmax(norm):.2f}",
            f"{report.bias[:, e].mean():.2f}",
        )
        lines.append(f"{name[:16]:>16}" + "".join(f"{cell:>11}" for cell in cells))
    pairs = report.cosine.min(axis=0)[np.triu_indices(len(report.experts), 1)]
    lines.append(
        f"entropy {np.median(report.entropy):.3f} of its maximum" + (f", cosine {pairs.max():.2f}" if len(pairs) else "")
    )
    return "\n".join(lines + [str(finding) for finding in report.findings] + ([] if report.findings else ["healthy"]))
