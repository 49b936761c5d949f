"""A mixture layer as a slow loop says it is, and how far the fast one is off, on the devices at hand."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np

from flexjax import config as config_lib
from flexjax.model import moe, router


def mixture(h: np.ndarray, rows: np.ndarray, experts: Mapping[str, np.ndarray], top_k: int) -> tuple[np.ndarray, np.ndarray]:
    """The mixture of [n, D] in float64, one token and expert after the other, and the experts [n, k] that were chosen."""
    y, chosen = np.zeros(h.shape), []
    for t, x in enumerate(h):
        logits = rows @ x
        weights = np.exp(logits - logits.max())
        chosen.append(np.argsort(-weights, kind="stable")[:top_k])
        for e in chosen[-1]:
            gate = x @ experts["gate"][e]
            inner = gate / (1 + np.exp(-gate)) * (x @ experts["up"][e])
            y[t] += weights[e] / weights.sum() * (inner @ experts["down"][e])
    return y, np.stack(chosen)


def deviation(layer: tuple[int, int, int], experts: int, dtype: str) -> tuple[float, float]:
    """Of a layer with 2 active experts: the relative error norm where routing agrees, and the share of tokens where not.

    `layer`: tokens, D and F. Inputs are random, other ones each time.
    """
    (n, d, f), random = layer, np.random.default_rng()
    owners = tuple(f"e{e}" for e in range(1, experts))
    shapes = {"gate": (experts, d, f), "up": (experts, d, f), "down": (experts, f, d)}
    ffn = {part: jnp.asarray(random.normal(size=shape) / shape[1] ** 0.5, dtype) for part, shape in shapes.items()}
    h, rows = jnp.asarray(random.normal(size=(1, n, d)), dtype), jnp.asarray(random.normal(size=(experts, d)) / 4, jnp.float32)
    banks = (config_lib.Bank("public", ("public",), f, biased=False), config_lib.Bank("owners", owners, f))

    @jax.jit
    def run(h: jax.Array, rows: jax.Array, ffn: dict[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        routing = router.route(h, rows, jnp.zeros(experts), 2, None)
        parts = [{part: w[own] for part, w in ffn.items()} for own in (slice(1), slice(1, None))]
        return moe.apply(h, parts, banks, routing, None), routing.indices

    y, chosen = (np.asarray(x.astype(jnp.float32), np.float64)[0] for x in run(h, rows, ffn))
    exact = [np.asarray(x.astype(jnp.float32), np.float64) for x in (h[0], rows, *ffn.values())]
    expected, ours = mixture(exact[0], exact[1], dict(zip(ffn, exact[2:], strict=True)), 2)
    alike = (np.sort(chosen) == np.sort(ours)).all(axis=1)
    error = np.linalg.norm((y - expected)[alike]) / np.linalg.norm(expected[alike])
    return float(error), float(1 - alike.mean())
