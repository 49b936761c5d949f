"""Whole models on a mesh: drawn there, or laid there."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flexjax import sharding, tree
from flexjax.model import transformer


def init(architecture: transformer.Architecture, seed: int, mesh: Mesh) -> tree.Tree:
    """The parameters of `transformer.init`, each device drawing its own part; they do not depend on the mesh."""
    places = _places(transformer.abstract(architecture), architecture, mesh)
    return jax.jit(lambda: transformer.init(architecture, seed), out_shardings=places)()


def place(params: tree.Tree, architecture: transformer.Architecture, mesh: Mesh) -> tree.Tree:
    """Lays a whole model, which every process holds, on the mesh; banks of experts that live apart are filled up."""
    params = pad(params, architecture, mesh)
    return jax.tree.map(sharding.put, params, _places(params, architecture, mesh))


def assemble(
    build: Callable[..., tree.Tree], architecture: transformer.Architecture, mesh: Mesh, *parts: tree.Tree
) -> tree.Tree:
    """`build(*parts)` on the mesh: a whole model made of trees that lie there or in memory, never whole anywhere."""
    everywhere = sharding.sharding(mesh, ())
    here = jax.tree.map(lambda leaf: leaf if isinstance(leaf, jax.Array) else sharding.put(leaf, everywhere), parts)

    def made(*parts: tree.Tree) -> tree.Tree:
        return pad(build(*parts), architecture, mesh)

    return jax.jit(made, out_shardings=_places(jax.eval_shape(made, *here), architecture, mesh))(*here)


def pad(params: tree.Tree, architecture: transformer.Architecture, mesh: Mesh | None) -> tree.Tree:
    """Fills each bank of experts that live apart up to a multiple of the `expert` axis, with experts that get no token."""
    parts, apart = sharding.size(mesh, "expert"), transformer.living_apart(architecture)
    if parts == 1 or not apart:
        return params

    def fill(path: str, leaf: Any) -> Any:
        missing = -leaf.shape[1] % parts if path.startswith(apart) else 0
        return leaf if not missing else jnp.pad(leaf, [(0, missing if axis == 1 else 0) for axis in range(leaf.ndim)])

    return tree.map_with_path(fill, params)


def _places(params: tree.Tree, architecture: transformer.Architecture, mesh: Mesh) -> Any:
    return sharding.of_state(params, transformer.logical_axes(architecture), mesh)
