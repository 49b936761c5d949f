"""May these bundles be merged with this anchor? Answered from manifests alone, before any tensor is opened."""

import dataclasses
from collections.abc import Sequence

from flexjax import errors
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import store

FIELDS = ("config", "tokenizer", "anchor")  # the anchor's digest covers the other two, so it comes last


@dataclasses.dataclass(frozen=True)
class Row:
    """One thing that was compared."""

    expert: str
    field: str
    expected: str
    found: str
    ok: bool
    advice: str = ""


def report(anchor: store.Artefact, bundles: Sequence[store.Artefact], top_k: int) -> list[Row]:
    """Compares every bundle's lineage with the anchor, names with each other, and top_k with their number."""
    lineage = manifest_lib.lineage(anchor.manifest)
    rows = []
    seen: dict[str, str] = {}
    for bundle in bundles:
        name = bundle.manifest["name"]
        for field in FIELDS:
            found = str(bundle.manifest[field])
            advice = f"train '{name}' on this anchor, or merge with the one it was trained on"
            rows.append(Row(name, field, lineage[field][:12], found[:12], found == lineage[field], advice))
        taken = seen.setdefault(name, str(bundle.directory))
        unique = taken == str(bundle.directory) and [b.manifest["name"] for b in bundles].count(name) == 1
        rows.append(Row(name, "name", "unique", "unique" if unique else f"also {taken}", unique, "give each expert once"))
    fits = 1 <= top_k <= len(bundles) + 1
    limit = f"1 to {len(bundles) + 1}"
    rows.append(Row("", "top_k", limit, str(top_k), fits, f"pass --top_k from {limit}"))
    return rows


def table(rows: Sequence[Row]) -> str:
    """The report for people."""
    lines = [f"{'expert':<16} {'field':<10} {'expected':<14} {'found':<14} verdict"]
    for row in rows:
        verdict = "ok" if row.ok else f"refused: {row.advice}"
        lines.append(f"{row.expert:<16} {row.field:<10} {row.expected:<14} {row.found:<14} {verdict}")
    return "\n".join(lines)


def check(rows: Sequence[Row]) -> None:
    """Raises IntegrityError (ConfigError for top_k and names) for the first row that does not fit."""
    for row in rows:
        if not row.ok:
            kind = errors.ConfigError if row.field in ("top_k", "name") else errors.IntegrityError
            whose = f"expert '{row.expert}': " if row.expert else ""
            raise kind(f"{whose}{row.field} expected {row.expected}, found {row.found}; {row.advice}")
