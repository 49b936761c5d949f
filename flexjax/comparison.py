"""The last stage of a job: models side by side on the same text."""

import dataclasses
from collections.abc import Callable, Sequence

from etils import epath
from jax.sharding import Mesh

from flexjax import config as config_lib
from flexjax import distributed, tree, workdir
from flexjax.data import sources
from flexjax.eval import bits_per_byte
from flexjax.experts import models, store
from flexjax.model import transformer


@dataclasses.dataclass
class Subject:
    """A model to be scored: the label of its column, its digest, and how it is read."""

    label: str
    digest: str
    load: Callable[[Mesh], tuple[transformer.Architecture, tree.Tree]]


def of_anchor(found: store.Artefact) -> Subject:
    """The anchor, as a dense model."""
    return Subject("anchor", found.manifest["digest"], lambda mesh: models.load_anchor(found, mesh))


def of_model(model: models.Model, label: str = "model") -> Subject:
    """A merged model."""
    return Subject(label, model.tree_digest, lambda mesh: models.load(model, mesh=mesh))


Scores = dict[str, dict[str, bits_per_byte.Score]]  # by label, then by domain


def evaluate(
    config: config_lib.Config,
    subjects: Sequence[Subject],
    corpora: sources.Corpora,
    directory: epath.Path,
    mesh: Mesh,
) -> Scores:
    """Scores the subjects on the validation text of each domain; kept in `directory/evaluation.json`."""
    settings = config.evaluation
    texts = {domain: corpora.source(domain, "validation") for domain in settings.domains}
    key = {
        "subjects": {subject.label: subject.digest for subject in subjects},
        "data": {domain: source.digest for domain, source in texts.items()},
        "max_kilobytes": settings.max_kilobytes,
        "seq_len": config.data.seq_len,
    }
    saved = distributed.main_says("evaluation", lambda: workdir.read_json(directory / "evaluation.json"))
    if saved is not None and saved["key"] == key:
        distributed.say("evaluation: finished, skipped")
        kept = saved["scores"]
        return {s.label: {domain: bits_per_byte.Score(**kept[s.label][domain]) for domain in texts} for s in subjects}
    distributed.say(f"evaluation: scoring {', '.join(settings.domains)}")

    def score(subject: Subject) -> dict[str, bits_per_byte.Score]:  # one model at a time is held
        seq_len, dtype = config.data.seq_len, config.train.compute_dtype
        scorer = bits_per_byte.Scorer(*subject.load(mesh), seq_len, settings.batch_size, dtype, mesh)
        return {domain: scorer.score(source, settings.max_kilobytes * 1000) for domain, source in texts.items()}

    result = {subject.label: score(subject) for subject in subjects}
    plain = {label: {d: dataclasses.asdict(score) for d, score in found.items()} for label, found in result.items()}
    if distributed.is_main():
        workdir.write_json(directory / "evaluation.json", {"key": key, "scores": plain})
    return result
