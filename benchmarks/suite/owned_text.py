"""Text in place of the owners' own, for tuning routers: nobody's private text but what its owner gave.

- `proxy`    public documents that a small classifier takes for the owner's (FlexOlmo, section 3.4);
- `sampled`  what each expert says by itself, beside the public one: it is published, and so is what it says. Pairs have learned
             public text as well, so that much of it is everybody's: the third that speaks most for the expert is kept;
- `donated`  1 % of the owner's text, which nobody trained on.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
from etils import epath

from benchmarks.suite import corpora, scoring, training
from flexjax import config as config_lib
from flexjax import errors
from flexjax.data import proxies
from flexjax.eval import bits_per_byte
from flexjax.inference import decode
from flexjax.train import flops

KINDS = ("proxy", "sampled", "donated")
SAMPLED_ROWS = 32  # generated at once
KEPT = 1 / 3  # of what an expert writes
SHORT = 32  # tokens: shorter documents say little about who wrote them
FILE = "text.jsonl.gz"


def prepare(
    bench: training.Bench, names: Sequence[str], model: training.Trained, kind: str, prefix: str = ""
) -> tuple[dict[str, str | epath.Path], tuple[str, ...]]:
    """A file for each owner, as `training.Bench.text` takes it, and the runs that made them.

    Args:
      bench: the suite.
      names: of the owners.
      model: the merged one, whose experts write.
      kind: one of `KINDS`.
      prefix: of the names of stages.

    Raises:
      ConfigError: there is no such kind. DataError: public text holds nothing like an owner's (proxy).
    """
    if kind not in KINDS:
        raise errors.ConfigError(f"text of kind '{kind}' is unknown; choose {', '.join(KINDS)}")
    if kind == "donated":
        return {name: f"{name}/donated" for name in names}, ()
    if kind == "proxy":
        return {name: _mined(bench, name, prefix) for name in names}, ()
    written = {name: _sampled(bench, model, name, prefix) for name in names}
    chosen = {name: _chosen(bench, model, name, file, prefix) for name, file in written.items()}
    return chosen, tuple(f"{prefix}{stage}-{name}" for stage in ("sampled", "chosen") for name in names)


def _sampled(bench: training.Bench, model: training.Trained, name: str, prefix: str) -> epath.Path:
    """Documents that {public, name} writes from nothing, at temperature 1."""
    inputs = {"model": model.key, "expert": name, "tokens": bench.size.sampled_tokens, "seed": bench.seed}

    def make(directory: epath.Path) -> dict[str, Any]:
        tokenizer, length = bench.sources.tokenizer, bench.size.seq_len
        decoder = decode.Decoder(model.params, model.architecture, tokenizer.eos_id, tokenizer.vocab_size)
        rows = min(SAMPLED_ROWS, -(-bench.size.sampled_tokens // length))
        texts: list[str] = []
        written = 0
        while written < bench.size.sampled_tokens:
            seeds = range(len(texts), len(texts) + rows)
            experts = (config_lib.PUBLIC, name)
            requests = [
                decode.Request([], experts, temperature=1.0, seed=bench.seed * training.STREAMS + seed) for seed in seeds
            ]
            found = decoder.generate(requests, length - 1)  # an EOS stands before them
            texts += [tokenizer.decode(np.asarray(ids)) for ids in found]
            written += sum(map(len, found))
        corpora.write(directory / FILE, [{"text": text} for text in texts if text.strip()])
        cost = flops.forward_per_token(model.architecture, length, (config_lib.PUBLIC, name))
        return {"run": training.entry(written, cost * written, 0, "")}

    directory = bench.stages.run(f"{prefix}sampled-{name}", inputs, make)
    bench.enter(f"{prefix}sampled-{name}", directory)
    return directory / FILE


def _chosen(bench: training.Bench, model: training.Trained, name: str, file: epath.Path, prefix: str) -> epath.Path:
    """Of what {public, name} wrote, the documents that it makes likelier than {public} does, by nats per token."""
    source, masks = bench.text(file), ((config_lib.PUBLIC,), (config_lib.PUBLIC, name))
    inputs = {"model": model.key, "expert": name, "text": source.digest, "kept": KEPT, "short": SHORT}

    def make(directory: epath.Path) -> dict[str, Any]:
        length = bench.size.seq_len
        scorer = bits_per_byte.Scorer(model.architecture, model.params, length, scoring.BATCH)
        public, pair = (scorer.tokens(source, experts=mask) for mask in masks)
        sizes = np.bincount(public.documents)
        gains = np.bincount(public.documents, public.nats - pair.nats) / (sizes + SHORT)
        best_first = np.argsort(-gains, kind="stable")
        count = 1 + int(np.sum(np.cumsum(sizes[best_first]) <= KEPT * sizes.sum()))
        kept = np.sort(best_first[:count]).tolist()
        corpora.write(directory / FILE, [{"text": bench.sources.tokenizer.decode(source.document(index))} for index in kept])
        cost = sum(flops.forward_per_token(model.architecture, length, mask) for mask in masks)
        return {"run": training.entry(source.num_tokens, cost * source.num_tokens, 0, ""), "documents": count}

    directory = bench.stages.run(f"{prefix}chosen-{name}", inputs, make)
    bench.enter(f"{prefix}chosen-{name}", directory)
    return directory / FILE


def _mined(bench: training.Bench, name: str, prefix: str) -> epath.Path:
    """The public passages that look most like an owner's; the owner does the looking."""
    public, mine = bench.text(f"{config_lib.PUBLIC}/train"), bench.text(f"{name}/train")

    def make(directory: epath.Path) -> dict[str, Any]:
        found = proxies.mine(public, mine, count=bench.size.proxy_documents, seed=bench.seed)
        texts = [bench.sources.tokenizer.decode(public.document(int(index))) for index in found.documents]
        corpora.write(directory / FILE, [{"text": text} for text in texts])
        return {"log_odds": float(np.median(found.log_odds)), "accuracy": float(found.accuracy)}

    inputs = {"public": public.digest, "mine": mine.digest, "documents": bench.size.proxy_documents, "seed": bench.seed}
    return bench.stages.run(f"{prefix}mined-{name}", inputs, make) / FILE
