"""A chain of lines: canonical JSON objects, each with its own SHA-256 (`digest`) and that of the line before (`previous`).

A line that was edited, lost, added or moved is seen and named; what was cut off the end is not, since nothing follows it.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from flexjax import distributed, errors, tree

Forms = Mapping[str, Callable[[Any], bool]]  # the fields that every line has, and whether a value fits


def follow(lines: Sequence[bytes], fields: Mapping[str, Any]) -> bytes:
    """The line that says `fields` after those lines, without its line feed."""
    linked = {**fields, "previous": tree.sha256(lines[-1]) if lines else None}
    return tree.canonical_json(linked | {"digest": tree.sha256(tree.canonical_json(linked))})


def split(data: bytes, where: str) -> list[bytes]:
    """The lines of a file; a last one that was cut while it was written is left out, with a note."""
    lines = data.split(b"\n")
    rest = lines.pop()
    if rest and _is_whole(rest):
        lines.append(rest)
    elif rest:
        distributed.say(f"note: {where}, line {len(lines) + 1} was cut while it was written; it is left out")
    return lines


def parse(lines: Sequence[bytes], forms: Forms, where: str) -> list[dict[str, Any]]:
    """What the lines say, without `previous` and `digest`.

    Raises:
      IntegrityError: names the line that is not of its form, was changed, or does not follow the one before.
    """
    found = []
    for number, line in enumerate(lines, start=1):
        try:
            fields = _verified(line, lines[number - 2] if number > 1 else None)
            if set(fields) != set(forms):
                raise ValueError(f"it must have the fields {', '.join(forms)}, previous and digest")
            for field, fits in forms.items():
                if not fits(fields[field]):
                    raise ValueError(f"field '{field}' is not of its form")
        except (ValueError, RecursionError) as error:
            raise errors.IntegrityError(f"{where}, line {number}: {error}; restore the file") from None
        found.append(fields)
    return found


def _verified(line: bytes, before: bytes | None) -> dict[str, Any]:
    fields = tree.strict_json(line)
    if not isinstance(fields, dict) or tree.canonical_json(fields) != line:
        raise ValueError("it is no object in canonical JSON")
    if fields.pop("digest", None) != tree.sha256(tree.canonical_json(fields)):
        raise ValueError("it was changed: its content has another digest than it says")
    if fields.pop("previous", "") != (None if before is None else tree.sha256(before)):
        raise ValueError("it does not follow the line before: lines were changed, lost or moved")
    return fields


def _is_whole(line: bytes) -> bool:
    try:
        tree.strict_json(line)
    except tree.DuplicateKey:
        return True
    except (ValueError, RecursionError):
        return False
    return True
