"""What a job ends with: a table, a picture, and the commands to type next."""

import math
from collections.abc import Mapping

from etils import epath

from flexjax import comparison
from flexjax.model import router
from flexjax.train import metrics


def table(scores: comparison.Scores) -> str:
    """Bits per byte of each model by domain, the change from the first to the last, and the last one's routing shares."""
    labels = list(scores)
    first, last = scores[labels[0]], scores[labels[-1]]
    compared = len(labels) > 1
    head = "".join(f"{label:>9}" for label in labels) + (f"{'change':>9}   routing shares" if compared else "")
    lines = [f"{'bits per byte':<16}{head}"]
    for domain in first:
        line = f"{domain:<16}" + "".join(f"{scores[label][domain].bits_per_byte:>9.3f}" for label in labels)
        if compared:
            change = last[domain].bits_per_byte / first[domain].bits_per_byte - 1
            shares = last[domain].shares
            named = "  ".join(f"{name} {shares[name]:.0%}" for name in router.canonical_order(shares))
            line += f"{change:>+9.1%}   {named}"
        lines.append(line)
    return "\n".join(lines)


def picture(path: epath.Path, runs: Mapping[str, epath.Path], scores: comparison.Scores) -> None:
    """Writes a PNG: the loss curve of every run (by title), and bars of bits per byte of every model."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, bars) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for title, run in runs.items():
        rows = [row for row in metrics.read(run / "metrics.jsonl") if row["cross_entropy"] is not None]
        curves.plot([row["step"] for row in rows], [row["cross_entropy"] / math.log(2) for row in rows], label=title)
    curves.set(xlabel="step", ylabel="training loss (bits per token)", title="Loss")
    if runs:  # an anchor from elsewhere has none
        curves.legend()
    domains = list(next(iter(scores.values())))
    width = 0.8 / len(scores)
    for index, (label, found) in enumerate(scores.items()):
        places = [place + width * index for place in range(len(domains))]
        drawn = bars.bar(places, [found[domain].bits_per_byte for domain in domains], 0.95 * width, label=label)
        bars.bar_label(drawn, fmt="%.2f")
    bars.set(ylabel="bits per byte", title="Validation text, lower is better")
    bars.set_xticks([place + width * (len(scores) - 1) / 2 for place in range(len(domains))], domains)
    bars.margins(y=0.25)  # room for the legend above the bars
    bars.legend(loc="upper left", ncols=2)
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
