"""Which experts weigh most: by domain, and token by token in a text that changes domain."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.suite import training
from flexjax import tree
from flexjax.data import pipeline
from flexjax.model import router, transformer

WINDOWS = 16  # looked at of each domain
TEXT = """The committee met on Tuesday and agreed to publish its report before the end of the year.

def mean(values):
    total = 0
    for value in values:
        total += value
    return total / len(values)

Maria has 12 apples and gives a third of them to her brother. She has 12 - 4 = 8 apples left. Let $f$ be a continuous function \
on a closed interval; then $f$ attains its maximum.

The cell membrane regulates what enters and leaves the cell. Students should be able to describe the structure of a protein."""


def _probabilities(model: training.Trained) -> Any:
    """A compiled function from tokens and segments [B, T] to the experts' probabilities, mean over layers, [B, T, E]."""
    architecture = model.architecture
    banks = [model.params["experts"][bank.name]["router"] for bank in architecture.banks]
    order = np.array(router.positions(architecture.banks))
    rows = np.concatenate([np.asarray(bank["row"]) for bank in banks], axis=1)[:, order]
    zero = [np.zeros(np.shape(bank["row"])[:2], np.float32) for bank in banks]
    biases = np.concatenate([np.asarray(b.get("bias", z)) for b, z in zip(banks, zero, strict=True)], axis=1)[:, order]

    @jax.jit
    def run(params: tree.Tree, tokens: jax.Array, segments: jax.Array) -> jax.Array:
        states = transformer.forward(params, tokens, architecture, segments=segments, keep_states=True).states
        logits = jnp.einsum("LBTD,LED->LBTE", states, jnp.asarray(rows)) + biases[:, None, None]
        return jax.nn.softmax(logits, axis=-1).mean(axis=0)

    return lambda tokens, segments: np.asarray(run(model.params, tokens, segments))


def look(bench: training.Bench, model: training.Trained) -> dict[str, Any]:
    """`confusion`: of the tokens of each domain, the share in which each expert weighs most; `examples`: token by token."""
    experts, length = model.architecture.experts, bench.size.seq_len
    run = _probabilities(model)
    confusion = {}
    for domain in bench.suite.domains:
        batches = pipeline.evaluation_batches(bench.text(f"{domain}/report"), seq_len=length, batch_size=WINDOWS)
        batch = next(iter(batches))
        most = run(batch["tokens"], batch["segments"]).argmax(axis=-1)[batch["weights"] > 0]
        confusion[domain] = [round(float((most == index).mean()), 4) for index in range(len(experts))]
    tokenizer = bench.sources.tokenizer
    ids = np.asarray(tokenizer.encode(TEXT), np.int32)[: length - 1]
    row = np.full((1, length), tokenizer.eos_id, np.int32)
    row[0, 1 : len(ids) + 1] = ids
    most = run(row, np.zeros_like(row))[0].argmax(axis=-1)
    pieces = [[piece, experts[index]] for piece, index in zip(_pieces(tokenizer, ids), most[1:], strict=False)]
    return {"confusion": confusion, "examples": [{"domain": "a text of four domains", "pieces": pieces}]}


def _pieces(tokenizer: Any, ids: np.ndarray) -> list[str]:
    """What each token adds to the text."""
    found, before = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        found.append(text[len(before) :])
        before = text
    return found
