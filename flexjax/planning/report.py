"""A plan as text for a terminal and as Markdown."""

from collections.abc import Iterable, Sequence
from typing import Any

from flexjax.planning import roofline

GIB = 2**30
Plan = dict[str, Any]


def size(count: float) -> str:
    """Bytes for a reader."""
    unit, name = next(
        (unit, name) for unit, name in ((GIB, "GiB"), (2**20, "MiB"), (2**10, "KiB"), (1, "B")) if count >= unit / 10
    )
    return f"{count / unit:,.2f} {name}"


def verdict(plan: Plan) -> str:
    """One line: whether it fits, and by how much."""
    peak, memory = plan["facts"]["peak"], plan["memory"]
    if memory["limit"] is None:
        return f"needs {size(peak)} on each device; how much there is, is not known"
    of = f"{peak / GIB:.2f} of {memory['limit'] / GIB:.2f} GiB on each device"
    if plan["fits"]:
        return f"fits: {of}, {memory['headroom'] / GIB:.2f} free"
    missing = f"{-memory['headroom'] / GIB:.2f} GiB missing" if memory["headroom"] < 0 else "the compiler found no way"
    return f"does not fit: {of}, {missing}"


def mesh(plan: Plan) -> str:
    """The sizes of a plan's mesh."""
    return " x ".join(f"{axis} {plan['mesh'][axis]}" for axis in ("data", "fsdp", "tensor", "expert"))


def rows(plan: Plan) -> list[tuple[str, str]]:
    """What a plan says, as (what, value); all per device and step unless it says otherwise."""
    job, facts, machine = plan["job"], plan["facts"], plan["machine"]
    batch = f"{job['sequences']} sequences of {job['seq_len']} tokens in {job['accumulation']} micro-batches"
    executed = sum(facts["flops"].values())
    found = [
        ("job", f"{job['phase']}, trains {job['trained']:,} of {job['parameters']:,} parameters"),
        ("machine", f"{machine['topology']}: {machine['devices']} devices, {machine['hosts']} hosts"),
        ("mesh", f"{mesh(plan)}, frozen weights {plan['mesh']['frozen']}"),
        ("step", f"{batch}; remat {job['remat']}, {job['compute_dtype']}"),
        ("method", facts["method"]),
        ("verdict", verdict(plan)),
        ("memory", _memory(facts)),
        ("FLOPs", f"useful {plan['useful_flops']:.3e}, executed {executed:.3e} ({executed / plan['useful_flops']:.0%})"),
        ("traffic", f"{size(facts['moved'])} to and from memory"),
    ]
    if facts["compiling"]:
        found.append(("compiling", _compiling(facts["compiling"])))
    found += _times(plan)
    saved = plan["checkpoint"]
    found.append(
        (
            "checkpoint",
            f"{size(saved['bytes'])}, written in {saved['seconds']:.0f} s "
            f"if each of {machine['hosts']} hosts writes {saved['storage'] / 1e9:g} GB/s",
        )
    )
    return found


def _memory(facts: Plan) -> str:
    parts = ("arguments", "temporaries", "code", "extra")
    return ", ".join(f"{part} {size(facts[part])}" for part in parts if facts[part])


def _compiling(compiling: dict[str, float]) -> str:
    return (
        f"lowered in {compiling['lower_seconds']:.1f} s, compiled in {compiling['compile_seconds']:.0f} s "
        f"({compiling['compile_cpu_seconds']:.0f} s of CPU time) with {size(compiling['host_bytes'])} of host memory; "
        f"{compiling['lines']:,.0f} lines of HLO"
    )


def _times(plan: Plan) -> list[tuple[str, str]]:
    estimate, job = plan["roofline"], plan["job"]
    if estimate is None:
        return [("time", "no estimate: the figures of this machine are not known (--flops, --memory_gb, --bandwidth, --link)")]
    links = "".join(f"; over {axes} {seconds:.2f} s" for axes, seconds in sorted(estimate["links"].items()))
    chips = plan["machine"]["devices"]
    price = f", {plan['price']:,.0f} at the price given" if plan["price"] is not None else ""
    return [
        (
            "estimate",
            f"step {estimate['step']:.2f} s, MFU {estimate['mfu']:.0%}, {estimate['tokens_per_second']:,.0f} tokens/s "
            f"({estimate['tokens_per_second'] / chips:,.0f} a device)",
        ),
        (
            "parts",
            f"products at peak {estimate['compute']:.2f} s, traffic at full bandwidth {estimate['memory']:.2f} s, "
            f"operation by operation {estimate['operations']:.2f} s{links}",
        ),
        (
            "run",
            f"{job['steps']:,} steps, {job['steps'] * job['tokens_per_step'] / 1e9:,.1f} B tokens: "
            f"{estimate['hours']:,.1f} hours, {estimate['chip_hours']:,.0f} device-hours{price}",
        ),
    ]


def text(title: str, plan: Plan) -> str:
    """A plan for a terminal."""
    lines = [title, ""]
    lines += [f"{what:<11} {value}" for what, value in rows(plan)]
    lines += ["", f"{'collectives':<20} {'axes':<24} {'times':>9} {'sent':>12}"]
    for one in plan["facts"]["collectives"]:
        lines.append(f"{one['kind']:<20} {', '.join(one['axes']):<24} {one['times']:>9,} {size(one['bytes']):>12}")
    lines += _uncounted(plan)
    if not plan["fits"]:
        lines += ["", "does not fit; what would help most, by the formulas:"]
        lines += [f"  {change['text']} (saves {size(change['saves'])})" for change in plan["advice"]]
        if plan["facts"]["largest"]:
            lines += ["", "largest buffers:"]
            lines += [f"  {size(b['bytes'])}  {b['shape']}  {b['source']}" for b in plan["facts"]["largest"]]
    if plan["roofline"]:
        lines += ["", "The estimate assumes:", *(f"- {line}" for line in roofline.ASSUMPTIONS)]
    return "\n".join(lines)


def _uncounted(plan: Plan) -> list[str]:
    names = plan["facts"]["uncounted"]
    return ["", f"Not in the FLOPs, or for one trip only: {', '.join(names)}."] if names else []


def table(head: Sequence[str], body: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    return lines + [f"| {' | '.join(cell.replace('|', '/') for cell in row)} |" for row in body]


def markdown(title: str, plan: Plan) -> str:
    """A plan as a Markdown document."""
    lines = [f"# {title}", "", *table(("what", "per device and step, unless it says otherwise"), rows(plan))]
    if not plan["fits"]:
        lines += ["", "What would help most, by the formulas:", ""]
        lines += [f"- {change['text']} (saves {size(change['saves'])})" for change in plan["advice"]]
    body = [
        (one["kind"], ", ".join(one["axes"]), f"{one['times']:,}", size(one["bytes"])) for one in plan["facts"]["collectives"]
    ]
    lines += ["", *table(("collective", "mesh axes", "times", "sent"), body)]
    if plan["facts"]["largest"]:
        buffers = [(size(b["bytes"]), f"`{b['shape']}`", f"`{b['source']}`") for b in plan["facts"]["largest"]]
        lines += ["", *table(("bytes", "largest buffers", "from"), buffers)]
    lines += _uncounted(plan)
    if plan["roofline"]:
        lines += ["", "The estimate assumes:", "", *(f"- {line}" for line in roofline.ASSUMPTIONS)]
    return "\n".join(lines) + "\n"


def candidates(found: Iterable[Any]) -> list[str]:
    """The rows of a search: mesh, micro-batches, memory and time by formulas."""
    return [
        f"{' x '.join(f'{axis} {size}' for axis, size in one.mesh.items()):<42} frozen {one.frozen:<10} "
        f"accumulation {one.accumulation:<5} {size(one.peak):>12}  {f'{one.seconds:.2f} s' if one.seconds else '':>9}"
        f"{'' if one.fits else '  does not fit'}"
        for one in found
    ]
