"""Low-rank experts beside full and narrow ones, on every path of one device, against the loop in `oracle`."""

import dataclasses
import functools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import config as config_lib
from flexjax import errors, sharding, tree
from flexjax.model import dispatch, kernels, low_rank, moe, router, transformer
from flexjax.planning import hlo
from tests.model import noise, oracle

B, T, D, F = 3, 4, 6, 7
NAMES = ("public", "a", "b", "c", "d", "e")
STANDARD = (
    config_lib.Bank("public", ("public",), F, biased=False),
    config_lib.Bank("r2", ("a", "d"), F, rank=2),
    config_lib.Bank("r3", ("e",), F, rank=3),
    config_lib.Bank("w7", ("b",), F),
    config_lib.Bank("w4", ("c",), 4),
)
SCRAMBLED = (STANDARD[3], dataclasses.replace(STANDARD[1], experts=("d", "a")), STANDARD[4], STANDARD[0], STANDARD[2])
RANKS = {name: bank.rank for bank in STANDARD for name in bank.experts}
WIDTHS = {name: bank.d_ff for bank in STANDARD for name in bank.experts}
PARTS = ("gate", "up", "down")
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compiling is what costs here


def draw(seed=0, scale=0.5):
    """Arrays in float64 that hold float32 values: h, rows, bias in canonical order, and weights by expert."""
    random = np.random.default_rng(seed)
    arrays = {"h": random.normal(size=(B, T, D)), "rows": random.normal(size=(6, D)), "bias": -np.abs(random.normal(size=6))}
    arrays["bias"][0] = 0
    for name in NAMES:
        for part in PARTS:
            inside, outside = (WIDTHS[name], D) if part == "down" else (D, WIDTHS[name])
            shapes = {f"{name}/{part}": (inside, outside)}
            if RANKS[name]:
                shapes = {f"{name}/{part}/a": (inside, RANKS[name]), f"{name}/{part}/b": (RANKS[name], outside)}
            arrays |= {path: scale * random.normal(size=shape) for path, shape in shapes.items()}
    return {path: array.astype(np.float32).astype(np.float64) for path, array in arrays.items()}


def by_oracle(arrays, top_k, allowed):
    """Low-rank experts expanded."""

    def matrix(name, part):
        if RANKS[name]:
            return arrays[f"public/{part}"] + arrays[f"{name}/{part}/a"] @ arrays[f"{name}/{part}/b"]
        return arrays[f"{name}/{part}"]

    experts = [tuple(matrix(name, part) for part in PARTS) for name in NAMES]
    return oracle.mixture(arrays["h"], experts, arrays["rows"], arrays["bias"], top_k, allowed)


def layer(arrays, allowed, path, banks, top_k):
    """`serve` is how one token is decoded, `apply` everything else: dense if k is 6, sparse otherwise."""

    def stack(bank, part):
        if not bank.rank:
            return jnp.stack([arrays[f"{name}/{part}"] for name in bank.experts])
        return {side: jnp.stack([arrays[f"{name}/{part}/{side}"] for name in bank.experts]) for side in "ab"}

    ffns = [{part: stack(bank, part) for part in PARTS} for bank in banks]
    routing = router.route(arrays["h"], arrays["rows"], arrays["bias"], top_k, allowed)
    if path == "serve":
        return moe.dense(arrays["h"], ffns, banks, router.dense_gates(routing), allowed, skip_idle=True)
    return moe.apply(arrays["h"], ffns, banks, routing, allowed)


def program(path, banks, top_k):
    """Jitted (y, gradients of sum(y * c))."""

    def loss(arrays, allowed, c):
        y = layer(arrays, allowed, path, banks, top_k)
        return (y * c).sum(), y

    def run(arrays, allowed, c):
        (_, y), gradients = jax.value_and_grad(loss, has_aux=True)(arrays, allowed, c)
        return y, gradients

    return jax.jit(run, compiler_options=QUICK)


shared_program = functools.cache(program)
C = np.random.default_rng(9).normal(size=(B, T, D)).astype(np.float32)


def run(path, banks, arrays, top_k, allowed, program=shared_program):
    f32 = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    y, gradients = program(path, banks, top_k)(f32, allowed, C)
    return np.asarray(y), {name: np.asarray(gradient) for name, gradient in gradients.items()}


def close(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * max(1, np.abs(expected).max()))


ROWS = np.array([[1, 1, 0, 1, 1, 0], [0, 1, 0, 0, 0, 0], [0, 0, 1, 0, 1, 1]], bool)  # public is forbidden where `a` is allowed
PATHS = {"dense": ("apply", STANDARD, 6), "sparse": ("apply", SCRAMBLED, 2), "serve": ("serve", SCRAMBLED, 2)}


@pytest.mark.parametrize("way", PATHS)
def test_values_and_gradients_equal_the_oracle(way):
    path, banks, top_k = PATHS[way]
    arrays = draw(seed=3)
    y, gradients = run(path, banks, arrays, top_k, ROWS)
    close(y, by_oracle(arrays, top_k, ROWS))
    few = {name: array for name, array in arrays.items() if name.split("/")[0] not in ("b", "c", "d")}
    expected = oracle.gradients(lambda moved: (by_oracle(arrays | moved, top_k, ROWS) * C).sum(), few)
    for name, slope in expected.items():
        close(gradients[name], slope, 1e-4)
    assert np.abs(expected["a/down/b"]).max() > 1e-2 and np.abs(expected["public/gate"]).max() > 1e-2


@pytest.mark.parametrize("top_k", [1, 2, 3, 5, 6, 8])
@pytest.mark.parametrize("mask", ["none", "rows"])
def test_every_k_and_mask_equal_the_oracle(top_k, mask):
    arrays, allowed = draw(seed=top_k), ROWS if mask == "rows" else None
    f32 = {name: jnp.asarray(array, jnp.float32) for name, array in arrays.items()}
    forward = functools.partial(layer, path="apply", banks=STANDARD, top_k=top_k)
    y = jax.jit(forward, compiler_options=QUICK)(f32, allowed)
    close(y, by_oracle(arrays, top_k, np.ones((B, 6), bool) if allowed is None else allowed))


def test_low_rank_experts_alone_are_computed_densely():
    banks = (STANDARD[0], STANDARD[1], STANDARD[2])
    assert not moe.is_sparse(banks, 2) and moe.is_sparse(STANDARD, 2) and dispatch.apart(banks) == ()
    arrays = draw(seed=4)
    keep = np.array([name in ("public", "a", "d", "e") for name in NAMES])
    allowed = np.tile(keep, (B, 1))
    found = {**arrays, "rows": arrays["rows"][keep], "bias": arrays["bias"][keep]}
    f32 = {name: jnp.asarray(array, jnp.float32) for name, array in found.items()}
    close(layer(f32, None, "apply", banks, 2), by_oracle(arrays, 2, allowed))


POISON = {"nan": np.nan, "inf": np.inf, "minus_inf": -np.inf, "huge": 3e38}


def leaks(way, poison, program=shared_program):
    """What changes, by name, if a forbidden low-rank expert is filled with something else; its own gradients must be 0."""
    path, banks, top_k = PATHS[way]
    clean = draw(seed=5)
    allowed = np.array([[1, 0, 1, 1, 1, 0], [1, 0, 1, 0, 1, 1], [0, 0, 0, 0, 1, 1]], bool)
    dirty = {name: np.full_like(a, poison) if name.startswith("a/") else a.copy() for name, a in clean.items()}
    dirty["rows"][1] = dirty["bias"][1] = poison
    (y, gradients), (other, found) = (run(path, banks, arrays, top_k, allowed, program) for arrays in (clean, dirty))
    changed = {name for name in gradients if gradients[name].tobytes() != found[name].tobytes()}
    changed |= {name for name in gradients if name.startswith("a/") and found[name].any()}
    if y.tobytes() != other.tobytes() or not np.allclose(y, by_oracle(clean, top_k, allowed), atol=1e-4):
        changed.add("y")
    return changed


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("way", PATHS)
def test_what_a_forbidden_low_rank_expert_holds_reaches_nothing(way, poison):
    assert not leaks(way, POISON[poison])


@pytest.mark.parametrize("way", ["sparse", "serve"])
def test_what_an_expert_holds_that_nobody_chose_reaches_nothing(way):
    """Allowed to all, but the router sends no token there."""
    path, banks, top_k = PATHS[way]
    clean = draw(seed=6)
    clean["bias"][1] = -50
    dirty = {name: np.full_like(a, np.nan) if name.startswith("a/") else a for name, a in clean.items()}
    (y, gradients), (other, found) = (run(path, banks, arrays, top_k, None) for arrays in (clean, dirty))
    np.testing.assert_array_equal(other, y)
    for name, gradient in gradients.items():
        np.testing.assert_array_equal(found[name], gradient, err_msg=name)


@pytest.mark.parametrize("way", PATHS)
def test_a_broken_expert_hurts_only_the_requests_that_allow_it(way):
    path, banks, top_k = PATHS[way]
    arrays = draw(seed=7)
    allowed = np.array([[1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 1], [0, 0, 0, 0, 1, 1]], bool)
    allowed[0] = np.array(NAMES) == "a"
    y, gradients = run(path, banks, arrays, top_k, allowed)
    for name in arrays:
        if name.startswith("a/"):
            arrays[name] = np.full_like(arrays[name], np.nan)
    broken_y, broken = run(path, banks, arrays, top_k, allowed)
    assert np.isnan(broken_y[0]).all()
    np.testing.assert_array_equal(broken_y[1:], y[1:])
    np.testing.assert_array_equal(broken["h"][1:], gradients["h"][1:])
    for name in ("e/gate/a", "e/down/b", "d/up/b"):
        np.testing.assert_array_equal(broken[name], gradients[name])


def test_a_broken_router_row_is_seen_and_not_hidden():
    arrays = draw(seed=8)
    arrays["rows"][1] = np.nan
    y, _ = run("apply", STANDARD, arrays, 6, np.array([[1, 1, 1, 1, 1, 1], [1, 0, 1, 0, 1, 1], [0, 0, 0, 0, 1, 1]], bool))
    assert np.isnan(y[0]).all() and np.isfinite(y[1:]).all()


class Multiplying:
    """`jax.numpy` that masks by multiplying with 0."""

    def __getattr__(self, name):
        return getattr(jnp, name)

    @staticmethod
    def where(condition, x, y):
        return x * condition.astype(x.dtype)


def select_after(ends, mesh, x, a, b, chosen):
    return jnp.where(chosen, kernels.project(kernels.project(x, a), b), 0)


def select_before(ends, mesh, x, a, b, chosen):
    return kernels.project(kernels.project(jnp.where(chosen, x, 0), a), b)


def select_nothing(ends, mesh, x, a, b, chosen):
    return kernels.project(kernels.project(x, a), b)


@pytest.mark.parametrize("broken", [select_after, select_before, select_nothing, Multiplying], ids=lambda b: b.__name__)
@pytest.mark.parametrize("way", ["dense", "sparse"])
def test_a_masking_that_leaks_is_caught(way, broken, monkeypatch):
    """The check of the check above, on programs of their own."""
    if broken is Multiplying:
        monkeypatch.setattr(low_rank, "jnp", Multiplying())
    else:
        monkeypatch.setattr(low_rank, "_product", broken)
    assert leaks(way, np.nan, program)


def test_public_matrices_masked_with_public_are_caught(monkeypatch):
    """A row that forbids `public` still computes a low-rank expert on top of its matrices."""
    whole = low_rank.mixture

    def masked(h, public, experts, gates, skip_idle, mesh):
        public = {part: jnp.where((gates[..., 0] > 0).all(), weight, 0) for part, weight in public.items()}
        return whole(h, public, experts, gates, skip_idle, mesh)

    monkeypatch.setattr(low_rank, "mixture", masked)
    y, _ = run("apply", STANDARD, draw(seed=3), 6, ROWS, program)
    assert np.abs(y[1] - by_oracle(draw(seed=3), 6, ROWS)[1]).max() > 1e-2


def test_bfloat16_adds_up_experts_in_float32():
    """Sixteen equal low-rank experts of gate 1 / 17: sums of rounded terms would drift, each is rounded once."""
    names, random = tuple(f"e{i:02}" for i in range(16)), np.random.default_rng(0)
    banks = (config_lib.Bank("public", ("public",), 32, False), config_lib.Bank("r2", names, 32, rank=2))
    shapes = {"gate": (16, 32), "up": (16, 32), "down": (32, 16)}
    public = {part: jnp.asarray(random.normal(size=(1, *shape)) / 4, jnp.bfloat16) for part, shape in shapes.items()}
    factors = {
        part: {
            "a": jnp.zeros((16, inside, 2), jnp.bfloat16),
            "b": jnp.asarray(random.normal(size=(16, 2, outside)), jnp.bfloat16),
        }
        for part, (inside, outside) in shapes.items()
    }
    h = jnp.asarray(random.normal(size=(1, 64, 16)), jnp.bfloat16)
    y = moe.dense(h, [public, factors], banks, jnp.full((1, 64, 17), 1 / 17), None)
    alone = moe.swiglu(h, *(public[part][0] for part in PARTS))
    assert y.dtype == jnp.bfloat16
    off = np.abs(np.asarray(y, np.float32) - np.asarray(alone, np.float32)).max()
    assert off <= 2**-7 * np.abs(np.asarray(alone, np.float32)).max()


MODEL = config_lib.ModelConfig(
    vocab_size=29, d_model=40, num_layers=1, num_heads=4, num_kv_heads=2, head_dim=6, d_ff=88, init_std=0.3
)


@pytest.mark.parametrize("names", [("a",), ("a", "b", "c", "d")], ids=len)
def test_public_products_occur_once_and_nothing_is_expanded(names):
    """Values and gradients of the factors: gate, up and down of `public`, and down once more for the gradient."""
    banks = (*transformer.dense_banks(MODEL), config_lib.Bank("r3", names, 88, rank=3))
    architecture = transformer.Architecture(MODEL, banks, top_k=len(names) + 1)
    trained, frozen = tree.partition(transformer.abstract(architecture), "experts/r3/.*")

    def loss(trained, frozen, tokens):
        return (transformer.forward(tree.combine(trained, frozen), tokens, architecture).hidden ** 2).sum()

    lowered = jax.jit(jax.value_and_grad(loss)).lower(trained, frozen, jax.ShapeDtypeStruct((2, 8), jnp.int32))
    with_public = r"dot_general.*tensor<(40x88|88x40)xf32>\) ->"
    assert len(re.findall(with_public, lowered.as_text())) == 4
    views = {"parameter", "bitcast", "get-tuple-element"}
    for step in hlo.Module(lowered.compile().as_text()).walk():
        for array in step.instruction.arrays:
            assert step.instruction.op in views or not {40, 88} <= set(array.dimensions), step.instruction


def hidden(architecture, compute=transformer.Compute()):
    def forward(params, tokens):
        return transformer.forward(params, tokens, architecture, compute).hidden

    return jax.jit(forward, compiler_options=QUICK)


def test_the_first_low_rank_expert_is_the_public_one():
    """b is 0: both experts say the same, and the norm behind the layer cancels the sum of their gates."""
    dense = transformer.Architecture(MODEL, transformer.dense_banks(MODEL))
    pair = transformer.Architecture(MODEL, (*dense.banks, config_lib.Bank("math", ("math",), 88, rank=3)), top_k=2)
    params = transformer.init(pair, 1)
    tokens = np.random.default_rng(0).integers(29, size=(2, 9))
    assert np.asarray(params["experts"]["math"]["ffn"]["gate"]["a"]).std() == pytest.approx(40**-0.5, rel=0.2)
    experts = {"public": {"ffn": params["experts"]["public"]["ffn"]}}
    found, expected = hidden(pair)(params, tokens), hidden(dense)({**params, "experts": experts}, tokens)
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-5)


MIXED = transformer.Architecture(
    MODEL, (*transformer.dense_banks(MODEL), config_lib.Bank("r3", ("a", "c"), 88, rank=3), config_lib.Bank("w8", ("b",), 8)), 2
)


def test_scan_remat_and_bfloat16_agree():
    params, tokens = noise.params(MIXED, seed=1), np.random.default_rng(0).integers(29, size=(2, 9))

    def gradient(compute):
        def loss(params):
            return (transformer.forward(params, tokens, MIXED, compute).hidden.astype(jnp.float32) ** 2 * C[0, 0, 0]).mean()

        return jax.jit(jax.value_and_grad(loss), compiler_options=QUICK)(params)

    exact = gradient(transformer.Compute())
    for remat, scan in (("full", True), ("dots", False)):
        found = gradient(transformer.Compute(remat=remat, scan=scan))
        np.testing.assert_allclose(found[0], exact[0], rtol=1e-6)
        for (path, a), b in zip(tree.flatten(found[1]).items(), tree.flatten(exact[1]).values(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max() + 1e-9, err_msg=path)
    cast = hidden(MIXED, transformer.Compute(jnp.bfloat16))(params, tokens)
    assert cast.dtype == jnp.bfloat16
    assert np.abs(cast.astype(jnp.float32) - hidden(MIXED)(params, tokens)).mean() < 0.1


def test_init_axes_and_splits_describe_the_factors():
    params, axes = (tree.flatten(made) for made in (transformer.init(MIXED, 0), transformer.logical_axes(MIXED)))
    assert list(params) == list(axes)
    letters = {"embed": 40, "mlp": 88, "column": 88, "layer": 1}
    for path, names in axes.items():
        assert len(names) == params[path].ndim, path
        if path.startswith(("experts/public/ffn", "experts/r3/ffn")):
            assert "expert" not in names  # computed together, on every device
            assert all(letters.get(name, size) == size for name, size in zip(names, params[path].shape, strict=True)), path
    assert "expert" in axes["experts/w8/ffn/gate"]
    assert params["experts/r3/ffn/down/a"].shape == (1, 2, 88, 3) and params["experts/r3/ffn/down/b"].shape == (1, 2, 3, 40)
    assert not params["experts/r3/ffn/up/b"].any() and params["experts/r3/ffn/up/a"].all()
    assert transformer.splits(MIXED)["d_ff of bank 'r3'"] == (88, ("tensor", "fsdp", "expert"))


@pytest.mark.parametrize(
    ("banks", "message"),
    [
        ((config_lib.Bank("r41", ("a",), 88, rank=41),), "rank 41 of a must lie between 1 and 40"),
        ((config_lib.Bank("r3", ("a",), 44, rank=3),), "as wide as the public one, 88; bank 'r3' has d_ff 44"),
    ],
)
def test_impossible_sizes_are_refused(banks, message):
    with pytest.raises(errors.ConfigError, match=message):
        transformer.check(transformer.Architecture(MODEL, (*transformer.dense_banks(MODEL), *banks), 2))


def test_public_must_be_alone_beside_low_rank_experts():
    banks = (config_lib.Bank("w88", ("public", "b"), 88), config_lib.Bank("r3", ("a",), 88, rank=3))
    with pytest.raises(errors.ConfigError, match="need 'public' in a bank of its own, beside bank 'r3'"):
        transformer.check(transformer.Architecture(MODEL, banks, 2))


def test_the_exchange_has_room_for_what_is_sent_only():
    tokens = 60
    whole = tuple(dataclasses.replace(bank, rank=0) for bank in STANDARD)
    mixed, full = (dispatch.buffer_bound(banks, None, tokens, 3, D, jnp.float32) for banks in (STANDARD, whole))
    assert (mixed.expected, full.expected) == (tokens * 3 * 2 // 6, tokens * 3)
    assert (mixed.pair, full.pair) == (tokens * 2, tokens * 3)  # two experts travel: no token has three choices there


MESH_BANKS = (
    config_lib.Bank("public", ("public",), 8, biased=False),
    config_lib.Bank("r2", ("a", "d"), 8, rank=2),
    config_lib.Bank("w4", ("b", "c", "e"), 4),
)


@pytest.mark.parametrize("top_k", [2, 6])
def test_on_a_mesh_a_forbidden_expert_reaches_nobody_either(top_k):
    """Rows with masks of their own, split over devices; the low-rank expert `a` is NaN throughout."""
    mesh = sharding.make_mesh(config_lib.MeshConfig(fsdp=2, tensor=2, expert=2))
    pair = transformer.Architecture(dataclasses.replace(MODEL, d_model=8, d_ff=8), MESH_BANKS, top_k)
    params = jax.tree.map(lambda leaf: leaf[0], noise.params(pair, seed=3, std=0.5)["experts"])
    rows = [params[bank.name]["router"]["row"] for bank in MESH_BANKS]
    rows = np.concatenate(rows)[list(router.positions(MESH_BANKS))]
    allowed = np.array([[1, 0, 1, 1, 1, 1], [0, 0, 0, 0, 1, 0], [1, 0, 0, 0, 0, 1], [0, 0, 1, 1, 1, 0]] * 2, bool)
    h = np.random.default_rng(4).normal(size=(8, 3, 8)).astype(np.float32)

    def loss(ffns, h, rows, allowed, mesh):
        routing = router.route(h, rows, jnp.zeros(6), top_k, allowed)
        y = moe.apply(h, ffns, MESH_BANKS, routing, allowed, mesh)
        return (y**2).sum(), y

    @functools.partial(jax.jit, static_argnums=4, compiler_options=QUICK)
    def run(ffns, h, rows, allowed, mesh):
        (_, y), gradients = jax.value_and_grad(loss, argnums=(0, 1, 2), has_aux=True)(ffns, h, rows, allowed, mesh)
        return y, gradients

    def on_mesh(ffns):
        """As they lie in a training step: three narrow experts in four slots."""
        axes = transformer.logical_axes(pair)["experts"]
        placed = []
        for bank, ffn in zip(MESH_BANKS, ffns, strict=True):
            missing = 1 if bank.name == "w4" and pair.sparse else 0
            names = tree.flatten(axes[bank.name]["ffn"])
            padded = {path: np.pad(leaf, [(0, missing), (0, 0), (0, 0)]) for path, leaf in tree.flatten(ffn).items()}
            rules = sharding.RULES if pair.sparse else sharding.IN_USE
            places = {path: sharding.sharding(mesh, names[path][1:], rules) for path in padded}
            placed.append(tree.unflatten({path: sharding.put(leaf, places[path]) for path, leaf in padded.items()}))
        split = sharding.sharding(mesh, ("batch",))
        return placed, sharding.put(h, split), rows, sharding.put(allowed, split), mesh

    clean = [params[bank.name]["ffn"] for bank in MESH_BANKS]
    dirty = jax.tree.map(np.copy, clean)
    for leaf in tree.flatten(dirty[1]).values():
        leaf[0] = np.nan
    one, eight, broken = (
        jax.tree.map(np.asarray, run(*args)) for args in ((clean, h, rows, allowed, None), on_mesh(clean), on_mesh(dirty))
    )
    close(eight[0], one[0], 1e-5)
    close(eight[1][1], one[1][1], 1e-5)
    for left, right in zip(jax.tree.leaves(broken), jax.tree.leaves(eight), strict=True):
        np.testing.assert_array_equal(left, right)
