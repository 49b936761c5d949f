"""Every path of the mixture layer, values and gradients, against the loop in `oracle`."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import config as config_lib
from flexjax import sharding
from flexjax.model import dispatch, moe, router
from tests.model import oracle

D = 6
NAMES = ("public", "a", "b", "c", "d")
WIDTHS = {"public": 5, "a": 5, "b": 3, "c": 5, "d": 3}

ONE_BANK = {"all": NAMES}
BY_WIDTH = {"public": ("public",), "w5": ("a", "c"), "w3": ("b", "d")}
SCRAMBLED = {"w3": ("d", "b"), "w5": ("c", "a"), "public": ("public",)}


def banks_of(layout, names):
    kept = {bank: tuple(n for n in members if n in names) for bank, members in layout.items()}
    return tuple(config_lib.Bank(b, m, WIDTHS[m[0]], b != "public") for b, m in kept.items() if m)


def widths_of(layout, names):
    return {name: 5 if layout is ONE_BANK else WIDTHS[name] for name in names}


def draw(layout, num_experts, batch, length, seed=0, spread=1.0):
    """Arrays in float64: h, rows, bias in canonical order, and each expert's weights by name."""
    random, names = np.random.default_rng(seed), NAMES[:num_experts]
    arrays = {
        "h": random.normal(size=(batch, length, D)),
        "rows": spread * random.normal(size=(num_experts, D)),
        "bias": -np.abs(random.normal(size=num_experts)),
    }
    arrays["bias"][0] = 0
    for name, f in widths_of(layout, names).items():
        arrays |= {f"{name}/gate": random.normal(size=(D, f)), f"{name}/up": random.normal(size=(D, f))}
        arrays[f"{name}/down"] = random.normal(size=(f, D))
    return {key: value.astype(np.float32).astype(np.float64) for key, value in arrays.items()}


def by_oracle(arrays, top_k, allowed):
    names = NAMES[: arrays["rows"].shape[0]]
    experts = [tuple(arrays[f"{name}/{part}"] for part in ("gate", "up", "down")) for name in names]
    return oracle.mixture(arrays["h"], experts, arrays["rows"], arrays["bias"], top_k, allowed)


def layer(arrays, allowed, path, banks, top_k):
    ffns = [
        {part: jnp.stack([arrays[f"{name}/{part}"] for name in bank.experts]) for part in ("gate", "up", "down")}
        for bank in banks
    ]
    routing = router.route(arrays["h"], arrays["rows"], arrays["bias"], top_k, allowed)
    if path == "dropless":
        return dispatch.dropless(arrays["h"], ffns, banks, routing)
    return moe.dense(arrays["h"], ffns, banks, router.dense_gates(routing), allowed, skip_idle=path == "skip_idle")


@functools.cache
def compiled(path, banks, top_k):
    """Jitted (y, gradients of sum(y * c)) for one path; shared by all tests of this file."""

    def loss(arrays, allowed, c):
        y = layer(arrays, allowed, path, banks, top_k)
        return (y * c).sum(), y

    def run(arrays, allowed, c):
        (_, y), gradients = jax.value_and_grad(loss, has_aux=True)(arrays, allowed, c)
        return y, gradients

    return jax.jit(run)


@functools.cache
def compiled_values(path, banks, top_k):
    return jax.jit(functools.partial(layer, path=path, banks=banks, top_k=top_k))


def run(path, layout, arrays, top_k, allowed, c):
    names = NAMES[: arrays["rows"].shape[0]]
    f32 = {key: jnp.asarray(value, jnp.float32) for key, value in arrays.items()}
    y, gradients = compiled(path, banks_of(layout, names), top_k)(f32, allowed, jnp.asarray(c, jnp.float32))
    return np.asarray(y), {key: np.asarray(value) for key, value in gradients.items()}


def close(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * max(1, np.abs(expected).max()))


MASKS = {"none": None, "rows": np.array([[1, 1, 0, 1], [1, 0, 0, 0], [0, 1, 1, 0]], bool)}


LAYOUTS = {"one_bank": ONE_BANK, "by_width": BY_WIDTH, "scrambled": SCRAMBLED}


@pytest.mark.parametrize(
    ("path", "layout"),
    [("dense", "one_bank"), ("dense", "scrambled"), ("skip_idle", "by_width"), *(("dropless", layout) for layout in LAYOUTS)],
)
def test_values_and_gradients_equal_the_oracle(path, layout):
    layout = LAYOUTS[layout]
    arrays, random = draw(layout, 4, 3, 2, seed=3), np.random.default_rng(1)
    c = random.normal(size=arrays["h"].shape)
    allowed = MASKS["rows"]
    y, gradients = run(path, layout, arrays, 2, allowed, c)
    close(y, by_oracle(arrays, 2, allowed))
    expected = oracle.gradients(lambda moved: (by_oracle(moved, 2, allowed) * c).sum(), arrays)
    for name, gradient in gradients.items():
        close(gradient, expected[name], 1e-4)


@pytest.mark.parametrize(("top_k", "mask"), [(1, "rows"), (2, "none"), (3, "rows"), (4, "none"), (7, "rows")])
@pytest.mark.parametrize("path", ["dense", "dropless"])
def test_every_k_and_mask_equal_the_oracle(path, top_k, mask):
    arrays, allowed = draw(BY_WIDTH, 4, 3, 5, seed=top_k), MASKS[mask]
    f32 = {key: jnp.asarray(value, jnp.float32) for key, value in arrays.items()}
    y = compiled_values(path, banks_of(BY_WIDTH, NAMES[:4]), top_k)(f32, allowed)
    close(y, by_oracle(arrays, top_k, np.ones((3, 4), bool) if allowed is None else allowed))


@pytest.mark.parametrize("winner", ["even", "public", "b", "d"])
def test_groups_across_block_borders_and_skewed_routing(winner):
    """300 tokens: groups of 0, of all and of some tokens, starting and ending inside blocks."""
    arrays = draw(SCRAMBLED, 5, 1, 300, seed=8)
    if winner != "even":
        arrays["h"][..., 0] = np.abs(arrays["h"][..., 0]) + 1
        arrays["rows"][:, 0] = -8
        arrays["rows"][NAMES.index(winner), 0] = 8
    c, allowed = np.random.default_rng(2).normal(size=arrays["h"].shape), np.ones((1, 5), bool)
    y, gradients = run("dropless", SCRAMBLED, arrays, 2, None, c)
    close(y, by_oracle(arrays, 2, allowed))
    _, dense = run("dense", SCRAMBLED, arrays, 2, None, c)
    for name, gradient in gradients.items():
        close(gradient, dense[name], 1e-4)


POISON = {"nan": np.nan, "inf": np.inf, "minus_inf": -np.inf, "huge": 3e38}


@pytest.mark.parametrize("poison", POISON)
@pytest.mark.parametrize("path", ["dense", "dropless", "skip_idle"])
def test_what_a_masked_expert_holds_reaches_nothing(path, poison):
    """FFN, router row and bias of a forbidden expert are poisoned: all else is bit-identical to any finite values."""
    clean, c = draw(BY_WIDTH, 4, 3, 5, seed=5), np.random.default_rng(3).normal(size=(3, 5, D))
    allowed = np.array([[1, 0, 1, 1], [1, 0, 1, 0], [1, 0, 0, 0]], bool)
    dirty = {key: np.full_like(value, POISON[poison]) if key.startswith("a/") else value.copy() for key, value in clean.items()}
    dirty["rows"][1] = dirty["bias"][1] = POISON[poison]
    y, gradients = run(path, BY_WIDTH, clean, 3, allowed, c)
    close(y, by_oracle(clean, 3, allowed))
    poisoned_y, poisoned = run(path, BY_WIDTH, dirty, 3, allowed, c)
    np.testing.assert_array_equal(poisoned_y, y)
    for name, gradient in gradients.items():
        if not name.startswith("a/"):
            np.testing.assert_array_equal(poisoned[name], gradient, err_msg=name)
    assert not poisoned["rows"][1].any() and not poisoned["bias"][1]


@pytest.mark.parametrize("path", ["dense", "dropless", "skip_idle"])
def test_a_broken_expert_hurts_only_the_requests_that_allow_it(path):
    arrays, c = draw(BY_WIDTH, 4, 3, 5, seed=6), np.random.default_rng(3).normal(size=(3, 5, D))
    allowed = np.array([[1, 1, 1, 1], [1, 0, 1, 0], [1, 0, 0, 1]], bool)
    y, gradients = run(path, BY_WIDTH, arrays, 3, allowed, c)
    for key in ("a/gate", "a/up", "a/down"):
        arrays[key] = np.full_like(arrays[key], np.nan)
    broken_y, broken = run(path, BY_WIDTH, arrays, 3, allowed, c)
    np.testing.assert_array_equal(broken_y[1:], y[1:])
    np.testing.assert_array_equal(broken["h"][1:], gradients["h"][1:])


@pytest.mark.parametrize("path", ["dense", "dropless"])
def test_a_broken_router_row_is_seen_and_not_hidden(path):
    """A NaN that is allowed must come out as NaN, so that training and serving notice it."""
    arrays = draw(BY_WIDTH, 4, 3, 5, seed=7)
    arrays["rows"][1] = np.nan
    y, _ = run(path, BY_WIDTH, arrays, 3, np.array([[1, 1, 1, 0], [1, 0, 1, 0], [1, 0, 0, 1]], bool), np.ones((3, 5, D)))
    assert np.isnan(y[0]).all() and np.isfinite(y[1:]).all()


def test_apply_chooses_dense_when_all_are_active_and_dropless_else(monkeypatch):
    chosen = []
    monkeypatch.setattr(moe, "dense", lambda *_, **__: chosen.append("dense"))
    monkeypatch.setattr(dispatch, "dropless", lambda *_: chosen.append("dropless"))
    monkeypatch.setattr(dispatch, "sharded", lambda *_: chosen.append("sharded"))
    meshes = {"none": None, "one": sharding.make_mesh(config_lib.MeshConfig(), jax.devices()[:1])}
    meshes["eight"] = sharding.make_mesh(config_lib.MeshConfig())
    banks = banks_of(BY_WIDTH, NAMES[:4])
    for mesh in meshes.values():
        for top_k in (1, 3, 4, 9):
            routing = router.route(jnp.ones((1, 2, D)), jnp.ones((4, D)), jnp.zeros(4), top_k, None)
            moe.apply(jnp.ones((1, 2, D)), [], banks, routing, None, mesh)
    assert chosen == [*["dropless", "dropless", "dense", "dense"] * 2, "sharded", "sharded", "dense", "dense"]
    sizes = ((2, 1), (3, 2), (3, 3))
    assert [moe.is_sparse(banks_of(ONE_BANK, NAMES[:count]), k) for count, k in sizes] == [False, True, False]


def test_the_dense_path_splits_hidden_units_and_changes_nothing_else():
    mesh = sharding.make_mesh(config_lib.MeshConfig(data=2, tensor=4))
    arrays = {key: jnp.asarray(value, jnp.float32) for key, value in draw(ONE_BANK, 2, 4, 6).items()}
    banks = (config_lib.Bank("all", NAMES[:2], 8),)
    random = np.random.default_rng(0)
    ffn = {part: random.normal(size=(2, 8, D) if part == "down" else (2, D, 8)) for part in ("gate", "up", "down")}
    ffn = {part: jnp.asarray(w, jnp.float32) for part, w in ffn.items()}

    def run(h, ffn, mesh):
        return moe.apply(h, [ffn], banks, router.route(h, arrays["rows"], arrays["bias"], 2, None), None, mesh)

    placed = {
        part: jax.device_put(w, sharding.sharding(mesh, dispatch.LOGICAL[part], sharding.IN_USE)) for part, w in ffn.items()
    }
    compiled = jax.jit(run, static_argnums=2).lower(
        sharding.put(arrays["h"], sharding.sharding(mesh, ("batch",))), placed, mesh
    )
    compiled = compiled.compile()
    y = compiled(sharding.put(arrays["h"], sharding.sharding(mesh, ("batch",))), placed)
    close(y, run(arrays["h"], ffn, None), 1e-6)
    assert "f32[12,2]" in compiled.as_text() and "f32[12,8]" not in compiled.as_text()  # 12 tokens, 8 / 4 hidden units a device
