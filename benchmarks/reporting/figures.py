"""Figures of a suite, as PNG; each function says whether its rows are there, and writes nothing if not."""

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from benchmarks.reporting import drawing, quality, sections
from benchmarks.reporting import rows as rows_lib
from benchmarks.reporting.measures import Estimate, Measures
from benchmarks.reporting.rows import ANCHOR, FLEX, JOINT_1X, JOINT_2X

LOWEST, HIGHEST = -0.3, 1.5  # of a gap that is drawn in place; the rest at the edge


def _is_ours(method: str) -> bool:
    return method.split("-")[0] == FLEX


def _marks(measures: Measures, method: str) -> dict[str, Any]:
    """Colour by group; filled are merged experts."""
    colour = drawing.COLOURS[measures.named(method)["group"]]
    return {"color": colour, "markerfacecolor": colour if _is_ours(method) else "white", "markeredgewidth": 1.4}


def _legend(figure: Any, groups: Sequence[str]) -> None:
    """The groups that occur, and what filled means, below everything."""
    from matplotlib import lines

    def mark(colour: str, filled: bool, label: str) -> Any:
        face = colour if filled else "white"
        return lines.Line2D([], [], marker="o", ls="", color=colour, markerfacecolor=face, markeredgewidth=1.4, label=label)

    found = [mark(drawing.COLOURS[name], True, drawing.TITLES[name]) for name in rows_lib.GROUPS if name in groups]
    found += [mark(drawing.INK, True, "experts trained apart, merged"), mark(drawing.INK, False, "anything else")]
    figure.legend(handles=found, loc="outside lower center", ncols=len(found), fontsize=8.5, handletextpad=0.1)


def gap(measures: Measures, path: epath.Path) -> bool:
    """Share of the gap that each method closes, with intervals and the seeds' own values."""
    found: dict[str, Estimate] = {}
    for method in measures.methods:
        estimate = measures.gap(method)
        shown = estimate and not math.isnan(estimate.value) and method not in (ANCHOR, JOINT_2X)
        if estimate and shown and not rows_lib.is_series(method):
            found[method] = estimate
    if not found:
        return False
    order = sorted(found, key=lambda method: found[method].value)
    with drawing.canvas(path, 1.3 + 0.27 * len(order)) as (figure, axes):
        low = max(LOWEST, min(0.0, *(e.value for e in found.values())) - 0.04)
        high = min(HIGHEST, max(1.0, *(e.value for e in found.values())) + 0.04)
        for place, method in enumerate(order):
            estimate, marks = found[method], _marks(measures, method)
            within = float(np.clip(estimate.value, low, high))
            ends = np.clip([estimate.low, estimate.high], low, high)
            axes.plot(ends, [place, place], color=marks["color"], lw=2.2, alpha=0.55, solid_capstyle="butt", clip_on=False)
            if len(estimate.seeds) > 1:
                seeds = np.clip(list(estimate.seeds.values()), low, high)
                axes.plot(seeds, [place] * len(seeds), "|", color=marks["color"], ms=7, mew=1)
            mark = "o" if within == estimate.value else "<" if estimate.value < low else ">"
            inset = 0.012 * (high - low)  # so that an arrow at the edge stays off the names
            axes.plot(np.clip(within, low + inset, high - inset), place, mark, ms=6.5, zorder=3, **marks)
            axes.text(1.01, place, f"{100 * estimate.value:z.0f} %", va="center", transform=axes.get_yaxis_transform())
        for value, name in ((0, "anchor"), (1, JOINT_2X)):
            axes.axvline(value, color=drawing.INK, lw=1, zorder=1.5)
            axes.annotate(name, (value, 1), (0, 3), xycoords=("data", "axes fraction"), textcoords="offset points", ha="center")
        axes.set_yticks(range(len(order)), [measures.named(method)["title"] for method in order])
        axes.set(
            xlim=(low, high), ylim=(-0.7, len(order) - 0.3), xlabel="share of the gap in macro bits per byte that is closed"
        )
        axes.xaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        axes.grid(axis="y", visible=False)
        _legend(figure, [measures.named(method)["group"] for method in order])
    return True


def flops(measures: Measures, path: epath.Path) -> bool:
    """Macro bits per byte against training FLOPs after the anchor, every method a labelled point."""
    unit = measures.ledger(JOINT_1X)
    points: dict[str, drawing.Point] = {}
    for method in measures.methods:
        macro, spent = measures.bits_per_byte(method), measures.ledger(method)
        if macro and not math.isnan(spent / unit) and not rows_lib.is_series(method):
            points[method] = (spent / unit, macro.value)
    if len(points) < 2:
        return False
    line = [points[name] for name in (ANCHOR, JOINT_1X, JOINT_2X) if name in points]
    best, worst = min(y for _, y in points.values()), max(y for _, y in line)
    ceiling = worst + 0.2 * max(worst - best, 0.01)  # what is worse is drawn there, with its number
    shown = {f"{name} ({y:.2f})" if y > ceiling else name: (x, min(y, ceiling)) for name, (x, y) in points.items()}
    with drawing.canvas(path, 6.2) as (figure, axes):
        axes.plot(*zip(*line, strict=True), color=drawing.PALE, lw=1.2, zorder=1)
        for method, (x, y) in points.items():
            axes.plot(x, min(y, ceiling), "^" if y > ceiling else "o", ms=6.5, zorder=3, **_marks(measures, method))
        anchor = measures.ledger(ANCHOR, "anchor_flops") / unit
        note = "" if math.isnan(anchor) else f"; the anchor before them: {anchor:.1f}"
        axes.set(xlabel=f"training FLOPs after the anchor (joint-1x = 1{note})", ylabel="macro bits per byte, lower is better")
        axes.set_title("Below the line: better than joint training at equal FLOPs")
        axes.margins(x=0.08, y=0.06)
        axes.set_xlim(left=-0.05 * max(x for x, _ in points.values()))
        _legend(figure, [measures.named(method)["group"] for method in points])
        colours = [drawing.COLOURS[measures.named(method)["group"]] for method in points]
        drawing.label(figure, axes, shown, dict(zip(shown, colours, strict=True)), line)
    return True


def removal(measures: Measures, path: epath.Path) -> bool:
    """Change of each domain when each expert is removed, one map for each model that it was tried with."""
    found = quality.removals(measures)
    if not found:
        return False
    domains, every = measures.domains(), [len(removed) for removed in found.values()]
    changes = {
        base: [[measures.difference(m, base, domain=d, relative=True) for d in domains] for m in removed.values()]
        for base, removed in found.items()
    }
    limit = max(0.01, *(abs(change.value) for rows in changes.values() for row in rows for change in row if change))
    grid = {"nrows": len(found), "squeeze": False, "height_ratios": every}
    with drawing.canvas(path, 0.3 + sum(0.75 + 0.4 * count for count in every), **grid) as (_, axes):
        for place, (base, removed) in zip(axes[:, 0], found.items(), strict=True):
            values = np.array([[change.value if change else math.nan for change in row] for row in changes[base]])
            place.imshow(values, cmap=drawing.ramp(drawing.CHANGE), vmin=-limit, vmax=limit, aspect="auto")
            for (row, column), value in np.ndenumerate(values):
                change = changes[base][row][column]
                sure = change is not None and change.excludes_zero
                colour = "white" if abs(value) > 0.6 * limit else drawing.INK if sure else drawing.PALE
                weight = "bold" if sure else "normal"
                place.text(column, row, f"{100 * value:+z.1f}", ha="center", va="center", color=colour, weight=weight)
            drawing.frame(place, domains, [f"without {expert}" for expert in removed])
            place.set_title(f"{base}: change of bits per byte, % (bold: the interval excludes 0)", fontsize=10)
    return True


def routing(measures: Measures, path: epath.Path) -> bool:
    """Share of each expert by text, a map for each layer, of our recipe or the first core method that has shares."""
    methods = sections.routed(measures)
    if not methods:
        return False
    experts, by_domain = sections.shares(measures, methods[0])
    layers = len(next(iter(by_domain.values())))
    columns = min(layers, 4)
    rows = math.ceil(layers / columns)
    grid = {"nrows": rows, "ncols": columns, "squeeze": False, "sharex": True, "sharey": True}
    line = 0.42 if len(by_domain) < 6 else 0.28  # inches
    with drawing.canvas(path, rows * (0.35 + line * len(by_domain)) + 1.1, **grid) as (figure, axes):
        for layer, place in enumerate(axes.flat):
            if layer >= layers:
                place.set_visible(False)
                continue
            values = np.array([found[layer] for found in by_domain.values()])
            place.imshow(
                values,
                cmap=drawing.ramp(drawing.SHARE),
                vmin=0,
                vmax=1,
                aspect="auto",
            )
            for (row, column), value in np.ndenumerate(values):
                colour = "white" if value > 0.5 else drawing.INK
                place.text(column, row, f"{100 * value:.0f}", ha="center", va="center", color=colour, fontsize=8)
            drawing.frame(place, experts, list(by_domain))
            place.set_title(f"layer {layer}", fontsize=9.5, weight="normal")
            for label in place.get_xticklabels():
                label.set(rotation=35, ha="right", rotation_mode="anchor")
        title = f"{methods[0]}: share of the gate mass by text (rows) and expert (columns), %"
        figure.suptitle(title, x=0.01, ha="left", weight="bold", fontsize=11)
    return True


def active(measures: Measures, path: epath.Path) -> bool:
    """Bits per byte by number of active experts: each domain, and the macro average against all experts, paired."""
    methods = sections.active(measures)
    if len(methods) < 2:
        return False
    last = max(methods)
    with drawing.canvas(path, 3.6, ncols=2) as (_, axes):
        _series(measures, axes, [(float(count), method) for count, method in methods.items()], methods[last], "o-")
        axes[1].set_title(f"macro, against {last} active, paired")
        for place in axes:
            place.set(xlabel="active experts", xticks=list(methods))
    return True


def sizes(measures: Measures, path: epath.Path) -> bool:
    """Bits per byte against parameters of one expert: each domain, and the macro average against full experts, paired."""
    found = sections.sized(measures)
    if len(found) < 2 or FLEX not in found:
        return False
    with drawing.canvas(path, 3.6, ncols=2) as (figure, axes):
        drawn = _series(measures, axes, [(parameters, method) for method, parameters in found.items()], FLEX, "o")
        axes[1].set_title("macro, against full experts, paired")
        for place in axes:
            place.set(xlabel="parameters of one expert", xscale="log")
            place.margins(x=0.12)
        drawing.label(figure, axes[1], drawn, dict.fromkeys(drawn, drawing.INK))
    return True


def _series(
    measures: Measures, axes: Sequence[Any], points: Sequence[tuple[float, str]], reference: str, style: str
) -> dict[str, drawing.Point]:
    """Two panels: bits per byte by domain, and the macro average's paired change from a reference, whose points it returns."""
    left, right = axes
    for place, domain in enumerate((*measures.domains(), None)):
        scores = [measures.bits_per_byte(method, domain=domain) for _, method in points]
        values = [score.value if score else math.nan for score in scores]
        colour, width, size = drawing.DOMAINS[place % len(drawing.DOMAINS)], 1.3, 4.5
        if domain is None:
            colour, width, size = drawing.INK, 2.2, 6
        left.plot([x for x, _ in points], values, style, color=colour, lw=width, ms=size, label=domain or "macro")
    left.set(ylabel="bits per byte", title="by domain")
    left.legend(loc="center left", bbox_to_anchor=(1, 0.5), fontsize=8.5)
    drawn: dict[str, drawing.Point] = {}
    for x, method in points:
        if change := measures.difference(method, reference, relative=True):
            drawn[method] = (x, 100 * change.value)
            right.vlines(x, 100 * change.low, 100 * change.high, color=drawing.COLOURS["core"], lw=2.2, alpha=0.55)
    right.axhline(0, color=drawing.PALE, lw=1, zorder=0)
    right.plot(*zip(*drawn.values(), strict=True), style, color=drawing.COLOURS["core"], lw=1.3, ms=6)
    right.set(ylabel="change of bits per byte, %")
    for place in axes:
        place.margins(x=0.08)
    return drawn
