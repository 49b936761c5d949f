"""A merged model taken through a text with one layer of weights in memory, so that a large one fits a small machine.

The order is that of the forward pass, with all windows at layer l before layer l + 1. What the routers read at a layer is
shown to the caller, who answers with the layer's biases, and so decides what the layers above see.
"""

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Bool, Float, Int

from flexjax import config as config_lib
from flexjax import errors, tree
from flexjax.data import tokens as tokens_lib
from flexjax.experts import models, store
from flexjax.model import attention, router, transformer

TOKENS = 16_384  # of a sample
LEAST_TOKENS = 256
BATCH_TOKENS = 4096  # at once; results are bit-identical for one value of it

Logits = Float[np.ndarray, "S E"]
Step = Callable[..., Any]
Choose = Callable[[int, Logits], Float[np.ndarray, " E"]]


@dataclasses.dataclass
class Sample:
    """Windows of public text, each an EOS and consecutive tokens; EOS and padding are context and never counted."""

    tokens: Int[np.ndarray, "N T"]
    eos_id: int

    @property
    def segments(self) -> Int[np.ndarray, "N T"]:
        """Document numbers within a window."""
        return np.cumsum(self.tokens == self.eos_id, axis=1, dtype=np.int32)

    @property
    def counted(self) -> Bool[np.ndarray, "N T"]:
        """True at tokens of the text."""
        return self.tokens != self.eos_id

    @property
    def digest(self) -> str:
        """SHA-256 of the windows: what a calibration entry calls `text`."""
        header = tree.canonical_json({"shape": list(self.tokens.shape), "eos": self.eos_id})
        return tree.sha256(header + self.tokens.astype("<i4").tobytes())


def sample(source: tokens_lib.TokenSource, *, seq_len: int, count: int = TOKENS) -> Sample:
    """At most `count` tokens of a text in windows spread evenly over it; no seed, no order of documents.

    Args:
      source: public text in the anchor's tokenizer.
      seq_len: window length. On CPU, attention takes 4 bytes * heads * seq_len for each of the `BATCH_TOKENS` tokens.
      count: upper bound, at least a window.

    Raises:
      ConfigError: sizes that make no window. DataError: the text is too short.
    """
    if seq_len < 2 or count < seq_len:
        raise errors.ConfigError(f"calibration: {count} tokens in windows of {seq_len}; give at least one window of 2 or more")
    body = seq_len - 1
    windows = -(-source.num_tokens // body)
    chosen = np.unique(np.linspace(0, max(0, windows - 1), min(windows, count // seq_len)).round().astype(np.int64))
    ids = np.full((len(chosen), seq_len), source.eos_id, np.int32)
    for row, window in zip(ids, chosen.tolist(), strict=True):
        piece = source.read(window * body, (window + 1) * body)
        row[1 : 1 + len(piece)] = piece
    found = Sample(ids, source.eos_id)
    if found.counted.sum() < LEAST_TOKENS:
        raise errors.DataError(f"calibration: {found.counted.sum()} tokens of public text, expected {LEAST_TOKENS}; give more")
    return found


def architecture(anchor: store.Artefact, bundles: Mapping[str, store.Artefact], top_k: int) -> transformer.Architecture:
    """What an anchor and bundles would be as one model."""
    return models.architecture(models.Model(anchor.directory, {}, anchor, dict(bundles)), top_k)


def descend(
    anchor: store.Artefact,
    bundles: Mapping[str, store.Artefact],
    architecture: transformer.Architecture,
    text: Sample,
    choose: Choose,
) -> None:
    """Takes a text through a model layer by layer; `choose(layer, logits)` gives the layer's biases, in canonical order."""
    config = architecture.config
    if text.tokens.max() >= config.vocab_size:
        raise errors.DataError(f"token {text.tokens.max()} of the public text is not of {anchor.label}; use its tokenizer")
    holders = {config_lib.PUBLIC: anchor, **bundles}
    size = max(1, BATCH_TOKENS // text.tokens.shape[1])
    parts = [slice(start, start + size) for start in range(0, len(text.tokens), size)]
    segments, counted = text.segments, text.counted
    states = _embed(anchor, text.tokens, config.d_model)
    attend, mix = _steps(dataclasses.astuple(config), architecture.banks, architecture.top_k)
    for layer in range(config.num_layers):
        paths = [path for path in anchor.manifest["tensors"] if path.startswith("layers/")]
        shared = tree.unflatten({path.removeprefix("layers/"): _slice(anchor, path, layer)[0] for path in paths})
        rows = np.concatenate([_slice(holders[name], "expert/router/row", layer) for name in architecture.experts])
        logits = []
        for part in parts:
            states[part], found = attend(states[part], shared, rows.astype(np.float32), segments[part])
            logits.append(np.asarray(found)[counted[part]])
        biases = choose(layer, np.concatenate(logits).astype(np.float64)).astype(np.float32)
        if layer == config.num_layers - 1:
            return  # no router reads what this layer's experts make
        experts = {
            bank.name: _bank(bank, [holders[name] for name in bank.experts], layer, rows, biases, architecture.experts)
            for bank in architecture.banks
        }
        for part in parts:
            states[part] = mix(states[part], {"norms": shared["norms"]}, experts, segments[part])


@functools.lru_cache(maxsize=4)
def _steps(config: tuple[Any, ...], banks: tuple[config_lib.Bank, ...], top_k: int) -> tuple[Step, Step]:
    """The two halves of a layer, compiled once for all layers and for whoever comes again with the same shapes."""
    architecture = transformer.Architecture(config_lib.ModelConfig(*config), banks, top_k)
    attend = functools.partial(_attend, config=architecture.config)
    return jax.jit(attend), jax.jit(functools.partial(_mix, architecture=architecture))


def _embed(anchor: store.Artefact, tokens: Int[np.ndarray, "N T"], width: int) -> Float[np.ndarray, "N T D"]:
    """Looks tokens up, holding one slice of the table at a time."""
    states, first = np.empty((*tokens.shape, width), np.float32), 0
    for rows in anchor.slices_of("embed/embedding"):
        inside = (tokens >= first) & (tokens < first + len(rows))
        states[inside] = rows[tokens[inside] - first].astype(np.float32)
        first += len(rows)
    return states


def _attend(
    h: jax.Array, layer: tree.Tree, rows: jax.Array, segments: jax.Array, *, config: config_lib.ModelConfig
) -> tuple[jax.Array, jax.Array]:
    """The residual states behind attention, and the router's logits without biases."""
    positions = jnp.broadcast_to(jnp.arange(segments.shape[1]), segments.shape)
    rotary = attention.rotary(positions, config.head_dim, config.rope_theta)
    mask = attention.causal_mask(segments.shape[1], segments)
    state, _ = attention.block(h, layer, config, rotary, mask)
    return state, jnp.einsum("BTD,ED->BTE", _read(state, segments, config), rows)


def _mix(
    h: jax.Array, layer: tree.Tree, experts: tree.Tree, segments: jax.Array, *, architecture: transformer.Architecture
) -> jax.Array:
    read = _read(h, segments, architecture.config)
    return transformer.expert_block(h, layer, experts, architecture, None, read=read)[0]


def _read(state: jax.Array, segments: jax.Array, config: config_lib.ModelConfig) -> jax.Array:
    """What the router reads."""
    return router.remember(state, router.place_in_document(segments), config.router_memory)


def _bank(
    bank: config_lib.Bank,
    members: Sequence[store.Artefact],
    layer: int,
    rows: np.ndarray,
    biases: np.ndarray,
    names: Sequence[str],
) -> tree.Tree:
    """One layer of a bank: an artefact's slice of one layer is a bank of one expert."""
    place = np.array([names.index(name) for name in bank.experts])
    leaves = {"router/row": rows[place], **({"router/bias": biases[place]} if bank.biased else {})}
    for path in members[0].manifest["tensors"]:
        if path.startswith("expert/ffn/"):
            found = [_slice(member, path, layer) for member in members]
            leaves[path.removeprefix("expert/")] = found[0] if len(found) == 1 else np.concatenate(found)
    return tree.unflatten(leaves)


def _slice(holder: store.Artefact, path: str, layer: int) -> np.ndarray:
    rows = holder.slice_at(path, layer)
    store.check_content(path, rows, holder.label)
    return rows
