"""The models of a suite, each trained when a method first asks for it, and shared by all that do."""

import dataclasses
import functools
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from benchmarks.suite import owned_text, scoring, training
from flexjax import baselines, errors, jobs, presets, tree
from flexjax import config as config_lib
from flexjax.experts import models, store, surgery

PUBLIC = config_lib.PUBLIC
GROUPS = ("report", "tune", "unseen", "mixed")
Bundles = Mapping[str, store.Artefact]
Experts = dict[str, tree.Tree]

NOTHING: Mapping[str, Any] = types.MappingProxyType({})
UNBIASED = r"(?!.*bias$).*"
OWNERS = r"experts/owners/(?!.*bias$).*"
ROUTERS = r"experts/(?!public/).*/router/.*"


@dataclasses.dataclass(frozen=True)
class Recipe:
    """Peak learning rates by kind of run: what tuning chooses."""

    expert: float = 4e-3
    dense: float = 4e-3
    joint: float = 4e-3
    frozen: float = 4e-3
    router: float = 4e-3


class Models:
    """The models of one seed of a suite.

    Args:
      bench: its text, stages and ledger.
      recipe: learning rates.
      fraction: of the suite's steps that every run takes, below 1 in tuning trials.
      prefix: of the names of all runs but the experts'.
      experts_prefix: of those.
      groups: of texts to score.
    """

    def __init__(
        self,
        bench: training.Bench,
        recipe: Recipe,
        fraction: float = 1.0,
        prefix: str = "",
        experts_prefix: str = "",
        groups: tuple[str, ...] = GROUPS,
    ) -> None:
        self.bench, self.recipe, self.prefix, self.experts_prefix = bench, recipe, prefix, experts_prefix
        self.names = bench.suite.owners
        self.groups = groups
        self.expert_steps = max(1, round(bench.size.expert_steps * fraction))
        self.tuning_steps = max(1, round(bench.size.tuning_steps * fraction))

    @functools.cached_property
    def anchor(self) -> store.Artefact:
        """The anchor, once it is good enough.

        Raises:
          NumericError: it does not pass the suite's gate.
        """
        found = self.bench.anchor()
        gate = self.bench.suite.gate.get(self.bench.size_name)
        if gate is not None:
            model = self._dense(found)
            reached = scoring.bits(scoring.score(self.bench, model, "anchor", ["tune"]), "tune")[f"tune/{PUBLIC}"]
            if reached > gate:
                raise errors.NumericError(
                    f"the anchor reaches {reached:.3f} bits per byte on public text, the gate of this suite is {gate}: "
                    "beside a starved anchor everything wins; raise anchor_steps of the size"
                )
        return found

    def with_rows(self, method: str) -> store.Artefact:
        """The same anchor, with another method of domain rows."""
        return self.bench.anchor_with_rows(self.anchor, method)

    @functools.cached_property
    def public(self) -> training.Trained:
        """The anchor as a dense model."""
        return self._dense(self.anchor)

    def _dense(self, anchor: store.Artefact) -> training.Trained:
        architecture, params = models.load_anchor(anchor)
        return training.Trained(architecture, params, anchor.manifest["digest"])

    def experts(
        self, label: str = "expert", anchor: store.Artefact | None = None, changes: Mapping[str, Any] = NOTHING
    ) -> dict[str, store.Artefact]:
        """The bundles of all owners, trained alike; `changes` are settings by path, see `training.Bench.expert`."""
        anchor, rate = self.anchor if anchor is None else anchor, self.recipe.expert
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
        mixture: Mapping[str, training.Part],
        budget: float,
        learning_rate: float,
        trainable: str,
        router_losses: bool = True,
    ) -> training.Trained:
        """Trains for a budget of FLOPs, as near as whole steps come."""
        steps = max(1, round(budget / self.bench.cost(start.architecture, trainable)))
        routed = start.architecture.routed and router_losses
        base = presets.joint_training("mini") if routed else presets.public_training("mini")
        settings = self.bench.settings(base, steps, learning_rate=learning_rate, trainable=trainable)
        return self.bench.train(self.prefix + name, start, mixture, settings)

    def dense(self, name: str) -> training.Trained:
        """The anchor trained further on one owner's text, for the FLOPs of one expert."""
        budget = self.expert_flops / len(self.names)
        return self.train(f"dense-{name}", self.public, {name: (1.0, f"{name}/train")}, budget, self.recipe.dense, ".*")

    @property
    def control(self) -> training.Trained:
        """The anchor trained further on public text, for the FLOPs of all experts."""
        return self.train(
            "control", self.public, {PUBLIC: (1.0, f"{PUBLIC}/train")}, self.expert_flops, self.recipe.dense, ".*"
        )

    def joint(self, times: float, frozen: bool = False) -> training.Trained:
        """The jointly trained MoE, for a multiple of the experts' FLOPs; with `frozen`, only what experts train is trained."""
        start, trainable = self.upcycled(frozen), OWNERS if frozen else UNBIASED
        rate = self.recipe.frozen if frozen else self.recipe.joint
        label = f"joint-{'frozen-' if frozen else ''}{times:g}x"
        return self.train(label, start, self.everybody, times * self.expert_flops, rate, trainable)

    def joint_on_as_much_text(self) -> training.Trained:
        """The jointly trained MoE that sees as many tokens as all experts together."""
        start = self.upcycled(frozen=False)
        steps = sum(self.bench.ledger[run]["steps"] for run in self.runs())
        return self.train(
            "joint-data",
            start,
            self.everybody,
            steps * self.bench.cost(start.architecture, UNBIASED),
            self.recipe.joint,
            UNBIASED,
        )

    @property
    def everybody(self) -> dict[str, training.Part]:
        """The union of what the experts see: public text at its share, the owners' in equal parts."""
        fraction = config_lib.ExpertConfig().public_fraction
        shares = {PUBLIC: fraction} | {name: (1 - fraction) / len(self.names) for name in self.names}
        return {name: (share, f"{name}/train") for name, share in shares.items()}

    def upcycled(self, frozen: bool) -> training.Trained:
        """The anchor with a copy of its FFN for each owner, all active; `frozen`: the public one lives apart."""
        config, seed = self.bench.size.model, self.bench.seed
        rng = np.random.default_rng(seed)
        shape = (config.num_layers, config.d_model)
        rows = {name: (config.init_std * rng.standard_normal(shape)).astype(np.float32) for name in (PUBLIC, *self.names)}
        architecture, params = baselines.copies(*self.public.model, rows, public_apart=frozen)
        kind = "upcycled, public apart" if frozen else "upcycled"
        return training.Trained(architecture, params, tree.sha256(f"{self.public.key} {kind}".encode()))

    def tuned(self, start: training.Trained, kind: str) -> training.Trained:
        """Rows and biases trained further, all else frozen, on public text and text in place of the owners' own.

        Args:
          start: the merged model.
          kind: "proxy" (public documents that look like the owner's), "sampled" (from the experts) or "donated" (1 %).
        """
        text = owned_text.prepare(self.bench, self.names, start, kind, self.prefix)
        share = 1 / (len(self.names) + 1)
        mixture: dict[str, training.Part] = {PUBLIC: (share, f"{PUBLIC}/train")}
        mixture |= {name: (share, path) for name, path in text.items()}
        settings = self.bench.settings(
            presets.router_training("mini"), self.tuning_steps, learning_rate=self.recipe.router, trainable=ROUTERS
        )
        return self.bench.train(f"{self.prefix}tuned-{kind}", start, mixture, settings)
