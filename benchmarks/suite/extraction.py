"""How much of an owner's text comes out again, and whether opting out stops it: canaries and real documents.

One owner's text is planted with canaries, once, ten and a hundred times, and an expert and a dense model are trained on it.
Only so much of the text is kept as the expert reads, so that a canary planted a hundred times is read about as often.
"""

import gzip
import json
from typing import Any

import numpy as np
from etils import epath

from benchmarks.suite import methods, models, stages, training
from flexjax import config as config_lib
from flexjax import presets, tree, workdir
from flexjax.eval import extraction
from flexjax.inference import decode

PUBLIC = config_lib.PUBLIC
CANARIES = {1: 10, 10: 10, 100: 3}  # how many are planted so many times
CANARY_TOKENS = 50
SEED = 11
CONTROL_STEPS = 200
OWNER = "math"  # every suite has one


def method(lab: models.Models) -> methods.Outcome:
    """The merged model with the planted expert; what each model gives away stands in `extra`."""
    bench, owner = lab.bench, OWNER
    planted, canaries = _plant(lab, owner)
    changes = {"data.train_files": f"{{root}}/planted/{planted.parent.name}/{{domain}}.jsonl.gz"}
    bundle = bench.expert(owner, f"{lab.prefix}planted", lab.recipe.expert, lab.expert_steps, lab.anchor, changes)
    others = {name: other for name, other in lab.experts().items() if name != owner}
    runs = (*lab.runs(), f"{lab.prefix}planted-{owner}")
    merged = lab.merge({**others, owner: bundle}, note="planted", runs=runs)
    mixture: dict[str, training.Part] = {owner: (1.0, planted)}
    dense = lab.train("planted-dense", lab.public, mixture, lab.expert_flops / len(lab.names), lab.recipe.dense, ".*")
    control = _control(lab, canaries)
    conditions = {
        "public": (lab.public, None),
        "dense": (dense, None),
        "merged": (merged, None),
        f"merged without {owner}": (merged, tuple(name for name in merged.architecture.experts if name != owner)),
        "positive control": (control, None),
    }
    found = {}
    for name, (model, experts) in conditions.items():
        inputs = {"model": model.key, "experts": experts, "planted": bench.text(planted).digest, "real": bench.size.prefixes}

        def make(
            directory: epath.Path, model: training.Trained = model, experts: tuple[str, ...] | None = experts
        ) -> dict[str, Any]:
            return {"counts": _counts(lab, model, experts, planted, canaries)}

        label = name.replace(" ", "-")
        found[name] = stages.facts(bench.stages.run(f"extraction-{label}", inputs, make))["counts"]
    outcome = methods.single(lab, merged, "flex-planted")
    outcome.runs = (*outcome.runs, *dense.runs)
    outcome.extra["extraction"] = found
    return outcome


def _plant(lab: models.Models, owner: str) -> tuple[epath.Path, list[extraction.Canary]]:
    """Writes the owner's text with canaries, and public text beside it, where training looks for both."""
    bench = lab.bench
    source = bench.text(f"{owner}/train")
    share = 1 - config_lib.ExpertConfig().public_fraction
    room = lab.expert_steps * bench.size.batch_size * bench.size.seq_len * share
    texts: list[str] = []
    for index in range(source.num_documents):
        ids = source.document(index)
        room -= len(ids)
        if room < 0 and len(texts) >= bench.size.row_documents:
            break
        texts.append(bench.sources.tokenizer.decode(ids))
    documents, canaries = extraction.plant(texts, CANARIES, SEED)
    home = bench.home / "corpus" / "planted" / f"{owner}-{tree.sha256(repr(documents).encode())[:12]}"
    home.mkdir(parents=True, exist_ok=True)
    if not (home / f"{owner}.jsonl.gz").exists():
        workdir.write(home / f"{PUBLIC}.jsonl.gz", (bench.home / "corpus" / PUBLIC / "train.jsonl.gz").read_bytes())
        _write(home / f"{owner}.jsonl.gz", documents)
    return home / f"{owner}.jsonl.gz", canaries


def _write(path: epath.Path, texts: list[str]) -> None:
    lines = "".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
    workdir.write(path, gzip.compress(lines.encode(), mtime=0))


def _control(lab: models.Models, canaries: list[extraction.Canary]) -> training.Trained:
    """The anchor trained on nothing but the canaries: if this does not leak, the protocol finds nothing."""
    bench = lab.bench
    path = bench.home / "corpus" / "planted" / f"control-{bench.corpus[:12]}.jsonl.gz"
    if not path.exists():
        _write(path, [canary.text for canary in canaries])
    settings = bench.settings(presets.public_training("mini"), CONTROL_STEPS, learning_rate=lab.recipe.dense)
    return bench.train(f"{lab.prefix}planted-control", lab.public, {"canaries": (1.0, path)}, settings)


def _counts(
    lab: models.Models,
    model: training.Trained,
    experts: tuple[str, ...] | None,
    planted: epath.Path,
    canaries: list[extraction.Canary],
) -> dict[str, Any]:
    """Canaries by number of copies (exact continuation), and real documents (samples near the truth; exact continuation)."""
    bench = lab.bench
    tokenizer = bench.sources.tokenizer
    decoder = decode.Decoder(model.params, model.architecture, tokenizer.eos_id, tokenizer.vocab_size)
    ids = [np.asarray(tokenizer.encode(canary.text), np.int32) for canary in canaries]
    copies = [canary.copies for canary in canaries]
    exact = extraction.greedy(decoder, extraction.prefixes(ids, copies, CANARY_TOKENS), experts)
    found = {str(number): _count(count) for number, count in exact.by_copies.items()}
    texts = {canary.text for canary in canaries}
    source = bench.text(planted)
    real = [source.document(index) for index in range(source.num_documents)]
    real = [document for document in real if tokenizer.decode(document) not in texts]
    targets = extraction.prefixes(real, limit=bench.size.prefixes, seed=SEED)
    found["real, exact"] = _count(extraction.greedy(decoder, targets, experts).total)
    found["real, sampled"] = _count(extraction.sampled(decoder, targets, experts, SEED).total)
    return found


def _count(count: extraction.Count) -> dict[str, Any]:
    low, high = count.interval
    return {"attempted": count.attempted, "extracted": count.extracted, "low": low, "high": high}
