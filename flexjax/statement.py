"""What an owner's bundle states beside its weights: counts, scores and terms, never text."""

from collections.abc import Callable, Sequence

from jax.sharding import Mesh

from flexjax import config as config_lib
from flexjax import distributed, errors, tree
from flexjax.data import sources
from flexjax.eval import bits_per_byte
from flexjax.experts import provenance, store
from flexjax.governance import margins
from flexjax.model import transformer


def of_expert(
    config: config_lib.Config,
    anchor: store.Artefact,
    architecture: transformer.Architecture,
    build: Callable[[], tree.Tree],
    corpora: sources.Corpora,
    unfrozen: Sequence[str],
    mesh: Mesh,
) -> provenance.Provenance:
    """The statement of a trained expert.

    Args:
      config: the job; `config.statement` has the owner's own words.
      anchor: the expert's.
      architecture, build: the trained pair, on the mesh; it is built only if something is to be measured.
      corpora: of the job.
      unfrozen: shared leaves that were trained: with some, switching the expert off does not give the anchor back.
      mesh: the devices.

    """
    name, words = config.expert.name, config.statement
    source, told, scores = corpora.source(name), None, {}
    if words.margins or config.evaluation.domains:
        params = build()
        scores = _evaluation(config, architecture, params, corpora, unfrozen, mesh)
        if words.margins:
            told = margins.measure(anchor, (architecture, params), source, seq_len=config.data.seq_len, mesh=mesh)
    return provenance.Provenance(
        owner=words.owner,
        version=words.version,
        data={
            "licence": words.licence,
            "documents": source.num_documents,
            "digest": source.digest,
            "row_documents": config.expert.row_documents,
            "public_fraction": config.expert.public_fraction,
        },
        evaluation=scores,
        margins=told,
    )


def check(words: config_lib.StatementConfig) -> None:
    """Raises ConfigError, before anything is trained, if an owner's words could not stand in a manifest."""
    stated = provenance.Provenance(owner=words.owner, version=words.version, data={"licence": words.licence})
    try:
        provenance.check(stated.fields(), "config.statement")
    except errors.IntegrityError as error:
        raise errors.ConfigError(str(error)) from None


def changed(words: config_lib.StatementConfig, bundle: store.Artefact) -> list[str]:
    """What a finished bundle states otherwise than the owner's words do now."""
    stated = {"owner": bundle.manifest["owner"], "version": bundle.manifest["version"]}
    stated |= {"licence": bundle.manifest["data"].get("licence", ""), "margins": bundle.manifest["margins"] is not None}
    return [field for field, value in stated.items() if getattr(words, field) != value]


def _evaluation(
    config: config_lib.Config,
    architecture: transformer.Architecture,
    params: tree.Tree,
    corpora: sources.Corpora,
    unfrozen: Sequence[str],
    mesh: Mesh,
) -> dict[str, dict[str, float]]:
    """Bits per byte of validation text, with the expert and, where switching it off gives the anchor back, without."""
    settings = config.evaluation
    if not settings.domains:
        return {}
    distributed.say(f"expert '{config.expert.name}': scoring {', '.join(settings.domains)} for the manifest")
    scorer = bits_per_byte.Scorer(
        architecture, params, config.data.seq_len, settings.batch_size, config.train.compute_dtype, mesh
    )
    found = {}
    for domain in settings.domains:
        text = corpora.source(domain, "validation")
        sides = {"bits_per_byte": architecture.experts} | ({} if unfrozen else {"anchor": (config_lib.PUBLIC,)})
        limit = settings.max_kilobytes * 1000
        scores = {side: scorer.score(text, limit, list(experts)).bits_per_byte for side, experts in sides.items()}
        found[domain] = {side: round(score, 4) for side, score in scores.items()}
    return found
