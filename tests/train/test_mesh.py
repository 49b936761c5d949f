"""A step on a mesh of eight devices is the step of one device: loss, gradients, and where everything lies."""

import dataclasses
import itertools

import jax
import numpy as np
import pytest

from flexjax import checkpoint, errors, sharding, tree
from flexjax import config as config_lib
from flexjax.model import transformer
from flexjax.train import program, step
from tests.train import tiny

MODEL = dataclasses.replace(tiny.MODEL, num_kv_heads=4, d_ff=64)
JOINT = transformer.Architecture(MODEL, (config_lib.Bank("joint", ("public", "a", "b", "c", "d"), 64, biased=False),), top_k=2)
WIDE = config_lib.Bank("w64", ("a", "b", "c"), 64)
NARROW = config_lib.Bank("w32", ("d", "e", "f"), 32)
ARCHITECTURES = {
    "dense": transformer.Architecture(MODEL, (tiny.PUBLIC,)),
    "pair": transformer.Architecture(MODEL, (tiny.PUBLIC, dataclasses.replace(tiny.MATH, d_ff=32)), top_k=2),
    "joint": JOINT,
    "merged": transformer.Architecture(MODEL, (tiny.PUBLIC, WIDE, NARROW), top_k=3),
    "all active": transformer.Architecture(MODEL, (tiny.PUBLIC, WIDE), top_k=4),
}
TRAINABLE = {
    "dense": ".*",
    "pair": "experts/math/.*",
    "joint": ".*",
    "merged": "experts/w.*",
    "all active": "experts/(?!public/).*/router/.*",
}
MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "tensor 4": {"data": 2, "tensor": 4},
    "expert 8": {"expert": 8},
    "data 2 fsdp 2 tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp 2 tensor 2 expert 2": {"fsdp": 2, "tensor": 2, "expert": 2},
    "data 2 expert 4": {"data": 2, "expert": 4},
    "fsdp 2 expert 4, frozen whole": {"fsdp": 2, "expert": 4, "frozen": "replicated"},
}
HOW = {
    "plain": {},
    "remat": {"remat": "full"},
    "dots": {"remat": "dots"},
    "scan": {"scan_layers": True},
    "scan, remat": {"scan_layers": True, "remat": "full"},
    "accumulation": {"accumulation": 2},
    "accumulation, scan, remat": {"accumulation": 2, "scan_layers": True, "remat": "full"},
}
COVER = [  # every mesh, every model and every way of computing, in pairs
    (name, mesh, how)
    for index, (name, mesh) in enumerate(itertools.product(ARCHITECTURES, MESHES))
    for how in [list(HOW)[(index + index // len(HOW)) % len(HOW)]]
]
BATCH_SIZE = 16


def mesh_of(sizes):
    return sharding.make_mesh(config_lib.MeshConfig(**sizes))


def job(name, mesh, choices, how):
    settings = tiny.settings(
        "dense",
        **{"trainable": TRAINABLE[name], "batch_size": BATCH_SIZE, "router_z_loss": 1e-2, "load_balance_loss": 0.0} | HOW[how],
    )
    return program.Program(ARCHITECTURES[name], settings, mesh, config_lib.MeshConfig(**choices), tiny.SEQ_LEN)


def params_of(name):
    params = tree.flatten(transformer.init(ARCHITECTURES[name], 1))
    rng = np.random.default_rng(3)
    for path, leaf in params.items():
        if path.endswith("router/bias"):
            params[path] = leaf - 0.2
        if path.endswith("router/row"):
            params[path] = leaf + np.asarray(rng.standard_normal(leaf.shape), np.float32)  # tokens really choose
    return tree.unflatten({path: np.asarray(leaf) for path, leaf in params.items()})


def gradients(found):
    """The loss and the gradient of the trainable leaves of a program, without padded slots."""
    compute = transformer.Compute(remat=found.settings.remat, scan=found.settings.scan_layers, mesh=found.mesh)
    head = "head/kernel" in tree.flatten(found.state.trainable)
    gradient = step.make_gradient(found.architecture, compute, found.settings, head)
    return jax.jit(gradient, compiler_options=tiny.QUICK)


_references = {}


def reference(name, how):
    """On one device; what is computed again or in parts changes nothing, so a model has one reference."""
    if name not in _references:
        _references[name] = results(job(name, sharding.one_device(), {}, "plain"), name)
    return _references[name]


def results(found, name):
    state, frozen = found.place(params_of(name))
    batch = found.put_batch(tiny.batch(0, BATCH_SIZE, uneven=True), list(range(BATCH_SIZE)))
    grads, metrics = gradients(found)(state.trainable, frozen, batch)
    return {path: np.asarray(leaf) for path, leaf in tree.flatten(grads).items()}, jax.tree.map(np.asarray, metrics)


def check_equal(name, mesh, how):
    expected, metrics = reference(name, how)
    found, other = results(job(name, mesh_of(MESHES[mesh]), MESHES[mesh], how), name)
    assert other["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    for path, leaf in expected.items():
        got = found[path]
        if "/ffn/" in path:
            assert not np.any(got[:, leaf.shape[1] :]), f"{path}: a slot without an expert has a gradient"
            got = got[:, : leaf.shape[1]]
        scale = np.abs(leaf).max()
        assert np.abs(got - leaf).max() <= 1e-5 * scale + 1e-9, f"{path}: {np.abs(got - leaf).max() / scale:.2g}"
    if "share" in metrics:
        np.testing.assert_allclose(other["share"], metrics["share"], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("name", "mesh", "how"), COVER)
def test_a_mesh_gives_the_loss_and_gradients_of_one_device(name, mesh, how):
    check_equal(name, mesh, how)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh", "how"), list(itertools.product(ARCHITECTURES, MESHES, HOW)))
def test_every_mesh_with_every_model_and_every_way_of_computing(name, mesh, how):
    check_equal(name, mesh, how)


@pytest.mark.parametrize(
    ("before", "after"),
    [("fsdp 8", "data 2 expert 4"), ("expert 8", "data 2 fsdp 2 tensor 2"), ("fsdp 2 tensor 2 expert 2", None)],
)
def test_a_checkpoint_is_restored_exactly_onto_another_mesh(tmp_path, before, after):
    """Five experts: eight slots on one mesh, five or six on the next."""
    first = job("joint", mesh_of(MESHES[before]), MESHES[before], "plain")
    state, _ = first.place(params_of("joint"))
    state = jax.tree.map(lambda leaf: leaf + 1 if leaf.ndim == 3 else leaf, state)  # moments too are not all 0
    checkpoints = checkpoint.Checkpoints(tmp_path, keep=1)
    checkpoints.save(1, state, {})
    checkpoints.wait()
    mesh = sharding.one_device() if after is None else mesh_of(MESHES[after])
    second = job("joint", mesh, {}, "plain")
    like, _ = second.place(params_of("joint"))
    restored = checkpoint.Checkpoints(tmp_path, keep=1).restore(1, like)
    expected, found = (jax.tree_util.tree_leaves_with_path(tree_) for tree_ in (state, restored))
    for (path, leaf), (_, got), like_leaf in zip(expected, found, jax.tree.leaves(like), strict=True):
        assert got.sharding == like_leaf.sharding and got.shape == like_leaf.shape
        leaf, got = np.asarray(leaf), np.asarray(got)
        if leaf.ndim == 4:  # experts: those there are, and zeros
            assert not got[:, 5:].any()
            leaf, got = leaf[:, :5], got[:, :5]
        assert leaf.tobytes() == got.tobytes(), path


def test_a_mesh_that_does_not_split_the_batch_is_refused():
    with pytest.raises(
        errors.ConfigError, match=r"train.batch_size / train.accumulation=4 cannot be split in 8 parts.*work: 4"
    ):
        settings = tiny.settings("dense", batch_size=8, accumulation=2)
        program.Program(ARCHITECTURES["dense"], settings, mesh_of({"data": 8}), config_lib.MeshConfig(), tiny.SEQ_LEN)


def test_each_device_holds_its_part_and_frozen_weights_may_be_whole():
    def held(mesh, path, part):
        found = job("pair", mesh_of(MESHES[mesh]), MESHES[mesh], "plain")
        leaf = tree.flatten(getattr(found, part) if part == "frozen" else found.state.trainable)[path]
        return np.prod(leaf.sharding.shard_shape(leaf.shape)) / np.prod(leaf.shape)

    assert held("fsdp 8", "layers/attention/q", "frozen") == 1 / 8
    assert held("fsdp 2 expert 4, frozen whole", "layers/attention/q", "frozen") == 1
    assert held("fsdp 2 expert 4, frozen whole", "experts/math/ffn/up", "trainable") == 1 / 8
    assert held("data 2 fsdp 2 tensor 2", "experts/math/ffn/up", "trainable") == 1 / 4
