"""The parts of a report beside the main tables: removal, routing, series of methods, tasks, extraction.

Each function gives lines of Markdown, none where the rows hold nothing for it.
"""

import json
import math
from collections.abc import Iterator
from typing import Any

import numpy as np
from jaxtyping import Float

from benchmarks.reporting import quality
from benchmarks.reporting import rows as rows_lib
from benchmarks.reporting.measures import Measures
from benchmarks.reporting.rows import FLEX, INTERLEAVED, REAL, REPORT, UNSEEN
from benchmarks.reporting.tables import NONE, bits, code, number, percent, signed, table

PAPER_EXTRACTION = "The paper, on its own text: public 0.1 %, dense math 1.6 %, FlexOlmo 0.7 %."
EXAMPLES = 8


def against_btm(measures: Measures) -> list[str]:
    """Merged models against the best BTM or prompt routing that costs no more at inference, on each kind of text."""
    parts = {"pure": REPORT, "unseen": UNSEEN, "interleaved": INTERLEAVED, "real mixed": REAL}
    body = []
    for method in quality.candidates(measures):
        other = quality.rival(measures, method)
        if other:
            costs = [quality.cost(measures, name) for name in (method, other)]
            changes = [signed(measures.difference(method, other, part, relative=True)) for part in parts.values()]
            body.append([code(method), code(other), *costs, *changes])
    head = ["method", "rival", "cost: forwards, FLOPs x joint-1x", "rival's", *(f"{title}, %" for title in parts)]
    return table(head, body, text=4) if body else []


def removal(measures: Measures) -> list[str]:
    """Change of each domain when each expert is removed, by model."""
    lines: list[str] = []
    for base, removed in quality.removals(measures).items():
        body = []
        for expert, method in removed.items():
            changes = [measures.difference(method, base, domain=domain, relative=True) for domain in measures.domains()]
            body.append([expert, *(_marked(signed(c), bool(c and c.excludes_zero)) for c in changes)])
        lines += [f"{code(base)}:", "", *table(["without", *(f"{domain}, %" for domain in measures.domains())], body), ""]
    unpaired = quality.unpaired_removals(measures)
    said = ", ".join(f"{code(method)} with {code(base)}" for base, method in unpaired)
    return [*lines, f"No seed in common, so not compared: {said}."] if unpaired else lines[:-1]


def _marked(cell: str, significant: bool) -> str:
    return f"**{cell}**" if significant else cell


def routed(measures: Measures) -> list[str]:
    """Core methods with routing shares, our recipe first."""
    found = [m for m in measures.methods if _is_core(measures, m) and any(row.get("shares") for row in measures.of(m))]
    return sorted(found, key=lambda method: method != FLEX)


def _is_core(measures: Measures, method: str) -> bool:
    return measures.named(method)["group"] == "core" and not rows_lib.is_series(method)


def shares(measures: Measures, method: str) -> tuple[list[str], dict[str, Float[np.ndarray, "L E"]]]:
    """The experts of a routed method, and by domain their share of the gate mass in each layer, mean over seeds."""
    found = [row for row in measures.of(method) if row.get("shares")]
    domains = list(found[0]["shares"])
    return found[0]["experts"], {d: np.mean([row["shares"][d] for row in found], axis=0) for d in domains}


def routing(measures: Measures) -> list[str]:
    """Shares by domain and expert of one method, and of the others how much each domain gives to its own expert."""
    methods = routed(measures)
    if not methods:
        return []
    experts, by_domain = shares(measures, methods[0])
    body = [[domain, *(number(100 * share, 0) for share in found.mean(axis=0))] for domain, found in by_domain.items()]
    lines = [f"{code(methods[0])}: share of the gate mass by text and expert, mean over layers, %", ""]
    lines += table(["text", *experts], body)
    own = []
    for method in methods[1:]:
        names, other = shares(measures, method)
        given = {d: found.mean(axis=0)[names.index(d)] if d in names else math.nan for d, found in other.items()}
        own.append([code(method), *(number(100 * given.get(domain, math.nan), 0) for domain in by_domain)])
    if own:
        lines += ["", "Share that each text gives to its own expert, %:", "", *table(["method", *by_domain], own)]
    return lines + _confusion(measures, methods[0]) + _examples(measures, methods[0])


def _confusion(measures: Measures, method: str) -> list[str]:
    found = [row for row in measures.of(method) if row.get("confusion")]
    if not found:
        return []
    domains = list(found[0]["confusion"])
    mean = {domain: np.mean([row["confusion"][domain] for row in found], axis=0) for domain in domains}
    body = [[domain, *(number(100 * share, 0) for share in counts / counts.sum())] for domain, counts in mean.items()]
    return ["", "Tokens by the expert that weighs most in them, %:", "", *table(["text", *found[0]["experts"]], body)]


def _examples(measures: Measures, method: str) -> list[str]:
    found = [example for row in measures.of(method)[:1] for example in row.get("extra", {}).get("examples", [])][:EXAMPLES]
    lines = ["", "Which expert weighs most, token by token:", ""] if found else []
    for example in found:
        pieces: list[list[str]] = []
        for text, expert in example["pieces"]:
            if pieces and pieces[-1][1] == expert:
                pieces[-1][0] += text
            else:
                pieces.append([text, expert])
        said = " ".join(f"[{expert}: {json.dumps(text, ensure_ascii=False)}]" for text, expert in pieces)
        lines.append(f"    {example['domain']}: {said}")
    return lines


def active(measures: Measures) -> dict[int, str]:
    """By number of active experts, the method; our recipe has all of them active."""
    matches = {method: rows_lib.ACTIVE.fullmatch(method) for method in measures.methods if measures.seeds_of(method)}
    found = {int(match["count"]): method for method, match in matches.items() if match}
    every = max((len(row.get("experts", ())) for row in measures.of(FLEX)), default=0)
    if found and every:
        found.setdefault(every, FLEX)
    return dict(sorted(found.items()))


def number_active(measures: Measures) -> list[str]:
    """Quality by number of active experts, against all of them."""
    body, methods = [], active(measures)
    for count, method in methods.items():
        last = methods[max(methods)]
        scores = [bits(measures.bits_per_byte(method, domain=domain)) for domain in (*measures.domains(), None)]
        against = NONE if method == last else signed(measures.difference(method, last, relative=True))
        forwards = number(measures.ledger(method, "forwards"), 1)
        body.append([code(method), str(count), forwards, *scores, percent(measures.gap(method)), against])
    head = ["method", "active", "forwards", *measures.domains(), "macro", "gap closed, %", "macro against the most, %"]
    return table(head, body) if body else []


def sized(measures: Measures) -> dict[str, float]:
    """Parameters of one expert by method, for experts of other sizes and our recipe, the smallest first."""
    found = {}
    for method in measures.methods:
        if method == FLEX or rows_lib.SIZED.fullmatch(method):
            known = [row["extra"]["parameters"] for row in measures.of(method) if row.get("extra", {}).get("parameters")]
            if known:
                found[method] = float(np.mean(known))
    return dict(sorted(found.items(), key=lambda item: item[1])) if set(found) - {FLEX} else {}


def expert_sizes(measures: Measures) -> list[str]:
    """Quality by size of the experts, against full ones."""
    body = []
    for method, parameters in sized(measures).items():
        flops = number(measures.ledger(method) / measures.ledger(FLEX))
        against = NONE if method == FLEX else signed(measures.difference(method, FLEX, relative=True))
        macro, gap = bits(measures.bits_per_byte(method)), percent(measures.gap(method))
        body.append([measures.named(method)["title"], code(method), f"{parameters:,.0f}", flops, macro, gap, against])
    head = ["experts", "", "parameters of one", f"FLOPs, x {code(FLEX)}", "macro", "gap closed, %", "macro against full, %"]
    return table(head, body, text=2) if body else []


def _extras(measures: Measures, name: str) -> Iterator[tuple[str, int, dict[str, Any]]]:
    """Method, seed and what its row carries by that name."""
    for method in measures.methods:
        for row in measures.of(method):
            if found := row.get("extra", {}).get(name):
                yield method, row["seed"], found


def tasks(measures: Measures) -> list[str]:
    """Accuracy on every task by method, with what the scorer says of each."""
    found = [(code(method), seed, tasks) for method, seed, tasks in _extras(measures, "tasks")]
    names = list(dict.fromkeys(name for _, _, tasks in found for name in tasks))
    if not names:
        return []
    facts = {name: next(tasks[name] for _, _, tasks in found if name in tasks) for name in names}
    useful = {name for name in names for _, _, tasks in found if tasks.get(name, {}).get("informative")}
    about = []
    for name in names:
        verdict = "" if name in useful else "uninformative: nothing beats chance"
        counts = [str(facts[name].get(key, NONE)) for key in ("items", "too_long")]
        chance = facts[name].get("chance")
        about.append([name, verdict, *counts, number(math.nan if chance is None else 100 * chance, 0)])
    lines = table(["task", "", "items", "too long", "chance, %"], about, text=2)
    accuracy, answers = [], []
    for method in dict.fromkeys(method for method, _, _ in found):
        scores = [tasks for other, _, tasks in found if other == method]
        share, low, high, answer = (
            [_mean(scores, name, field) for name in names] for field in ("accuracy", "low", "high", "answer_bits")
        )
        intervals = zip(share, low, high, strict=True)
        accuracy.append([method, str(len(scores)), *(_share(*values) for values in intervals)])
        answers.append([method, str(len(scores)), *(number(value) for value in answer)])
    head = ["method", "seeds", *names]
    said = "Accuracy, % [95 % interval over the items of one seed], mean over seeds:"
    lines += ["", said, "", *table(head, accuracy)]
    return [*lines, "", "Bits of the right answer, lower is better, mean over seeds:", "", *table(head, answers)]


def _share(value: float, low: float, high: float) -> str:
    """In percent, with its interval."""
    return NONE if math.isnan(value) else f"{100 * value:.0f} [{100 * low:.0f}, {100 * high:.0f}]"


def _mean(scores: list[dict[str, Any]], task: str, field: str) -> float:
    """Over seeds; not a number where one has none."""
    found = [score.get(task, {}).get(field) for score in scores]
    return float(np.mean([math.nan if value is None else value for value in found]))


def extraction(measures: Measures) -> list[str]:
    """How much planted and real text each model gives away."""
    found = [
        (method, seed, name, counts) for method, seed, all_ in _extras(measures, "extraction") for name, counts in all_.items()
    ]
    repeats = list(dict.fromkeys(repeat for *_, counts in found for repeat in counts))
    body = [
        [code(method), str(seed), name, *(_extracted(counts.get(r)) for r in repeats)] for method, seed, name, counts in found
    ]
    if not body:
        return []
    head = ["row", "seed", "model", *(f"x{repeat}" if str(repeat).isdigit() else str(repeat) for repeat in repeats)]
    return [*table(head, body, text=3), "", f"Extracted of attempted, % [95 %, Wilson]. {PAPER_EXTRACTION}"]


def _extracted(counts: dict[str, Any] | None) -> str:
    if not counts:
        return NONE
    share, low, high = (100 * value for value in (counts["extracted"] / counts["attempted"], counts["low"], counts["high"]))
    return f"{counts['extracted']} of {counts['attempted']}: {share:.1f} [{low:.1f}, {high:.1f}]"
