"""The mesh and the table of logical axes: what is accepted, what is refused, and how batches are laid out."""

import hypothesis
import jax
import numpy as np
import pytest
from hypothesis import strategies as st
from jax.sharding import PartitionSpec as P

from flexjax import config as config_lib
from flexjax import errors, sharding
from flexjax.model import transformer
from tests.train import tiny

SIZES = st.sampled_from([0, 1, 2, 3, 4, 8])


def mesh(**sizes):
    return sharding.make_mesh(config_lib.MeshConfig(**sizes))


@hypothesis.given(SIZES, SIZES, SIZES, SIZES)
def test_a_mesh_is_made_exactly_of_sizes_that_multiply_to_the_devices(data, fsdp, tensor, expert):
    sizes = [data, fsdp, tensor, expert]
    given = np.prod([size for size in sizes if size])
    fits = (given == 8) if all(sizes) else sizes.count(0) == 1 and 8 % given == 0
    if fits:
        made = mesh(data=data, fsdp=fsdp, tensor=tensor, expert=expert)
        assert made.size == 8 and all(size in (0, made.shape[axis]) for axis, size in zip(sharding.AXES, sizes, strict=True))
    else:
        with pytest.raises(errors.ConfigError, match=r"8 devices.*multiply to 8.*1, 2, 4, 8|of one axis only"):
            mesh(data=data, fsdp=fsdp, tensor=tensor, expert=expert)


@pytest.mark.parametrize(
    ("sizes", "model", "message"),
    [
        ({"tensor": 8}, {}, r"model.num_heads=4 cannot be split in 8 parts \(mesh.tensor=8\).*work: 4"),
        ({"tensor": 4}, {"num_kv_heads": 2}, r"model.num_kv_heads=2 cannot be split in 4 parts.*work: 2"),
        ({"fsdp": 4, "expert": 2}, {"d_model": 36}, r"d_model=36 cannot.*8 parts \(mesh.fsdp=4 x mesh.expert=2\).*6, 9"),
    ],
)
def test_a_dimension_that_cannot_be_split_is_named_with_what_works(sizes, model, message):
    config = config_lib.ModelConfig(**{"num_heads": 4, "num_kv_heads": 4, "head_dim": 8, "d_model": 32} | model)
    architecture = transformer.Architecture(config, transformer.dense_banks(config))
    with pytest.raises(errors.ConfigError, match=message):
        sharding.check(transformer.splits(architecture), mesh(**sizes))


def test_a_mesh_axis_is_used_once_per_array():
    assert sharding.spec(("layer", "expert", "embed", "mlp")) == P(None, ("expert",), ("fsdp",), ("tensor",))
    assert sharding.spec(("layer", "whole", "embed", "mlp")) == P(None, None, ("fsdp", "expert"), ("tensor",))
    assert sharding.spec(("batch", None, "mlp"), sharding.IN_USE) == P(("data", "fsdp", "expert"), None, ("tensor",))


@pytest.mark.parametrize("name", tiny.ARCHITECTURES)
def test_every_dimension_of_every_parameter_has_a_rule(name):
    axes = transformer.logical_axes(tiny.ARCHITECTURES[name])
    shapes = transformer.abstract(tiny.ARCHITECTURES[name])
    for leaf, names in zip(jax.tree.leaves(shapes), jax.tree.leaves(axes, is_leaf=lambda x: isinstance(x, tuple)), strict=True):
        assert len(names) == leaf.ndim and set(names) <= set(sharding.RULES)


@pytest.mark.parametrize("sizes", [{"data": 8}, {"data": 2, "tensor": 4}, {"fsdp": 2, "expert": 2, "tensor": 2}])
def test_the_rows_of_a_batch_come_back_in_order(sizes):
    where = mesh(**sizes)
    mine = sharding.local_rows(where, 16)
    assert mine == list(range(16))
    rows = np.arange(32, dtype=np.int32).reshape(16, 2)
    laid = sharding.put_rows({"x": rows}, mine, where, 16)["x"]
    assert np.array_equal(laid, rows) and laid.sharding == sharding.sharding(where, ("batch", None))
    assert np.array_equal(sharding.fetch(laid), rows)


def test_unknown_choices_are_refused():
    with pytest.raises(errors.ConfigError, match=r"mesh.frozen is 'split', expected one of sharded, replicated"):
        mesh(frozen="split")
