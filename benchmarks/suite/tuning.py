"""Every kind of training run gets the same number of trials of its learning rate, the joint baseline included.

A trial takes a quarter of the steps (router tuning: all of its few), on the first seed, and is judged on the tuning half of the
validation text; what it chooses holds for all seeds.
"""

import dataclasses
from collections.abc import Callable

from benchmarks.suite import methods, models, scoring, training

FACTORS = (0.5, 1.0, 2.0)  # of the default rate
FRACTION = 0.25  # of the steps
Trials = dict[str, list[dict[str, float]]]


def _experts(lab: models.Models) -> float:
    return methods.macro(methods.flex(lab).scores, "tune")


def _dense(lab: models.Models) -> float:
    """Mean over owners of what each one's dense model makes of the owner's text."""
    own = [scoring.bits(methods.dense(name)(lab).scores, "tune")[f"tune/{name}"] for name in lab.names]
    return sum(own) / len(own)


def _joint(lab: models.Models) -> float:
    return methods.macro(methods.joint(1.0)(lab).scores, "tune")


def _frozen(lab: models.Models) -> float:
    return methods.macro(methods.joint(1.0, frozen=True)(lab).scores, "tune")


def _router(lab: models.Models) -> float:
    return methods.macro(methods.flex_tuned("donated")(lab).scores, "tune")


JUDGES: dict[str, Callable[[models.Models], float]] = {
    "expert": _experts,
    "dense": _dense,
    "joint": _joint,
    "frozen": _frozen,
    "router": _router,
}


def choose(bench: training.Bench) -> tuple[models.Recipe, Trials]:
    """The learning rate of each kind of run, and the trials behind it; a smoke size takes the defaults."""
    recipe = models.Recipe()
    trials: Trials = {}
    if bench.size_name == "smoke":
        return recipe, {}
    for kind, judge in JUDGES.items():
        trials[kind] = []
        for factor in FACTORS:
            rate = getattr(models.Recipe(), kind) * factor
            trial, name = dataclasses.replace(recipe, **{kind: rate}), f"trial-{kind}-{rate:g}-"
            fraction = 1.0 if kind == "router" else FRACTION  # the router's few steps are taken beside the real experts
            lab = models.Models(bench, trial, fraction, name, name if kind == "expert" else "", ("tune",))
            trials[kind].append({"learning_rate": rate, "tune": round(judge(lab), 4)})
        chosen = min(trials[kind], key=lambda found: found["tune"])
        recipe = dataclasses.replace(recipe, **{kind: chosen["learning_rate"]})
    return recipe, trials
