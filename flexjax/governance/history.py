"""What was done to a merged model: `MODEL.history.jsonl` beside the directory MODEL, so that nothing inside it names who left.

One line per operation, chained (`chain`), recorded before the operation's manifest is committed. A line to whose result the
model never came is an operation that was interrupted: it stays, and is shown as such; the next line begins where it began.
Order is that of the lines, never of clocks.

The chain shows lines that were edited, lost or moved; the model's own digest shows lines cut off the end. Whoever may write
the file can also write another one: it is the coordinator's own record, not a proof against the coordinator.
"""

import dataclasses
import datetime
import os
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from flexjax import errors, storage, workdir
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import provenance
from flexjax.governance import chain

SUFFIX = ".history.jsonl"
MAX_BYTES = 2**26
DIGEST = provenance.DIGEST
OPERATION = re.compile(r"[a-z][a-z_]{0,30}")
TIME = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\+00:00")
SIZE = {"d_ff", "rank"}
RESTORABLE = ("anchor", "experts", "top_k", "calibration", "shared")  # fields of a model's manifest that operations change


@dataclasses.dataclass(frozen=True)
class Entry:
    """One line.

    Attributes:
      operation: create, add, replace, remove, calibrate, revert, ...
      experts: name to digest, after the operation.
      what: `name` and `digest` of the expert concerned (also `d_ff` and `rank`), `former`: fields of the model's manifest
        as they were before, of those that changed, and `sizes`: d_ff and rank of each expert that left, by name.
      before, after: tree digests of the model; before is None where there was no model.
      time, code: UTC, and the code's version; `record` fills them in.
    """

    operation: str
    experts: dict[str, str]
    what: dict[str, Any]
    before: str | None
    after: str
    time: str = ""
    code: str = ""


def _fits(pattern: re.Pattern[str], optional: bool = False) -> Callable[[Any], bool]:
    return lambda value: (optional and value is None) or _matches(pattern, value)


def _matches(pattern: re.Pattern[str], value: Any) -> bool:
    return isinstance(value, str) and pattern.fullmatch(value) is not None


def _digests(value: Any) -> bool:
    """Whether a value maps names of experts to digests."""
    return isinstance(value, dict) and all(
        manifest_lib.NAME.fullmatch(name) and _matches(DIGEST, digest) for name, digest in value.items()
    )


def _what(value: Any) -> bool:
    former = value.get("former") if isinstance(value, dict) else None
    return (
        isinstance(former, dict)
        and set(former) <= set(RESTORABLE)
        and _digests(former.get("experts", {}))
        and isinstance(value.get("name", ""), str)
        and all(provenance.whole(value.get(size, 0)) for size in SIZE)
        and _sizes(value.get("sizes", {}))
    )


def _sizes(value: Any) -> bool:
    """Whether a value maps names of experts to their d_ff and rank."""
    return isinstance(value, dict) and all(
        manifest_lib.NAME.fullmatch(name)
        and isinstance(size, dict)
        and set(size) == SIZE
        and all(map(provenance.whole, size.values()))
        for name, size in value.items()
    )


FORMS: dict[str, Callable[[Any], bool]] = {
    "operation": _fits(OPERATION),
    "experts": _digests,
    "what": _what,
    "before": _fits(DIGEST, optional=True),
    "after": _fits(DIGEST),
    "time": _fits(TIME),
    "code": lambda value: isinstance(value, str) and value.isprintable(),
}


def path(model: epath.PathLike) -> epath.Path:
    """The history of a model: beside the directory, also where a link or `.` leads to it.

    Raises:
      ConfigError: the model is a whole bucket or file system, which has no place beside it.
    """
    home = epath.Path(model)
    if workdir.is_local(home):
        home = epath.Path(os.path.realpath(home))
    if not home.name or str(home.parent) in ("gs:/", "gs://"):
        raise errors.ConfigError(f"{home} has no place beside it for its history; put the model into a directory")
    return home.parent / f"{home.name}{SUFFIX}"


def entry(
    operation: str,
    before: manifest_lib.Manifest | None,
    after: manifest_lib.Manifest,
    name: str = "",
    facts: Mapping[str, Any] | None = None,
    sizes: Mapping[str, Mapping[str, int]] | None = None,
) -> Entry:
    """Describes an operation by a model's manifests before and after it, both sealed.

    Args:
      operation: what was done.
      before: None if there was no model.
      after: the manifest that will be committed.
      name: the expert concerned, if it is one.
      facts: whatever else is worth keeping.
      sizes: `d_ff` and `rank` by name, at least of every expert that leaves: of those they are kept.
    """
    was = {} if before is None else before
    former = {field: was[field] for field in RESTORABLE if was and was.get(field) != after.get(field)}
    what = dict(facts or {}) | {"former": former}
    if name:
        what |= {"name": name, "digest": after["experts"].get(name, was.get("experts", {}).get(name))}
    gone = sorted(set(was.get("experts", {})) - set(after["experts"]))
    if sizes is not None and gone:
        what["sizes"] = {name: {size: sizes[name][size] for size in sorted(SIZE)} for name in gone}
    return Entry(operation, dict(after["experts"]), what, was.get("digest"), after["digest"])


def record(model: epath.PathLike, entry: Entry) -> Entry:
    """Adds a line, before the manifest that it announces is committed; the caller holds the model's lock.

    Returns:
      The entry as it was written.

    Raises:
      IntegrityError: the history is damaged, or does not lead to the model that the operation begins with.
      StorageError: it cannot be written, or somebody else wrote it at the same time.
    """
    target = path(model)
    generation = storage.generation(target)  # before reading: what is written since makes the replacement fail
    lines, entries = _load(target)
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    filled = dataclasses.replace(entry, time=entry.time or now, code=manifest_lib.code())
    lines.append(chain.follow(lines, dataclasses.asdict(filled)))
    chain.parse(lines, FORMS, str(target))
    _states([*entries, filled], filled.after, str(target))
    data = b"".join(line + b"\n" for line in lines)
    if len(data) > MAX_BYTES:
        raise errors.StorageError(f"{target} would have {len(data)} bytes, more than {MAX_BYTES}; move it away and begin anew")
    storage.replace(target, data, generation, f".{target.name}.partial")  # one name, so that none is left behind
    return filled


def read(model: epath.PathLike) -> list[Entry]:
    """All lines, verified; empty if there is no history.

    A last line that was cut while it was written is left out, with a note.

    Raises:
      IntegrityError: names the line that was changed, or before which one is missing.
    """
    target = path(model)
    _, entries = _load(target)
    if entries:
        _states(entries, entries[-1].after, str(target))
    return entries


def settled(entries: Sequence[Entry], current: str | None) -> list[Entry]:
    """The operations that took effect.

    Args:
      entries: all lines.
      current: the model's tree digest; None if there is no model.

    Raises:
      IntegrityError: the lines do not lead to this model.
    """
    return [entry for entry, done in zip(entries, _states(entries, current), strict=True) if done]


def log(model: epath.PathLike, current: str | None) -> list[dict[str, Any]]:
    """One row per line: number, time, operation, name, digest, experts, before, after, state (done or interrupted).

    Args:
      model: the directory.
      current: its tree digest; None if there is no model.

    Raises:
      IntegrityError: as `read`, or the history does not lead to this model.
    """
    entries = read(model)
    return [
        {
            "number": number,
            "time": entry.time,
            "operation": entry.operation,
            "name": entry.what.get("name", ""),
            "digest": entry.what.get("digest") or "",
            "experts": sorted(entry.experts),
            "before": entry.before,
            "after": entry.after,
            "state": "done" if done else "interrupted",
        }
        for number, (entry, done) in enumerate(zip(entries, _states(entries, current, str(path(model))), strict=True), start=1)
    ]


def table(rows: Sequence[Mapping[str, Any]]) -> str:
    """The log for people."""
    if not rows:
        return "no history: the model was made before histories were kept, or its file was not moved along"
    lines = [f"{'':>4} {'time (UTC)':<20} {'operation':<10} {'expert':<16} {'digest':<13} {'model after':<13} state"]
    for row in rows:
        when, digest, after = row["time"][:19].replace("T", " "), row["digest"][:12] or "-", row["after"][:12]
        name = row["name"] or "-"
        lines.append(f"{row['number']:>4} {when:<20} {row['operation']:<10} {name:<16} {digest:<13} {after:<13} {row['state']}")
    return "\n".join(lines)


def find_removed(entries: Sequence[Entry], name: str) -> Entry:
    """The last operation that took an expert out.

    Args:
      entries: those that took effect (`settled`).
      name: of the expert.

    Raises:
      PolicyError: the expert is in the model, or none of this name ever left.
    """
    if entries and name in entries[-1].experts:
        raise errors.PolicyError(f"expert '{name}' is in the model; nothing to bring back")
    for entry in reversed(entries):
        if name in entry.what["former"].get("experts", {}) and name not in entry.experts:
            return entry
    raise errors.PolicyError(f"the history tells of no removal of an expert '{name[:63]}'")


def revert_plan(entries: Sequence[Entry]) -> dict[str, Any]:
    """What would undo the last operation.

    Args:
      entries: those that took effect (`settled`).

    Returns:
      operation, name: what is undone; add {name: digest}: bundles that somebody must give, with exactly these digests;
      remove [name]: experts that go; restore {field: value}: fields of the model's manifest as they were; expect: the
      tree digest that the model then has; text: the same for people.

    Raises:
      PolicyError: there is nothing that can be undone.
    """
    if not entries:
        raise errors.PolicyError("no operation is recorded; there is nothing to revert")
    last = entries[-1]
    if last.before is None:
        raise errors.PolicyError("the last operation made the model; to undo that, remove its directory")
    former = last.what["former"]
    before, after = former.get("experts", last.experts), last.experts
    add = {name: digest for name, digest in sorted(before.items()) if after.get(name) != digest}
    gone = sorted(set(after) - set(before))
    restore = {field: value for field, value in former.items() if field != "experts"}
    parts = [
        f"expert '{name}' with digest {digest} must be given (--expert=DIR): its bytes are gone from this copy"
        for name, digest in add.items()
    ]
    parts += [f"expert '{name}' is removed" for name in gone]
    parts += [f"{field} becomes again what it was" for field in sorted(restore)]
    name = last.what.get("name", "")
    what = f"{last.operation} {name}".strip()
    return {
        "operation": last.operation,
        "name": name,
        "add": add,
        "remove": gone,
        "restore": restore,
        "expect": last.before,
        "text": f"to revert '{what}': {'; '.join(parts) or 'nothing needs to be done'}",
    }


def _states(entries: Sequence[Entry], current: str | None, where: str = "the history") -> list[bool]:
    """Whether each operation took effect, as the later ones and the model's digest show.

    Lines that begin at the same model are attempts, of which at most one succeeded: the next line begins at its result.
    """
    done = [entry.before == entry.after for entry in entries]
    first = 0  # of the attempts that begin at the same model
    following = [*(entry.before for entry in entries[1:]), current] if entries else []
    for number, found in enumerate(following):
        if found == entries[first].before:
            continue
        led = [attempt for attempt in range(first, number + 1) if entries[attempt].after == found]
        last = number + 1 == len(entries)
        anew = found is None and not last and entries[number + 1].operation == "create"  # the directory was removed by hand
        if not led and not anew:
            who = "the model is" if last else f"line {number + 2} begins at"
            raise errors.IntegrityError(
                f"{where}, line {number + 1}: it leads to model {_short(entries[number].after)}, but {who} {_short(found)}; "
                "lines are missing, or the model was changed by other means: restore one of them, or move the history away"
            )
        done[led[-1] if led else number] = True
        first = number + 1
    return done


def _short(digest: str | None) -> str:
    return "none" if digest is None else digest[:12]


def _load(target: epath.Path) -> tuple[list[bytes], list[Entry]]:
    """The sound lines and what they say; the order of models is not yet checked."""
    if not storage.exists(target):
        return [], []
    lines = chain.split(storage.read_small(target, MAX_BYTES), str(target))
    return lines, [Entry(**fields) for fields in chain.parse(lines, FORMS, str(target))]
