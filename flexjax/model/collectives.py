"""The steps of a forward pass in which devices talk, other than the exchange of tokens between experts (`dispatch`)."""

from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from flexjax import sharding, tree
from flexjax.model import router


def gather(leaves: tree.Tree, axes: tree.Tree, dtype: Any, mesh: Mesh | None, apart: bool) -> tree.Tree:
    """One layer's weights as it computes with them: split over `tensor` alone, cast first so that fewer bytes travel.

    Args:
      leaves: one layer's, of the tree that `transformer.logical_axes` names.
      axes: their logical names, those of the stacked leaves.
      dtype: of the computation.
      mesh: where they lie.
      apart: experts stay where they are; `moe.apply` fetches what their own devices need.
    """

    def use(path: str, leaf: Array, names: tuple[str, ...]) -> Array:
        if "embed" not in names or (apart and "/ffn/" in path):
            return leaf
        return sharding.constrain(leaf.astype(dtype), mesh, *names[1:])

    return tree.map_with_path(use, leaves, axes)


def look_up(embedding: Float[Array, "V D"], tokens: Int[Array, "B T"], dtype: Any, mesh: Mesh | None) -> Float[Array, "B T D"]:
    """Embeds tokens. On a mesh, each device looks its columns up for all sequences of its group, then they are exchanged:
    as many bytes as the activations, where gathering the table would move the vocabulary."""
    if mesh is None or mesh.size == 1:
        return jnp.asarray(embedding)[tokens].astype(dtype)
    group = sharding.RULES["embed"]

    def local(columns: Array, tokens: Array) -> Array:
        tokens = jax.lax.all_gather(tokens, group, tiled=True)
        h = columns[tokens].astype(dtype)
        h = jax.lax.all_to_all(h, group, split_axis=0, concat_axis=2, tiled=True)
        return jax.lax.all_gather(h, "tensor", axis=2, tiled=True)

    of_table, of_batch = sharding.spec(("token", "column")), sharding.spec(("batch", None))
    mapped = jax.shard_map(local, mesh=mesh, in_specs=(of_table, of_batch), out_specs=of_batch, check_vma=False)
    return mapped(embedding, tokens)


def route(h: Array, rows: Array, biases: Array, top_k: int, allowed: Array | None, mesh: Mesh | None) -> router.Routing:
    """The routing rule, by each device for its own tokens: the compiler would gather all of them to choose the top k."""
    if mesh is None or mesh.size == 1:
        return router.route(h, rows, biases, top_k, allowed)
    of_batch, everywhere = sharding.spec(("batch",)), sharding.spec(())

    def local(h: Array, rows: Array, biases: Array, allowed: Array | None) -> router.Routing:
        return router.route(h, rows, biases, top_k, allowed)

    specs = (of_batch, everywhere, everywhere, None if allowed is None else of_batch)
    return jax.shard_map(local, mesh=mesh, in_specs=specs, out_specs=of_batch)(h, rows, biases, allowed)
