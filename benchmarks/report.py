"""One Markdown page, with figures, of what a suite measured.

python -m benchmarks.report benchmarks/results/table1-cpu     (makes them again from rows.jsonl alone)
"""

import argparse
import pathlib
import sys
from collections.abc import Iterable

from etils import epath

from benchmarks.reporting import accounts, figures, quality, sections, tables
from benchmarks.reporting import rows as rows_lib
from benchmarks.reporting.measures import LEVEL, RESAMPLES, Measures
from benchmarks.reporting.rows import FLEX, INTERLEAVED, JOINT_1X, JOINT_2X, REAL, TUNE, UNSEEN, Row
from flexjax import errors, workdir

FILE = "report.md"
DRAWINGS = {
    "gap.png": (figures.gap, "Share of the gap between anchor and joint-2x that each method closes"),
    "flops.png": (figures.flops, "Bits per byte against training FLOPs"),
    "removal.png": (figures.removal, "Change of each domain when an expert is removed"),
    "routing.png": (figures.routing, "Share of each expert by layer and text"),
    "active.png": (figures.active, "Bits per byte against number of active experts"),
    "sizes.png": (figures.sizes, "Bits per byte against size of the experts"),
}
NOTES = f"""Bits per byte are of the reported half of the validation text; tuning saw the other half. *Macro* is the mean over
domains. *Gap closed* = (anchor - X) / (anchor - joint-2x) in macro bits per byte. FLOPs are those after the anchor, by formula;
*forwards* is the inference cost of a token in passes of the dense anchor. Brackets are {round(100 * LEVEL)} % intervals of the
figure itself: {RESAMPLES} resamples of documents, the same for all methods; with several seeds, Student's t over seeds on top.
*Seeds*: how many, and the standard deviation of the gap over them, in points."""


def write(rows: Iterable[Row], directory: epath.PathLike) -> None:
    """Writes `report.md` and its figures.

    Args:
      rows: of one suite at one size, as `rows.jsonl` has them.
      directory: of the report; what its `attempts.md` says is taken in.

    Raises:
      DataError: something is no row, or there is none. IntegrityError: rows that cannot be compared. StorageError: it cannot be
        written.
    """
    home = epath.Path(directory)
    measures = Measures(rows)
    drawn = {}
    for name, (draw, caption) in DRAWINGS.items():
        if draw(measures, home / name):
            drawn[name] = f"![{caption}]({name})"
        else:
            (home / name).unlink(missing_ok=True)  # of a former report
    workdir.write(home / FILE, ("\n".join(page(measures, home, drawn)) + "\n").encode())


def page(measures: Measures, home: epath.Path, drawn: dict[str, str]) -> list[str]:
    """The report's lines; `drawn` has the Markdown of each figure that there is."""
    row = next(iter(measures.rows.values()))
    lines = [f"# Suite `{row['suite']}`, size `{row['size']}`", "", *_verdict(measures)]
    for warning in accounts.comparable(measures):
        lines += ["", warning]

    def add(title: str, body: list[str], absent: str, figure: str = "") -> None:
        lines.extend(["", f"## {title}", "", *(body or [absent])])
        if figure in drawn:
            lines.extend(["", drawn[figure]])

    core, second, ablations = (tables.group(measures, name) for name in rows_lib.GROUPS)
    add("What was run", _origin(measures), "")
    add("Methods", tables.methods(measures, core) if core else [], "Not run: no row of the core methods.", "gap.png")
    lines += ["", NOTES, *(["", drawn["flops.png"]] if "flops.png" in drawn else [])]
    add("Beside the paper", _paper(measures), "The paper has no counterpart of this suite.")
    add("Quality to reach", _quality(measures), "")
    add("Text from sources that were left out of training", tables.other_text(measures, (UNSEEN,)), "Not scored.")
    add("Documents in which domains change", _mixed(measures), "Not scored.")
    add("Removing an expert", _removal(measures), "Not run: no method `NAME-without-EXPERT`.", "removal.png")
    add("Routing", sections.routing(measures), "No core method recorded its shares.", "routing.png")
    add("Second suite", tables.methods(measures, second) if second else [], "Not run.")
    add("Ablations", tables.methods(measures, ablations, FLEX) if ablations else [], "Not run.")
    active = sections.number_active(measures)
    add("Number of active experts", active, f"Not run: no method `{FLEX}-kN`.", "active.png")
    sizes = sections.expert_sizes(measures)
    add("Size of experts", sizes, f"Not run: no method `{FLEX}-rank...` or `{FLEX}-narrow...` with `parameters`.", "sizes.png")
    add("Tasks", sections.tasks(measures), "Not run.")
    add("Extraction", sections.extraction(measures), "Not run.")
    add("Tuning", accounts.tuning(measures), "No row has tuning trials.")
    add("What failed or was not run", accounts.failures(measures), "Every method finished in every seed.")
    add("Ledger of FLOPs", accounts.ledger(measures), "Empty.")
    add("What was tried", accounts.attempts(home), f"No `{accounts.ATTEMPTS}` beside this report.")
    return lines


def _verdict(measures: Measures) -> list[str]:
    """The first lines: whether anything may be claimed."""
    sanity = measures.sanity()
    reasons = "; ".join(sanity.reasons)
    if not sanity.holds:
        return [f"**Nothing may be claimed from this report: {reasons}.**"]
    lines = [f"Sanity holds: {reasons}."]
    best = quality.chosen(measures)
    if best:
        title = {
            "token": "by token, nothing tuned",
            "tuned": "by token, router tuned",
            "sequence": "by sequence, nothing tuned",
        }
        found = [
            f"{title[kind]} {tables.percent(measures.gap(method))} % ({quality.cost(measures, method)} {JOINT_1X})"
            for kind, method in best.items()
        ]
        lines += ["", f"Gap to {JOINT_2X} closed by merged experts: {'; '.join(found)}."]
    return lines


def _origin(measures: Measures) -> list[str]:
    rows = list(measures.rows.values())

    def every(field: str) -> str:
        return ", ".join(sorted({str(row.get(field) or "unknown") for row in rows}))

    times = sorted(str(row["time"])[:16].replace("T", " ") for row in rows if row.get("time"))
    done = sum(bool(measures.seeds_of(method)) for method in measures.methods)
    body = [
        ("seeds", ", ".join(map(str, measures.seeds))),
        (
            "what seeds share",
            "corpus, split, tokenizer, learning rates; they differ in initialisation, anchor, experts, text order",
        ),
        ("methods", f"{done} of {len(measures.methods)} finished"),
        ("corpus", f"`{rows[0].get('corpus', 'unknown')}`"),
        ("scored text", "; ".join(_scored(measures)) or "none"),
        ("commit", every("commit")),
        ("device", every("device")),
        ("jax", every("jax")),
        ("methods began", f"{times[0]} to {times[-1]} UTC" if times else "unknown"),
    ]
    return [f"- {what}: {value}" for what, value in body]


def _scored(measures: Measures) -> list[str]:
    found = []
    for part in rows_lib.PARTS:
        size = measures.extent(part)
        if size is not None:
            found.append(f"{part} {size[0]:,} documents, {size[1] / 1000:,.0f} kB")
    return found


def _paper(measures: Measures) -> list[str]:
    body = tables.beside_the_paper(measures)
    if not body:
        return []
    said = "Another measure: accuracy, averaged over tasks of 100 items, of 7B models trained once. Only the order compares."
    return [said, "", *body]


def _quality(measures: Measures) -> list[str]:
    claims = quality.claims(measures)
    lines = tables.table(quality.HEAD, [claim.row for claim in claims], text=len(quality.HEAD))
    judge = "the tuning half" if quality.judged_on(measures) == TUNE else "this very text, which is a little generous,"
    said = f"Where several methods are of a kind, the best on {judge} is taken."
    few = any(len(measures.seeds_of(claim.method)) < quality.ENOUGH for claim in claims if claim.method)
    notes = [said, quality.COST, *([quality.FEW_SEEDS] if few else [])]
    warning = [] if measures.sanity().holds else ["**Sanity does not hold: none of this may be claimed.**", ""]
    return [*warning, *lines, "", *notes]


def _mixed(measures: Measures) -> list[str]:
    lines = tables.other_text(measures, (INTERLEAVED, REAL))
    btm = sections.against_btm(measures)
    said = (
        "Bits per byte against the best BTM or prompt routing that costs at most "
        f"{round(100 * (quality.EQUAL - 1))} % more at inference, else the cheapest (negative: better):"
    )
    return [*lines, "", said, "", *btm, "", quality.COST] if lines and btm else lines


def _removal(measures: Measures) -> list[str]:
    lines = sections.removal(measures)
    return [*lines, "", "Change of bits per byte, paired; in bold where the interval excludes 0."] if lines else []


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", help="that holds rows.jsonl, and gets report.md and figures")
    home = pathlib.Path(parser.parse_args().directory)
    try:
        write(rows_lib.read(home / rows_lib.FILE), home)
    except errors.FlexjaxError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(error.exit_code)
    print(home / FILE)


if __name__ == "__main__":
    main()
