"""Counts the matrix products of a compiled program.

`cost_analysis` cannot be used: it adds elementwise work and counts a loop's body once. So the optimised HLO is read. On CPU,
XLA leaves every matrix product as a `dot` instruction, most of them alone in a fusion of kind kCustom that names its kernel;
none becomes a custom call (asserted). A dot costs 2 * (scalars of its result) * (sizes of the contracted dimensions), times
the number of times its computation is called; loops count their trips.
"""

import math
import re

COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[\w.\-]+) \(.*\) -> .* \{$")
INSTRUCTION = re.compile(
    r"^\s+(?:ROOT )?%(?P<name>[\w.\-]+) = (?P<shape>\(.*?\)|\S+) (?P<op>[\w\-]+)\((?P<operands>.*?)\)(?P<rest>.*)$"
)


def _dimensions(shape):
    return [int(size) for size in re.match(r"\w+\[([\d,]*)\]", shape).group(1).split(",") if size]


def _parse(text):
    computations, entry, current = {}, None, None
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            current = computations.setdefault(head["name"], [])
            entry = head["name"] if head["entry"] else entry
        elif found := INSTRUCTION.match(line):
            current.append(found.groupdict())
    return computations, entry


def dot_flops(text):
    """FLOPs of all dots of an optimised HLO module."""
    assert not re.search(r'custom_call_target="[^"]*(matmul|dot|gemm)', text), "a product became a custom call; count those too"
    computations, entry = _parse(text)

    def cost(name):
        shapes = {instruction["name"]: instruction["shape"] for instruction in computations[name]}
        total = 0
        for instruction in computations[name]:
            rest = instruction["rest"]
            if instruction["op"] == "dot":
                left = re.findall(r"%([\w.\-]+)", instruction["operands"])[0]
                axes = [int(axis) for axis in re.search(r"lhs_contracting_dims=\{([\d,]*)\}", rest).group(1).split(",")]
                contracted = math.prod(_dimensions(shapes[left])[axis] for axis in axes)
                total += 2 * math.prod(_dimensions(instruction["shape"])) * contracted
            trips = 1
            if instruction["op"] == "while":
                trips = int(re.search(r'known_trip_count"?:\{"?n"?:"?(\d+)', rest).group(1))
            for called in re.findall(r"(?:calls|to_apply|body|condition)=%([\w.\-]+)", rest):
                total += trips * cost(called)
        return total

    return cost(entry)
