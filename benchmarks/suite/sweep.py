"""A grid of settings of the expert recipe, each merged and ranked on the tuning half: `--sweep`.

python -m benchmarks.run --suite=table1 --data_root=DIR --sweep=train.learning_rate=2e-3,4e-3
    --sweep=expert.public_fraction=0.1,0.25
"""

import ast
import itertools
import json
from collections.abc import Mapping, Sequence
from typing import Any

from benchmarks.suite import methods, models
from flexjax import config as config_lib
from flexjax import errors, tree


def grid(flags: Sequence[str]) -> list[dict[str, Any]]:
    """Every combination of PATH=VALUE,VALUE... of several flags.

    Raises:
      ConfigError: a flag is not of that form, or there is no such setting.
    """
    axes = []
    for flag in flags:
        path, equals, values = flag.partition("=")
        if not equals or not values:
            raise errors.ConfigError(f"--sweep={flag} must be PATH=VALUE,VALUE..., for instance train.learning_rate=2e-3,4e-3")
        kind = config_lib.check_field(path)
        if not path.startswith(("expert.", "train.")):
            raise errors.ConfigError(f"--sweep={flag}: a sweep is over expert.* and train.*, the settings of the expert's run")
        axes.append([(path, _value(value, kind, flag)) for value in values.split(",")])
    points = [dict(point) for point in itertools.product(*axes)]
    for point in points:
        config = config_lib.Config()
        for path, value in point.items():
            group, field = path.split(".")
            setattr(getattr(config, group), field, value)
        config_lib.check(config)
    return points


def _value(text: str, kind: Any, flag: str) -> Any:
    try:
        value = text if kind is str else ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    if kind is float and type(value) is int:
        value = float(value)
    if type(value) is not kind:
        raise errors.ConfigError(f"--sweep={flag}: '{text}' is no {kind.__name__}")
    return value


def run(lab: models.Models, points: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """Trains and merges the experts of every point; returns them ranked, the best by macro bits per byte first."""
    found = []
    for point in points:
        label = f"sweep-{tree.sha256(tree.canonical_json(dict(point)))[:6]}"
        bundles = lab.experts(label, changes=point)
        model = lab.merge(bundles, note=json.dumps(dict(point), sort_keys=True), runs=lab.runs(label))
        token = methods.single(lab, model, f"flex-{label}")
        by_sequence = methods.by_sequence(lab, model, f"flex-{label}", "mixture")
        values = {
            "token": round(methods.macro(token.scores, "tune"), 4),
            "sequence": round(methods.macro(by_sequence.scores, "tune", by_sequence.nats), 4),
        }
        found.append({"settings": dict(point), "seed": lab.bench.seed, **values})
        lab.bench.say(f"sweep: {json.dumps(dict(point))}: {values}")
    return sorted(found, key=lambda row: row["token"])
