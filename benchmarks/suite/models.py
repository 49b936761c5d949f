"""The models of a suite, each trained when a method first asks for it, and shared by all that do."""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.suite import owned_text, scoring, training
from flexjax import baselines, errors, jobs, presets, stages, tree
from flexjax import config as config_lib
from flexjax.experts import models, store, surgery

PUBLIC = config_lib.PUBLIC
GROUPS = ("report", "tune", "unseen", "mixed")
Bundles = Mapping[str, store.Artefact]
Experts = dict[str, tree.Tree]

NOTHING: Mapping[str, Any] = types.MappingProxyType({})
UNBIASED = presets.joint_training("mini").trainable
MEMORY = 0.98  # a token: about 50 of them
OWNERS = f"experts/{baselines.OWNERS}/.*"


RATES = {  # peak learning rates by kind of run, around which tuning looks
    "expert": 4e-3,
    "paper": 4e-3,
    "dense": 4e-3,
    "control": 4e-3,
    "joint": 4e-3,
    "frozen": 4e-3,
    "router": 4e-3,
    "btx": 4e-3,
    "lora": 4e-3,
    "fedavg": 4e-3,
}


class Models:
    """The models of one seed of a suite.

    Args:
      bench: its text, stages and ledger.
      rate: the peak learning rate of each kind of run, a key of `RATES`.
      fraction: of the suite's steps that every run takes, below 1 in tuning trials.
      prefix: of the names of all runs but the experts'.
      experts_prefix: of those.
      groups: of texts to score.
    """

    def __init__(
        self,
        bench: training.Bench,
        rate: Callable[[str], float],
        fraction: float = 1.0,
        prefix: str = "",
        experts_prefix: str = "",
        groups: tuple[str, ...] = GROUPS,
    ) -> None:
        self.bench, self._rate, self.prefix, self.experts_prefix = bench, rate, prefix, experts_prefix
        self.kinds: dict[str, str] = {}  # of every run that was asked for, which says how its learning rate was tuned
        self.names = bench.suite.owners
        self.groups = groups
        self.expert_steps = max(1, round(bench.size.expert_steps * bench.suite.expert_share * fraction))
        self.tuning_steps = max(1, round(bench.size.tuning_steps * fraction))

    def rate(self, kind: str, *runs: str) -> float:
        """The learning rate of runs of a kind."""
        self.kinds |= dict.fromkeys(runs, kind)
        return self._rate(kind)

    @functools.cached_property
    def anchor(self) -> store.Artefact:
        """What everything starts from."""
        return self.bench.anchor()

    def check_anchor(self) -> None:
        """Raises NumericError if the anchor does not pass the suite's gate."""
        gate = self.bench.suite.gate.get(self.bench.size_name)
        if gate is None:
            return
        scores = scoring.score(self.bench, self.public, "anchor", ["tune"])
        reached = scoring.bits(scores, "tune")[f"tune/{PUBLIC}"]
        if reached > gate:
            raise errors.NumericError(
                f"the anchor reaches {reached:.3f} bits per byte on public text, the gate of this suite is {gate}: "
                "beside a starved anchor everything wins; raise anchor_steps of the size"
            )

    def with_rows(self, method: str) -> store.Artefact:
        """The same anchor, with another method of domain rows."""
        return self.bench.prepared(self.anchor, method, {"anchor.rows": method})

    @functools.cached_property
    def public(self) -> training.Trained:
        """The anchor as a dense model."""
        return training.Trained(*models.load_anchor(self.anchor), self.anchor.manifest["digest"])

    def experts(
        self,
        label: str = "expert",
        anchor: store.Artefact | None = None,
        changes: Mapping[str, Any] = NOTHING,
        kind: str = "expert",
    ) -> dict[str, store.Artefact]:
        """The bundles of all owners, trained alike; `changes` are settings by path, see `training.Bench.expert`."""
        anchor, rate = self.anchor if anchor is None else anchor, self.rate(kind, *self.runs(label))
        run = f"{self.experts_prefix}{label}"
        return {name: self.bench.expert(name, run, rate, self.expert_steps, anchor, changes) for name in self.names}

    def runs(self, label: str = "expert") -> tuple[str, ...]:
        """Names of the runs behind `experts`."""
        return tuple(f"{self.experts_prefix}{label}-{name}" for name in self.names)

    def merge(
        self,
        bundles: Bundles,
        top_k: int | None = None,
        edit: Callable[[Experts], Experts] | None = None,
        note: str = "",
        runs: tuple[str, ...] = (),
        anchor: store.Artefact | None = None,
    ) -> training.Trained:
        """The anchor and bundles as one model.

        Args:
          bundles: by name.
          top_k: experts per token; None: all.
          edit: changes the experts' trees first; `note` then says how.
          note: part of the model's key.
          runs: behind the bundles.
          anchor: theirs; None: the suite's.
        """
        anchor = self.anchor if anchor is None else anchor
        experts = {PUBLIC: anchor.tensors("expert")} | {name: bundle.tensors("expert") for name, bundle in bundles.items()}
        params, banks = surgery.join(anchor.shared(), experts if edit is None else edit(experts))
        architecture = surgery.architecture(store.config_of(anchor), banks, top_k or len(experts))
        made_of = {"anchor": anchor.manifest["digest"], "note": note}
        made_of |= {name: bundle.manifest["digest"] for name, bundle in bundles.items()}
        return training.Trained(architecture, params, tree.sha256(tree.canonical_json(made_of)), runs)

    @functools.cached_property
    def flex(self) -> training.Trained:
        """The merged model of our recipe, all experts active."""
        return self.merge(self.experts(), runs=self.runs())

    @functools.cached_property
    def flex_memory(self) -> training.Trained:
        """The same with routers that remember: rows fitted to running means, experts trained beside them."""
        anchor = self.bench.prepared(self.anchor, "memory", {"model.router_memory": MEMORY})
        return self.merge(self.experts("memory", anchor), runs=self.runs("memory"), anchor=anchor)

    @functools.cached_property
    def expert_flops(self) -> float:
        """Training FLOPs of all owners together: the budget of 1x."""
        config = self.bench.config("expert")
        config.expert.name = name = self.names[0]
        one = self.bench.cost(jobs.architecture(config), f"experts/{name}/.*")
        return one * self.expert_steps * len(self.names)

    def train(
        self,
        name: str,
        start: training.Trained,
        mixture: Mapping[str, training.Portion],
        budget: float,
        kind: str,
        trainable: str,
        base: config_lib.TrainConfig | None = None,
        stream: int = 0,
    ) -> training.Trained:
        """Trains for a budget of FLOPs, as near as whole steps come.

        Args:
          name: of the run.
          start, mixture, stream: as for `training.Bench.train`.
          budget: in FLOPs.
          kind: of run, which has its own learning rate.
          trainable: what is trained.
          base: all other settings; None: those of joint training, or of dense training for a model without a router.
        """
        steps = max(1, round(budget / self.bench.cost(start.architecture, trainable)))
        if base is None:
            base = presets.joint_training("mini") if start.architecture.routed else presets.public_training("mini")
        rate = self.rate(kind, self.prefix + name)
        settings = self.bench.settings(base, steps, learning_rate=rate, trainable=trainable)
        return self.bench.train(self.prefix + name, start, mixture, settings, stream)

    def dense(self, name: str) -> training.Trained:
        """The anchor trained further on one owner's text, for the FLOPs of one expert."""
        budget = self.expert_flops / len(self.names)
        return self.train(f"dense-{name}", self.public, {name: (1.0, f"{name}/train")}, budget, "dense", ".*")

    @property
    def control(self) -> training.Trained:
        """The anchor trained further on public text, for the FLOPs of all experts."""
        mixture: dict[str, training.Portion] = {PUBLIC: (1.0, f"{PUBLIC}/train")}
        return self.train("control", self.public, mixture, self.expert_flops, "control", ".*", stream=1)

    def joint(self, times: float, top_k: int | None = None) -> training.Trained:
        """The jointly trained MoE, for a multiple of the experts' FLOPs; `top_k`: experts per token, None: all."""
        label = f"joint-{times:g}x" + ("" if top_k is None else f"-k{top_k}")
        return self.train(label, self.upcycled(top_k), self.everybody, times * self.expert_flops, "joint", UNBIASED)

    def joint_frozen(self, times: float) -> training.Trained:
        """The fair twin of the experts: the same leaves, starts and losses, trained together, all else frozen."""
        start, base = self.upcycled_apart(), presets.expert_training("mini")
        budget = times * self.expert_flops
        return self.train(f"joint-frozen-{times:g}x", start, self.everybody, budget, "frozen", OWNERS, base)

    def joint_on_as_much_text(self) -> training.Trained:
        """The jointly trained MoE that sees as many tokens as all experts together."""
        start = self.upcycled()
        budget = self.expert_steps * len(self.names) * self.bench.cost(start.architecture, UNBIASED)
        return self.train("joint-data", start, self.everybody, budget, "joint", UNBIASED)

    @property
    def everybody(self) -> dict[str, training.Portion]:
        """The union of what the experts see: public text at its share, the owners' in equal parts."""
        fraction = config_lib.ExpertConfig().public_fraction
        shares = {PUBLIC: fraction} | {name: (1 - fraction) / len(self.names) for name in self.names}
        return {name: (share, f"{name}/train") for name, share in shares.items()}

    def own(self, name: str) -> dict[str, training.Portion]:
        """What one expert sees: its owner's text, and public negatives."""
        fraction = config_lib.ExpertConfig().public_fraction
        return {name: (1 - fraction, f"{name}/train"), PUBLIC: (fraction, f"{PUBLIC}/train")}

    def upcycled(self, top_k: int | None = None) -> training.Trained:
        """The anchor with a copy of its FFN for each owner, in one bank, small random rows."""
        config = self.bench.size.model
        rng = np.random.default_rng(self.bench.seed)
        shape = (config.num_layers, config.d_model)
        rows = {name: (config.init_std * rng.standard_normal(shape)).astype(np.float32) for name in (PUBLIC, *self.names)}
        architecture, params = baselines.copies(*self.public.model, rows, public_apart=False, top_k=top_k)
        return training.Trained(architecture, params, tree.sha256(f"{self.public.key} upcycled".encode()))

    def upcycled_apart(self) -> training.Trained:
        """The same as experts start: `public` apart and frozen with its row, domain rows, biases of -0.1."""
        rows = {name: self.bench.row(name, self.anchor) for name in self.names}
        rows = {PUBLIC: self.anchor.tensor("expert/router/row"), **rows}
        architecture, params = baselines.copies(*self.public.model, rows, public_apart=True, biased=True)
        router = params["experts"][baselines.OWNERS]["router"]
        router["bias"] = np.full_like(router["bias"], stages.INITIAL_BIAS)
        return training.Trained(architecture, params, tree.sha256(f"{self.public.key} upcycled as experts start".encode()))

    def tuned(self, start: training.Trained, kind: str, label: str = "") -> training.Trained:
        """Rows and biases trained further, all else frozen, on public text and text in place of the owners' own.

        Args:
          start: the merged model.
          kind: "proxy" (public documents that look like the owner's), "sampled" (from the experts) or "donated" (1 %).
          label: before the names of its runs, for another model than that of our recipe.
        """
        prefix = f"{self.prefix}{label}"
        run = f"{prefix}tuned-{kind}"
        text, runs = owned_text.prepare(self.bench, self.names, start, kind, prefix)
        share = 1 / (len(self.names) + 1)
        mixture: dict[str, training.Portion] = {PUBLIC: (share, f"{PUBLIC}/train")}
        mixture |= {name: (share, path) for name, path in text.items()}
        settings = self.bench.settings(
            presets.router_training("mini"), self.tuning_steps, learning_rate=self.rate("router", run)
        )
        start = dataclasses.replace(start, runs=(*start.runs, *runs))
        return self.bench.train(run, start, mixture, settings)
