"""Result rows: what each must hold to be reported, and what the names of methods say.

`rows.jsonl` has one JSON object a line for each method and seed, enough to rebuild report and figures without the weights.
"""

import json
import pathlib
import re
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from flexjax import errors

Row = dict[str, Any]
Texts = dict[str, tuple[np.ndarray, np.ndarray]]  # by name: nats and bytes of each document

FILE = "rows.jsonl"
ANCHOR, JOINT_1X, JOINT_2X, FROZEN_2X = "anchor", "joint-1x", "joint-2x", "joint-frozen-2x"
FLEX = "flex"  # our recipe as it stands; relatives have longer names
GROUPS = ("core", "second", "ablation")
REPORT, TUNE, UNSEEN, INTERLEAVED, REAL = "report", "tune", "unseen", "mixed/interleaved", "mixed/real"
PARTS = (REPORT, TUNE, UNSEEN, INTERLEAVED, REAL)
WITHOUT = re.compile(r"(?P<base>.+)-without-(?P<expert>.+)")  # one expert removed
ACTIVE = re.compile(r"flex-k(?P<count>\d+)")  # another number of active experts
SIZED = re.compile(r"flex-(rank|narrow).*")  # experts of another size
_NEEDED = {"suite": str, "size": str, "seed": int, "method": str, "title": str, "group": str, "status": str}
_ADVICE = "remove the line or run the method again"


def is_series(method: str) -> bool:
    """Whether a method is a point of a series that has a section of its own."""
    return any(pattern.fullmatch(method) for pattern in (WITHOUT, ACTIVE, SIZED))


def read(path: pathlib.Path) -> list[Row]:
    """The rows of a file.

    Raises:
      DataError: there is no such file, or a line is no row; the message names the line.
    """
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except FileNotFoundError:
        raise errors.DataError(f"{path} is missing; run the suite first: python -m benchmarks.run --suite=NAME") from None
    except (OSError, UnicodeDecodeError) as error:
        raise errors.DataError(f"{path} cannot be read: {error}; restore it, or run the suite again") from None
    found = []
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line)
        except ValueError as error:
            raise errors.DataError(f"{path}:{number} is no JSON: {error}; {_ADVICE}") from None
        check(row, f"{path}:{number}")
        found.append(row)
    return found


def check(row: Any, where: str) -> None:
    """Raises DataError, with `where` in its one line, unless this is a row that can be reported."""
    if not isinstance(row, dict):
        raise errors.DataError(f"{where} is no result row: expected an object, found {type(row).__name__}; remove the line")
    for field, kind in _NEEDED.items():
        if not isinstance(row.get(field), kind):
            said = f"{field} must be {kind.__name__}, found {row.get(field)!r:.40}"
            raise errors.DataError(f"{where} is no result row: {said}; {_ADVICE}")
    where = f"{where}, method {row['method']!r:.40} of seed {row['seed']}"
    for field, known in (("status", ("ok", "failed")), ("group", GROUPS)):
        if row[field] not in known:
            said = f"{field} must be one of {', '.join(known)}, found {row[field]!r:.40}"
            raise errors.DataError(f"{where}: {said}; {_ADVICE}")
    if row["status"] == "ok":
        _check_scores(row, where)


def _check_scores(row: Row, where: str) -> None:
    try:
        found = texts(row)
        float(row["ledger"]["training_flops"])
    except (KeyError, TypeError, ValueError, AttributeError):
        raise errors.DataError(
            f"{where}: expected scores with nats and bytes by document and a ledger with training_flops; {_ADVICE}"
        ) from None
    if not any(within(text, REPORT) for text in found):
        raise errors.DataError(f"{where}: no scores of the report half; {_ADVICE}")
    for text, (nats, sizes) in found.items():
        if nats.ndim != 1 or nats.shape != sizes.shape or not len(nats):
            said = f"{text:.40} has {nats.shape} nats and {sizes.shape} bytes; expected one by document"
            raise errors.DataError(f"{where}: {said}; {_ADVICE}")
        if not (np.isfinite(nats).all() and (sizes > 0).all()):
            raise errors.DataError(f"{where}: {text:.40} has nats that are not finite or empty documents; {_ADVICE}")


def texts(row: Row) -> Texts:
    """Every text that a finished row has scores of, by name: `report/math`, `mixed/real`."""
    return dict(_texts(row["scores"], ""))


def _texts(scores: Mapping[str, Any], name: str) -> Iterator[tuple[str, tuple[np.ndarray, np.ndarray]]]:
    if "nats" in scores:
        yield name, (np.array(scores["nats"], np.float64), np.array(scores["bytes"], np.float64))
        return
    for key, below in scores.items():
        yield from _texts(below, f"{name}/{key}" if name else key)


def within(text: str, part: str) -> bool:
    """Whether a text belongs to a part of the suite's text."""
    return text == part or text.startswith(f"{part}/")
