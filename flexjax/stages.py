"""The stages of a job, each done once: corpus, tokenizer, anchor, expert (or joint, or router tuning), model, evaluation.

A stage is finished when its artefact has a manifest; starting again skips it and says so. Training stages resume from their
last committed checkpoint.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

from flexjax import config as config_lib
from flexjax import distributed, errors, jobs, statement, tree, workdir
from flexjax.data import pipeline, sources
from flexjax.experts import domains, manifest, models, provenance, publishing, slices, store, surgery
from flexjax.experts import rows as rows_lib
from flexjax.model import placement, transformer
from flexjax.train import loop

INITIAL_BIAS = -0.1


def check_claim(config: config_lib.Config, directory: epath.Path, options: loop.Options) -> None:
    """Raises ConfigError if the directory holds work of another job."""
    saved = workdir.read_json(directory / "config.json")
    current = config_lib.to_dict(config)
    finished = any(_finished(directory / part) for part in ("anchor", "expert", "model"))
    if saved is not None and (finished or _begun(directory / "checkpoints")):
        try:
            config_lib.check_same_run(saved, current, options.allow_schedule_change)
        except errors.ConfigError as error:
            raise errors.ConfigError(f"{directory}: {error}") from None


def claim(config: config_lib.Config, directory: epath.Path, options: loop.Options) -> None:
    """Saves the resolved config, unless the directory holds work of another job."""
    check_claim(config, directory, options)
    if distributed.is_main():
        workdir.write_json(directory / "config.json", config_lib.to_dict(config))
    distributed.barrier("claim")


def anchor(config: config_lib.Config, directory: epath.Path, options: loop.Options) -> store.Artefact:
    """Opens the anchor that the config names, or trains one in `directory/public`."""
    if config.anchor.path:
        found = store.open_anchor(config.anchor.path)
        distributed.say(f"anchor: {config.anchor.path}, digest {found.manifest['digest'][:12]}")
        return found
    home = workdir.create(directory / "public")
    public = jobs.public_config(config)
    claim(public, home, options)
    return public_stage(public, sources.Corpora(config, directory, None, distributed.say), home, options)


def public_stage(
    config: config_lib.Config, corpora: sources.Corpora, directory: epath.Path, options: loop.Options
) -> store.Artefact:
    """Trains the public model and freezes it as `directory/anchor`, with the public row and statistics owners need."""
    domains.check_method(config.anchor.rows)
    home = directory / "anchor"
    stream = corpora.pipeline({config_lib.PUBLIC: 1.0}, config.train)
    made_of = _made_of(config, stream, start="")
    if _finished(home):
        found = store.open_anchor(home)
        _check_made_of(found.manifest["training"], made_of, home)
        distributed.say(f"anchor: finished, skipped; digest {found.manifest['digest'][:12]}")
        return found
    architecture = transformer.Architecture(config.model, transformer.dense_banks(config.model))
    transformer.check(architecture)

    def start() -> tree.Tree:
        return placement.init(architecture, config.seed, options.mesh)

    trained, facts = loop.train(start(), architecture, stream, config, directory, "anchor", options, origin="")
    trained, source = _complete(trained, start, architecture), corpora.source(config_lib.PUBLIC)
    statistics, row = rows_lib.public_rows(config, architecture, trained, source, options.mesh)
    shared, experts = surgery.split(trained, architecture.banks)
    public = {**experts[config_lib.PUBLIC], "router": {"row": row}}

    def put(writer: slices.TensorWriter) -> None:
        writer.put_tree({**shared, "expert": public, "statistics": statistics})

    facts |= made_of | {"data": source.digest, "seed": config.seed, "seq_len": config.data.seq_len}
    found = publishing.write_anchor(home, config.model, corpora.tokenizer_file, put, rows=config.anchor.rows, training=facts)
    distributed.say(f"anchor: written to {home}, digest {found.manifest['digest'][:12]}")
    return found


def prepare_stage(
    config: config_lib.Config, given: store.Artefact, corpora: sources.Corpora, home: epath.Path, mesh: Mesh
) -> store.Artefact:
    """Gives an anchor from elsewhere (an imported OLMo-2) the public row and statistics that owners need; writes `home`.

    The config's model has the shapes of the anchor; what its routers read may be new.
    """
    domains.check_method(config.anchor.rows)
    if _finished(home):
        found = store.open_anchor(home)
        _check_made_of(found.manifest["training"], {"start": given.manifest["digest"]}, home)
        distributed.say(f"anchor: finished, skipped; digest {found.manifest['digest'][:12]}")
        return found
    architecture, params = models.load_anchor(given, mesh)
    architecture = dataclasses.replace(architecture, config=config.model)
    statistics, row = rows_lib.public_rows(config, architecture, params, corpora.source(config_lib.PUBLIC), mesh)
    shared, experts = surgery.split(params, architecture.banks)
    public = {**experts[config_lib.PUBLIC], "router": {"row": row}}

    def put(writer: slices.TensorWriter) -> None:
        writer.put_tree({**shared, "expert": public, "statistics": statistics})

    facts = given.manifest["training"] | {"start": given.manifest["digest"], "seq_len": config.data.seq_len}
    found = publishing.write_anchor(home, config.model, corpora.tokenizer_file, put, rows=config.anchor.rows, training=facts)
    distributed.say(f"anchor: {given.directory} with public row and statistics, written to {home}")
    return found


def expert_stage(
    config: config_lib.Config, anchor: store.Artefact, corpora: sources.Corpora, directory: epath.Path, options: loop.Options
) -> store.Artefact:
    """Trains the owner's expert beside the frozen anchor and writes the bundle `directory/expert`."""
    name = manifest.check_name(config.expert.name)
    home, origin = directory / "expert", anchor.manifest["digest"]
    fraction = config.expert.public_fraction
    if not 0 <= fraction < 1:
        raise errors.ConfigError(f"expert.public_fraction={fraction} must lie in [0, 1)")
    stream = corpora.pipeline({name: 1 - fraction, config_lib.PUBLIC: fraction}, config.train)
    made_of = _made_of(config, stream, start=origin)
    if _finished(home):
        found = store.open_bundle(home, store.config_of(anchor))
        _check_made_of(found.manifest["training"], made_of, home)
        distributed.say(f"expert '{name}': finished, skipped; digest {found.manifest['digest'][:12]}")
        if (words := statement.changed(config.statement, found)) and distributed.is_main():
            distributed.say(f"warning: {home} states another {', '.join(words)}; remove it and start again to publish anew")
        return found
    mesh, source = options.mesh, corpora.source(name)
    distributed.say(f"expert '{name}': making its router row by the anchor's method '{anchor.manifest['rows']}'")
    row = rows_lib.domain_row(config, anchor, source, mesh)
    bias = np.full(config.model.num_layers, INITIAL_BIAS, np.float32)
    mine = {"router": {"row": row, "bias": bias}} | _first_ffn(config, anchor)

    def build(params: tree.Tree, public_row: tree.Tree, mine: tree.Tree) -> tree.Tree:
        shared, experts = surgery.split(params, transformer.dense_banks(config.model))
        public = {**experts[config_lib.PUBLIC], "router": public_row}
        both = {config_lib.PUBLIC: public, name: {"ffn": public["ffn"]} | mine}
        return surgery.join(shared, both, {config_lib.PUBLIC: (config_lib.PUBLIC,), name: (name,)})[0]

    def start() -> tree.Tree:
        public_row = {"row": anchor.tensor("expert/router/row")}
        return placement.assemble(build, architecture, mesh, models.load_anchor(anchor, mesh)[1], public_row, mine)

    architecture = jobs.architecture(config)
    _check_carried(architecture, config.train.trainable, shared=True)
    trained, facts = loop.train(start(), architecture, stream, config, directory, f"expert {name}", options, origin)
    whole = functools.partial(_complete, trained, start, architecture)
    unfrozen = {path: leaf for path, leaf in tree.flatten(trained).items() if not path.startswith("experts/")}
    stated = statement.of_expert(config, anchor, architecture, whole, corpora, list(unfrozen), mesh)
    expert = surgery.split(whole(f"experts/{name}/"), architecture.banks[1:])[1][name]
    facts |= made_of | {"seed": config.seed}
    found = publishing.write_bundle(home, name, anchor, expert, facts, stated, tree.unflatten(unfrozen))
    distributed.say(f"expert '{name}': written to {home}, digest {found.manifest['digest'][:12]}")
    return found


def _first_ffn(config: config_lib.Config, anchor: store.Artefact) -> tree.Tree:
    """The FFN that an expert begins with, if it is not a copy of the public one."""
    if config.expert.kind == "low_rank":
        layers, d, width = config.model.num_layers, config.model.d_model, config.model.d_ff
        shapes = {"gate": (layers, d, width), "up": (layers, d, width), "down": (layers, width, d)}
        return surgery.low_rank(shapes, config.expert.rank, config.seed)
    if config.expert.d_ff not in (0, config.model.d_ff):
        return {"ffn": surgery.narrow(anchor.tensors("expert"), config.expert.d_ff)["ffn"]}
    return {}


def _check_carried(architecture: transformer.Architecture, pattern: str, shared: bool = False) -> None:
    """Raises ConfigError, before anything is trained, if something would be that no bundle carries.

    With `shared`, a bundle may carry leaves that all experts share; `public` itself never changes.
    """
    for path in tree.flatten(tree.partition(transformer.abstract(architecture), pattern)[0]):
        if path.startswith(f"experts/{config_lib.PUBLIC}/") or not (shared or path.startswith("experts/")):
            raise errors.ConfigError(f"train.trainable selects {path}, which no bundle carries; use 'experts/(?!public/).*'")


def joint_stage(
    config: config_lib.Config, anchor: store.Artefact, corpora: sources.Corpora, directory: epath.Path, options: loop.Options
) -> models.Model:
    """Upcycles the anchor to one expert per domain and trains everything together; writes `directory/model`."""
    home, origin = directory / "model", anchor.manifest["digest"]
    stream = corpora.pipeline(jobs.mixture_weights(config.mixture), config.train)
    made_of = _made_of(config, stream, start=origin)
    if _finished(home):
        found = models.open_model(home)
        _check_made_of(found.anchor.manifest["training"], made_of, home)
        distributed.say(f"joint model: finished, skipped; tree digest {found.tree_digest[:12]}")
        return found
    names, rng = config.mixture.experts, np.random.default_rng(config.seed)
    rows = {config_lib.PUBLIC: anchor.tensor("expert/router/row")}
    for name in names:
        rows[name] = (config.model.init_std * rng.standard_normal(rows[config_lib.PUBLIC].shape)).astype(np.float32)

    def build(params: tree.Tree, rows: tree.Tree) -> tree.Tree:
        shared, experts = surgery.split(params, transformer.dense_banks(config.model))
        copies = {name: {**experts[config_lib.PUBLIC], "router": {"row": row}} for name, row in rows.items()}
        return surgery.join(shared, copies, jobs.joint_groups(config))[0]

    def start() -> tree.Tree:
        return placement.assemble(build, architecture, options.mesh, models.load_anchor(anchor, options.mesh)[1], rows)

    architecture = jobs.architecture(config)
    trained, facts = loop.train(start(), architecture, stream, config, directory, "joint", options, origin)
    shared, experts = surgery.split(_complete(trained, start, architecture), architecture.banks)

    def put(writer: slices.TensorWriter) -> None:  # no statistics: the old anchor's states are not those of the new one
        writer.put_tree({**shared, "expert": experts[config_lib.PUBLIC]})

    parts = directory / "parts"
    _discard(parts)
    tokenizer_file, method = store.tokenizer_path(anchor), anchor.manifest["rows"]
    facts |= made_of | {"seed": config.seed, "seq_len": config.data.seq_len}
    new = publishing.write_anchor(parts / "anchor", config.model, tokenizer_file, put, rows=method, training=facts)
    bias = np.zeros(config.model.num_layers, np.float32)  # bundles carry one; the experts of a joint model have none
    bundles = {}
    for name in names:
        expert = {**experts[name], "router": {**experts[name]["router"], "bias": bias}}
        bundles[name] = publishing.write_bundle(parts / name, name, new, expert, facts)
    return _publish(home, parts, new, bundles, config.mixture.top_k)


def _publish(
    home: epath.Path,
    parts: epath.Path,
    anchor: store.Artefact,
    bundles: dict[str, store.Artefact],
    top_k: int,
    averaged: bool = True,
) -> models.Model:
    """Writes a model from parts that are then discarded."""
    if distributed.is_main():
        models.write_model(home, anchor, bundles, top_k, averaged)
        _discard(parts)
    distributed.barrier("publish")
    return models.open_model(home)


def router_stage(
    config: config_lib.Config, start: models.Model, corpora: sources.Corpora, directory: epath.Path, options: loop.Options
) -> models.Model:
    """Trains rows and biases of a merged model, all experts active; writes `directory/model` with new bundles."""
    home, origin = directory / "model", start.tree_digest
    stream = corpora.pipeline(jobs.mixture_weights(config.mixture), config.train)
    made_of = _made_of(config, stream, start=origin)
    if _finished(home):
        found = models.open_model(home)
        for bundle in found.bundles.values():
            _check_made_of(bundle.manifest["training"], made_of, home)
        distributed.say(f"router-tuned model: finished, skipped; tree digest {found.tree_digest[:12]}")
        return found
    architecture = models.architecture(start, top_k=len(start.bundles) + 1)
    _check_carried(architecture, config.train.trainable)

    def read() -> tree.Tree:
        return models.load(start, len(start.bundles) + 1, options.mesh, public_apart=True)[1]

    trained, facts = loop.train(read(), architecture, stream, config, directory, "router tuning", options, origin)
    experts = surgery.split(_complete(trained, read, architecture), architecture.banks)[1]
    parts = directory / "parts"
    _discard(parts)
    bundles = {}
    for name, bundle in start.bundles.items():
        before = bundle.manifest["training"].get("router_tuned_with", [])  # a row keeps what it learned beside who has left
        tuned = facts | made_of | {"router_tuned_with": sorted({*before, *start.bundles})}
        parent = {"digest": bundle.manifest["digest"], "by": "router tuning"}
        stated = dataclasses.replace(provenance.of(bundle.manifest), parent=parent, evaluation={}, margins=None)
        bundles[name] = publishing.write_bundle(
            parts / name, name, start.anchor, experts[name], tuned, stated, bundle.tensors("shared")
        )
    return _publish(home, parts, start.anchor, bundles, start.manifest["top_k"], averaged=start.shared is not None)


def model_stage(anchor: store.Artefact, bundle: store.Artefact, directory: epath.Path) -> models.Model:
    """Merges the new bundle with its anchor as `directory/model`."""
    home = directory / "model"
    if _finished(home):
        found = models.open_model(home)
        _check_made_of(found.manifest["experts"], {bundle.manifest["name"]: bundle.manifest["digest"]}, home)
        distributed.say(f"model: finished, skipped; tree digest {found.tree_digest[:12]}")
        return found
    if distributed.is_main():
        models.write_model(home, anchor, {bundle.manifest["name"]: bundle}, top_k=2)
    distributed.barrier("model")
    found = models.open_model(home)
    distributed.say(f"model: written to {home}, tree digest {found.tree_digest[:12]}")
    return found


def _complete(
    trained: tree.Tree, start: Callable[[], tree.Tree], architecture: transformer.Architecture, below: str = ""
) -> tree.Tree:
    """What was trained with what was not, as it was published: read again, rather than kept beside the copy in use."""
    flat = tree.flatten(trained)
    missing = {path for path in tree.flatten(transformer.abstract(architecture)) if path.startswith(below)} - set(flat)
    if missing:
        flat |= {path: leaf for path, leaf in tree.flatten(start()).items() if path in missing}
    return tree.unflatten({path: leaf for path, leaf in flat.items() if path.startswith(below)})


def _begun(checkpoints: epath.Path) -> bool:
    return checkpoints.exists() and any((step / "commit.json").exists() for step in checkpoints.iterdir())


def _finished(home: epath.Path) -> bool:
    return bool(distributed.main_says("finished", lambda: (home / manifest.FILE).exists()))


def _made_of(config: config_lib.Config, stream: pipeline.Pipeline, start: str) -> dict[str, Any]:
    """What decides a trained artefact beside the config that `claim` guards: kept in its manifest."""
    return {
        "steps": config.train.steps,
        "stream": tree.sha256(tree.canonical_json(stream.identity())),
        "start": start,
    }


def _check_made_of(recorded: dict[str, Any], made_of: dict[str, Any], home: epath.Path) -> None:
    """Raises ConfigError if a finished artefact was made of something else than this job would make it of."""
    for part, value in made_of.items():
        if recorded.get(part) != value:
            raise errors.ConfigError(
                f"{home} is finished, with {part} {str(recorded.get(part))[:12]}; this job has {str(value)[:12]}: "
                f"restore it, choose another --workdir, or remove {home}"
            )


def _discard(directory: epath.Path) -> None:
    if distributed.is_main() and directory.exists():
        directory.rmtree()
