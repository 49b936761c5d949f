"""Learning rates: every kind of training run gets the same trials, the joint baseline included.

Three rates around the default; while the best is at an edge, the next one beyond it, up to five. A trial takes a quarter of the
steps (router tuning: all of its few) and is judged on the tuning half of the validation text. A kind is tuned when a method
first asks for it, on the seed that is at work then; what it chooses holds for all seeds.
"""

import dataclasses
from collections.abc import Callable

from etils import epath

from benchmarks.suite import methods, models, scoring, second, training
from flexjax import workdir

FACTORS = (0.5, 1.0, 2.0)  # of the default rate
MOST = 5
FRACTION = 0.25  # of the steps
Trials = list[dict[str, float]]


def _experts(lab: models.Models) -> float:
    return methods.macro(methods.single(lab, lab.flex, "flex").scores, "tune")


def _dense(lab: models.Models) -> float:
    """Mean over owners of what each one's dense model makes of the owner's text."""
    own = [scoring.bits(methods.dense(name)(lab).scores, "tune")[f"tune/{name}"] for name in lab.names]
    return sum(own) / len(own)


def _of(method: methods.Method) -> Callable[[models.Models], float]:
    def judge(lab: models.Models) -> float:
        outcome = method(lab)
        return methods.macro(outcome.scores, "tune", outcome.nats)

    return judge


JUDGES: dict[str, Callable[[models.Models], float]] = {
    "expert": _experts,
    "paper": _of(methods.flex_as_paper),
    "dense": _dense,
    "control": _of(methods.control),
    "joint": _of(methods.joint(1.0)),
    "frozen": _of(methods.joint_frozen(1.0)),
    "router": _of(methods.flex_tuned("sampled")),
    "btx": _of(second.btx),
    "lora": _of(second.lora),
    "fedavg": _of(second.fedavg),
}


@dataclasses.dataclass
class Rates:
    """The learning rate of each kind of run, as `models.Models` asks for them.

    Attributes:
      bench: the seed at work, on which trials run.
      file: keeps rates and trials, so that they outlive the stages.
      inputs: digest of what they depend on.
      chosen, trials: by kind.
    """

    bench: training.Bench
    file: epath.Path
    inputs: str
    chosen: dict[str, float] = dataclasses.field(default_factory=dict)
    trials: dict[str, Trials] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        saved = workdir.read_json(self.file)
        if saved is not None and saved.get("inputs") == self.inputs:
            self.chosen, self.trials = saved["chosen"], saved["trials"]

    def __call__(self, kind: str) -> float:
        """The rate of a kind, tuned now if it was not; a smoke size takes the default."""
        if self.bench.size_name == "smoke":
            return models.RATES[kind]
        if kind not in self.chosen:
            self.bench.say(f"tuning: learning rates of kind '{kind}'")
            self.trials[kind] = self._search(kind)
            self.chosen[kind] = _best(self.trials[kind])
            workdir.write_json(self.file, {"inputs": self.inputs, "chosen": self.chosen, "trials": self.trials})
        return self.chosen[kind]

    def _search(self, kind: str) -> Trials:
        found: Trials = []
        wanted = [models.RATES[kind] * factor for factor in FACTORS]
        while wanted and len(found) < MOST:
            found += [{"learning_rate": rate, "tune": self._try(kind, rate)} for rate in wanted]
            tried = sorted(trial["learning_rate"] for trial in found)
            wanted = {tried[0]: [tried[0] / 2], tried[-1]: [tried[-1] * 2]}.get(_best(found), [])
        return found

    def _try(self, kind: str, rate: float) -> float:
        """Bits per byte on the tuning half."""
        known = self.chosen | {kind: rate}

        def rates(other: str) -> float:
            return known[other] if other in known else self(other)

        name = f"trial-{kind}-{rate:g}-"
        fraction = 1.0 if kind == "router" else FRACTION  # beside the real experts, whose writing it is tuned on
        lab = models.Models(self.bench, rates, fraction, name, name if kind in ("expert", "paper") else "", ("tune",))
        return round(JUDGES[kind](lab), 4)


def _best(trials: Trials) -> float:
    return min(trials, key=lambda trial: trial["tune"])["learning_rate"]
