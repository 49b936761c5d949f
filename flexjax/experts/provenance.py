"""What a manifest may say of where an artefact comes from: allow-listed fields, numbers and short words, never contents.

A manifest travels further than the text that it speaks of, and is written by people whom the reader need not trust. So
every field is named here, bounded, and refused if it is of another type.
"""

import dataclasses
import itertools
import math
import re
from collections.abc import Callable, Mapping
from typing import Any

from flexjax import errors

LONGEST_WORD = 128
NO_PRIVACY = {"dp": "none"}
LICENCE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+() -]{0,63}")  # an SPDX expression, or a few words
KEY = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,62}")
DIGEST = re.compile(r"[0-9a-f]{64}")


@dataclasses.dataclass(frozen=True)
class Provenance:
    """What an owner states of an expert, beside its tensors and its training.

    Attributes:
      owner: who trained it; may be empty.
      version: the owner's release of this expert, from 1; a lower one never silently replaces a higher one.
      data: {licence, documents, digest} of the owner's text: how much, under which terms, never what.
      evaluation: {domain: {"bits_per_byte": with this expert, "anchor": without}}.
      privacy: {"dp": "none"}, or the mechanism with its epsilon and delta.
      margins: {"quantiles": [...], "values": [[...] per layer]} of the router's margin on the owner's own text, or None.
      parent: {"digest": of the bundle that this one was derived from, "by": how}, or None.
    """

    owner: str = ""
    version: int = 1
    data: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    evaluation: Mapping[str, Mapping[str, float]] = dataclasses.field(default_factory=dict)
    privacy: Mapping[str, Any] = dataclasses.field(default_factory=lambda: NO_PRIVACY)
    margins: Mapping[str, Any] | None = None
    parent: Mapping[str, str] | None = None

    def fields(self) -> dict[str, Any]:
        """The fields of the manifest."""
        return {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}


def of(manifest: Mapping[str, Any]) -> Provenance:
    """What a bundle's manifest says; inverse of `Provenance.fields`."""
    return Provenance(**{field.name: manifest[field.name] for field in dataclasses.fields(Provenance)})


def check(manifest: Mapping[str, Any], where: str) -> None:
    """Raises IntegrityError for the first statement of an expert's manifest that is not of its form."""
    for field, fits in STATEMENTS.items():
        if not fits(manifest[field]):
            raise errors.IntegrityError(f"{where}: field '{field}' is not of its form: {EXPECTED[field]}; refused")


def check_training(training: Mapping[str, Any], where: str) -> None:
    """Raises IntegrityError if training facts hold anything but the allow-listed numbers, digests and names."""
    for key, value in training.items():
        fits = TRAINING.get(key)
        if fits is None or not fits(value):
            state = "is not of its form" if fits else "is no field that a manifest may hold"
            raise errors.IntegrityError(f"{where}: training.{key[:40]} {state}; refused")


def number(value: Any) -> bool:
    """Whether a value is a plain finite number."""
    return (type(value) is int and abs(value) < 2**1000) or (type(value) is float and math.isfinite(value))


def whole(value: Any) -> bool:
    """Whether a value is a plain whole number from 0 that 64 bits hold."""
    return type(value) is int and 0 <= value < 2**63


def _word(value: Any) -> bool:
    return isinstance(value, str) and len(value) <= LONGEST_WORD and (not value or value.isprintable())


def _digest(value: Any) -> bool:
    return isinstance(value, str) and (not value or DIGEST.fullmatch(value) is not None)


def _names(value: Any) -> bool:
    return (
        isinstance(value, list) and len(value) <= 4096 and all(isinstance(name, str) and KEY.fullmatch(name) for name in value)
    )


def _members(**fits: Callable[[Any], bool]) -> Callable[[Any], bool]:
    """An object with some of these members."""
    return lambda value: isinstance(value, dict) and all(key in fits and fits[key](member) for key, member in value.items())


def _within(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: number(value) and low <= value <= high


def _evaluation(value: Any) -> bool:
    scores = _members(bits_per_byte=_within(0, 1e3), anchor=_within(0, 1e3))
    return isinstance(value, dict) and len(value) <= 64 and all(_word(name) and scores(score) for name, score in value.items())


def _margins(value: Any) -> bool:
    if value is None:
        return True
    if not isinstance(value, dict) or set(value) != {"quantiles", "values"} or not isinstance(value["values"], list):
        return False
    quantiles, rows = value["quantiles"], value["values"]
    if not isinstance(quantiles, list) or not 2 <= len(quantiles) <= 9 or not all(map(_within(0, 1), quantiles)):
        return False
    if 0.5 not in quantiles or any(high <= low for low, high in itertools.pairwise(quantiles)):  # who reads them interpolates
        return False
    return all(isinstance(row, list) and len(row) == len(quantiles) and all(map(_within(-1e4, 1e4), row)) for row in rows)


def _privacy(value: Any) -> bool:
    if not _members(dp=_word, epsilon=_within(0, 1e6), delta=_within(0, 1))(value):
        return False
    return value == NO_PRIVACY or (len(value) == 3 and value["dp"].strip().lower() not in ("", "none"))


def _parent(value: Any) -> bool:
    return value is None or (_members(digest=_digest, by=_word)(value) and len(value) == 2)


def _licence(value: Any) -> bool:
    return isinstance(value, str) and (not value or LICENCE.fullmatch(value) is not None)


STATEMENTS: dict[str, Callable[[Any], bool]] = {
    "owner": _word,
    "version": lambda value: type(value) is int and 1 <= value < 2**31,
    "data": _members(
        licence=_licence, documents=whole, digest=_digest, row_documents=whole, public_fraction=number, tokens=whole
    ),
    "evaluation": _evaluation,
    "privacy": _privacy,
    "margins": _margins,
    "parent": _parent,
}
EXPECTED = {
    "owner": f"a printable name of at most {LONGEST_WORD} characters",
    "version": "a whole number from 1",
    "data": "licence, documents, digest, row_documents, public_fraction, tokens",
    "evaluation": "bits_per_byte and anchor, numbers, by domain",
    "privacy": "dp, epsilon, delta",
    "margins": "null, or two to nine ascending quantiles, 0.5 among them, and one row of values for each layer",
    "parent": "null, or digest and by",
}
TRAINING: dict[str, Callable[[Any], bool]] = {
    **dict.fromkeys(("steps", "tokens", "seed", "seq_len"), whole),
    "flops": number,
    **dict.fromkeys(("stream", "start", "data"), _digest),
    "router_tuned_with": _names,
    "huggingface": lambda value: (
        isinstance(value, dict)
        and len(value) <= 64
        and all(KEY.fullmatch(key) and _plain(member) for key, member in value.items())
    ),
}


def _plain(value: Any) -> bool:
    """A setting of an imported config: a number, a word, or a short list of numbers."""
    if isinstance(value, list):
        return len(value) <= 64 and all(number(member) for member in value)
    return value is None or isinstance(value, bool) or number(value) or _word(value)
