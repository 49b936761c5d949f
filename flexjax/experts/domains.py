"""Domain rows: the router row with which an owner's expert starts, made without seeing any other owner's text.

The method belongs to the anchor, so that the rows of owners who never meet live in one space:

- `logistic`  per layer, the logistic regression "mine against public" on the anchor's residual states; the public row is 0,
              so a row's logit is the log-odds of its domain.
- `mean`      the mean residual state, as in the paper (FlexOlmo, section 3.3), and its control.
- `text`      mean TF-IDF vector of the documents, projected as fitted on public text; the same vector in all layers.
- `random`    a random direction, the control.

All but `logistic` are scaled per layer to unit logits on public states, since the router reads un-normalised states.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jaxtyping import Float, Int

from flexjax import errors, sharding, tree
from flexjax.data import tokens as tokens_lib
from flexjax.model import placement, transformer

METHODS = ("logistic", "mean", "text", "random")
LEAST_DOCUMENTS = 1000  # an owner's row must not describe a handful of documents
RIDGE = 1e-2  # of the logistic regression, relative to the mean squared state
BATCH = 16

States = Float[np.ndarray, "L S D"]
Rows = Float[np.ndarray, "L D"]


def check_method(method: str) -> None:
    """Raises ConfigError for an unknown method."""
    if method not in METHODS:
        raise errors.ConfigError(f"anchor.rows is '{method}', expected one of {', '.join(METHODS)}")


def choose(source: tokens_lib.TokenSource, count: int, seed: int) -> Int[np.ndarray, " C"]:
    """Random document numbers, at most `count`, without repetition."""
    chosen = np.random.default_rng(seed).permutation(source.num_documents)[:count]
    return np.sort(chosen)


def choose_owner(source: tokens_lib.TokenSource, count: int, name: str, seed: int) -> Int[np.ndarray, " C"]:
    """An owner's documents behind its row.

    Raises:
      ConfigError: fewer than 1000 are asked for. DataError: the owner has too few.
    """
    if count < LEAST_DOCUMENTS:
        raise errors.ConfigError(f"expert.row_documents={count} must be at least {LEAST_DOCUMENTS}, or the row describes a few")
    if source.num_documents < count:
        raise errors.DataError(
            f"expert '{name}' has {source.num_documents} documents, its domain row needs {count}; "
            "give more documents or split long ones"
        )
    return choose(source, count, seed)


def states(
    architecture: transformer.Architecture,
    params: tree.Tree,
    source: tokens_lib.TokenSource,
    documents: Int[np.ndarray, " C"],
    seq_len: int,
    count: int,
    seed: int,
    mesh: Mesh,
) -> States:
    """The residual states that routers read, at `count` random tokens of the documents (one random window of each)."""
    params = placement.place(params, architecture, mesh)
    compute = transformer.Compute(mesh=mesh)
    batch = sharding.round_up(BATCH, mesh)
    rng = np.random.default_rng(seed)
    windows = [_window(source, int(document), seq_len, rng) for document in documents]
    per_document = -(-count // len(windows))
    # position 0 is the EOS before the document; padding lies behind it, unseen by causal attention
    drawn = [rng.integers(1, len(window), per_document) for window in windows]
    rows = sharding.sharding(mesh, ("batch", None))

    @jax.jit
    def run(params: tree.Tree, tokens: jax.Array, positions: jax.Array) -> jax.Array:
        kept = transformer.forward(params, tokens, architecture, compute, keep_states=True).states
        assert kept is not None  # of all positions: they stay on their devices
        kept = sharding.constrain(kept, mesh, None, "batch", None, None)
        return jnp.take_along_axis(kept, positions[None, :, :, None], axis=2)

    collected = []
    for first in range(0, len(windows), batch):
        group = windows[first : first + batch]
        ids = np.full((batch, seq_len), source.eos_id, np.int32)
        positions = np.zeros((batch, per_document), np.int32)
        for row, window in enumerate(group):
            ids[row, : len(window)], positions[row] = window, drawn[first + row]
        found = sharding.fetch(run(params, sharding.put(ids, rows), sharding.put(positions, rows)))
        collected += list(found[:, : len(group)].swapaxes(0, 1))
    everything = np.concatenate(collected, axis=1)
    return everything[:, np.sort(rng.permutation(everything.shape[1])[:count])]


def _window(source: tokens_lib.TokenSource, document: int, seq_len: int, rng: np.random.Generator) -> np.ndarray:
    ids = source.document(document)
    start = int(rng.integers(0, max(1, len(ids) - seq_len + 2)))
    return np.concatenate([[source.eos_id], ids[start : start + seq_len - 1]]).astype(np.int32)


def logistic_rows(mine: States, public: States, iterations: int = 12) -> Rows:
    """Per-layer ridge logistic regression through the origin by Newton's method, both classes weighing the same."""
    return np.stack(
        [_logistic(m.astype(np.float64), p.astype(np.float64), iterations) for m, p in zip(mine, public, strict=True)]
    )


def _logistic(mine: np.ndarray, public: np.ndarray, iterations: int) -> np.ndarray:
    x = np.concatenate([mine, public])
    y = np.concatenate([np.ones(len(mine)), np.zeros(len(public))])
    weight = np.concatenate([np.full(len(mine), 0.5 / len(mine)), np.full(len(public), 0.5 / len(public))])
    ridge = RIDGE * np.mean(np.square(x)) * np.eye(x.shape[1])
    row = np.zeros(x.shape[1])
    for _ in range(iterations):
        p = 1 / (1 + np.exp(-np.clip(x @ row, -30, 30)))
        gradient = x.T @ (weight * (p - y)) + ridge @ row
        hessian = (x * (weight * p * (1 - p))[:, None]).T @ x + ridge
        row = row - np.linalg.solve(hessian, gradient)
    return row.astype(np.float32)


def scaled(vectors: Float[np.ndarray, "... D"], public: States) -> Rows:
    """One vector, or one per layer, scaled to logits of root mean square 1 on public states."""
    rows = np.broadcast_to(vectors, (public.shape[0], public.shape[2])).astype(np.float64)
    logits = np.einsum("LSD,LD->LS", public, rows)
    return (rows / np.sqrt(np.mean(np.square(logits), axis=1, keepdims=True) + 1e-12)).astype(np.float32)


def text_projection(source: tokens_lib.TokenSource, documents: Int[np.ndarray, " C"], vocab: int, width: int) -> np.ndarray:
    """Fits TF-IDF and its first singular directions on public documents; returns [V, D], inverse frequencies included."""
    counts = np.stack([_counts(source, int(document), vocab) for document in documents])
    inverse = np.log((1 + len(counts)) / (1 + (counts > 0).sum(axis=0))) + 1
    weighted = counts * inverse
    weighted /= np.linalg.norm(weighted, axis=1, keepdims=True) + 1e-12
    directions = np.linalg.svd(weighted, full_matrices=False)[2][:width]
    padded = np.zeros((width, vocab))
    padded[: len(directions)] = directions
    return (inverse[:, None] * padded.T).astype(np.float32)


def text_vector(source: tokens_lib.TokenSource, documents: Int[np.ndarray, " C"], projection: np.ndarray) -> np.ndarray:
    """Mean of the documents' projected, normalised TF-IDF vectors, [D]."""
    total = np.zeros(projection.shape[1])
    for document in documents:
        vector = _counts(source, int(document), projection.shape[0]) @ projection
        total += vector / (np.linalg.norm(vector) + 1e-12)
    return total / len(documents)


def _counts(source: tokens_lib.TokenSource, document: int, vocab: int) -> np.ndarray:
    return np.bincount(source.document(document), minlength=vocab)[:vocab].astype(np.float32)


def random_vector(width: int, seed: int) -> np.ndarray:
    """A standard normal vector, [D]."""
    return np.random.default_rng(seed).standard_normal(width)
