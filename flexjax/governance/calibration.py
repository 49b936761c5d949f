"""Router calibration: biases from the anchor, public text and experts, without any owner's text.

    p_e = softmax(h . row_e + b_e)        h: the states that the router of a layer reads, b_public = 0, b_e <= 0

`alone` chooses an expert's bias in the model {public, e}, so that no other expert, present or gone, has a say in it. `jointly`
chooses the biases of all experts of one model at once; then each depends on all. Both go through the model once, from the
first layer to the last, with one layer of weights in memory; a layer's biases are set on the states that the layers below
give with theirs already set. A bundle is never changed: what is found goes into the manifest of the model that uses it.
"""

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Bool, Float

from flexjax import config as config_lib
from flexjax import errors, tree
from flexjax.data import tokens as tokens_lib
from flexjax.eval import bits_per_byte
from flexjax.experts import models, store
from flexjax.governance import layerwise
from flexjax.governance import margins as margins_lib
from flexjax.model import router as router_lib
from flexjax.model import transformer

SHARE = 0.10  # of public text: on our evidence 0.10 brings public text back to the anchor and 0.05 costs much of the gain
BIAS_TOLERANCE = 1e-9  # of the bisection
SETTLED = 1e-8  # the largest change of a bias in the last sweep of a joint fit
SWEEPS = 1000
SHARE_TOLERANCE = 1e-4  # a target counts as reached within this

Layers = Float[np.ndarray, " L"]


@dataclasses.dataclass(frozen=True)
class Fit:
    """The biases found for one expert, and what they do; shares are means of p over the sample, per layer.

    Attributes:
      name: of the expert.
      bias: what was found, float32, at most 0.
      own: the bundle's own bias, which stays in the bundle.
      target: the share that was asked for.
      before, after: shares with the own bias and with the one found, on the same states (those of calibrated layers below).
      reached: whether `after` is the target. Where it is less, a bias of 0 gives no more.
      held: where the owner's margins kept the bias above what the target needs.
      in_domain: with margins, the share on the owner's own text before and after, estimated from their quantiles.
    """

    name: str
    bias: Layers
    own: Layers
    target: float
    before: Layers
    after: Layers
    reached: Bool[np.ndarray, " L"]
    held: Bool[np.ndarray, " L"]
    in_domain: tuple[Layers, Layers] | None

    def to_dict(self) -> dict[str, Any]:
        """As JSON, with the means over layers."""
        found: dict[str, Any] = {
            field.name: value.tolist() if isinstance(value := getattr(self, field.name), np.ndarray) else value
            for field in dataclasses.fields(self)
        }
        means = {"before": float(self.before.mean()), "after": float(self.after.mean())}
        if self.in_domain is not None:
            found["in_domain"] = dict(zip(("before", "after"), (part.tolist() for part in self.in_domain), strict=True))
            means |= {f"in_domain_{name}": float(np.mean(part)) for name, part in found["in_domain"].items()}
        return {**found, "mean": means}


def alone(
    anchor: store.Artefact,
    bundle: store.Artefact,
    text: layerwise.Sample,
    share: float = SHARE,
    *,
    ignore_margins: bool = False,
) -> Fit:
    """Sets an expert's biases so that its mean probability beside `public` alone is `share` on public text, in each layer.

    Where even a bias of 0 gives less, it is 0. Margins in the bundle's manifest hold a bias where the median token of the
    owner's text is split evenly with `public`, unless that token is public's even at 0.

    Args:
      anchor, bundle: as their owners made them.
      text: public text; `layerwise.sample` makes it.
      share: between 0 and 1.
      ignore_margins: do not hold.

    Raises:
      ConfigError: the share is none. DataError: the text is of another vocabulary. IntegrityError: bytes are not as declared.
    """
    name = bundle.manifest["name"]
    return _fit(anchor, {name: bundle}, text, share, 2, ignore_margins)[name]


def jointly(
    anchor: store.Artefact,
    bundles: Mapping[str, store.Artefact],
    text: layerwise.Sample,
    share: float = SHARE,
    *,
    top_k: int | None = None,
    ignore_margins: bool = False,
) -> dict[str, Fit]:
    """Sets the biases of all experts of a model together: in the softmax over all, the mean probability of each on public
    text is `share` / number of experts, so that `public` keeps 1 - `share`.

    Per layer, one expert after another gets the bias that gives it its part while the others stay, in canonical order from
    0 downwards, until no bias moves by more than 1e-8. More bias for one means more for all others, so the sequence only
    falls, and it ends at the largest solution. A target that is out of reach leaves its expert at 0.

    Args:
      anchor, bundles: as for `alone`, by name.
      text, share, ignore_margins: as for `alone`; `share` is that of all experts together.
      top_k: experts per token in the layers below; None: all.

    Raises:
      As `alone`. NumericError: the biases do not settle.
    """
    if not bundles:
        raise errors.ConfigError("a joint calibration needs an expert; the model has none but public")
    names = len(bundles) + 1
    return _fit(anchor, bundles, text, share, names if top_k is None else top_k, ignore_margins)


def of_model(
    model: models.Model, text: layerwise.Sample, share: float = SHARE, *, together: bool = False, ignore_margins: bool = False
) -> tuple[dict[str, Fit], list[str]]:
    """Fits all experts of a model on its anchor as it is used, jointly (with the model's top_k) or each alone.

    Averaged shared leaves hold something of every expert, so that nothing is fitted alone on them.

    Returns:
      Fits by name, and the names that each was fitted with, for `entry`: none if each was fitted alone.

    Raises:
      As `jointly`.
    """
    anchor, bundles = models.effective(model).anchor, dict(sorted(model.bundles.items()))
    if together:
        k = model.manifest["top_k"]
        return jointly(anchor, bundles, text, share, top_k=k, ignore_margins=ignore_margins), list(bundles)
    fits = {name: alone(anchor, bundle, text, share, ignore_margins=ignore_margins) for name, bundle in bundles.items()}
    return fits, [] if model.shared is None else sorted(model.manifest["shared"]["experts"])


def _fit(
    anchor: store.Artefact,
    bundles: Mapping[str, store.Artefact],
    text: layerwise.Sample,
    share: float,
    top_k: int,
    ignore_margins: bool,
) -> dict[str, Fit]:
    if not 0 < share < 1:
        raise errors.ConfigError(f"calibration: share={share} must lie between 0 and 1, for instance {SHARE}")
    architecture = layerwise.architecture(anchor, bundles, top_k)
    names, target = architecture.experts[1:], share / len(bundles)
    own = np.stack([bundles[name].tensor("expert/router/bias").astype(np.float32) for name in names], axis=1)  # [L, E-1]
    floors = np.stack([margins_lib.floors(bundles[name], own[:, e], ignore_margins) for e, name in enumerate(names)], axis=1)
    found, before, after, held = [], [], [], []

    def choose(layer: int, logits: layerwise.Logits) -> Float[np.ndarray, " E"]:
        free = _settle(logits, target, floors[layer])
        biases = np.concatenate([[0], free]).astype(np.float32)
        found.append(biases[1:])
        before.append(_probabilities(logits, np.concatenate([[0], own[layer]]))[1:])
        after.append(_probabilities(logits, biases)[1:])
        held.append((free == floors[layer]) & (after[-1] > target + SHARE_TOLERANCE))
        return biases

    layerwise.descend(anchor, bundles, architecture, text, choose)
    fits = {}
    for e, name in enumerate(names):
        bias, shares = np.stack(found)[:, e], np.stack(after)[:, e]
        fits[name] = Fit(
            name, bias, own[:, e], target, np.stack(before)[:, e], shares, np.abs(shares - target) <= SHARE_TOLERANCE,
            np.stack(held)[:, e], margins_lib.shares(bundles[name], own[:, e], bias),
        )  # fmt: skip
    return fits


def _settle(logits: layerwise.Logits, target: float, floors: Float[np.ndarray, " E-1"]) -> Float[np.ndarray, " E-1"]:
    """The biases of all but the first expert that give each a mean probability of `target`, or its floor, or 0."""
    biases = np.zeros(logits.shape[1])
    for _ in range(SWEEPS):
        last = biases.copy()
        for e in range(1, len(biases)):
            others = np.delete(logits + biases, e, axis=1)
            biases[e] = max(floors[e - 1], _solve(logits[:, e] - np.logaddexp.reduce(others, axis=1), target))
        if np.abs(biases - last).max() <= SETTLED:
            return biases[1:]
    raise errors.NumericError(f"the joint calibration did not settle in {SWEEPS} sweeps; ask for a smaller share")


def _solve(margin: Float[np.ndarray, " S"], target: float) -> float:
    """The b <= 0 at which the mean of sigmoid(margin + b) is `target`, by bisection; 0 if it is less there."""
    if margins_lib.sigmoid(margin).mean() <= target:
        return 0.0
    odds = np.log(target / (1 - target))
    low, high = float(odds - margin.max()), min(0.0, float(odds - margin.min()))
    while high - low > BIAS_TOLERANCE:
        middle = (low + high) / 2
        if middle in (low, high):
            break  # neighbours in float64
        low, high = (low, middle) if margins_lib.sigmoid(margin + middle).mean() > target else (middle, high)
    return (low + high) / 2


def _probabilities(logits: layerwise.Logits, biases: Float[np.ndarray, " E"]) -> Float[np.ndarray, " E"]:
    """Mean probability of each expert."""
    shifted = logits + biases.astype(np.float64)
    return np.exp(shifted - np.logaddexp.reduce(shifted, axis=1)[:, None]).mean(axis=0)


def entry(fit: Fit, share: float, text_digest: str, names: Sequence[str]) -> dict[str, Any]:
    """What the manifest of a model says of a calibrated expert.

    Args:
      fit: of this expert.
      share: what was asked for; of a joint fit, that of all experts together.
      text_digest: `layerwise.Sample.digest` of the public text.
      names: the experts it was fitted with, itself or not among them; none if it was fitted alone.
    """
    return {
        "bias": [float(value) + 0.0 for value in fit.bias],  # + 0.0: no negative zero
        "share": float(share),
        "text": text_digest,
        "with": sorted(set(names) - {fit.name}),
    }


def table(fits: Mapping[str, Fit]) -> str:
    """What calibration did, a line per expert, and a line for each that did not get what was asked for."""
    lines = [f"{'expert':<16}{'bias':>18}{'public share':>18}{'own text, est.':>18}"]
    for name, fit in fits.items():
        mean = fit.to_dict()["mean"]
        own = f"{mean['in_domain_before']:.1%} -> {mean['in_domain_after']:.1%}" if fit.in_domain else "not stated"
        span = f"{fit.bias.min():.2f} to {fit.bias.max():.2f}"
        lines.append(f"{name:<16}{span:>18}{mean['before']:>9.1%} -> {mean['after']:.1%}{own:>18}")
    for name, fit in fits.items():
        below = np.flatnonzero(~fit.reached & (fit.after < fit.target)).tolist()
        if below:
            lines.append(f"{name}: below the target {fit.target:.1%} even with bias 0 in layers {below}")
        if fit.held.any():
            lines.append(
                f"{name}: kept above the target {fit.target:.1%} by its margins in layers {np.flatnonzero(fit.held).tolist()}"
            )
    return "\n".join(lines)


def with_biases(params: tree.Tree, banks: Sequence[config_lib.Bank], biases: Mapping[str, Layers]) -> tree.Tree:
    """The same parameters with the biases of the named experts replaced.

    Raises:
      PolicyError: there is no such expert, or it has no bias.
    """
    experts, left = dict(params["experts"]), dict(biases)
    for bank in banks:
        for slot in [slot for slot, name in enumerate(bank.experts) if bank.biased and name in left]:
            router = dict(experts[bank.name]["router"])
            router["bias"] = np.array(router["bias"], np.float32)
            router["bias"][:, slot] = left.pop(bank.experts[slot])
            experts[bank.name] = {**experts[bank.name], "router": router}
    for name in sorted(left):
        raise errors.PolicyError(f"no expert '{name}' with a bias; the model has {', '.join(router_lib.expert_names(banks))}")
    return {**params, "experts": experts}


def confusion(
    architecture: transformer.Architecture,
    params: tree.Tree,
    biases: Mapping[str, Layers],
    texts: Mapping[str, tokens_lib.TokenSource],
    *,
    seq_len: int,
    batch_size: int = 16,
    max_bytes: int = 0,
    mesh: Mesh | None = None,
) -> dict[str, dict[str, Any]]:
    """Who takes whose text, which public text cannot tell, and what calibration costs and gains there.

    Args:
      architecture, params: the model with its experts' own biases.
      biases: calibrated ones, [L] by expert.
      texts: validation text by domain.
      seq_len, batch_size, max_bytes, mesh: as for `bits_per_byte.Scorer`.

    Returns:
      By domain: `anchor`, bits per byte of `public` alone; `own` and `calibrated`, each with `bits_per_byte` and the `shares`
      of the experts, means over tokens and layers.
    """
    found: dict[str, dict[str, Any]] = {domain: {} for domain in texts}
    for state, weights in (("own", params), ("calibrated", with_biases(params, architecture.banks, biases))):
        scorer = bits_per_byte.Scorer(architecture, weights, seq_len, batch_size, mesh=mesh)
        for domain, source in texts.items():
            if state == "own":
                found[domain]["anchor"] = scorer.score(source, max_bytes, (config_lib.PUBLIC,)).bits_per_byte
            score = scorer.score(source, max_bytes)
            found[domain][state] = {"bits_per_byte": score.bits_per_byte, "shares": score.shares}
    return found


def confusion_table(found: Mapping[str, Mapping[str, Any]]) -> str:
    """Bits per byte and routing shares of each domain, before and after."""
    names = list(next(iter(found.values()))["own"]["shares"])
    lines = [f"{'text':<12}{'anchor':>8}{'biases':>12}{'bits/byte':>11}" + "".join(f"{name[:12]:>13}" for name in names)]
    for domain, row in found.items():
        for state in ("own", "calibrated"):
            head = f"{domain[:12]:<12}{row['anchor']:>8.3f}" if state == "own" else " " * 20
            shares = "".join(f"{row[state]['shares'][name]:>13.1%}" for name in names)
            lines.append(f"{head}{state:>12}{row[state]['bits_per_byte']:>11.3f}{shares}")
    return "\n".join(lines)
