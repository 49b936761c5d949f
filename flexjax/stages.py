"""The stages of a job, each done once: corpus, tokenizer, anchor, expert (or joint, or router tuning), model, evaluation.

A stage is finished when its artefact has a manifest; starting again skips it and says so. Training stages resume from their
last committed checkpoint.
"""

import sys
from typing import Any

import numpy as np
from etils import epath

from flexjax import config as config_lib
from flexjax import errors, tree, workdir
from flexjax.data import pipeline, sources, tokens
from flexjax.experts import domains, manifest, models, slices, store, surgery
from flexjax.model import transformer
from flexjax.train import loop

INITIAL_BIAS = -0.1


def say(text: str) -> None:
    """Tells whoever watches what is going on."""
    print(text, file=sys.stderr, flush=True)


def public_config(config: config_lib.Config) -> config_lib.Config:
    """The job that trains the anchor of another job; what concerns experts only is at its default."""
    return config_lib.Config(
        phase="public",
        seed=config.seed,
        model=config.model,
        data=config.data,
        anchor=config_lib.AnchorConfig(rows=config.anchor.rows, statistics_tokens=config.anchor.statistics_tokens),
        train=config.anchor.train,
    )


def check_claim(config: config_lib.Config, directory: epath.Path, options: loop.Options) -> None:
    """Raises ConfigError if the directory holds work of another job."""
    saved = workdir.read_json(directory / "config.json")
    current = config_lib.to_dict(config)
    finished = any(_finished(directory / part) for part in ("anchor", "expert", "model"))
    if saved is not None and (finished or any((directory / "checkpoints").glob("*/commit.json"))):
        try:
            config_lib.check_same_run(saved, current, options.allow_schedule_change)
        except errors.ConfigError as error:
            raise errors.ConfigError(f"{directory}: {error}") from None


def claim(config: config_lib.Config, directory: epath.Path, options: loop.Options) -> None:
    """Saves the resolved config, unless the directory holds work of another job."""
    check_claim(config, directory, options)
    workdir.write_json(directory / "config.json", config_lib.to_dict(config))


def anchor(config: config_lib.Config, directory: epath.Path, options: loop.Options) -> store.Artefact:
    """Opens the anchor that the config names, or trains one in `directory/public`."""
    if config.anchor.path:
        found = store.open_anchor(config.anchor.path)
        say(f"anchor: {config.anchor.path}, digest {found.manifest['digest'][:12]}")
        return found
    home = workdir.create(directory / "public")
    public = public_config(config)
    claim(public, home, options)
    return public_stage(public, sources.Corpora(config, directory, None, say), home, options)


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
        say(f"anchor: finished, skipped; digest {found.manifest['digest'][:12]}")
        return found
    architecture = transformer.Architecture(config.model, transformer.dense_banks(config.model))
    transformer.check(architecture)
    params = transformer.init(architecture, config.seed)
    trained, facts = loop.train(params, architecture, stream, config, directory, "anchor", options, origin="")
    trained, source = _replace(params, trained), corpora.source(config_lib.PUBLIC)
    statistics, row = public_rows(config, architecture, trained, source)
    shared, experts = surgery.split(trained, architecture.banks)
    public = {**experts[config_lib.PUBLIC], "router": {"row": row}}

    def put(writer: slices.TensorWriter) -> None:
        writer.put_tree({**shared, "expert": public, "statistics": statistics})

    facts |= made_of | {"data": source.digest, "seed": config.seed, "seq_len": config.data.seq_len}
    found = store.write_anchor(home, config.model, corpora.tokenizer_file, put, rows=config.anchor.rows, training=facts)
    say(f"anchor: written to {home}, digest {found.manifest['digest'][:12]}")
    return found


def prepare_stage(
    config: config_lib.Config, given: store.Artefact, corpora: sources.Corpora, home: epath.Path
) -> store.Artefact:
    """Gives an anchor from elsewhere (an imported OLMo-2) the public row and statistics that owners need; writes `home`."""
    domains.check_method(config.anchor.rows)
    if _finished(home):
        found = store.open_anchor(home)
        _check_made_of(found.manifest["training"], {"start": given.manifest["digest"]}, home)
        say(f"anchor: finished, skipped; digest {found.manifest['digest'][:12]}")
        return found
    architecture, params = models.load_anchor(given)
    statistics, row = public_rows(config, architecture, params, corpora.source(config_lib.PUBLIC))
    public = {**given.tensors("expert"), "router": {"row": row}}

    def put(writer: slices.TensorWriter) -> None:
        writer.put_tree({**given.shared(), "expert": public, "statistics": statistics})

    facts = given.manifest["training"] | {"start": given.manifest["digest"], "seq_len": config.data.seq_len}
    found = store.write_anchor(home, config.model, corpora.tokenizer_file, put, rows=config.anchor.rows, training=facts)
    say(f"anchor: {given.directory} with public row and statistics, written to {home}")
    return found


def public_rows(
    config: config_lib.Config, architecture: transformer.Architecture, params: tree.Tree, source: tokens.TokenSource
) -> tuple[tree.Tree, np.ndarray]:
    """The statistics that owners need for their rows, and the public row [L, D], by the anchor's method."""
    count, seed, method = config.anchor.statistics_tokens, config.seed, config.anchor.rows
    documents = domains.choose(source, max(domains.LEAST_DOCUMENTS, count // config.data.seq_len), seed)
    states = domains.states(architecture, params, source, documents, config.data.seq_len, count, seed)
    statistics = {"states": states}
    if method == "logistic":
        return statistics, np.zeros((states.shape[0], states.shape[2]), np.float32)
    if method == "mean":
        return statistics, domains.scaled(states.mean(axis=1), states)
    if method == "random":
        return statistics, domains.scaled(domains.random_vector(states.shape[2], seed), states)
    projection = domains.text_projection(source, documents, config.model.vocab_size, config.model.d_model)
    statistics["projection"] = projection
    return statistics, domains.scaled(domains.text_vector(source, documents, projection), states)


def domain_row(
    config: config_lib.Config,
    anchor: store.Artefact,
    architecture: transformer.Architecture,
    params: tree.Tree,
    source: tokens.TokenSource,
) -> np.ndarray:
    """The owner's row [L, D], by the method of the anchor."""
    name, method = config.expert.name, anchor.manifest["rows"]
    seed = config.seed + int(tree.sha256(name.encode())[:6], 16)  # owners of one seed draw different random rows
    documents = domains.choose_owner(source, config.expert.row_documents, name, seed)
    if "statistics/states" not in anchor.manifest["tensors"]:
        raise errors.ConfigError(
            f"{anchor.label} carries no public statistics, so no domain row can be made; "
            f"add them: --config=configs/public.py --config.anchor.path={anchor.directory}"
        )
    public = anchor.tensor("statistics/states").astype(np.float32)
    if method == "random":
        return domains.scaled(domains.random_vector(public.shape[2], seed), public)
    if method == "text":
        return domains.scaled(domains.text_vector(source, documents, anchor.tensor("statistics/projection")), public)
    mine = domains.states(architecture, params, source, documents, config.data.seq_len, public.shape[1], seed)
    if method == "logistic":
        return domains.logistic_rows(mine, public)
    return domains.scaled(mine.mean(axis=1), public)


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
        say(f"expert '{name}': finished, skipped; digest {found.manifest['digest'][:12]}")
        return found
    dense, params = models.load_anchor(anchor)
    public, source = anchor.tensors("expert"), corpora.source(name)
    say(f"expert '{name}': making its router row by the anchor's method '{anchor.manifest['rows']}'")
    row = domain_row(config, anchor, dense, params, source)
    bias = np.full(config.model.num_layers, INITIAL_BIAS, np.float32)
    mine = surgery.narrow(public, config.expert.d_ff or config.model.d_ff)
    mine = {**mine, "router": {"row": row, "bias": bias}}
    pair, banks = surgery.join(
        anchor.shared(), {config_lib.PUBLIC: public, name: mine}, {config_lib.PUBLIC: (config_lib.PUBLIC,), name: (name,)}
    )
    architecture = surgery.architecture(config.model, banks, top_k=2)
    _check_carried(pair, config.train.trainable)
    trained, facts = loop.train(pair, architecture, stream, config, directory, f"expert {name}", options, origin)
    expert = surgery.split(_replace(pair, trained), banks)[1][name]
    facts |= made_of | {
        "data": source.digest,
        "documents": source.num_documents,
        "row_documents": config.expert.row_documents,
        "public_fraction": fraction,
        "seed": config.seed,
    }
    found = store.write_bundle(home, name, anchor, expert, facts)
    say(f"expert '{name}': written to {home}, digest {found.manifest['digest'][:12]}")
    return found


def _check_carried(params: tree.Tree, pattern: str) -> None:
    """Raises ConfigError, before anything is trained, if a part of the anchor would be: no bundle carries it."""
    for path in tree.flatten(tree.partition(params, pattern)[0]):
        if not path.startswith("experts/") or path.startswith(f"experts/{config_lib.PUBLIC}/"):
            raise errors.ConfigError(f"train.trainable selects {path}, which no bundle carries; use 'experts/(?!public/).*'")


def mixture_weights(mixture: config_lib.MixtureConfig) -> dict[str, float]:
    """Public text at its fraction, the experts' domains sharing the rest.

    Raises:
      ConfigError: the fraction is no share, or there is no expert.
    """
    if not 0 <= mixture.public_fraction <= 1 or not mixture.experts:
        raise errors.ConfigError(
            f"mixture.public_fraction={mixture.public_fraction} must lie in [0, 1], beside one expert at least"
        )
    rest = (1 - mixture.public_fraction) / len(mixture.experts)
    return {config_lib.PUBLIC: mixture.public_fraction, **{name: rest for name in mixture.experts}}


def joint_stage(
    config: config_lib.Config, anchor: store.Artefact, corpora: sources.Corpora, directory: epath.Path, options: loop.Options
) -> models.Model:
    """Upcycles the anchor to one expert per domain and trains everything together; writes `directory/model`."""
    home, origin = directory / "model", anchor.manifest["digest"]
    stream = corpora.pipeline(mixture_weights(config.mixture), config.train)
    made_of = _made_of(config, stream, start=origin)
    if _finished(home):
        found = models.open_model(home)
        _check_made_of(found.anchor.manifest["training"], made_of, home)
        say(f"joint model: finished, skipped; tree digest {found.tree_digest[:12]}")
        return found
    names = config.mixture.experts
    public = anchor.tensors("expert")
    rng = np.random.default_rng(config.seed)

    def start() -> tree.Tree:
        row = config.model.init_std * rng.standard_normal(public["router"]["row"].shape)
        return {**public, "router": {"row": row.astype(np.float32), "bias": np.zeros(config.model.num_layers, np.float32)}}

    experts = {config_lib.PUBLIC: public, **{name: start() for name in names}}
    params, banks = surgery.join(anchor.shared(), experts, {config_lib.PUBLIC: (config_lib.PUBLIC,), "joint": names})
    architecture = surgery.architecture(config.model, banks, config.mixture.top_k)
    trained, facts = loop.train(params, architecture, stream, config, directory, "joint", options, origin)
    shared, experts = surgery.split(_replace(params, trained), banks)

    def put(writer: slices.TensorWriter) -> None:  # no statistics: the old anchor's states are not those of the new one
        writer.put_tree({**shared, "expert": experts[config_lib.PUBLIC]})

    parts = directory / "parts"
    _discard(parts)
    tokenizer_file, rows = store.tokenizer_path(anchor), anchor.manifest["rows"]
    facts |= made_of | {"seed": config.seed, "seq_len": config.data.seq_len}
    new = store.write_anchor(parts / "anchor", config.model, tokenizer_file, put, rows=rows, training=facts)
    bundles = {name: store.write_bundle(parts / name, name, new, experts[name], facts) for name in names}
    model = models.write_model(home, new, bundles, config.mixture.top_k)
    _discard(parts)
    return model


def router_stage(
    config: config_lib.Config, start: models.Model, corpora: sources.Corpora, directory: epath.Path, options: loop.Options
) -> models.Model:
    """Trains rows and biases of a merged model, all experts active; writes `directory/model` with new bundles."""
    home, origin = directory / "model", start.tree_digest
    stream = corpora.pipeline(mixture_weights(config.mixture), config.train)
    made_of = _made_of(config, stream, start=origin)
    if _finished(home):
        found = models.open_model(home)
        for bundle in found.bundles.values():
            _check_made_of(bundle.manifest["training"], made_of, home)
        say(f"router-tuned model: finished, skipped; tree digest {found.tree_digest[:12]}")
        return found
    architecture, params = models.load(start, top_k=len(start.bundles) + 1)
    _check_carried(params, config.train.trainable)
    trained, facts = loop.train(params, architecture, stream, config, directory, "router tuning", options, origin)
    experts = surgery.split(_replace(params, trained), architecture.banks)[1]
    parts = directory / "parts"
    _discard(parts)
    bundles = {}
    for name, bundle in start.bundles.items():
        provenance = facts | made_of | {"router_tuned_with": sorted(start.bundles), "parent": bundle.manifest["digest"]}
        bundles[name] = store.write_bundle(parts / name, name, start.anchor, experts[name], provenance)
    model = models.write_model(home, start.anchor, bundles, start.manifest["top_k"])
    _discard(parts)
    return model


def model_stage(anchor: store.Artefact, bundle: store.Artefact, directory: epath.Path) -> models.Model:
    """Merges the new bundle with its anchor as `directory/model`."""
    home = directory / "model"
    if _finished(home):
        found = models.open_model(home)
        _check_made_of(found.manifest["experts"], {bundle.manifest["name"]: bundle.manifest["digest"]}, home)
        say(f"model: finished, skipped; tree digest {found.tree_digest[:12]}")
        return found
    found = models.write_model(home, anchor, {bundle.manifest["name"]: bundle}, top_k=2)
    say(f"model: written to {home}, tree digest {found.tree_digest[:12]}")
    return found


def _replace(params: tree.Tree, trained: tree.Tree) -> tree.Tree:
    flat = tree.flatten(params) | tree.flatten(trained)
    return tree.unflatten({path: np.asarray(leaf) for path, leaf in flat.items()})


def _finished(home: epath.Path) -> bool:
    return (home / manifest.FILE).exists()


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
    if directory.exists():
        directory.rmtree()
