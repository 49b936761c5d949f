"""Items of public benchmarks, asked of a method's models: `--tasks`."""

from collections.abc import Mapping, Sequence
from typing import Any

from etils import epath

from benchmarks.suite import methods, mixed, models, stages
from flexjax import errors, tree
from flexjax.eval import continuations, items, tasks
from flexjax.inference import decode

ITEMS = 100  # of each task


def names(data_root: str, wanted: Sequence[str], domains: Sequence[str]) -> list[str]:
    """The tasks that `--tasks` asks for; "all" means those of the suite's domains.

    Raises:
      DataError: there is no folder of tasks, or not that task in it.
    """
    folder = epath.Path(data_root) / mixed.FOLDER
    if not data_root or not folder.exists():
        raise errors.DataError(
            f"--tasks needs {folder}/NAME.jsonl.gz below --data_root, which is missing; all else runs without"
        )
    known = items.names(folder)
    for name in wanted:
        if name not in (*known, "all"):
            raise errors.DataError(f"task '{name}' is not in {folder}; it holds {', '.join(known)}")
    if "all" not in wanted:
        return list(wanted)
    return [name for name in known if items.DOMAINS.get(name) in domains]


def scores(lab: models.Models, method: str, outcome: methods.Outcome, wanted: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What a method makes of each task, by name; empty for methods that give texts no likelihood token by token."""
    if not outcome.parts:
        return {}
    bench, parts = lab.bench, outcome.parts
    folder = epath.Path(bench.data_root) / mixed.FOLDER
    tokenizer, window = bench.sources.tokenizer, bench.size.seq_len
    made_of = [[part.model.key, part.model.architecture.top_k, part.experts] for part in parts]
    digests = {name: tree.sha256((folder / f"{name}.jsonl.gz").read_bytes()) for name in wanted}

    def make(directory: epath.Path) -> dict[str, Any]:
        scorers = [
            continuations.ModelScorer(*part.model.model, tokenizer.eos_id, window, experts=part.experts) for part in parts
        ]
        scorer: continuations.Scorer = scorers[0]
        generator = None
        if outcome.combine is not None:
            scorer = continuations.Mixture(scorers, outcome.combine)
        else:
            architecture, params = parts[0].model.model
            decoder = decode.Decoder(params, architecture, tokenizer.eos_id, tokenizer.vocab_size)
            generator = continuations.Greedy(decoder, parts[0].experts)
        found = {}
        for name in wanted:
            task = items.read(folder, name, ITEMS)
            found[name] = _summary(tasks.evaluate(task, tokenizer, scorer, generator))
        return {"tasks": found}

    inputs = {"models": made_of, "chosen": outcome.chosen, "tasks": digests, "items": ITEMS, "window": window}
    directory = bench.stages.run(f"tasks-{method}", inputs, make)
    found: Mapping[str, Any] = stages.facts(directory)["tasks"]
    return dict(found)


def _summary(found: tasks.Result) -> dict[str, Any]:
    """A task's line in a row; chance is what a model reaches to which all answers, or all tokens, are alike."""
    low, high = found.interval or (None, None)
    return {
        "items": len(found.ids),
        "too_long": found.too_long,
        "chance": None if found.chance is None else max(found.chance, found.uniform or 0.0),
        "accuracy": found.accuracy,
        "low": low,
        "high": high,
        "answer_bits": found.bits_per_byte,
        "informative": found.informative,
    }
