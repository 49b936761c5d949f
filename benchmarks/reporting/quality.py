"""What the suite is to show, measured: each line a figure to reach, with its interval, and whether it is reached."""

import dataclasses
import math

from benchmarks.reporting import rows as rows_lib
from benchmarks.reporting import tables
from benchmarks.reporting.measures import Estimate, Measures
from benchmarks.reporting.rows import ANCHOR, FROZEN_2X, INTERLEAVED, JOINT_1X, JOINT_2X, REAL, REPORT, TUNE, UNSEEN

EQUAL = 1.1  # inference costs that differ by less count as equal
PROMPT_ROUTING = "prompt-routing"
PUBLIC_TOLERANCE = 0.005
ENOUGH = 3  # seeds, for an interval that says how seeds differ
PAPER_GAPS = {"token": "67 %", "tuned": "75 %"}  # of its own measure: accuracy, averaged over tasks


@dataclasses.dataclass(frozen=True)
class Claim:
    """One line of the table: what, the paper's figure, ours to reach, who was measured, what came out, what that costs."""

    what: str
    paper: str
    target: str
    method: str
    measured: str
    reached: str
    cost: str = tables.NONE

    @property
    def row(self) -> tuple[str, ...]:
        """For a table with `HEAD`."""
        return (self.what, self.paper, self.target, tables.code(self.method), self.measured, self.cost, self.reached)


HEAD = (
    "what",
    "paper (its own measure)",
    "to reach",
    "measured on",
    "measured",
    f"cost: forwards, FLOPs x {JOINT_1X}",
    "reached",
)
COST = f"Cost: inference of a token in passes of the dense anchor; training FLOPs after the anchor, in those of {JOINT_1X}."
FEW_SEEDS = f"""With fewer than {ENOUGH} seeds an interval hardly says how seeds differ, with one it covers documents only:
"yes" then holds for these documents, not for another seed."""


def kind(method: str) -> str:
    """How a merged model chooses its experts, by the words of its name: `token`, `tuned`, `donated` or `sequence`.

    `sequence`: a mask by sequence, nothing tuned; `tuned`: a router tuned without anybody's private text; `donated`: tuned with
    some; `token`: by token, nothing tuned. Empty for a sequence mask over a tuned router.
    """
    words = method.split("-")
    tuned = "tuned" in words or "donated" in words
    if "sequence" in words:
        return "" if tuned else "sequence"
    return ("donated" if "donated" in words else "tuned") if tuned else "token"


def chosen(measures: Measures) -> dict[str, str]:
    """The best core method of each kind, by macro bits per byte on `judged_on`; kinds that were not run are left out."""
    part = judged_on(measures)
    order = sorted(candidates(measures), key=lambda method: _macro(measures, method, part), reverse=True)
    best = {kind(method): method for method in order}  # the last of a kind stays
    return {name: best[name] for name in ("token", "tuned", "sequence") if name in best}


def judged_on(measures: Measures) -> str:
    """The text by which the best of a kind is chosen: the tuning half if all candidates were scored on it."""
    return TUNE if all(measures.bits_per_byte(method, TUNE) for method in candidates(measures)) else REPORT


def candidates(measures: Measures) -> list[str]:
    """Core methods that merge experts, finished in some seed."""
    return [
        method
        for method in measures.methods
        if method.split("-")[0] == rows_lib.FLEX
        and measures.named(method)["group"] == "core"
        and not rows_lib.is_series(method)
        and measures.seeds_of(method)
    ]


def claims(measures: Measures) -> list[Claim]:
    """Every line of the table."""
    best = chosen(measures)
    top = min(best.values(), key=lambda method: _macro(measures, method, judged_on(measures)), default="")
    masks, unseen = best.get("sequence", ""), "sequence masks against joint 1x, unseen sources"
    found = [
        _gap(measures, "per-token routing, no tuning: gap to joint 2x", PAPER_GAPS["token"], 0.70, best.get("token", "")),
        _gap(measures, "per-token routing, tuned without private text: gap", PAPER_GAPS["tuned"], 0.80, best.get("tuned", "")),
        _gap(measures, "sequence masks, no tuning: gap", "", 0.90, masks),
        _gap(measures, "the same on unseen sources", "", 0.85, masks, part=UNSEEN),
        _ahead(measures, unseen, "", masks, JOINT_1X, UNSEEN),
        _ahead(measures, "best of these against joint 1x", "+0.4 points", top, JOINT_1X, REPORT),
        _gap(measures, "best of these: gap to joint 2x, shared weights frozen", "", 0.95, top, FROZEN_2X),
    ]
    for title, part in (("pure", REPORT), ("interleaved", INTERLEAVED), ("real mixed", REAL)):
        found.append(_against_btm(measures, title, top, part))
    for method in dict.fromkeys(best.values()):
        found.append(_public(measures, method))
    return [*found, *_removals(measures)]


def _macro(measures: Measures, method: str, part: str) -> float:
    found = measures.bits_per_byte(method, part)
    return math.inf if found is None else found.value


def _absent(what: str, paper: str, target: str, method: str, why: str) -> Claim:
    return Claim(what, paper, target, method, why, "not measured")


def _gap(
    measures: Measures, what: str, paper: str, target: float, method: str, reference: str = JOINT_2X, part: str = REPORT
) -> Claim:
    said = f">= {target:.0%}".replace("%", " %")
    if not method:
        return _absent(what, paper, said, "", "not run")
    found = measures.gap(method, reference, part)
    if found is None:
        lacking = [name for name in (ANCHOR, reference) if not measures.seeds_of(name)]
        why = f"{lacking[0]} {measures.absence(lacking[0])}" if lacking else "not scored"
        return _absent(what, paper, said, method, why)
    return Claim(what, paper, said, method, f"{tables.percent(found)} %", _verdict(found, target), cost(measures, method))


def cost(measures: Measures, *methods: str) -> str:
    """Inference in dense forward passes and training FLOPs in those of joint-1x; with several methods, each by name."""
    unit = measures.ledger(JOINT_1X)
    found = [
        f"{tables.number(measures.ledger(method, 'forwards'), 1)} forwards, {tables.number(measures.ledger(method) / unit)} x"
        for method in methods
    ]
    if len(methods) == 1:
        return found[0]
    return "; ".join(f"{tables.code(method)} {said}" for method, said in zip(methods, found, strict=True))


def _yes(seeds: int) -> str:
    """That a figure is reached, interval and all; plain where seeds are too few for the interval to speak of others."""
    return "**yes**" if seeds >= ENOUGH else f"yes for these documents, {seeds} seed{'s' if seeds > 1 else ''}"


def _verdict(found: Estimate, target: float) -> str:
    """Whether a value of at least `target` was found, and whether the interval agrees."""
    if math.isnan(found.value):
        return "undefined"
    if found.value >= target:
        return _yes(len(found.seeds)) if found.low >= target else "yes, not all of the interval"
    return "no" if found.high < target else "no, the interval reaches it"


def _ahead(measures: Measures, what: str, paper: str, method: str, other: str, part: str) -> Claim:
    target = "ahead, outside the error bars"
    if not method:
        return _absent(what, paper, target, "", "not run")
    found = measures.difference(method, other, part, relative=True)
    if found is None:
        why = "not scored" if measures.seeds_of(other) else f"{other} {measures.absence(other)}"
        return _absent(what, paper, target, method, why)
    reached = _yes(len(found.seeds)) if found.high < 0 else "no" if found.low > 0 else "no, within the error bars"
    measured = f"{tables.signed(found)} % bits per byte"
    return Claim(what, paper, target, method, measured, reached, cost(measures, method, other))


def rivals(measures: Measures, part: str = REPORT) -> list[str]:
    """What chooses or mixes dense models, scored on a part: every method `btm...`, and prompt routing."""
    named = [name for name in measures.methods if name.startswith("btm") or name == PROMPT_ROUTING]
    return [name for name in named if measures.bits_per_byte(name, part)]


def rival(measures: Measures, method: str, part: str = REPORT) -> str:
    """The best rival that costs no more at inference than a method; the cheapest if all cost more; empty without any."""
    known = rivals(measures, part)
    forwards = {name: measures.ledger(name, "forwards") for name in known}
    affordable = [name for name in known if forwards[name] <= EQUAL * measures.ledger(method, "forwards")]
    if affordable:
        return min(affordable, key=lambda name: _macro(measures, name, part))
    return min(known, key=lambda name: (forwards[name], _macro(measures, name, part)), default="")


def _against_btm(measures: Measures, title: str, method: str, part: str) -> Claim:
    what = f"best of these against BTM or prompt routing at equal inference FLOPs, {title} text"
    other = rival(measures, method, part) if method else ""
    if not other:
        why = "BTM was not scored" if rivals(measures) else f"btm {measures.absence('btm')}"
        return _absent(what, "", "ahead", method, why if method else "not run")
    found = _ahead(measures, what, "", method, other, part)
    mine, theirs = (measures.ledger(name, "forwards") for name in (method, other))
    reached = found.reached
    if mine > EQUAL * theirs and "yes" in reached:
        reached = f"only at {mine / theirs:.1f} times the cost"
    elif theirs > EQUAL * mine and "yes" not in reached:
        reached += f"; every one of them costs {theirs / mine:.1f} times as much or more"
    return dataclasses.replace(found, target="ahead", reached=reached)


def _public(measures: Measures, method: str) -> Claim:
    what, target = "public text, merged against anchor", "within 0.5 %"
    found = measures.difference(method, ANCHOR, domain="public", relative=True)
    if found is None:
        return _absent(what, "", target, method, "not scored")
    negated = Estimate(-found.value, -found.high, -found.low, found.seeds)
    reached, both = _verdict(negated, -PUBLIC_TOLERANCE), cost(measures, method, ANCHOR)
    return Claim(what, "", target, method, f"{tables.signed(found)} %", reached, both)


def removals(measures: Measures) -> dict[str, dict[str, str]]:
    """By model, by expert removed: the method without it; pairs of `unpaired_removals` are kept out."""
    found: dict[str, dict[str, str]] = {}
    for base, expert, method in _removal_rows(measures):
        if measures.difference(method, base):
            found.setdefault(base, {})[expert] = method
    return found


def unpaired_removals(measures: Measures) -> list[tuple[str, str]]:
    """Models, and the same without an expert, that finished in no seed together: nothing can be said of the pair."""
    return [(base, method) for base, _, method in _removal_rows(measures) if not measures.difference(method, base)]


def _removal_rows(measures: Measures) -> list[tuple[str, str, str]]:
    """Model, expert and method without it, both finished in some seed."""
    matches = ((method, rows_lib.WITHOUT.fullmatch(method)) for method in measures.methods if measures.seeds_of(method))
    return [(match["base"], match["expert"], method) for method, match in matches if match and measures.seeds_of(match["base"])]


def _removals(measures: Measures) -> list[Claim]:
    """Of each model from which experts were removed: what that does to all other domains."""
    what, paper, target = "removing an expert: change on other domains", "about 0", "within error bars"
    found = []
    for base, removed in removals(measures).items():
        changes = {
            f"{domain} without {expert}": change
            for expert, method in removed.items()
            for domain in measures.domains()
            if domain != expert and (change := measures.difference(method, base, domain=domain, relative=True))
        }
        if not changes:
            found.append(_absent(what, paper, target, base, "there is no other domain"))
            continue
        worse, better = (sum(test) for test in zip(*((c.low > 0, c.high < 0) for c in changes.values()), strict=True))
        where, largest = max(changes.items(), key=lambda item: abs(item[1].value))
        measured = f"of {len(changes)}, {worse} worse and {better} better; largest {tables.signed(largest)} % ({where})"
        reached = "no" if worse + better else _yes(min(len(change.seeds) for change in changes.values()))
        found.append(Claim(what, paper, target, base, measured, reached, cost(measures, base)))
    why = "no seed in common" if unpaired_removals(measures) else "no expert was removed"
    return found or [_absent(what, paper, target, "", why)]
