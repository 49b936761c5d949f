"""What a job ends with: a table, a picture, and the commands to type next."""

import math
from collections.abc import Mapping

from etils import epath

from flexjax.eval import bits_per_byte
from flexjax.train import metrics

Scores = Mapping[str, bits_per_byte.Score]


def table(before: Scores, after: Scores) -> str:
    """Bits per byte of anchor and model by domain, the change, and the model's routing shares."""
    lines = [f"{'bits per byte':<16}{'anchor':>9}{'model':>9}{'change':>9}   routing shares of the model"]
    for domain, score in before.items():
        line = f"{domain:<16}{score.bits_per_byte:>9.3f}"
        if domain in after:
            new = after[domain]
            shares = "  ".join(f"{name} {share:.0%}" for name, share in new.shares.items())
            line += f"{new.bits_per_byte:>9.3f}{new.bits_per_byte / score.bits_per_byte - 1:>+9.1%}   {shares}"
        lines.append(line)
    return "\n".join(lines)


def picture(path: epath.Path, runs: Mapping[str, epath.Path], before: Scores, after: Scores) -> None:
    """Writes a PNG: the loss curve of every run (by title), and bars of bits per byte before and after."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, (curves, bars) = pyplot.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for title, run in runs.items():
        rows = metrics.read(run / "metrics.jsonl")
        curves.plot([row["step"] for row in rows], [row["cross_entropy"] / math.log(2) for row in rows], label=title)
    curves.set(xlabel="step", ylabel="training loss (bits per token)", title="Loss")
    curves.legend()
    places = range(len(before))
    series = {"anchor": before, "model": after} if after else {"anchor": before}
    for index, (label, scores) in enumerate(series.items()):
        heights = [score.bits_per_byte for score in scores.values()]
        drawn = bars.bar([place + 0.4 * index for place in places], heights, 0.38, label=label)
        bars.bar_label(drawn, fmt="%.2f")
    bars.set(ylabel="bits per byte", title="Validation text, lower is better")
    bars.set_xticks([place + 0.2 * (len(series) - 1) for place in places], list(before))
    bars.legend()
    with path.open("wb") as file:
        figure.savefig(file, format="png", dpi=120)
    pyplot.close(figure)
