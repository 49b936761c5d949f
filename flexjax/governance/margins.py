"""What an owner may tell of its own text so that its expert is not calibrated away where it belongs: a few quantiles.

The margin of a token is h . (row_e - row_public) + b_e in the model {public, e}: the log-odds of the expert against
`public`, with the bias that the bundle holds. A manifest states its quantiles per layer, or nothing.
"""

from typing import Any

import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float

from flexjax import config as config_lib
from flexjax import sharding, tree
from flexjax.data import tokens as tokens_lib
from flexjax.experts import domains, loading, store
from flexjax.model import transformer

QUANTILES = (0.1, 0.5, 0.9)
TOKENS = 16_384

Layers = Float[np.ndarray, " L"]
Pair = tuple[transformer.Architecture, tree.Tree]


def measure(
    anchor: store.Artefact,
    expert: store.Artefact | Pair,
    source: tokens_lib.TokenSource,
    *,
    seq_len: int,
    mesh: Mesh | None = None,
    count: int = TOKENS,
    documents: int = domains.LEAST_DOCUMENTS,
    seed: int = 0,
) -> dict[str, Any]:
    """What an owner may tell of its own text: quantiles of h . (row_e - row_public) + b_e in the model {public, e}, per layer.

    PRIVACY: these numbers, three per layer, describe private text and are not differentially private. They are taken over at
    least 1000 documents and rounded to 0.01; an owner for whom that is too much leaves them out.

    Args:
      anchor: the expert's.
      expert: its bundle, or the pair in memory as (architecture, parameters with effective biases).
      source: the owner's text.
      seq_len: tokens of a window; one is taken of each document.
      mesh: where the pair is, or is to be laid; None: one device.
      count: tokens.
      documents: how many of the owner's.
      seed: of their choice.

    Returns:
      {"quantiles": [0.1, 0.5, 0.9], "values": [L][3]}, the field `margins` of a bundle's manifest.

    Raises:
      ConfigError: fewer than 1000 documents are asked for. DataError: the owner has fewer.
    """
    mesh = sharding.one_device() if mesh is None else mesh
    if isinstance(expert, store.Artefact):
        expert = loading.load(anchor, {expert.manifest["name"]: expert}, 2, mesh)
    architecture, params = expert
    _, name = architecture.experts  # of a pair
    chosen = domains.choose_owner(source, documents, name, seed)
    states = domains.states(architecture, params, source, chosen, seq_len, count, seed, mesh).astype(np.float64)
    rows, biases = {}, {}
    for bank in architecture.banks:
        router = {part: sharding.fetch(leaf) for part, leaf in params["experts"][bank.name]["router"].items()}
        for slot, member in enumerate(bank.experts):
            rows[member] = router["row"][:, slot].astype(np.float64)
            biases[member] = router["bias"][:, slot].astype(np.float64) if "bias" in router else np.zeros(len(states))
    margin = np.einsum("LSD,LD->LS", states, rows[name] - rows[config_lib.PUBLIC]) + biases[name][:, None]
    values = np.quantile(margin, QUANTILES, axis=1).T
    return {"quantiles": list(QUANTILES), "values": [[round(float(value), 2) for value in layer] for layer in values]}


def floors(bundle: store.Artefact, own: Layers, ignore_margins: bool) -> Float[np.ndarray, " L"]:
    """The least bias per layer that an owner's margins allow; -inf where they say nothing."""
    stated = bundle.manifest.get("margins")
    if ignore_margins or stated is None:
        return np.full(own.shape, -np.inf)
    medians = np.array(stated["values"], np.float64)[:, stated["quantiles"].index(0.5)]
    split = own.astype(np.float64) - medians  # where the median token goes half to the expert, half to public
    return np.where(split < 0, split, -np.inf)


def shares(bundle: store.Artefact, own: Layers, bias: Layers) -> tuple[Layers, Layers] | None:
    """Estimated shares on the owner's own text: sigmoid over margins spread linearly between and beyond the quantiles."""
    stated = bundle.manifest.get("margins")
    if stated is None:
        return None
    at, grid = np.array(stated["quantiles"]), (np.arange(200) + 0.5) / 200
    place = np.clip(np.searchsorted(at, grid) - 1, 0, len(at) - 2)
    values = np.array(stated["values"], np.float64)
    slope = np.diff(values, axis=1)[:, place] / np.diff(at)[place]
    margin = values[:, place] + slope * (grid - at[place])  # [L, 200]
    moved = (bias.astype(np.float64) - own)[:, None]
    return sigmoid(margin).mean(axis=1), sigmoid(margin + moved).mean(axis=1)


def sigmoid(x: np.ndarray) -> np.ndarray:
    """1 / (1 + exp(-x)), without overflow."""
    return 1 / (1 + np.exp(-np.clip(x, -700, 700)))
