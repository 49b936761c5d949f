"""What a compiled program moves through a device's memory, and its largest buffers. An estimate: caches are not modelled."""

import dataclasses
from collections.abc import Iterable

from flexjax.planning import hlo

FREE = {  # move nothing: names for bytes that are there, or control
    "parameter", "constant", "tuple", "get-tuple-element", "bitcast", "while", "call", "conditional", "after-all",
    "partition-id", "replica-id", "iota", "opt-barrier", "async-start", "async-update", "async-done",
}  # fmt: skip
LARGEST = 8


@dataclasses.dataclass(frozen=True)
class Buffer:
    """An intermediate result."""

    bytes: int
    shape: str
    source: str


def moved(module: hlo.Module) -> float:
    """Bytes that a device reads and writes in its main memory in one run.

    Every instruction outside a fusion, and every fusion as a whole, reads its operands and writes its result once. Of what it
    only takes a slice from, or writes a slice into, the slice counts. Starts and ends of one asynchronous copy count once.
    """
    total = 0.0
    for step in module.walk(into_fusions=False):
        total += step.times * of(module, step.computation, step.instruction)
    return total


def largest(module: hlo.Module, count: int = LARGEST) -> list[Buffer]:
    """The largest results of single instructions in main memory, each shape and source once; they need not live together."""
    found: dict[tuple[str, str], Buffer] = {}
    for step in module.walk(into_fusions=False):
        instruction = step.instruction
        if instruction.op in FREE or instruction.op.endswith("-done"):
            continue
        for array in instruction.arrays:
            if array.in_memory and array.bytes:
                shape = f"{array.dtype}[{','.join(map(str, array.dimensions))}]"
                found[shape, instruction.source] = Buffer(array.bytes, shape, instruction.source)
    return sorted(found.values(), key=lambda buffer: -buffer.bytes)[:count]


def _bytes(arrays: Iterable[hlo.Array]) -> int:
    return sum(array.bytes for array in arrays if array.in_memory)


def of(module: hlo.Module, name: str, instruction: hlo.Instruction) -> int:
    """Bytes that one instruction of computation `name` moves, 0 for those that do nothing of their own."""
    if instruction.op in FREE or instruction.op.endswith("-done"):
        return 0
    computation = module.computations[name]
    operands = [computation[name].arrays for name in instruction.operands if name in computation]
    result = _bytes(instruction.arrays)
    if instruction.op in ("dynamic-slice", "slice", "gather", "slice-start"):
        return 2 * result
    if instruction.op == "dynamic-update-slice":
        return 2 * _bytes(operands[1])
    if instruction.op.endswith("-start"):
        return 2 * sum(_bytes(arrays) for arrays in operands)
    if instruction.op == "custom-call" and "tpu_custom_call" not in instruction.rest:
        return 0  # a buffer by another name
    if instruction.op != "fusion":
        return result + sum(_bytes(arrays) for arrays in operands)
    inside = module.computations[instruction.called["calls"][0]]
    return _written(inside, result) + sum(_read(inside, place, arrays) for place, arrays in enumerate(operands))


def _read(inside: hlo.Computation, place: int, arrays: tuple[hlo.Array, ...]) -> int:
    """What a fusion reads of one operand: its slices, if it takes nothing else."""
    whole = _bytes(arrays)
    parameter = next((i for i in inside.values() if i.op == "parameter" and i.literal == str(place)), None)
    if parameter is None or not whole:
        return whole
    total = 0
    for user in inside.values():
        if parameter.name not in user.operands:
            continue
        if user.op in ("dynamic-slice", "slice", "gather") and user.operands[0] == parameter.name:
            total += sum(array.bytes for array in user.arrays)
        elif user.op != "dynamic-update-slice" or user.operands[0] != parameter.name:
            return whole
    return min(whole, total)


def _written(inside: hlo.Computation, result: int) -> int:
    """What a fusion writes: the slice, where its result is an operand with a slice replaced."""
    root = next(i for i in inside.values() if i.root)
    parts = [inside[name] for name in root.operands] if root.op == "tuple" else [root]
    total = 0
    for part in parts:
        while part.op == "bitcast" and part.operands[0] in inside:
            part = inside[part.operands[0]]
        arrays = inside[part.operands[1]].arrays if part.op == "dynamic-update-slice" else part.arrays
        total += sum(array.bytes for array in arrays)
    return min(result, total)
