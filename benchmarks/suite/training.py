"""Everything that a suite trains, with the product's own loop; each run is a stage with an entry in the ledger of FLOPs."""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath

from benchmarks.suite import corpora, stages, suites
from flexjax import config as config_lib
from flexjax import presets, sharding, tree
from flexjax import stages as product
from flexjax.data import pipeline, sources, tokens
from flexjax.experts import rows, store
from flexjax.model import transformer
from flexjax.train import flops, loop

WEIGHTS = "params.npz"
STREAMS = 1_000_003  # apart in seeds
Params = tree.Tree
Portion = tuple[float, str | epath.Path]  # of a mixture: share of windows, and file


@dataclasses.dataclass
class Trained:
    """A model that a stage trained, or a starting point.

    Attributes:
      architecture, params: the model.
      key: digest of what it was made of.
      runs: the training runs that made it, the anchor's left out, as the ledger has them.
    """

    architecture: transformer.Architecture
    params: Params
    key: str
    runs: tuple[str, ...] = ()

    @property
    def model(self) -> tuple[transformer.Architecture, Params]:
        """As `flexjax.baselines` takes models."""
        return self.architecture, self.params


class Bench:
    """One seed of one suite: its text, its stages, its ledger.

    Args:
      suite: what.
      size_name: how large.
      home: holds corpus/, tokens/ and a directory for each seed.
      data_root: where corpora lie.
      seed: decides the anchor, the experts and everything drawn.
      say: tells whoever watches.
    """

    def __init__(
        self,
        suite: suites.Suite,
        size_name: str,
        home: epath.Path,
        data_root: str,
        seed: int,
        say: Callable[[str], None],
    ) -> None:
        self.suite, self.size_name, self.size = suite, size_name, suites.SIZES[size_name]
        self.home, self.seed, self.say = home, seed, say
        self.data_root = data_root
        self.corpus = corpora.prepare(suite, self.size, data_root, home / "corpus")
        self.stages = stages.Stages(home / f"seed{seed}", say)
        self.ledger: dict[str, dict[str, Any]] = {}
        self.options = loop.Options(sharding.one_device())
        self._corpora: sources.Corpora | None = None
        self._texts: dict[epath.Path, tokens.TokenSource] = {}

    def config(self, phase: str) -> config_lib.Config:
        """The settings that all runs of the suite share; the caller sets `train`."""
        config = config_lib.Config(phase=phase, seed=self.seed)
        config.model = dataclasses.replace(self.size.model)
        config.data = config_lib.DataConfig(
            root=str(self.home / "corpus"),
            train_files="{root}/{domain}/train.jsonl.gz",
            validation_files="{root}/{domain}/report.jsonl.gz",
            seq_len=self.size.seq_len,
            cache_dir=str(self.home / "cache"),
        )
        config.expert.row_documents = self.size.row_documents
        config.anchor.statistics_tokens = self.size.statistics_tokens
        config.evaluation = config_lib.EvaluationConfig(
            domains=(suites.PUBLIC,), max_kilobytes=min(16, self.size.kilobytes["tune"])
        )
        return config

    def settings(self, train: config_lib.TrainConfig, steps: int, **changes: Any) -> config_lib.TrainConfig:
        """Training settings at the suite's batch size, for a number of steps."""
        return dataclasses.replace(
            train,
            steps=steps,
            batch_size=self.size.batch_size,
            warmup_steps=min(train.warmup_steps, max(1, steps // 5)),
            compute_dtype=self.size.compute_dtype,
            save_every=max(1, min(500, steps)),
            keep=1,
            log_every=max(1, steps // 40),
            **changes,
        )

    @property
    def sources(self) -> sources.Corpora:
        """The suite's text as tokens of the anchor's tokenizer."""
        if self._corpora is None:
            self._corpora = sources.Corpora(self.config("public"), self.home, None, self.say)
        return self._corpora

    def text(self, file: str | epath.Path) -> tokens.TokenSource:
        """A file of the corpus ("math/report"), or one that a stage wrote, as tokens; read and hashed once."""
        path = self.home / "corpus" / f"{file}.jsonl.gz" if isinstance(file, str) else file
        if path not in self._texts:
            data, cache = self.config("public").data, self.home / "cache" / "tokens"
            self._texts[path] = tokens.tokenize([path], self.sources.tokenizer, data, self.size.model.vocab_size, cache)
        return self._texts[path]

    def pipeline(self, mixture: Mapping[str, Portion], settings: config_lib.TrainConfig, seed: int) -> pipeline.Pipeline:
        """The shuffled mixture of texts: share and file by name."""
        found = {name: self.text(file) for name, (_, file) in mixture.items()}
        weights = {name: share for name, (share, _) in mixture.items()}
        return pipeline.Pipeline(found, weights, self.size.seq_len, settings.batch_size, seed)

    def anchor(self) -> store.Artefact:
        """The public model that everything starts from."""
        config = self.config("public")
        config.train = self.settings(presets.public_training("mini"), self.size.anchor_steps)

        def make(directory: epath.Path) -> dict[str, Any]:
            found = product.public_stage(config, self.sources, directory, self.options)
            _forget_checkpoints(directory)
            facts = found.manifest["training"]
            return {"run": entry(facts["tokens"], facts["flops"], facts["steps"], ".*"), "digest": found.manifest["digest"]}

        directory = self.stages.run("anchor", self._inputs(config, {}), make)
        self.enter("anchor", directory)
        return store.open_anchor(directory / "anchor")

    def prepared(self, given: store.Artefact, label: str, changes: Mapping[str, Any]) -> store.Artefact:
        """An anchor of the same weights for other routers: other settings ("anchor.rows", "model.router_memory") by path."""
        config = self.config("public")
        change(config, changes)

        def make(directory: epath.Path) -> dict[str, Any]:
            found = product.prepare_stage(config, given, self.sources, directory / "anchor", self.options.mesh)
            return {"digest": found.manifest["digest"]}

        inputs = self._inputs(config, {}) | {"anchor": given.manifest["digest"]}
        return store.open_anchor(self.stages.run(f"anchor-{label}", inputs, make) / "anchor")

    def row(self, name: str, anchor: store.Artefact) -> np.ndarray:
        """An owner's domain row [L, D], by the method of the anchor."""
        config = self.config("expert")
        config.expert.name = name
        return rows.domain_row(config, anchor, self.text(f"{name}/train"), self.options.mesh)

    def train(
        self,
        name: str,
        start: Trained,
        mixture: Mapping[str, Portion],
        settings: config_lib.TrainConfig,
        stream: int = 0,
    ) -> Trained:
        """Trains what `settings.trainable` selects on a mixture of the suite's text.

        Args:
          name: of the run, and of its stage.
          start: the model to start from; its key is part of the stage's.
          mixture: share of windows, and file, by name.
          settings: how.
          stream: another number gives another order of the text, for runs that go on where others ended.
        """
        config = self.config("joint")
        config.seed += STREAMS * stream
        config.train = settings
        inputs = self._inputs(config, mixture) | {"start": start.key, "top_k": start.architecture.top_k}

        def make(directory: epath.Path) -> dict[str, Any]:
            batches = self.pipeline(mixture, settings, config.seed)
            trained, facts = loop.train(
                start.params, start.architecture, batches, config, directory, name, self.options, origin=start.key
            )
            whole = tree.unflatten(tree.flatten(start.params) | tree.flatten(trained))
            save(directory / WEIGHTS, whole)
            _forget_checkpoints(directory)
            return {"run": entry(facts["tokens"], facts["flops"], facts["steps"], settings.trainable)}

        directory = self.stages.run(name, inputs, make)
        self.enter(name, directory)
        return Trained(start.architecture, load(directory / WEIGHTS), stages.key(directory), (*start.runs, name))

    def expert(
        self,
        name: str,
        label: str,
        learning_rate: float,
        steps: int,
        anchor: store.Artefact,
        changes: Mapping[str, Any],
    ) -> store.Artefact:
        """One owner's bundle, trained as `python -m flexjax.main` trains it.

        Args:
          name: of the expert and its domain.
          label: of this way of training it.
          learning_rate: at the peak.
          steps: to train.
          anchor: the frozen public model.
          changes: settings by path ("expert.public_fraction") that differ from the default recipe.
        """
        config = self.config("expert")
        config.expert.name, config.anchor.path, config.anchor.rows = name, str(anchor.directory), anchor.manifest["rows"]
        config.model = store.config_of(anchor)
        config.train = self.settings(presets.expert_training("mini"), steps, learning_rate=learning_rate)
        change(config, changes)
        config_lib.resolve(config)
        own = config.data != self.config("expert").data  # other text than the suite's
        corpora = sources.Corpora(config, self.home, store.tokenizer_path(anchor), self.say) if own else self.sources

        def make(directory: epath.Path) -> dict[str, Any]:
            found = product.expert_stage(config, anchor, corpora, directory, self.options)
            _forget_checkpoints(directory)
            facts = found.manifest["training"]
            return {"run": entry(facts["tokens"], facts["flops"], facts["steps"], config.train.trainable)}

        inputs = self._inputs(config, {}) | {"anchor": anchor.manifest["digest"]}
        if own:
            inputs["text"] = corpora.source(name).digest
        run = f"{label}-{name}"
        directory = self.stages.run(run, inputs, make)
        self.enter(run, directory)
        return store.open_bundle(directory / "expert", store.config_of(anchor))

    def enter(self, name: str, directory: epath.Path) -> None:
        """Books a training stage."""
        facts = stages.facts(directory)
        self.ledger[name] = facts["run"] | {"seconds": facts["seconds"], "resumed": facts["resumed"]}

    def cost(self, architecture: transformer.Architecture, trainable: str) -> float:
        """FLOPs of one training step."""
        shapes = tree.partition(transformer.abstract(architecture), trainable)[0]
        return flops.per_token(architecture, shapes, self.size.seq_len).total * self.size.batch_size * self.size.seq_len

    def _inputs(self, config: config_lib.Config, mixture: Mapping[str, Portion]) -> dict[str, Any]:
        """What decides a run: its settings but for operations, the corpus, the mixture."""
        weights = {name: [share, self.text(file).digest] for name, (share, file) in mixture.items()}
        return {"settings": decisive(config), "corpus": self.corpus, "weights": weights}


def change(config: config_lib.Config, changes: Mapping[str, Any]) -> None:
    """Sets fields by path ("expert.public_fraction")."""
    for path, value in changes.items():
        group, field = path.split(".")
        setattr(getattr(config, group), field, value)


def decisive(config: config_lib.Config) -> dict[str, Any]:
    """The settings that a run reads, without those that only say where and how fast."""
    kinds, unread = config_lib.classes(), config_lib.UNREAD[config.phase]
    return {
        path: value
        for path, value in config_lib.to_dict(config).items()
        if kinds[path] != "operations" and not path.startswith(unread)
    }


def entry(tokens_seen: int, total: float, steps: int, trainable: str) -> dict[str, Any]:
    """What a run has in the ledger."""
    return {
        "tokens": int(tokens_seen),
        "flops": float(total),
        "steps": int(steps),
        "trainable": trainable,
        "device": jax.devices()[0].device_kind,
    }


def _forget_checkpoints(directory: epath.Path) -> None:
    """What is finished needs no checkpoint."""
    if (directory / "checkpoints").exists():
        (directory / "checkpoints").rmtree()


def save(path: epath.Path, params: Params) -> None:
    """Writes a tree as one file, complete or not at all."""
    flat: dict[str, Any] = {name: np.asarray(leaf) for name, leaf in tree.flatten(params).items()}
    part = path.parent / f"{path.name}.part.npz"
    np.savez(part, **flat)
    part.rename(path)


def load(path: epath.Path) -> Params:
    """Reads what `save` wrote."""
    with np.load(path, allow_pickle=False) as found:
        return tree.unflatten({name: found[name] for name in found.files})
