"""How much of an owner's text comes out again, and whether opting out stops it: canaries and real documents.

One owner's text is planted with canaries, once, ten and a hundred times, and an expert and a dense model are trained on it.
Only so much of the text is kept as the expert reads, so that a canary planted a hundred times is read about as often.
"""

from typing import Any

import numpy as np
from etils import epath

from benchmarks.suite import corpora, methods, models, stages, training
from flexjax import config as config_lib
from flexjax import presets, tree, workdir
from flexjax.eval import extraction
from flexjax.inference import decode

PUBLIC = config_lib.PUBLIC
CANARIES = {1: 10, 10: 10, 100: 3}  # how many are planted so many times
CANARY_TOKENS = 50
SEED = 11
CONTROL_STEPS = 300
CONTROL_DOCUMENTS = 5
OWNER = "math"  # every suite has one


def method(lab: models.Models) -> methods.Outcome:
    """The merged model with the planted expert; what each model gives away stands in `extra`."""
    bench, owner = lab.bench, OWNER
    planted, canaries = _plant(lab, owner)
    changes = {"data.train_files": f"{{root}}/planted/{planted.parent.name}/{{domain}}.jsonl.gz"}
    bundle = bench.expert(owner, f"{lab.prefix}planted", lab.rate("expert"), lab.expert_steps, lab.anchor, changes)
    others = {name: other for name, other in lab.experts().items() if name != owner}
    runs = tuple(run for run, name in zip(lab.runs(), lab.names, strict=True) if name != owner)
    runs = (*runs, f"{lab.prefix}planted-{owner}")
    merged = lab.merge({**others, owner: bundle}, note="planted", runs=runs)
    mixture = {**lab.own(owner), owner: (lab.own(owner)[owner][0], planted)}  # as often as the expert reads it
    dense = lab.train("planted-dense", lab.public, mixture, lab.expert_flops / len(lab.names), "dense", ".*")
    control = _control(lab, planted, canaries)
    few = ("positive control",)  # was trained on no more real documents
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
            directory: epath.Path,
            model: training.Trained = model,
            experts: tuple[str, ...] | None = experts,
            limit: int = CONTROL_DOCUMENTS if name in few else bench.size.prefixes,
        ) -> dict[str, Any]:
            return {"counts": _counts(lab, model, experts, planted, canaries, limit)}

        label = name.replace(" ", "-")
        found[name] = stages.facts(bench.stages.run(f"extraction-{label}", inputs, make))["counts"]
    outcome = methods.single(lab, merged, "flex-planted")
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
        corpora.write(home / f"{owner}.jsonl.gz", [{"text": text} for text in documents])
    return home / f"{owner}.jsonl.gz", canaries


def _control(lab: models.Models, planted: epath.Path, canaries: list[extraction.Canary]) -> training.Trained:
    """The anchor trained on canaries and a few real documents alone: if this does not leak, the protocols find nothing."""
    bench = lab.bench
    path = planted.parent / "control.jsonl.gz"
    if not path.exists():
        real = [bench.sources.tokenizer.decode(target) for target in _real(lab, planted, canaries, CONTROL_DOCUMENTS)]
        corpora.write(path, [{"text": text} for text in [*(canary.text for canary in canaries), *real]])
    settings = bench.settings(presets.public_training("mini"), CONTROL_STEPS, learning_rate=lab.rate("dense"))
    return bench.train(f"{lab.prefix}planted-control", lab.public, {"canaries": (1.0, path)}, settings)


def _real(lab: models.Models, planted: epath.Path, canaries: list[extraction.Canary], limit: int) -> list[np.ndarray]:
    """Documents of the planted text that are no canaries, long enough to be asked for."""
    tokenizer, source = lab.bench.sources.tokenizer, lab.bench.text(planted)
    texts, found = {canary.text for canary in canaries}, []
    for index in range(source.num_documents):
        document = source.document(index)
        if len(document) >= extraction.PREFIX_TOKENS + extraction.SAMPLED_TOKENS and tokenizer.decode(document) not in texts:
            found.append(document)
        if len(found) == limit:
            break
    return found


def _counts(
    lab: models.Models,
    model: training.Trained,
    experts: tuple[str, ...] | None,
    planted: epath.Path,
    canaries: list[extraction.Canary],
    limit: int,
) -> dict[str, Any]:
    """Canaries by number of copies (exact continuation), and real documents (samples near the truth; exact continuation)."""
    tokenizer = lab.bench.sources.tokenizer
    decoder = decode.Decoder(model.params, model.architecture, tokenizer.eos_id, tokenizer.vocab_size)
    ids = [np.asarray(tokenizer.encode(canary.text), np.int32) for canary in canaries]
    copies = [canary.copies for canary in canaries]
    exact = extraction.greedy(decoder, extraction.prefixes(ids, copies, CANARY_TOKENS), experts)
    found = {str(number): _count(count) for number, count in exact.by_copies.items()}
    targets = extraction.prefixes(_real(lab, planted, canaries, limit))
    found["real, exact"] = _count(extraction.greedy(decoder, targets, experts).total)
    found["real, sampled"] = _count(extraction.sampled(decoder, targets, experts, SEED).total)
    return found


def _count(count: extraction.Count) -> dict[str, Any]:
    low, high = count.interval
    return {"attempted": count.attempted, "extracted": count.extracted, "low": low, "high": high}
