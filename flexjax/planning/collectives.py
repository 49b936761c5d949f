"""What the devices say to each other in a compiled program: kind, mesh axes, how often, how many bytes."""

import dataclasses
import math
import re
from collections.abc import Iterable, Mapping

import numpy as np

from flexjax.planning import hlo

KINDS = (
    "all-gather",
    "all-reduce",
    "reduce-scatter",
    "all-to-all",
    "ragged-all-to-all",
    "collective-permute",
    "collective-broadcast",
)
Axes = Mapping[str, int]  # the mesh: sizes by axis, in the order of its devices


@dataclasses.dataclass(frozen=True)
class Collective:
    """One collective of a program.

    Attributes:
      kind: of `KINDS`.
      axes: mesh axes that its groups span; a part of an axis is written `fsdp/2`.
      group: devices that take part together.
      sent: bytes that each device sends in one go, by a ring: (n - 1) / n of the whole, twice that to reduce for all.
      times: how often a step runs it.
      source: where it comes from in the model.
    """

    kind: str
    axes: tuple[str, ...]
    group: int
    sent: float
    times: int
    source: str


def find(module: hlo.Module, axes: Axes) -> list[Collective]:
    """The collectives of a program in the order of its text.

    An asynchronous one counts once. TPUs spread one over several fusions, which share its channel, and write a
    reduce-scatter as a fusion of an all-reduce and a slice.

    Raises:
      ValueError: replica groups are written in a form that is not known here.
    """
    found, seen = [], set()
    for step in module.walk():
        instruction = step.instruction
        kind = instruction.op.removesuffix("-start")
        if kind not in KINDS:
            continue
        if step.fusion is not None:
            if step.fusion.called["calls"][0].startswith("all-reduce-scatter"):
                kind = "reduce-scatter"
            place = step.path[: step.path.index(step.fusion.name)]
            key = (place, kind, instruction.attribute("channel_id", r"(\d+)") or instruction.name)
            if key in seen:
                continue
            seen.add(key)
        computation = module.computations[step.computation]
        given = sum(array.bytes for name in instruction.operands for array in computation[name].arrays)
        if kind == "ragged-all-to-all":  # rows, the buffer they go to, sizes and offsets: one of the two has spare rows
            given = min(computation[name].arrays[0].bytes for name in instruction.operands[:2])
        names, size = spanned(instruction, axes)
        if size > 1:
            found.append(Collective(kind, names, size, _sent(kind, given, size), step.times, instruction.source))
    return found


def _sent(kind: str, given: int, size: int) -> float:
    if kind in ("collective-permute", "collective-broadcast"):
        return given
    if kind == "all-gather":
        return given * (size - 1)
    return (2 if kind == "all-reduce" else 1) * given * (size - 1) / size


def table(found: Iterable[Collective]) -> dict[tuple[str, tuple[str, ...]], tuple[int, float]]:
    """Runs and bytes sent per device and step, by kind and axes."""
    total: dict[tuple[str, tuple[str, ...]], tuple[int, float]] = {}
    for one in found:
        count, sent = total.get((one.kind, one.axes), (0, 0.0))
        total[one.kind, one.axes] = count + one.times, sent + one.times * one.sent
    return dict(sorted(total.items()))


def spanned(instruction: hlo.Instruction, axes: Axes) -> tuple[tuple[str, ...], int]:
    """Mesh axes over which the groups of a collective run, and the size of a group."""
    if pairs := instruction.attribute("source_target_pairs", r"\{((?:\{\d+,\d+\},?)+)\}"):
        moves = [tuple(map(int, pair)) for pair in re.findall(r"\{(\d+),(\d+)\}", pairs)]
        groups = np.array([move for move in moves if move[0] != move[1]] or [(0, 0)])
        names = _names(groups, axes, whole=False)
        return names, 2 if names else 1
    groups = _groups(instruction, math.prod(axes.values()))
    return _names(groups, axes, whole=True), groups.shape[1]


def _groups(instruction: hlo.Instruction, devices: int) -> np.ndarray:
    """Replica groups as rows of device numbers, whatever form they are written in."""
    rest = instruction.rest
    if found := re.search(r"replica_groups=\[(\d+),(\d+)\]<=\[([\d,]+)\](?:T\(([\d,]+)\))?", rest):
        laid = np.arange(devices).reshape([int(size) for size in found[3].split(",")])
        if found[4]:
            laid = laid.transpose([int(axis) for axis in found[4].split(",")])
        return laid.reshape(int(found[1]), int(found[2]))
    if found := re.search(r"replica_groups=mesh\[([^\]]*)\] ?\{([^}]*)\}(?!, ?device_ids)", rest):
        sizes = {name: int(size) for name, size in re.findall(r"'([^']+)'=(\d+)", found[1])}
        chosen = re.findall(r"'([^']+)'", found[2])
        if ":" not in found[2] and math.prod(sizes.values()) == devices:
            names = list(sizes)
            order = [names.index(name) for name in names if name not in chosen] + [names.index(name) for name in chosen]
            laid = np.arange(devices).reshape(list(sizes.values())).transpose(order)
            return laid.reshape(-1, math.prod(sizes[name] for name in chosen))
    if found := re.search(r"replica_groups=\{((?:\{[\d,]+\},?)*)\}", rest):
        rows = [[int(device) for device in row.split(",")] for row in re.findall(r"\{([\d,]+)\}", found[1])]
        return np.array(rows or [list(range(devices))])
    raise ValueError(f"{instruction.name}: unknown form of replica groups: {rest[:200]}")


def _names(groups: np.ndarray, axes: Axes, whole: bool) -> tuple[str, ...]:
    """Axes along which the members of a group differ."""
    places = np.unravel_index(groups, tuple(axes.values()))
    names = []
    for (name, size), place in zip(axes.items(), places, strict=True):
        members = max(len(set(row)) for row in place.tolist())
        if members > 1:
            names.append(name if members == size or not whole else f"{name}/{size // members}")
    return tuple(names)
