"""The decoder: every way to run it gives the same numbers, and its size is the published one."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import config as config_lib
from flexjax import errors, tree
from flexjax.model import attention, transformer
from tests.model import noise

TINY = config_lib.ModelConfig(
    vocab_size=29, d_model=12, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=6, d_ff=10, init_std=0.3
)
BANKS = (
    config_lib.Bank("public", ("public",), 10, biased=False),
    config_lib.Bank("w6", ("beta",), 6),
    config_lib.Bank("w10", ("alpha", "gamma"), 10),
)
DENSE = transformer.Architecture(TINY, transformer.dense_banks(TINY))
MERGED = transformer.Architecture(TINY, BANKS, top_k=2)
PAIR = transformer.Architecture(TINY, (BANKS[0], config_lib.Bank("w10", ("alpha",), 10)), top_k=2)
ARCHITECTURES = {
    "dense": DENSE,
    "pair": PAIR,
    "merged": MERGED,
    "reordered": dataclasses.replace(MERGED, banks=BANKS[::-1]),
    "memory": dataclasses.replace(MERGED, config=dataclasses.replace(TINY, router_memory=0.7)),
}
TOKENS = np.random.default_rng(0).integers(29, size=(2, 9))


@functools.cache
def params_of(name):
    return noise.params(ARCHITECTURES[name], seed=1)


@functools.cache
def _compiled(name, compute):
    return jax.jit(lambda params, tokens, **kw: transformer.forward(params, tokens, ARCHITECTURES[name], compute, **kw))


def compiled(name, compute=transformer.Compute()):
    """Jitted forward of one architecture, shared by the tests of this file."""
    return _compiled(name, compute)


def loss_and_gradient(architecture, compute):
    def loss(params, tokens):
        output = transformer.forward(params, tokens, architecture, compute)
        return (transformer.logits(params, output.hidden) ** 2).mean()

    return jax.jit(jax.value_and_grad(loss))


@pytest.mark.parametrize("name", ["dense", "merged"])
def test_scan_and_remat_change_nothing(name):
    params = params_of(name)
    variants = [("none", False), ("full", True), ("dots", False)][: 3 if name == "dense" else 2]
    results = [
        loss_and_gradient(ARCHITECTURES[name], transformer.Compute(remat=remat, scan=scan))(params, TOKENS)
        for remat, scan in variants
    ]
    for loss, gradient in results[1:]:
        np.testing.assert_allclose(loss, results[0][0], rtol=1e-6)
        for (path, a), b in zip(tree.flatten(gradient).items(), tree.flatten(results[0][1]).values(), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * np.abs(b).max(), err_msg=path)


@pytest.mark.parametrize("name", ["dense", "pair", "merged"])
def test_outputs_are_complete_and_scan_agrees(name):
    params = params_of(name)
    unrolled = compiled(name)(params, TOKENS)
    scanned = compiled(name, transformer.Compute(scan=True))(params, TOKENS)
    assert unrolled.hidden.shape == (2, 9, 12) and unrolled.states is None
    assert (unrolled.routing is None) == (name == "dense")
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5), unrolled, scanned)
    if name == "merged":
        assert unrolled.routing.share.shape == (2, 2, 4)


def test_bfloat16_runs_close_to_float32():
    exact = compiled("merged")(params_of("merged"), TOKENS)
    cast = compiled("merged", transformer.Compute(dtype=jnp.bfloat16))(params_of("merged"), TOKENS)
    assert cast.hidden.dtype == jnp.bfloat16 and cast.routing.share.dtype == jnp.float32
    assert np.abs(cast.hidden.astype(jnp.float32) - exact.hidden).mean() < 0.1


@pytest.mark.parametrize("name", ["dense", "merged", "memory"])
def test_documents_of_one_window_do_not_see_each_other(name):
    run, segments = compiled(name), np.array([[0] * 4 + [1] * 5, [3] * 2 + [5] * 7])
    changed = TOKENS.copy()
    changed[0, :4], changed[1, :2] = (changed[0, :4] + 1) % 29, (changed[1, :2] + 7) % 29
    before, after = (np.asarray(run(params_of(name), t, segments=segments).hidden) for t in (TOKENS, changed))
    np.testing.assert_array_equal(before[0, 4:], after[0, 4:])
    np.testing.assert_array_equal(before[1, 2:], after[1, 2:])
    assert (before[0, :4] != after[0, :4]).any()
    open_window = np.asarray(run(params_of(name), TOKENS).hidden)
    assert (open_window[0, 4:] != before[0, 4:]).any()


@pytest.mark.parametrize("name", ["dense", "merged", "memory"])
def test_no_token_sees_the_future(name):
    run, changed = compiled(name), TOKENS.copy()
    changed[:, 6:] = (changed[:, 6:] + 3) % 29
    before, after = (np.asarray(run(params_of(name), t).hidden) for t in (TOKENS, changed))
    np.testing.assert_array_equal(before[:, :6], after[:, :6])
    assert (before[:, 6:] != after[:, 6:]).any()


def test_order_of_banks_does_not_matter():
    allowed = np.array([[True, True, False, True], [True, False, True, True]])
    a, b = (compiled(name)(params_of("merged"), TOKENS, allowed=allowed) for name in ("merged", "reordered"))
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), a, b)


def test_kept_states_are_what_the_routers_read():
    params = params_of("merged")
    output = jax.jit(lambda p, t: transformer.forward(p, t, MERGED, keep_states=True))(params, TOKENS)
    assert output.states.shape == (2, 2, 9, 12)
    layer = jax.tree.map(lambda leaf: leaf[0], params["layers"])
    rotary = attention.rotary(jnp.tile(jnp.arange(9)[None], (2, 1)), 6, TINY.rope_theta)
    first, _ = attention.block(
        jnp.asarray(params["embed"]["embedding"][TOKENS]), layer, TINY, rotary, attention.causal_mask(9, None)
    )
    np.testing.assert_allclose(output.states[0], first, rtol=1e-5, atol=1e-6)


def test_routers_with_a_memory_read_running_means_and_experts_the_states():
    kept = {
        name: transformer.forward(params_of("merged"), TOKENS, ARCHITECTURES[name], keep_states=True)
        for name in ("merged", "memory")
    }
    weights = 0.7 ** np.maximum(np.arange(9)[:, None] - np.arange(9)[None], 0) * np.tri(9)
    means = np.einsum("ts,bsd->btd", weights / weights.sum(axis=1, keepdims=True), kept["merged"].states[0])
    np.testing.assert_allclose(kept["memory"].states[0], means, rtol=1e-4, atol=1e-5)
    assert np.abs(kept["memory"].hidden - kept["merged"].hidden).max() > 1e-3
    scanned = compiled("memory", transformer.Compute(scan=True))(params_of("merged"), TOKENS)
    np.testing.assert_allclose(scanned.hidden, kept["memory"].hidden, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("memory", [1.0, 1.5])
def test_a_memory_that_never_forgets_is_refused(memory):
    config = dataclasses.replace(TINY, router_memory=memory)
    with pytest.raises(errors.ConfigError, match=r"router_memory=1.* must lie in \[0, 1\)"):
        transformer.check(dataclasses.replace(MERGED, config=config))


def test_tied_head():
    config = dataclasses.replace(TINY, tied_head=True)
    tied = transformer.Architecture(config, transformer.dense_banks(config))
    params = noise.params(tied)
    assert "kernel" not in params["head"]
    hidden = jnp.ones((1, 2, 12))
    np.testing.assert_allclose(transformer.logits(params, hidden), hidden @ params["embed"]["embedding"].T, rtol=1e-5)


@pytest.mark.parametrize("name", ["merged"])
def test_init_abstract_and_axes_describe_the_same_tree(name):
    params, shapes = (
        tree.flatten(transformer.init(ARCHITECTURES[name], 0)),
        tree.flatten(transformer.abstract(ARCHITECTURES[name])),
    )
    axes = tree.flatten(transformer.logical_axes(ARCHITECTURES[name]))
    assert list(params) == list(shapes) == list(axes)
    for path, leaf in params.items():
        assert (leaf.shape, leaf.dtype) == (shapes[path].shape, shapes[path].dtype)
        assert len(axes[path]) == leaf.ndim, path
        assert (axes[path][0] == "layer") == tree.is_stacked(path)
    letters = {"embed": 12, "heads": 24, "kv_heads": 12, "vocab": 29, "layer": 2}
    for path, names in axes.items():
        assert all(letters.get(n, size) == size for n, size in zip(names, params[path].shape, strict=True)), path


def test_init_is_deterministic_and_layers_differ():
    once, again = transformer.init(MERGED, 3), transformer.init(MERGED, 3)
    jax.tree.map(np.testing.assert_array_equal, once, again)
    q = transformer.init(MERGED, 4)["layers"]["attention"]["q"]
    assert (q[0] != q[1]).all() and (q != once["layers"]["attention"]["q"]).all()
    assert math.isclose(np.asarray(q).std(), TINY.init_std, rel_tol=0.1)


SEVEN_B = config_lib.ModelConfig(
    vocab_size=100352, d_model=4096, num_layers=32, num_heads=32, num_kv_heads=32, head_dim=128, d_ff=11008
)


@pytest.mark.parametrize(
    ("experts", "published"),
    [(1, 7_298_617_344), (2, 11_627_401_216), (7, 33_270_665_216), (8, 37_599_318_016)],
)
def test_parameter_counts_of_the_paper(experts, published):
    banks = transformer.dense_banks(SEVEN_B)
    if experts > 1:
        banks += (config_lib.Bank("w11008", tuple(f"e{i}" for i in range(1, experts)), 11008),)
    params = transformer.abstract(transformer.Architecture(SEVEN_B, banks, top_k=experts))
    biases = sum(leaf.size for path, leaf in tree.flatten(params).items() if path.endswith("/bias"))
    assert biases == 32 * (experts - 1)
    assert tree.count(params) - biases == published
    if experts > 1:
        ffn = tree.count(params["experts"]["w11008"]["ffn"])
        assert ffn == (experts - 1) * 4_328_521_728
        assert tree.count(params["experts"]["w11008"]["router"]) == (experts - 1) * 32 * (4096 + 1)


@pytest.mark.parametrize(
    ("change", "top_k", "message"),
    [({"num_kv_heads": 3}, 1, "num_kv_heads=3"), ({"head_dim": 5}, 1, "head_dim=5"), ({}, 0, "top_k=0"), ({}, 2, "top_k=2")],
)
def test_impossible_shapes_are_refused(change, top_k, message):
    config = dataclasses.replace(TINY, **change)
    with pytest.raises(errors.ConfigError, match=message):
        transformer.check(transformer.Architecture(config, transformer.dense_banks(config), top_k))


def test_two_experts_of_one_name_are_refused():
    with pytest.raises(errors.ConfigError, match="unique"):
        transformer.check(transformer.Architecture(TINY, (BANKS[0], BANKS[1], config_lib.Bank("x", ("beta",), 10)), 1))
