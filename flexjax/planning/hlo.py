"""Reads a compiled program: its matrix products, its collectives and its traffic to memory.

`cost_analysis` cannot be used: it adds elementwise work and counts a loop's body once. So the optimised HLO is read, and
what stands in a loop is multiplied by its trips: from the annotation if there is one (CPU), else from the loop's condition
(TPU). A loop whose trips are known at run time only counts once, and is named in `Module.dynamic`.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[\w\-]+)\((?P<operands>.*?)\)(?P<rest>.*)$"
)
ARRAY = re.compile(r"\b([a-z]+\d*[a-z0-9]*)\[([\d,]*)\](?:\{([^{}]*)\})?")
NAME = re.compile(r"%([\w.\-]+)")
CALLED = re.compile(r"\b(calls|to_apply|body|condition|branch_computations|called_computations)=\{?((?:%[\w.\-]+(?:, )?)+)")
OUTSIDE_HBM = re.compile(r"S\([1-9]\d*\)")  # on TPU, a buffer in one of the chip's own small memories
WINDOW = re.compile(r"(\w+)=(\S+)")
PRODUCTS_ELSEWHERE = re.compile(r"matmul|gemm|dot")


@dataclasses.dataclass(frozen=True)
class Array:
    """One array of a shape."""

    dtype: str
    dimensions: tuple[int, ...]
    layout: str = ""

    @property
    def bytes(self) -> int:
        """Without the padding of tiles."""
        bits = 8 if self.dtype == "pred" else int((re.search(r"\d+", self.dtype) or [0])[0])
        return math.prod(self.dimensions) * bits // 8

    @property
    def in_memory(self) -> bool:
        """Whether it lies in the device's main memory."""
        return not OUTSIDE_HBM.search(self.layout)


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of HLO."""

    name: str
    shape: str
    op: str
    operands: tuple[str, ...]
    literal: str
    rest: str
    root: bool

    @functools.cached_property
    def arrays(self) -> tuple[Array, ...]:
        """The arrays of its result."""
        found = ARRAY.findall(self.shape)
        return tuple(Array(dtype, tuple(int(d) for d in dims.split(",") if d), layout) for dtype, dims, layout in found)

    @functools.cached_property
    def called(self) -> dict[str, tuple[str, ...]]:
        """Computations that it calls, by role."""
        return {role: tuple(NAME.findall(names)) for role, names in CALLED.findall(self.rest)}

    def attribute(self, name: str, form: str = r"\{([\d,]*)\}") -> str | None:
        """The text of an attribute, None if it has none."""
        found = re.search(rf"\b{name}={form}", self.rest)
        return found[1] if found else None

    @property
    def source(self) -> str:
        """Where it comes from in the model, as JAX names it."""
        found = re.search(r'op_name="([^"]*)"', self.rest)
        return found[1] if found else ""


Computation = dict[str, Instruction]


@dataclasses.dataclass(frozen=True)
class Step:
    """An instruction as often as a program runs it."""

    instruction: Instruction
    computation: str
    times: int
    fusion: Instruction | None  # the outermost fusion that holds it
    path: tuple[str, ...]  # the calls that lead to it, outermost first


class Module:
    """A parsed program.

    Args:
      text: optimised HLO.
      filled: share of the rows of a grouped product that are expected to be in use; its kernel leaves the others out.

    Attributes:
      computations: by name, each an ordered {name: instruction}.
      dynamic: loops whose trips only the running program knows; they count once.
    """

    def __init__(self, text: str, filled: float = 1.0) -> None:
        self.filled = filled
        self.computations: dict[str, Computation] = {}
        self.dynamic: set[str] = set()
        self.entry, current = "", None
        for line in text.splitlines():
            if head := COMPUTATION.match(line):
                current = self.computations.setdefault(head["name"], {})
                self.entry = head["name"] if head["entry"] else self.entry
            elif current is not None and (found := INSTRUCTION.match(line)):
                names = tuple(NAME.findall(found["operands"]))
                current[found["name"]] = Instruction(
                    found["name"], found["shape"], found["op"], names, found["operands"], found["rest"], bool(found["root"])
                )

    def walk(self, into_fusions: bool = True) -> Iterator[Step]:
        """Every instruction with the number of times it runs; functions of reductions and sorts are left out."""
        return self._walk(self.entry, 1, None, (), into_fusions)

    def _walk(
        self, name: str, times: int, fusion: Instruction | None, path: tuple[str, ...], into_fusions: bool
    ) -> Iterator[Step]:
        for instruction in self.computations[name].values():
            yield Step(instruction, name, times, fusion, path)
            inside, trips = fusion, 1
            if instruction.op == "fusion":
                if not into_fusions:
                    continue
                inside = fusion or instruction
            elif instruction.op == "while":
                trips = self.trips(name, instruction)
            elif instruction.op not in ("call", "conditional", "async-start", "custom-call"):
                continue
            for called in (other for names in instruction.called.values() for other in names):
                yield from self._walk(called, times * trips, inside, (*path, instruction.name), into_fusions)

    def trips(self, name: str, loop: Instruction) -> int:
        """How often a loop's body runs; 1, and an entry in `dynamic`, if the program decides."""
        if known := re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', loop.rest):
            return int(known[1])
        derived = self._derived_trips(name, loop)
        if derived is None:
            self.dynamic.add(loop.name)
            return 1
        return derived

    def _derived_trips(self, name: str, loop: Instruction) -> int | None:
        """Trips of `for (i = first; i < bound; i += step)` with constants."""
        condition, body = (self.computations[loop.called[role][0]] for role in ("condition", "body"))
        test = _root(condition)
        if test.op == "fusion":  # a compare alone in a fusion
            inner = _root(self.computations[test.called["calls"][0]])
            test = dataclasses.replace(test, op=inner.op, rest=inner.rest)
        if test.op != "compare" or "direction=LT" not in test.rest or len(test.operands) != 2:
            return None
        index = _element(condition, test.operands[0])
        bound = _constant(condition, test.operands[1])
        if bound is None:  # the bound may be carried by the loop, unchanged
            carried = _element(condition, test.operands[1])
            bound = None if carried is None else self._initial(name, loop, carried)
        if index is None or bound is None:
            return None
        first, step = self._initial(name, loop, index), _increment(body, index)
        if first is None or not step or step < 0:
            return None
        return max(0, -(-(bound - first) // step))

    def _initial(self, name: str, loop: Instruction, index: int) -> int | None:
        """The constant that a loop's variable begins with."""
        given = self.computations[name].get(loop.operands[0])
        if given is None or given.op != "tuple":
            return None
        return _constant(self.computations[name], given.operands[index])


def _root(computation: Computation) -> Instruction:
    return next(instruction for instruction in computation.values() if instruction.root)


def _behind(computation: Computation, name: str) -> Instruction | None:
    """The instruction that a value comes from, past copies."""
    found = computation.get(name)
    while found is not None and found.op in ("copy", "bitcast", "copy-done", "copy-start"):
        found = computation.get(found.operands[0])
    return found


def _constant(computation: Computation, name: str) -> int | None:
    found = _behind(computation, name)
    return int(found.literal) if found is not None and found.op == "constant" and found.literal.isdigit() else None


def _element(computation: Computation, name: str) -> int | None:
    """Which of the loop's variables a value is."""
    found = _behind(computation, name)
    if found is None or found.op != "get-tuple-element":
        return None
    return int(found.attribute("index", r"(\d+)") or 0)


def _increment(body: Computation, index: int) -> int | None:
    """What a loop's body adds to a variable."""
    root = _root(body)
    added = _behind(body, root.operands[index]) if root.op == "tuple" else None
    if added is None or added.op != "add":
        return None
    for mine, other in (added.operands, added.operands[::-1]):
        if _element(body, mine) == index:
            return _constant(body, other)
    return None


def dot_flops(module: Module) -> dict[str, float]:
    """FLOPs of all matrix products of a program on one device, by the dtype of their left operand; see `products`."""
    found: dict[str, float] = {}
    for step in module.walk(into_fusions=False):
        for dtype, cost in products(module, step.computation, step.instruction).items():
            found[dtype] = found.get(dtype, 0.0) + cost * step.times
    return found


def products(module: Module, name: str, instruction: Instruction) -> dict[str, float]:
    """FLOPs by dtype of the matrix products of an instruction of computation `name`, or inside it if it is a fusion.

    A product is a `dot`, on TPU a `convolution`, or the kernel that `ragged_dot` becomes there. It costs
    2 * (scalars of its result) * (scalars that are contracted for each).

    Raises:
      ValueError: a product became some other custom call.
    """
    if instruction.op == "fusion":
        found: dict[str, float] = {}
        called = instruction.called["calls"][0]
        for inner in module.computations[called].values():
            for dtype, cost in products(module, called, inner).items():
                found[dtype] = found.get(dtype, 0.0) + cost
        return found
    if instruction.op not in ("dot", "convolution", "custom-call"):
        return {}
    computation = module.computations[name]
    operands = [computation[operand].arrays[0] for operand in instruction.operands if computation[operand].arrays]
    if instruction.op == "dot":
        axes = [int(axis) for axis in (instruction.attribute("lhs_contracting_dims") or "").split(",") if axis]
        contracted = math.prod(operands[0].dimensions[axis] for axis in axes)
        return {operands[0].dtype: 2.0 * math.prod(instruction.arrays[0].dimensions) * contracted}
    if instruction.op == "convolution":
        return {operands[0].dtype: _convolution(instruction, operands)}
    if instruction.name.startswith("ragged-dot") and len(operands) >= 2 and len(instruction.arrays) == 1:
        return {operands[-2].dtype: module.filled * _ragged(operands[-2], operands[-1], instruction.arrays[0])}
    if PRODUCTS_ELSEWHERE.search(instruction.attribute("custom_call_target", r'"([^"]*)"') or ""):
        raise ValueError(f"a product became the custom call {instruction.name}; count those too")
    return {}


def _ragged(left: Array, right: Array, result: Array) -> float:
    """[R, D] and [G, D, F] to [R, F], or the gradient [G, D, F] of two matrices: of all sizes, each but G occurs twice."""
    scalars = math.prod(math.prod(array.dimensions) for array in (left, right, result))
    groups = max((result, right), key=lambda array: len(array.dimensions)).dimensions[0]
    return 2.0 * math.sqrt(scalars // groups)


def kernels(module: Module) -> set[str]:
    """Hand-written kernels whose FLOPs `dot_flops` cannot see."""
    return {
        step.instruction.name
        for step in module.walk()
        if 'custom_call_target="tpu_custom_call"' in step.instruction.rest
        and not step.instruction.name.startswith("ragged-dot")
    }


def _convolution(instruction: Instruction, operands: list[Array]) -> float:
    """2 * result features and batch * input features * pairs of positions that meet inside the input."""
    labels = instruction.attribute("dim_labels", r"([\w?]+_[\w?]+->[\w?]+)") or ""
    left, right, result = re.split("_|->", labels)
    shape = dict(zip(result, instruction.arrays[0].dimensions, strict=True))
    kernel = dict(zip(right, operands[1].dimensions, strict=True))
    given = dict(zip(left, operands[0].dimensions, strict=True))
    window = {key: value.split("x") for key, value in WINDOW.findall(instruction.attribute("window", r"\{([^}]*)\}") or "")}
    pairs = 1
    for axis in sorted(name for name in result if name.isdigit()):
        pairs *= _meetings(window, int(axis), given[axis], kernel[axis], shape[axis])
    groups = int(instruction.attribute("batch_group_count", r"(\d+)") or 1)
    return 2.0 * shape["b"] * shape["f"] * kernel["i"] * pairs / groups


def _meetings(window: dict[str, list[str]], axis: int, given: int, kernel: int, result: int) -> int:
    """Pairs (position of the result, position of the kernel) of one axis that read a real input."""

    def of(key: str, default: str) -> str:
        return window[key][axis] if key in window else default

    stride, low = int(of("stride", "1")), int(of("pad", "0_0").split("_")[0])
    left, right = int(of("lhs_dilate", "1")), int(of("rhs_dilate", "1"))
    spread = (given - 1) * left + 1
    count = 0
    for place in range(result):
        reach = range(place * stride - low, place * stride - low + kernel * right, right)
        count += sum(1 for at in reach if 0 <= at < spread and at % left == 0)
    return count
