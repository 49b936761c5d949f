"""How two merged models, bundles or anchors differ: manifests first, then the slices whose digests differ, one at a time."""

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from flexjax import errors, tree
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import models, slices, store

ROW, BIAS = "expert/router/row", "expert/router/bias"
APART = ("tensors", "evaluation", "digest")  # fields of a manifest that are compared in their own way
FACTORS = "factors are not unique: the products a b may be equal where a and b differ, so these are compared too"


def compare(a: epath.PathLike, b: epath.PathLike) -> dict[str, Any]:
    """Compares two artefacts of one kind; what is said of b is relative to a.

    Args:
      a, b: directories of merged models, bundles or anchors.

    Returns:
      A JSON-able dict: kind, a, b {directory, digest}, same, and
      of bundles and anchors, facts [{field, a, b}], tensors [{path, state, ...}] of those that differ, unchanged (how many
      do not), router {angle, bias}, deltas of low-rank experts, evaluation [{domain, a, b, change}], note;
      of models, facts, anchor and shared (the averaged leaves): as of bundles, None where they are the same or one model
      has none; added and removed {name: digest}, changed {name: as of bundles}, bias {name: as of router} of
      experts that stayed and were calibrated otherwise, unchanged [name].
      `relative` is ||b - a|| / ||a||, `largest` the largest |b - a|, angles are in degrees, over layers.

    Raises:
      ConfigError: the kinds differ, or are of none of the three. IntegrityError: what was read is damaged or not finite.
    """
    kind, other = manifest_lib.kind(a), manifest_lib.kind(b)
    if kind != other or kind not in ("model", "expert", "anchor"):
        raise errors.ConfigError(f"{a} is of kind {kind} and {b} of kind {other}; give two models, two bundles or two anchors")
    if kind == "model":
        pair = models.open_model(a), models.open_model(b)
        sides, found = [model.manifest for model in pair], _models(*pair)
    else:
        opened = [store.open_anchor(p) if kind == "anchor" else store.open_bundle(p, None) for p in (a, b)]
        sides, found = [artefact.manifest for artefact in opened], _artefacts(*opened)
    named = {
        side: {"directory": str(directory), "digest": manifest["digest"]}
        for side, directory, manifest in zip("ab", (a, b), sides, strict=True)
    }
    return {"kind": kind, **named, "same": sides[0]["digest"] == sides[1]["digest"], **found}


def _models(a: models.Model, b: models.Model) -> dict[str, Any]:
    both = sorted(set(a.bundles) & set(b.bundles))
    digests = {name: (a.bundles[name].manifest["digest"], b.bundles[name].manifest["digest"]) for name in both}
    used, now = models.effective(a).bundles, models.effective(b).bundles
    calibration = [model.manifest["calibration"] for model in (a, b)]
    recalibrated = [name for name in both if calibration[0].get(name) != calibration[1].get(name)]
    return {
        "facts": _facts(a.manifest, b.manifest, ("experts", "calibration", "digest")),
        "anchor": _changed(a.anchor, b.anchor),
        "shared": _changed(a.shared, b.shared),
        "added": {name: b.manifest["experts"][name] for name in sorted(set(b.bundles) - set(a.bundles))},
        "removed": {name: a.manifest["experts"][name] for name in sorted(set(a.bundles) - set(b.bundles))},
        "changed": {name: _artefacts(a.bundles[name], b.bundles[name]) for name in both if len(set(digests[name])) > 1},
        "bias": {name: _bias(used[name], now[name]) for name in recalibrated},
        "unchanged": [name for name in both if len(set(digests[name])) == 1],
    }


def _changed(a: store.Artefact | None, b: store.Artefact | None) -> dict[str, Any] | None:
    """How parts of two models differ; None if they do not, or one is not there."""
    if a is None or b is None or a.manifest["digest"] == b.manifest["digest"]:
        return None
    return _artefacts(a, b)


def _artefacts(a: store.Artefact, b: store.Artefact) -> dict[str, Any]:
    tensors, other = a.manifest["tensors"], b.manifest["tensors"]
    rows = [_tensor(a, b, path) for path in sorted({*tensors, *other}) if tensors.get(path) != other.get(path)]
    low_rank = bool(a.manifest.get("rank") and b.manifest.get("rank"))
    return {
        "facts": _facts(a.manifest, b.manifest, APART),
        "tensors": rows,
        "unchanged": len({*tensors, *other}) - len(rows),
        "router": {"angle": _angles(a, b), "bias": _bias(a, b)} if ROW in {*tensors, *other} else None,
        "deltas": [_delta(a, b, f"expert/ffn/{name}") for name in ("gate", "up", "down")] if low_rank else [],
        "evaluation": _evaluation(a.manifest.get("evaluation", {}), b.manifest.get("evaluation", {})),
        "note": FACTORS if low_rank and any("/ffn/" in row["path"] for row in rows) else "",
    }


def _facts(a: Mapping[str, Any], b: Mapping[str, Any], without: Sequence[str]) -> list[dict[str, Any]]:
    """What manifests state differently; null also stands for what one of them does not state."""
    old, new = (tree.flatten({key: value for key, value in side.items() if key not in without}) for side in (a, b))
    return [
        {"field": field, "a": old.get(field), "b": new.get(field)}
        for field in sorted({*old, *new})
        if old.get(field) != new.get(field)
    ]


def _evaluation(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Bits per byte by domain; below 0, b is better."""
    rows = []
    for domain in sorted({*a, *b}):
        old, new = a.get(domain, {}).get("bits_per_byte"), b.get(domain, {}).get("bits_per_byte")
        if old != new:
            rows.append({"domain": domain, "a": old, "b": new, "change": None if None in (old, new) else new - old})
    return rows


def _tensor(a: store.Artefact, b: store.Artefact, path: str) -> dict[str, Any]:
    """One tensor that differs: where, and by how much, if both have it in slices of the same shape."""
    old, new = a.manifest["tensors"].get(path), b.manifest["tensors"].get(path)
    if old is None or new is None:
        return {"path": path, "state": "only in b" if old is None else "only in a", "shape": (old or new)["shape"]}
    row = {"path": path, "a": _form(old), "b": _form(new)}
    if old["shape"] != new["shape"] or len(old["slices"]) != len(new["slices"]):
        return row | {"state": "other shape" if old["shape"] != new["shape"] else "other slices"}
    differing = _differing(a, b, path)
    change = Change()
    for index in differing:
        change.add(a.slice_at(path, index), b.slice_at(path, index))
    if not math.isfinite(change.squares + change.before):
        raise errors.IntegrityError(f"{a.label} or {b.label}: tensor {path} holds NaN or infinity; verify both")
    before = change.before
    if len(differing) < len(old["slices"]):  # what was not read is as large as the manifest says
        before = max(before, old["rms"] ** 2 * math.prod(old["shape"]))
    return row | {
        "state": "changed" if differing else "same values",
        "slices": len(old["slices"]),
        "changed": differing,
        "relative": _ratio(change.squares, before),
        "largest": change.largest,
    }


def _form(entry: Mapping[str, Any]) -> str:
    return f"{entry['dtype']}[{','.join(map(str, entry['shape']))}]"


def _differing(a: store.Artefact, b: store.Artefact, path: str) -> list[int]:
    """Slices whose bytes differ; all, if a number is written otherwise in one than in the other."""
    old, new = a.manifest["tensors"][path], b.manifest["tensors"][path]
    other = old["dtype"] != new["dtype"]
    return [i for i, (x, y) in enumerate(zip(old["slices"], new["slices"], strict=True)) if other or x != y]


@dataclasses.dataclass
class Change:
    """Sums over pairs of numbers, in double precision, a block at a time."""

    squares: float = 0.0  # of b - a
    before: float = 0.0  # squares of a
    largest: float = 0.0  # |b - a|

    def add(self, a: np.ndarray, b: np.ndarray) -> None:
        """Looks at two arrays of one shape."""
        a, b = a.reshape(-1), b.reshape(-1)
        for start in range(0, a.size, slices.BLOCK):
            old, new = (side[start : start + slices.BLOCK].astype(np.float64) for side in (a, b))
            with np.errstate(invalid="ignore"):  # infinity less infinity; the sums show it
                difference = new - old
            self.squares += float(np.dot(difference, difference))
            self.before += float(np.dot(old, old))
            self.largest = max(self.largest, float(np.abs(difference).max()))


def _ratio(change: float, before: float) -> float | None:
    """Square root of the ratio of two sums of squares; None where something comes from nothing."""
    if before == 0:
        return 0.0 if change == 0 else None
    return math.sqrt(change / before)


def _angles(a: store.Artefact, b: store.Artefact) -> dict[str, Any] | None:
    """Degrees between the router rows of each layer, where neither is 0; None if they cannot be compared."""
    old, new = a.manifest["tensors"].get(ROW), b.manifest["tensors"].get(ROW)
    if old is None or new is None or old["shape"] != new["shape"]:
        return None
    if old == new:
        return _spread([0.0])
    u, v = _read(a, ROW), _read(b, ROW)
    lengths = [np.linalg.norm(rows, axis=1, keepdims=True) for rows in (u, v)]
    sound = ((lengths[0] > 0) & (lengths[1] > 0))[:, 0]
    u, v = (rows[sound] / length[sound] for rows, length in zip((u, v), lengths, strict=True))
    # The arc cosine of a product near 1 loses half of the digits; this does not (Kahan 2006, section 12).
    angles = 2 * np.arctan2(np.linalg.norm(u - v, axis=1), np.linalg.norm(u + v, axis=1))
    return _spread([float(angle) for angle in np.degrees(angles)])


def _bias(a: store.Artefact, b: store.Artefact) -> dict[str, Any] | None:
    """Change of the bias over layers, as it is used; None if it cannot be compared."""
    old, new = a.manifest["tensors"].get(BIAS), b.manifest["tensors"].get(BIAS)
    if old is None or new is None or old["shape"] != new["shape"]:
        return None
    return _spread([float(value) for value in _read(b, BIAS) - _read(a, BIAS)])


def _read(artefact: store.Artefact, path: str) -> np.ndarray:
    values = artefact.tensor(path)
    store.check_content(path, values, artefact.label)
    return values.astype(np.float64)


def _spread(values: Sequence[float]) -> dict[str, float] | None:
    if not values:
        return None
    return {"min": min(values), "median": float(np.median(values)), "max": max(values)}


def _delta(a: store.Artefact, b: store.Artefact, path: str) -> dict[str, Any]:
    """Change of the product a b that a low-rank expert adds to a public matrix, over the layers where a factor differs.

    ||a b - a' b'|| comes from the Gram matrices of [a, -a'] and [b; b'], so that no product is made.
    """
    factors = (f"{path}/a", f"{path}/b")
    shapes = [[side.manifest["tensors"][factor]["shape"] for factor in factors] for side in (a, b)]
    outer = [(left[0], left[1], right[2]) for left, right in shapes]
    if outer[0] != outer[1]:
        return {"path": path, "state": "other shape"}
    layers = list(range(outer[0][0]))
    if shapes[0] == shapes[1]:
        layers = sorted({index for factor in factors for index in _differing(a, b, factor)})
    squares = before = 0.0
    for layer in layers:
        (left, right), (left_b, right_b) = (
            [side.slice_at(factor, layer)[0].astype(np.float64) for factor in factors] for side in (a, b)
        )
        gram = np.concatenate([left, -left_b], axis=1), np.concatenate([right, right_b])
        squares += max(0.0, float(((gram[0].T @ gram[0]) * (gram[1] @ gram[1].T)).sum()))
        before += max(0.0, float(((left.T @ left) * (right @ right.T)).sum()))
    return {"path": path, "state": "compared", "layers": layers, "relative": _ratio(squares, before)}


def table(found: Mapping[str, Any]) -> str:
    """What `compare` found, for people."""
    lines = [f"{side}: {found['kind']} {found[side]['digest'][:12]} in {found[side]['directory']}" for side in ("a", "b")]
    if found["same"]:
        return "\n".join([*lines, "the same, byte for byte"])
    if found["kind"] != "model":
        return "\n".join([*lines, *_lines(found, "")])
    lines += [f"{row['field']}: {_short(row['a'])} -> {_short(row['b'])}" for row in found["facts"]]
    for part, what in (("anchor", "anchor"), ("shared", "averaged leaves")):
        if found[part] is not None:
            lines += [f"{what} changed", *_lines(found[part], "  ")]
    lines += [f"expert {name} added, digest {digest[:12]}" for name, digest in found["added"].items()]
    lines += [f"expert {name} removed, digest {digest[:12]}" for name, digest in found["removed"].items()]
    for name, change in found["changed"].items():
        lines += [f"expert {name} changed", *_lines(change, "  ")]
    lines += [f"expert {name} calibrated otherwise: bias {_range(spread)}" for name, spread in found["bias"].items()]
    return "\n".join([*lines, f"unchanged: {', '.join(found['unchanged']) or 'no expert'}"])


def _lines(found: Mapping[str, Any], indent: str) -> list[str]:
    lines = [f"{row['field']}: {_short(row['a'])} -> {_short(row['b'])}" for row in found["facts"]]
    for row in found["tensors"]:
        if "relative" in row:
            form = row["a"] if row["a"] == row["b"] else f"{row['a']} -> {row['b']}"
            amount = f"relative {_percent(row['relative'])}, largest {row['largest']:.3g}"
            lines.append(f"{row['path']} {form}: {len(row['changed'])} of {row['slices']} slices changed, {amount}")
        else:
            form = f"{row['a']} -> {row['b']}, not compared" if "a" in row else str(row["shape"])
            lines.append(f"{row['path']} {row['state']}: {form}")
    lines.append(f"tensors unchanged: {found['unchanged']}")
    for row in found["deltas"]:
        amount = _percent(row["relative"]) if "relative" in row else "not compared, since its shape is another"
        lines.append(f"{row['path']}, product of its factors: relative {amount}")
    if found["router"] is not None:
        angle, bias = found["router"]["angle"], found["router"]["bias"]
        lines.append(f"router row: {'not compared' if angle is None else f'turned by {_range(angle)} degrees'}")
        if bias is not None:
            lines.append(f"router bias: {_range(bias)}")
    for row in found["evaluation"]:
        change = "" if row["change"] is None else f" ({row['change']:+.4f})"
        lines.append(f"bits per byte on {row['domain']}: {_short(row['a'])} -> {_short(row['b'])}{change}")
    return [indent + line for line in [*lines, *([found["note"]] if found["note"] else [])]]


def _range(spread: Mapping[str, float] | None) -> str:
    if spread is None:
        return "not compared"
    return f"{spread['min']:.4g} / {spread['median']:.4g} / {spread['max']:.4g} (min, median, max over layers)"


def _percent(ratio: float | None) -> str:
    return "not defined (a is 0)" if ratio is None else f"{100 * ratio:.3g} %"


def _short(value: Any) -> str:
    text = "nothing" if value is None else tree.canonical_json(value).decode() if isinstance(value, list | dict) else str(value)
    return text[:12] if len(text) == 64 else f"{text[:57]}..." if len(text) > 60 else text
