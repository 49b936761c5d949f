"""May these bundles be merged with this anchor? The report that a coordinator reads before anything is moved.

Most of it comes from manifests alone, before any tensor is opened. Then rows and biases are read, a few kilobytes for each
expert, since what a router does with them cannot be stated; and shared leaves, where a bundle carries some.
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from flexjax import config as config_lib
from flexjax import errors, tree
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import provenance, slices, store
from flexjax.governance import signatures

LINEAGE = ("config", "tokenizer", "anchor")  # the anchor's digest covers the other two, so it comes last
POLICIES = ("strict", "report", "average")
MOST_MAX = 64.0  # a weight may be so many times the largest of the anchor's same tensor; trained ones stay below 8
MOST_RMS = 16.0
MOST_ROW = 1e4  # rows are made for logits near 1: their norms are 0.5 to 50, whatever the scale of the states
ENOUGH_ACTIVE = 4  # the paper's quality levels off at four active experts (section 5)
ROWS = 1024  # of a leaf that are compared at once
OK, NOTE, REFUSED = "ok", "note", "refused"


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing that was compared: what was expected, what was found, the verdict, and what to do about it."""

    expert: str
    field: str
    expected: str
    found: str
    verdict: str
    advice: str = ""
    kind: str = "integrity"  # class of the error if refused


def default_top_k(experts: int) -> int:
    """Experts per token of a model of so many experts, `public` among them."""
    return min(ENOUGH_ACTIVE, experts)


def report(
    anchor: store.Artefact,
    bundles: Sequence[store.Artefact],
    top_k: int,
    policy: str = "strict",
    trust: signatures.Trust | None = None,
    present: int = 0,
) -> list[Row]:
    """All that manifests tell; no tensor is opened.

    Args:
      anchor: the one to merge with.
      bundles: opened without regard to an anchor (`store.open_bundle(path, None)`).
      top_k: experts per token.
      policy: what becomes of shared leaves that a bundle carries, one of `POLICIES`.
      trust: whose signatures count; None: any, or none.
      present: experts, beside `public`, that the model has already.

    Raises:
      ConfigError: the policy is unknown.
    """
    if policy not in POLICIES:
        raise errors.ConfigError(f"--anchor_policy={policy} must be one of {', '.join(POLICIES)}")
    names = [bundle.manifest["name"] for bundle in bundles]
    rows = [row for bundle in bundles for row in _of_bundle(anchor, bundle, names, policy, trust)]
    experts = len(bundles) + present + 1
    advised, limit = default_top_k(experts), f"1 to {experts}"
    if not 1 <= top_k <= experts:
        return [*rows, Row("", "top_k", limit, str(top_k), REFUSED, f"pass --top_k from {limit}", "config")]
    advice = f"quality levels off at {ENOUGH_ACTIVE} active experts; --top_k={advised} is usual"
    verdict, advice = (OK, "") if top_k == advised else (NOTE, advice)
    return [*rows, Row("", "top_k", limit, str(top_k), verdict, advice)]


def _of_bundle(
    anchor: store.Artefact, bundle: store.Artefact, names: Sequence[str], policy: str, trust: signatures.Trust | None
) -> list[Row]:
    manifest, config = bundle.manifest, store.config_of(anchor)
    name, lineage = manifest["name"], manifest_lib.lineage(anchor.manifest)
    rows = []
    for field in LINEAGE:
        fits = manifest[field] == lineage[field]
        advice = "" if fits else f"train '{name}' on this anchor, or merge with the one it was trained on"
        rows.append(Row(name, field, lineage[field][:12], manifest[field][:12], OK if fits else REFUSED, advice))
    alone = names.count(name) == 1
    state = OK if alone else REFUSED
    rows.append(Row(name, "name", "unique", "unique" if alone else "given twice", state, "give each expert once", "config"))
    rows.append(_shapes(bundle, config))
    if rows[-1].verdict == REFUSED:
        return rows
    stated = f"{config.vocab_size} tokens"
    rows.append(Row(name, "vocabulary", stated, stated if rows[0].verdict == OK else "of another model", rows[0].verdict))
    rows += [_dtypes(anchor, bundle), *_magnitudes(anchor, bundle), _size(bundle, config), *_statements(bundle)]
    rows.append(_carried(bundle, policy))
    rows.append(_signature(bundle, trust))
    return rows


def _shapes(bundle: store.Artefact, config: config_lib.ModelConfig) -> Row:
    name, stated = bundle.manifest["name"], "as the anchor's"
    try:
        store.check_bundle(bundle, config)
    except errors.IntegrityError as error:
        advice = str(error).removeprefix(f"{bundle.label}: ")
        return Row(name, "shapes", stated, "others", REFUSED, f"{advice}; ask the owner for a bundle of this anchor")
    return Row(name, "shapes", stated, stated, OK)


def _dtypes(anchor: store.Artefact, bundle: store.Artefact) -> Row:
    def of(artefact: store.Artefact) -> str:
        entries = artefact.manifest["tensors"].items()
        return ", ".join(sorted({entry["dtype"] for path, entry in entries if path.startswith("expert/ffn/")}))

    expected, found = of(anchor), of(bundle)
    same = expected == found
    advice = "" if same else "they may differ; a model that mixes them is read in the wider one"
    return Row(bundle.manifest["name"], "dtypes", expected, found, OK if same else NOTE, advice)


def _magnitudes(anchor: store.Artefact, bundle: store.Artefact) -> list[Row]:
    """How large the weights are, as stated: whoever copies them compares the statement with the numbers."""
    name, worst, refused = bundle.manifest["name"], 0.0, []
    ours, theirs = anchor.manifest["tensors"], bundle.manifest["tensors"]
    for path, entry in sorted(theirs.items()):
        limit, found = _limits(path, ours, theirs, entry)
        if limit is None:
            continue
        ratios = [found[i] / max(limit[i], 1e-30) for i in range(2)]
        worst = max(worst, *ratios)
        if max(ratios) > 1:
            what, i = ("largest weight", 0) if ratios[0] > 1 else ("root mean square", 1)
            advice = f"tensor {path} is far larger than the anchor's: ask the owner how it was trained"
            refused.append(Row(name, what, f"<= {limit[i]:.3g}", f"{found[i]:.3g}", REFUSED, advice))
    return refused[:1] or [Row(name, "magnitude", "<= 1 of its bounds", f"{worst:.2g}", OK)]


Sizes = tuple[float, float]


def _limits(
    path: str, ours: Mapping[str, Any], theirs: Mapping[str, Any], entry: Mapping[str, Any]
) -> tuple[Sizes | None, Sizes]:
    """Bounds of max and rms of a tensor, and what they are compared with; None where the anchor holds nothing like it."""
    matrix = path.removesuffix("/a").removesuffix("/b").removeprefix("shared/")
    if path.startswith(store.ROUTER) or matrix not in ours:
        return None, (0.0, 0.0)
    own = ours[matrix]
    if not path.endswith(("/a", "/b")):
        return (MOST_MAX * own["max"], MOST_RMS * own["rms"]), (entry["max"], entry["rms"])
    a, b = (theirs[f"{matrix}/{factor}"] for factor in ("a", "b"))
    product = a["rms"] * b["rms"] * math.sqrt(a["shape"][-1])  # of independent factors; aligned ones reach sqrt(rank) more
    return (MOST_MAX * own["max"], MOST_RMS * own["rms"]), (a["max"] * b["max"], product)


def _size(bundle: store.Artefact, config: config_lib.ModelConfig) -> Row:
    manifest, megabytes = bundle.manifest, bundle.nbytes / 1e6
    form = f"rank {manifest['rank']}" if manifest["rank"] else f"width {manifest['d_ff']}"
    full = not manifest["rank"] and manifest["d_ff"] == config.d_ff
    found = f"{'full' if full else form}, {megabytes:.4g} MB"
    return Row(manifest["name"], "size", f"width {config.d_ff}, any rank", found, OK)


def _statements(bundle: store.Artefact) -> list[Row]:
    manifest = bundle.manifest
    name, licence, privacy = manifest["name"], manifest["data"].get("licence", ""), manifest["privacy"]
    rows = [
        Row(name, "licence", "stated", licence or "not stated", OK if licence else NOTE, "" if licence else "ask the owner"),
        Row(name, "version", "1 or later", str(manifest["version"]), OK),
    ]
    if privacy == provenance.NO_PRIVACY:
        advice = "weights can memorise text: treat this expert as its owner's text is treated"
        rows.append(Row(name, "privacy", "a statement", "NO differential privacy", NOTE, advice))
    else:
        rows.append(Row(name, "privacy", "a statement", f"dp {privacy['dp']}, epsilon {privacy.get('epsilon')}", OK))
    tuned = sorted(set(manifest["training"].get("router_tuned_with", [])) - {name})
    if tuned:
        advice = f"removing {', '.join(tuned)} later cannot undo what their presence did to this row"
        rows.append(Row(name, "router", "trained alone", f"tuned with {len(tuned)} others", NOTE, advice))
    return rows


def _carried(bundle: store.Artefact, policy: str) -> Row:
    name, leaves = bundle.manifest["name"], store.carried(bundle)
    if not leaves:
        return Row(name, "shared", "none", "none", OK)
    found = f"carries {', '.join(leaves[:3])}" + (", ..." if len(leaves) > 3 else "")
    if policy == "strict":
        advice = "its training changed what all share; pass --anchor_policy=report to leave that out, or average"
        return Row(name, "shared", "none", found, REFUSED, advice, "policy")
    said = {
        "report": "left out: the expert will stand on leaves that it was not trained with",
        "average": "averaged over experts: opting out per request is then not clean, and the manifest says so",
    }
    return Row(name, "shared", "none", found, NOTE, said[policy])


def _signature(bundle: store.Artefact, trust: signatures.Trust | None) -> Row:
    name = bundle.manifest["name"]
    expected = "of a trusted key" if trust is not None else "any"
    try:
        status = signatures.check(bundle.directory, bundle.manifest, trust)
    except errors.PolicyError as error:
        return Row(name, "signature", expected, "not trusted", REFUSED, str(error), "policy")
    except errors.IntegrityError as error:
        return Row(name, "signature", expected, "broken", REFUSED, str(error))
    advice = "" if status.state == "trusted" else "nothing proves who made it; ask the owner to sign, and pass --trusted_keys"
    return Row(name, "signature", expected, status.state, OK if status.state == "trusted" else NOTE, advice)


def routers(bundles: Sequence[store.Artefact]) -> list[Row]:
    """The geometry of the routers: norms, cosines between rows, biases. Reads rows and biases, and nothing else."""
    rows, directions = [], {}
    for bundle in bundles:
        name = bundle.manifest["name"]
        for path in (f"{store.ROUTER}row", f"{store.ROUTER}bias"):
            for piece in bundle.slices_of(path):
                store.check_content(path, piece, bundle.label)
        row = bundle.tensor(f"{store.ROUTER}row").astype(np.float64)
        bias = bundle.tensor(f"{store.ROUTER}bias").astype(np.float64)
        norms = np.linalg.norm(row, axis=1)
        directions[name] = row / np.maximum(norms, 1e-30)[:, None]
        fits = norms.max() <= MOST_ROW
        advice = "" if fits else "such a row takes every token: ask the owner how it was made"
        span = f"{norms.min():.3g} to {norms.max():.3g}"
        rows.append(Row(name, "row norm", f"at most {MOST_ROW:g}", span, OK if fits else REFUSED, advice))
        rows.append(Row(name, "bias", "at most 0", f"{bias.min():.3g} to {bias.max():.3g}", OK))
    for name, own in directions.items():
        near = {other: float(np.mean(np.sum(own * found, axis=1))) for other, found in directions.items() if other != name}
        if near:
            other = max(sorted(near), key=lambda key: near[key])
            close = near[other] > 0.95
            advice = f"'{name}' and '{other}' claim the same tokens: are they trained on the same text?" if close else ""
            rows.append(Row(name, "nearest row", "cosine < 0.95", f"{other} {near[other]:.2f}", NOTE if close else OK, advice))
    return rows


def drift(anchor: store.Artefact, bundle: store.Artefact) -> list[Row]:
    """How far each shared leaf that a bundle carries has moved, |x - anchor| / |anchor|; read a slice at a time."""
    rows = []
    for path in store.carried(bundle):
        moved = size = 0.0
        rows_at_once = 1 if tree.is_stacked(path) else ROWS
        others = slices.regroup(bundle.slices_of(f"shared/{path}"), rows_at_once)
        for ours, theirs in zip(slices.regroup(anchor.slices_of(path), rows_at_once), others, strict=True):
            store.check_content(path, theirs, bundle.label)
            before, after = ours.astype(np.float32), theirs.astype(np.float32)
            moved += float(np.sum(np.square(after - before), dtype=np.float64))
            size += float(np.sum(np.square(before), dtype=np.float64))
        found = math.sqrt(moved / max(size, 1e-30))
        rows.append(Row(bundle.manifest["name"], f"drift {path}", "0", f"{found:.3g}", NOTE if found else OK))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The report for people."""
    head = Row("expert", "field", "expected", "found", "verdict")
    cells = [[row.expert, row.field, row.expected, row.found] for row in (head, *rows)]
    widths = [max(len(line[i]) for line in cells) for i in range(4)]
    lines = []
    for row, line in zip((head, *rows), cells, strict=True):
        said = row.verdict + (f": {row.advice}" if row.advice and row.verdict != OK else "")
        lines.append("  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) + f"  {said}")
    return "\n".join(lines)


def check(rows: Sequence[Row]) -> None:
    """Raises for the first refused row: IntegrityError, ConfigError for names and top_k, PolicyError for policies."""
    kinds = {"config": errors.ConfigError, "policy": errors.PolicyError, "integrity": errors.IntegrityError}
    for row in rows:
        if row.verdict == REFUSED:
            whose = f"expert '{row.expert}': " if row.expert else ""
            raise kinds[row.kind](f"{whose}{row.field} expected {row.expected}, found {row.found}; {row.advice}")
