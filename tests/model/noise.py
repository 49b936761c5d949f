"""Models of noise, drawn by NumPy: nothing to compile."""

import numpy as np

from flexjax import tree
from flexjax.model import transformer


def params(architecture, seed=0, std=None):
    """A parameter tree of NumPy arrays: weights N(0, std), norms near 1, biases below 0."""
    random = np.random.default_rng(seed)
    std = architecture.config.init_std if std is None else std

    def draw(path, leaf):
        values = random.normal(size=leaf.shape)
        if "norm" in path:
            return (1 + 0.1 * values).astype(np.float32)
        return (-np.abs(values) if path.endswith("bias") else std * values).astype(np.float32)

    return tree.map_with_path(draw, transformer.abstract(architecture))
