"""What it takes to do without router biases, for formats that have no place for them, and what that changes.

A logit bias cannot be folded into a bias-free linear router exactly. But with a direction v such that v.h = 1 on public
states, row + bias * v has nearly the logits of row and bias. The comparison runs the model one layer and one matrix at a
time, so that it needs no more memory than the conversion.
"""

import dataclasses
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from etils import epath

from flexjax import config as config_lib
from flexjax import errors
from flexjax.experts import store
from flexjax.experts.huggingface import expansion
from flexjax.model import attention, router

RIDGE = 1e-4  # relative to the mean squared norm of the states
SAMPLE_TOKENS = 256
SAMPLE = """The river rises in the hills above the town, and for most of the year it is shallow enough to cross on foot. In
spring, when the snow melts, it carries branches and gravel down to the plain, where farmers have built low walls of stone
along its banks. A traveller who follows it for two days reaches the coast. There the water is slow and brown, and in the
evening small boats come back with fish, which are sold on the quay before it is dark. How far is it from the source to
the sea? About 60 kilometres, if one counts every bend; 42 as the crow flies.
"""


@dataclasses.dataclass(frozen=True)
class Routers:
    """The router of every layer, experts in canonical order: rows [L, E, D] and biases [L, E], float32."""

    rows: np.ndarray
    biases: np.ndarray

    def dropped(self) -> "Routers":
        """The same rows without biases."""
        return Routers(self.rows, np.zeros_like(self.biases))

    def folded(self, directions: np.ndarray) -> "Routers":
        """Biases folded into the rows along one direction per layer, [L, D]."""
        rows = self.rows + self.biases[:, :, None] * directions[:, None]
        return Routers(rows.astype(np.float32), np.zeros_like(self.biases))


@dataclasses.dataclass(frozen=True)
class Sample:
    """Token ids and the bytes of the text that they encode after the first; 0 bytes if they come from no text."""

    tokens: np.ndarray
    num_bytes: int


def routers_of(anchor: store.Artefact, bundles: Mapping[str, store.Artefact]) -> Routers:
    """Reads all rows and biases."""
    rows, biases = [], []
    for name in router.canonical_order([config_lib.PUBLIC, *bundles]):
        source = bundles.get(name, anchor)
        rows.append(source.tensor("expert/router/row").astype(np.float32))
        if name in bundles:
            biases.append(source.tensor("expert/router/bias").astype(np.float32))
            store.check_content("expert/router/bias", biases[-1], source.label)
        else:
            biases.append(np.zeros(len(rows[-1]), np.float32))
    return Routers(np.stack(rows, axis=1), np.stack(biases, axis=1))


def direction(states: np.ndarray) -> tuple[np.ndarray, float]:
    """Ridge regression of 1 on states [S, D]: returns v [D] and the standard deviation of v.h - 1."""
    h = states.astype(np.float64)
    ridge = RIDGE * float(np.square(h).sum(axis=1).mean())
    if len(h) < h.shape[1]:
        v = h.T @ np.linalg.solve(h @ h.T + ridge * np.eye(len(h)), np.ones(len(h)))
    else:
        v = np.linalg.solve(h.T @ h + ridge * np.eye(h.shape[1]), h.sum(axis=0))
    return v.astype(np.float32), float(np.sqrt(np.mean(np.square(h @ v - 1))))


def fold(anchor: store.Artefact, routers: Routers, sample: Sample) -> tuple[Routers, dict[str, Any]]:
    """Folds biases along directions fitted on the anchor's public states, or, if it keeps none, on its states on a sample."""
    stored = "statistics/states" in anchor.manifest["tensors"]
    vectors, residuals = [], []

    def fit(layer: int, states: np.ndarray) -> None:
        v, residual = direction(states)
        vectors.append(v)
        residuals.append(residual)

    if stored:
        for layer in range(len(routers.rows)):
            fit(layer, anchor.slice_at("statistics/states", layer)[0])
    else:
        stream(anchor, {}, [None], 1, sample.tokens, fit)
    states = "the anchor's public states" if stored else "the sample"
    return routers.folded(np.stack(vectors)), {"fitted_on": states, "residual": [round(r, 4) for r in residuals]}


def stream(
    anchor: store.Artefact,
    bundles: Mapping[str, store.Artefact],
    variants: Sequence[Routers | None],
    top_k: int,
    tokens: np.ndarray,
    watch: Callable[[int, np.ndarray], None] | None = None,
) -> np.ndarray:
    """Logits [variants, T, V] of one sequence under several routers (None: the public expert alone), layer by layer.

    `watch(layer, states [T, D])` is shown what the first variant's routers read.
    """
    config, names = store.config_of(anchor), router.canonical_order([config_lib.PUBLIC, *bundles])
    rotary = attention.rotary(jnp.arange(len(tokens))[None], config.head_dim, config.rope_theta)
    mask = attention.causal_mask(len(tokens), None)
    h = jnp.asarray(np.stack([_embed(anchor, tokens)] * len(variants)))
    for layer in range(config.num_layers):
        leaves = {
            part: {name: _slice(anchor, f"layers/{part}/{name}", layer) for name in members}
            for part, members in (("attention", ("q", "k", "v", "o", "q_norm", "k_norm")), ("norms", ("attention", "ffn")))
        }
        h, _ = attention.block(h, leaves, config, rotary, mask)
        if watch is not None:
            watch(layer, np.asarray(h[0]))
        gates = np.concatenate([_gates(h[i : i + 1], variant, layer, top_k) for i, variant in enumerate(variants)])
        x, y = np.asarray(h), np.zeros(h.shape, np.float32)
        for e, name in enumerate(names):
            y += gates[..., e, None] * _expert(anchor, bundles.get(name, anchor), layer, x)
        h = h + attention.rms_norm(jnp.asarray(y), jnp.asarray(leaves["norms"]["ffn"]), config.norm_eps)
    norm = jnp.asarray(anchor.tensor("head/norm").astype(np.float32))
    return _logits(anchor, np.asarray(attention.rms_norm(h, norm, config.norm_eps)), config)


def compare(
    anchor: store.Artefact,
    bundles: Mapping[str, store.Artefact],
    before: Routers,
    after: Routers,
    top_k: int,
    sample: Sample,
) -> dict[str, Any]:
    """What exchanging the routers changes on a sample: logits, and bits per byte (per token if there is no text)."""
    logits = stream(anchor, bundles, [before, after], top_k, sample.tokens)
    difference = np.abs(logits[0] - logits[1])
    unit = "bits_per_byte" if sample.num_bytes else "bits_per_token"
    count = sample.num_bytes or len(sample.tokens) - 1
    bits = [round(_nats(variant, sample.tokens) / math.log(2) / count, 5) for variant in logits]
    return {
        "tokens": len(sample.tokens),
        "max_logit_difference": float(difference.max()),
        "mean_logit_difference": float(difference.mean()),
        f"{unit}_before": bits[0],
        f"{unit}_after": bits[1],
    }


def _slice(source: store.Artefact, path: str, layer: int) -> np.ndarray:
    return source.slice_at(path, layer)[0].astype(np.float32)


def _embed(anchor: store.Artefact, tokens: np.ndarray) -> np.ndarray:
    out, first = np.zeros((len(tokens), store.config_of(anchor).d_model), np.float32), 0
    for rows in anchor.slices_of("embed/embedding"):
        here = (tokens >= first) & (tokens < first + len(rows))
        out[here] = rows[tokens[here] - first].astype(np.float32)
        first += len(rows)
    return out


def _gates(h: Any, routers: Routers | None, layer: int, top_k: int) -> np.ndarray:
    if routers is None:
        return np.ones((*h.shape[:2], 1), np.float32)
    rows, biases = jnp.asarray(routers.rows[layer]), jnp.asarray(routers.biases[layer])
    return np.asarray(router.dense_gates(router.route(h, rows, biases, top_k, None)))


def _expert(anchor: store.Artefact, source: store.Artefact, layer: int, x: np.ndarray) -> np.ndarray:
    gate = x @ _matrix(anchor, source, "expert/ffn/gate", layer)
    hidden = gate / (1 + np.exp(-np.maximum(gate, -80))) * (x @ _matrix(anchor, source, "expert/ffn/up", layer))
    return hidden @ _matrix(anchor, source, "expert/ffn/down", layer)


def _matrix(anchor: store.Artefact, source: store.Artefact, path: str, layer: int) -> np.ndarray:
    return expansion.matrix(anchor, source, path, layer).astype(np.float32)


def _logits(anchor: store.Artefact, hidden: np.ndarray, config: config_lib.ModelConfig) -> np.ndarray:
    out, first = np.zeros((*hidden.shape[:2], config.vocab_size), np.float32), 0
    for rows in anchor.slices_of("embed/embedding" if config.tied_head else "head/kernel"):
        here = slice(first, first + len(rows))
        if config.tied_head:
            out[..., here] = hidden @ rows.astype(np.float32).T
        else:
            out += hidden[..., here] @ rows.astype(np.float32)
        first += len(rows)
    return out


def _nats(logits: np.ndarray, tokens: np.ndarray) -> float:
    """Summed negative log-likelihood of all tokens after the first."""
    total = 0.0
    for row, token in zip(logits[:-1], tokens[1:], strict=True):
        shifted = row.astype(np.float64) - row.max()
        total += float(np.log(np.exp(shifted).sum()) - shifted[token])
    return total


def sample_tokens(file: epath.PathLike | None, tokenizer: Any, vocab_size: int) -> Sample:
    """The start of a text file (None: a built-in paragraph) as tokens behind an EOS; random ids if there is no tokenizer.

    Raises:
      ConfigError: a file is given but there is no tokenizer, or its ids exceed the vocabulary.
      DataError: the file cannot be read, is no UTF-8 or empty.
    """
    if tokenizer is None:
        if file is not None:
            raise errors.ConfigError("--sample needs a tokenizer, and this anchor has none; leave the flag out")
        return Sample(np.random.default_rng(0).integers(vocab_size, size=SAMPLE_TOKENS), 0)
    try:
        text = SAMPLE if file is None else epath.Path(file).read_bytes().decode("utf-8")
    except (OSError, UnicodeDecodeError):
        raise errors.DataError(f"{file} of --sample cannot be read as UTF-8 text") from None
    if not text:
        raise errors.DataError(f"{file} of --sample is empty; give some text or leave the flag out")
    ids = tokenizer.encode(text[: 16 * SAMPLE_TOKENS])[:SAMPLE_TOKENS]
    tokens = np.concatenate([np.array([tokenizer.eos_id]), ids]).astype(np.int64)
    if tokens.max() >= vocab_size:
        raise errors.ConfigError(f"the tokenizer gives id {tokens.max()}, the model's vocabulary has {vocab_size}")
    return Sample(tokens, len(tokenizer.decode(ids).encode()))
