"""Tables of a report: figures short, units in the heads, the best first."""

import dataclasses
import math
from collections.abc import Callable, Iterable, Mapping, Sequence

from benchmarks.reporting import rows as rows_lib
from benchmarks.reporting.measures import Estimate, Measures
from benchmarks.reporting.rows import ANCHOR, INTERLEAVED, JOINT_1X, JOINT_2X, REAL, REPORT, UNSEEN

NONE = "-"
WIDE = 5  # with more domains, bits per byte by domain get a table of their own


@dataclasses.dataclass(frozen=True)
class System:
    """What the paper measured: its name for it, its average over tasks, our counterpart if any, and what differs in that."""

    title: str
    accuracy: float
    ours: str = ""
    differs: str = ""


_OURS = "our recipe otherwise: fitted rows, public negatives"
PAPER: dict[str, tuple[System, ...]] = {
    "table1": (
        System("public model", 36.9, ANCHOR),
        System("model soup", 39.6, "soup"),
        System("weighted model soup", 42.2, "soup-weighted", "weights by the opening of each window"),
        System("BTM", 43.4, "btm"),
        System("prompt routing (the better of two)", 40.8, "prompt-routing", "a small classifier in place of a chat model"),
        System("BTX", 40.0, "btx"),
        System("FlexOlmo, no bias, no domain rows, no coordination", 38.8, "no-coordination", "with domain rows"),
        System("FlexOlmo, no bias, no domain rows", 44.4),
        System("FlexOlmo, rows of hidden states (its Table 3)", 43.5, "flex-paper"),
        System("FlexOlmo, no bias", 45.8, "flex-no-bias", _OURS),
        System("FlexOlmo, rows of a text encoder, no router tuning", 46.7),
        System("FlexOlmo, router tuned", 47.8, "flex-tuned-proxy", _OURS),
        System("unrestricted MoE, 1x FLOPs", 46.3, JOINT_1X),
        System("unrestricted MoE, 2x FLOPs", 51.5, JOINT_2X),
    ),
    "table2": (
        System("public model", 42.4, ANCHOR),
        System("BTM", 47.6, "btm"),
        System("FlexOlmo, rows of a text encoder, no router tuning", 51.3),
        System("FlexOlmo, router tuned", 52.4, "flex-tuned-proxy", _OURS),
    ),
}


def table(head: Sequence[str], body: Iterable[Sequence[str]], text: int = 1) -> list[str]:
    """Lines of a Markdown table whose first `text` columns are words and whose others are figures."""
    clean = [[" ".join(str(cell).split()).replace("|", "\\|") for cell in row] for row in (head, *body)]
    rule = ["---" if column < text else "---:" for column in range(len(head))]
    return [f"| {' | '.join(row)} |" for row in (clean[0], rule, *clean[1:])]


def code(name: str) -> str:
    """A method's name in a sentence."""
    return f"`{name}`" if name else NONE


def number(value: float, digits: int = 2) -> str:
    """A figure that may be missing."""
    return NONE if math.isnan(value) else f"{value:,.{digits}f}"


def bits(found: Estimate | None) -> str:
    """Bits per byte."""
    return NONE if found is None else f"{found.value:.3f}"


def percent(found: Estimate | None) -> str:
    """A share in percent with its interval."""
    return _with_interval(found, lambda value: f"{100 * value:z.0f}")


def signed(found: Estimate | None) -> str:
    """A change in percent with its interval."""
    return _with_interval(found, lambda value: f"{100 * value:+z.1f}")


def _with_interval(found: Estimate | None, write: Callable[[float], str]) -> str:
    if found is None:
        return NONE
    if math.isnan(found.value):
        return "undefined"
    if math.isinf(found.low):
        return f"{write(found.value)} [no bounds]"
    return f"{write(found.value)} [{write(found.low)}, {write(found.high)}]"


def by_gap(measures: Measures, methods: Iterable[str], part: str = REPORT) -> list[str]:
    """Methods, the one that closes most of the gap first; those without a gap by bits per byte, then those without any."""

    def rank(method: str) -> tuple[float, float]:
        gap, found = measures.gap(method, part=part), measures.bits_per_byte(method, part)
        closed = -gap.value if gap and not math.isnan(gap.value) else math.inf
        return (closed, found.value if found else math.inf)

    return sorted(methods, key=rank)


def group(measures: Measures, name: str) -> list[str]:
    """The methods of a group, without those that have a section of their own."""
    return [m for m in measures.methods if measures.named(m)["group"] == name and not rows_lib.is_series(m)]


def methods(measures: Measures, names: Sequence[str], against: str = "") -> list[str]:
    """The main table; `against`: another column, the paired difference to that method."""
    domains = measures.domains() if len(measures.domains()) <= WIDE else []
    paper = {system.ours: system for system in PAPER.get(suite(measures), ()) if system.ours}
    shown = any(name in paper for name in names)
    head = ["method", "", "FLOPs, x one expert", "FLOPs, x joint 1x", "forwards", *domains, "macro", "gap closed, %", "seeds"]
    head += [f"macro against {code(against)}, %"] if against else []
    head += ["paper, gap in accuracy, %"] if shown else []
    body = []
    for name in by_gap(measures, names):
        cells = [measures.named(name)["title"], code(name), *_costs(measures, name)]
        cells += [bits(measures.bits_per_byte(name, domain=domain)) for domain in domains]
        if measures.seeds_of(name):
            cells += [bits(measures.bits_per_byte(name)), percent(measures.gap(name)), _seeds(measures, name)]
        else:
            cells += ["failed", NONE, f"0 of {len(measures.seeds)}"]
        cells += [signed(measures.difference(name, against, relative=True))] if against else []
        cells += [number(paper_gap(paper, name), 0)] if shown else []
        body.append(cells)
    lines = table(head, body, text=2)
    if not domains:
        every = [[code(name), *(bits(measures.bits_per_byte(name, domain=d)) for d in measures.domains())] for name in names]
        order = {code(name): place for place, name in enumerate(by_gap(measures, names))}
        every.sort(key=lambda cells: order[cells[0]])
        lines += ["", "Bits per byte by domain:", "", *table(["method", *measures.domains()], every)]
    return lines


def suite(measures: Measures) -> str:
    """The suite that the rows are of."""
    return str(next(iter(measures.rows.values()))["suite"])


def _costs(measures: Measures, method: str) -> list[str]:
    spent = measures.ledger(method)
    ratios = [spent / measures.expert_run(), spent / measures.ledger(JOINT_1X)]
    return [number(ratio) for ratio in ratios] + [number(measures.ledger(method, "forwards"), 1)]


def _seeds(measures: Measures, method: str) -> str:
    """How many seeds, and by how many points of the gap they differ."""
    gap, done = measures.gap(method), len(measures.seeds_of(method))
    count = f"{done} of {len(measures.seeds)}" if done < len(measures.seeds) else str(done)
    known = gap is not None and not math.isnan(gap.spread)
    return f"{count}, ±{100 * gap.spread:.1f}" if known and gap else count


def paper_gap(paper: Mapping[str, System], method: str) -> float:
    """The share of the gap between public model and joint 2x, in the paper's accuracies; not a number if it has none."""
    if method not in paper or JOINT_2X not in paper:
        return math.nan
    return _between(paper[method], paper[ANCHOR], paper[JOINT_2X])


def _between(system: System, low: System, high: System) -> float:
    """Where a system stands between two others, in percent of their distance."""
    return 100 * (system.accuracy - low.accuracy) / (high.accuracy - low.accuracy)


def beside_the_paper(measures: Measures) -> list[str]:
    """All that the paper measured of this suite's kind, with our counterpart and what differs in it."""
    systems = PAPER.get(suite(measures), ())
    known = {system.ours: system for system in systems}
    body = []
    for system in sorted(systems, key=lambda system: -system.accuracy):
        ours, gap = NONE, math.nan
        if system.ours:
            ours = percent(measures.gap(system.ours)) if measures.seeds_of(system.ours) else measures.absence(system.ours)
        if JOINT_2X in known:
            gap = _between(system, known[ANCHOR], known[JOINT_2X])
        differs = system.differs if system.ours else "no counterpart"
        body.append([system.title, code(system.ours), differs, f"{system.accuracy:.1f}", number(gap, 0), ours])
    head = ["the paper's system", "our method", "what differs", "accuracy there", "gap in accuracy there, %"]
    return table([*head, "gap in bits per byte here, %"], body, text=3) if body else []


def other_text(measures: Measures, parts: Sequence[str]) -> list[str]:
    """Macro bits per byte and gap on other text, beside the pure text."""
    titles = {REPORT: "pure", UNSEEN: "unseen", INTERLEAVED: "interleaved", REAL: "real mixed"}
    names = [name for key in rows_lib.GROUPS for name in group(measures, key) if measures.seeds_of(name)]
    names = [name for name in names if any(measures.bits_per_byte(name, part) for part in parts)]
    every = (REPORT, *parts)
    head = ["method", *(f"{titles[part]}" for part in every), *(f"gap, {titles[part]}, %" for part in every)]
    body = [
        [
            code(name),
            *(bits(measures.bits_per_byte(name, part)) for part in every),
            *(percent(measures.gap(name, part=part)) for part in every),
        ]
        for name in by_gap(measures, names, parts[0])
    ]
    return table(head, body) if body else []
