"""Low-rank experts in training: what is trained, what it costs, and that no mesh and no way of computing changes it."""

import dataclasses
import functools
import itertools

import jax
import numpy as np
import pytest

from flexjax import config as config_lib
from flexjax import errors, jobs, sharding, tree
from flexjax.experts import surgery
from flexjax.model import transformer
from flexjax.planning import hlo
from flexjax.train import program, step
from tests.model import noise
from tests.train import tiny

MODEL = dataclasses.replace(tiny.MODEL, num_kv_heads=4, init_std=0.2)
PUBLIC = config_lib.Bank("public", ("public",), 64, biased=False)
MATH = config_lib.Bank("math", ("math",), 64, rank=6)
LOW = config_lib.Bank("r4", ("a", "e"), 64, rank=4)
OTHER = config_lib.Bank("r7", ("c",), 64, rank=7)
WIDE = config_lib.Bank("w64", ("b", "f"), 64)
NARROW = config_lib.Bank("w32", ("d",), 32)
ARCHITECTURES = {
    "pair": transformer.Architecture(MODEL, (PUBLIC, MATH), top_k=2),
    "sparse": transformer.Architecture(MODEL, (PUBLIC, LOW, WIDE, OTHER, NARROW), top_k=3),
    "all low": transformer.Architecture(MODEL, (PUBLIC, LOW, OTHER), top_k=2),
    "all active": transformer.Architecture(MODEL, (PUBLIC, LOW, WIDE), top_k=5),
}
TRAINABLE = {
    "pair": "experts/math/.*",
    "sparse": "experts/[rw].*",
    "all low": ".*",
    "all active": "experts/(?!public/).*/router/.*",
}
MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "tensor 4": {"data": 2, "tensor": 4},
    "expert 8": {"expert": 8},
    "data 2 fsdp 2 tensor 2": {"data": 2, "fsdp": 2, "tensor": 2},
    "fsdp 2 tensor 2 expert 2": {"fsdp": 2, "tensor": 2, "expert": 2},
    "fsdp 2 expert 4, frozen whole": {"fsdp": 2, "expert": 4, "frozen": "replicated"},
}
HOW = {
    "plain": {},
    "remat": {"remat": "full"},
    "scan, dots": {"scan_layers": True, "remat": "dots"},
    "accumulation": {"accumulation": 2},
}
COVER = [
    ("pair", "data 2 fsdp 2 tensor 2", "scan, dots"),
    ("pair", "fsdp 2 expert 4, frozen whole", "plain"),
    ("sparse", "fsdp 2 tensor 2 expert 2", "plain"),
    ("sparse", "expert 8", "remat"),
    ("all low", "fsdp 8", "accumulation"),
]
BATCH_SIZE = 16
CHOICES = config_lib.MeshConfig()


def params_of(name):
    """Noise in every leaf, the factors b too; rows so long that tokens choose."""
    params = tree.flatten(noise.params(ARCHITECTURES[name], seed=1))
    return tree.unflatten({path: 5 * leaf if path.endswith("row") else leaf for path, leaf in params.items()})


def job(name, mesh, how="plain", **choices):
    settings = tiny.settings("dense", trainable=TRAINABLE[name], batch_size=BATCH_SIZE, router_z_loss=1e-2, **HOW[how])
    return program.Program(ARCHITECTURES[name], settings, mesh, config_lib.MeshConfig(**choices), tiny.SEQ_LEN)


def results(found, name):
    """Gradient of the trainable leaves, and metrics."""
    compute = transformer.Compute(remat=found.settings.remat, scan=found.settings.scan_layers, mesh=found.mesh)
    head = "head/kernel" in tree.flatten(found.state.trainable)
    gradient = jax.jit(step.make_gradient(found.architecture, compute, found.settings, head), compiler_options=tiny.QUICK)
    state, frozen = found.place(params_of(name))
    batch = found.put_batch(tiny.batch(0, BATCH_SIZE, uneven=True), list(range(BATCH_SIZE)))
    grads, metrics = gradient(state.trainable, frozen, batch)
    return {path: np.asarray(leaf) for path, leaf in tree.flatten(grads).items()}, jax.tree.map(np.asarray, metrics)


@functools.cache
def reference(name):
    return results(job(name, sharding.one_device()), name)


def check_equal(name, mesh, how):
    expected, metrics = reference(name)
    sizes = MESHES[mesh]
    found, other = results(job(name, sharding.make_mesh(config_lib.MeshConfig(**sizes)), how, **sizes), name)
    assert other["loss"] == pytest.approx(metrics["loss"], rel=1e-5)
    np.testing.assert_allclose(other["share"], metrics["share"], rtol=1e-4, atol=1e-5)
    for path, leaf in expected.items():
        got = found[path]
        if "/ffn/" in path:
            assert not np.any(got[:, leaf.shape[1] :]), f"{path}: a slot without an expert has a gradient"
            got = got[:, : leaf.shape[1]]
        scale = np.abs(leaf).max()
        assert np.abs(got - leaf).max() <= 2e-5 * scale + 1e-9, f"{path}: {np.abs(got - leaf).max() / scale:.2g}"


@pytest.mark.parametrize(("name", "mesh", "how"), COVER)
def test_a_mesh_gives_the_loss_and_gradients_of_one_device(name, mesh, how):
    check_equal(name, mesh, how)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "mesh", "how"), list(itertools.product(ARCHITECTURES, MESHES, HOW)))
def test_every_mesh_with_every_model_and_every_way_of_computing(name, mesh, how):
    check_equal(name, mesh, how)


def test_experts_computed_together_are_split_like_other_weights_and_the_rest_lives_apart():
    found = job("sparse", sharding.make_mesh(config_lib.MeshConfig(expert=8)))
    leaves = tree.flatten(found.frozen) | tree.flatten(found.state.trainable)
    for path in (
        "r4/ffn/gate/a",
        "r4/ffn/gate/b",
        "r7/ffn/down/a",
        "r7/ffn/down/b",
        "public/ffn/up",
        "w64/ffn/up",
        "w32/ffn/up",
    ):
        leaf = leaves[f"experts/{path}"]
        assert np.prod(leaf.sharding.shard_shape(leaf.shape)) * 8 == np.prod(leaf.shape), path
    assert leaves["experts/r4/ffn/gate/a"].shape == (2, 2, 32, 4)  # no empty slots
    assert leaves["experts/w64/ffn/up"].shape == (2, 8, 32, 64)


def test_a_mesh_that_does_not_divide_the_hidden_units_is_refused():
    model = dataclasses.replace(MODEL, d_ff=60)
    banks = (dataclasses.replace(PUBLIC, d_ff=60), dataclasses.replace(MATH, d_ff=60))
    with pytest.raises(errors.ConfigError, match="d_ff of bank 'math'=60 cannot be split in 8 parts"):
        mesh = sharding.make_mesh(config_lib.MeshConfig(fsdp=8))
        program.Program(transformer.Architecture(model, banks, 2), tiny.settings("pair", batch_size=8), mesh, CHOICES, 16)


def held(rank):
    """Scalars of the parameters that are trained, and of the optimizer's moments."""
    banks = (PUBLIC, dataclasses.replace(MATH, rank=rank))
    architecture = transformer.Architecture(MODEL, banks, top_k=2)
    found = program.Program(architecture, tiny.settings("pair"), sharding.one_device(), CHOICES, tiny.SEQ_LEN)
    paths = set(tree.flatten(found.state.trainable))
    moments = sum(leaf.size for leaf in jax.tree.leaves(found.state.optimizer))
    return paths, tree.count(found.state.trainable), moments


def test_what_is_trained_and_its_optimizer_state_scale_with_the_rank():
    """Exactly the factors, the row and the bias."""
    router_scalars = MODEL.num_layers * (MODEL.d_model + 1)
    for rank in (1, 5, 32):
        paths, trained, moments = held(rank)
        factors = {f"experts/math/ffn/{part}/{side}" for part in ("gate", "up", "down") for side in "ab"}
        assert paths == factors | {"experts/math/router/row", "experts/math/router/raw_bias"}
        assert trained == MODEL.num_layers * 3 * rank * (MODEL.d_model + MODEL.d_ff) + router_scalars
        assert moments == 2 * trained + 1  # and the number of updates


def test_gradients_of_the_factors_are_those_of_the_expanded_matrices():
    """With dW the gradient of W = public + a b: da = dW b^T and db = a^T dW."""
    found, batch = ARCHITECTURES["pair"], tiny.batch(0, uneven=True)
    full = dataclasses.replace(found, banks=(PUBLIC, dataclasses.replace(MATH, rank=0)))
    shared, experts = surgery.split(params_of("pair"), found.banks)
    whole, _ = surgery.join(
        shared,
        {**experts, "math": surgery.expand(experts["math"], experts["public"])},
        {"public": ("public",), "math": ("math",)},
    )

    def gradient(architecture, params):
        trained, frozen = tree.partition(params, "experts/math/.*")

        def loss(trained):
            compute, settings = transformer.Compute(), tiny.settings("pair")
            return step.batch_loss(tree.combine(trained, frozen), batch, architecture, compute, settings, False)[0]

        return jax.jit(jax.grad(loss), compiler_options=tiny.QUICK)(trained)["experts"]["math"]

    low, expanded = gradient(found, params_of("pair")), gradient(full, whole)
    for part, dw in expanded["ffn"].items():
        a, b = (np.asarray(experts["math"]["ffn"][part][side], np.float64) for side in "ab")
        for side, expected in (("a", dw[:, 0] @ b.transpose(0, 2, 1)), ("b", a.transpose(0, 2, 1) @ dw[:, 0])):
            scale = np.abs(expected).max()
            assert scale > 0 and np.abs(low["ffn"][part][side][:, 0] - expected).max() < 1e-4 * scale, (part, side)
    np.testing.assert_allclose(low["router"]["row"], expanded["router"]["row"], rtol=1e-3, atol=1e-6)


def test_an_expert_that_starts_as_the_public_one_learns():
    architecture, settings = ARCHITECTURES["pair"], tiny.settings("pair", steps=12, learning_rate=3e-2)
    shared, experts = surgery.split(params_of("pair"), architecture.banks)
    shapes = {part: leaf.shape for part, leaf in experts["public"]["ffn"].items()}
    first = {**experts["math"], **surgery.low_rank(shapes, MATH.rank, seed=0)}
    params, _ = surgery.join(
        shared, {"public": experts["public"], "math": first}, {bank.name: bank.experts for bank in architecture.banks}
    )
    found = program.Program(architecture, settings, sharding.one_device(), CHOICES, tiny.SEQ_LEN)
    state, frozen = found.place(params)
    losses = []
    for _ in range(12):
        state, metrics = found.step(state, frozen, found.put_batch(tiny.batch(0), list(range(tiny.BATCH_SIZE))))
        losses.append(float(metrics["cross_entropy"]))
    assert losses[-1] < losses[0] - 0.5
    assert all(np.asarray(leaf).any() for path, leaf in tree.flatten(state.trainable).items() if path.endswith("/b"))


@pytest.mark.parametrize("names", [("a",), ("a", "b", "c")], ids=len)
def test_no_expanded_matrix_appears_in_the_compiled_step(names):
    """At a size where one matrix is larger than everything else that a step keeps beside its arguments."""
    model = dataclasses.replace(MODEL, d_model=512, d_ff=1536, num_layers=1)
    banks = (dataclasses.replace(PUBLIC, d_ff=1536), config_lib.Bank("math", names, 1536, rank=3))
    settings = tiny.settings("pair", batch_size=1)
    architecture = transformer.Architecture(model, banks, top_k=len(names) + 1)
    compiled = program.Program(architecture, settings, sharding.one_device(), CHOICES, 4).compile()
    assert compiled.memory_analysis().temp_size_in_bytes < 512 * 1536 * 4
    views = {"parameter", "bitcast", "get-tuple-element", "tuple"}
    for found in hlo.Module(compiled.as_text()).walk():
        for array in found.instruction.arrays:
            assert found.instruction.op in views or not {512, 1536} <= set(array.dimensions), found.instruction


def owner(**expert):
    found = config_lib.Config(phase="expert", model=MODEL)
    found.expert = dataclasses.replace(found.expert, **expert)
    return found


def test_a_job_says_what_is_trained():
    assert jobs.architecture(owner(kind="low_rank", rank=6)) == ARCHITECTURES["pair"]
    assert jobs.architecture(owner(d_ff=48)).banks[1] == config_lib.Bank("math", ("math",), 48)


@pytest.mark.parametrize(
    ("expert", "message"),
    [
        ({"kind": "lora"}, "expert.kind is 'lora', expected one of full, low_rank"),
        ({"rank": 4}, "expert.rank=4 is for low-rank experts; set expert.kind=low_rank"),
        ({"kind": "low_rank"}, "expert.rank=0 of a low-rank expert must lie between 1 and 32"),
        ({"kind": "low_rank", "rank": 33}, "expert.rank=33 of a low-rank expert must lie between 1 and 32"),
        ({"kind": "low_rank", "rank": 4, "d_ff": 64}, "expert.d_ff=64 with expert.kind=low_rank"),
    ],
)
def test_kinds_and_ranks_that_cannot_be_are_refused(expert, message):
    with pytest.raises(errors.ConfigError, match=message):
        jobs.architecture(owner(**expert))
