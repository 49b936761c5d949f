"""How figures look: their style, their file, names beside points, maps."""

import contextlib
import io
import itertools
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from flexjax import workdir

Point = tuple[float, float]

INK, PALE, GRID = "#26323d", "#8b98a5", "#e6eaee"
COLOURS = {"core": "#17698f", "second": "#d8822b", "ablation": "#8569ad"}
TITLES = {"core": "core", "second": "second suite", "ablation": "ablation"}
DOMAINS = ("#17698f", "#d8822b", "#3f9b6d", "#b5476b", "#8569ad", "#8c6d46", "#4fa6c9", "#77808a")
STYLE: dict[Any, Any] = {
    "axes.axisbelow": True,
    "axes.edgecolor": PALE,
    "axes.grid": True,
    "axes.labelcolor": INK,
    "axes.spines.right": False,
    "axes.spines.top": False,
    "axes.titlelocation": "left",
    "axes.titlesize": 11,
    "axes.titleweight": "bold",
    "figure.dpi": 100,
    "font.size": 9.5,
    "grid.color": GRID,
    "legend.frameon": False,
    "text.color": INK,
    "xtick.color": INK,
    "ytick.color": INK,
    "xtick.major.size": 0,
    "ytick.major.size": 0,
}
CHANGE = (COLOURS["core"], "#f4f6f8", "#c4601a")  # better, none, worse
SHARE = ("#f4f6f8", "#9cc4d6", COLOURS["core"], "#0e3f57")
DPI = 160
WIDTH = 9.0  # inches


@contextlib.contextmanager
def canvas(path: epath.Path, height: float, **grid: Any) -> Iterator[tuple[Any, Any]]:
    """A figure and its axes; written when the block ends."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    with matplotlib.rc_context(STYLE):
        figure, axes = pyplot.subplots(figsize=(WIDTH, height), layout="constrained", **grid)
        try:
            yield figure, axes
            content = io.BytesIO()
            figure.savefig(content, format="png", dpi=DPI)
            workdir.write(path, content.getvalue())
        finally:
            pyplot.close(figure)


def label(figure: Any, axes: Any, points: Mapping[str, Point], colours: Mapping[str, str], path: Sequence[Point] = ()) -> None:
    """Names beside points, where they cover neither each other, nor a point, nor a path; those far off get a line."""
    figure.draw_without_rendering()
    figure.set_layout_engine("none")
    scale = figure.dpi / 72
    at = {name: axes.transData.transform(point) for name, point in points.items()}
    taken = [_around(place, 5 * scale) for place in at.values()]
    for one, two in itertools.pairwise(axes.transData.transform(np.reshape(path, (-1, 2)))):
        taken += [_around(one + part * (two - one), 2 * scale) for part in np.linspace(0, 1, 100)]
    area = axes.get_window_extent().extents
    for name in sorted(at, key=lambda name: at[name][1]):
        text = axes.annotate(
            name, points[name], (0, 0), textcoords="offset points", fontsize=8, va="center", color=colours[name]
        )
        size = text.get_window_extent()
        for step, side, up in itertools.product(range(40), (1, -1), (1, -1)):
            x, y = side * (7 + 2 * step), up * 4 * step  # points
            left, middle = at[name][0] + x * scale - (size.width if side < 0 else 0), at[name][1] + y * scale
            box = (left, middle - size.height / 2, left + size.width, middle + size.height / 2)
            inside = area[0] < box[0] and area[1] < box[1] and box[2] < area[2] and box[3] < area[3]
            if inside and not any(_overlap(box, other) for other in taken):
                break
        text.set(ha="left" if side > 0 else "right", x=x, y=y)
        taken.append(box)
        if step > 2:
            line = {"arrowstyle": "-", "color": PALE, "lw": 0.6, "shrinkA": 0, "shrinkB": 4}
            axes.annotate("", points[name], (x, y), textcoords="offset points", arrowprops=line)


def _around(place: Sequence[float], half: float) -> tuple[float, float, float, float]:
    return (place[0] - half, place[1] - half, place[0] + half, place[1] + half)


def _overlap(one: Sequence[float], two: Sequence[float]) -> bool:
    """Whether boxes (left, bottom, right, top) share a point."""
    return one[0] < two[2] and two[0] < one[2] and one[1] < two[3] and two[1] < one[3]


def frame(axes: Any, columns: Sequence[str], rows: Sequence[str]) -> None:
    """A map's names, and white lines between its cells."""
    axes.set_xticks(range(len(columns)), columns)
    axes.set_yticks(range(len(rows)), rows)
    axes.set_xticks(np.arange(len(columns) - 1) + 0.5, minor=True)
    axes.set_yticks(np.arange(len(rows) - 1) + 0.5, minor=True)
    axes.tick_params(which="minor", length=0)
    axes.set_axisbelow(False)
    axes.grid(visible=False)
    axes.grid(which="minor", color="white", lw=2)
    for spine in axes.spines.values():
        spine.set_visible(False)


def ramp(colours: Sequence[str]) -> Any:
    """A colour map through these colours."""
    from matplotlib import colors

    return colors.LinearSegmentedColormap.from_list("ramp", colours)
