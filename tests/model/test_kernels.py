"""Grouped matmuls against a loop, and the test that chooses between them at start-up."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import errors
from flexjax.model import kernels

ROWS, GROUPS = 300, 4
SIZES = [(0, 0, 0, 0), (300, 0, 0, 0), (0, 0, 300, 0), (1, 127, 128, 44), (129, 0, 1, 100), (0, 150, 0, 149)]


def close(actual, expected, tolerance=2e-5):
    np.testing.assert_allclose(actual, expected, rtol=tolerance, atol=tolerance * max(1, np.abs(expected).max()))


def by_loop(x, w, starts, sizes):
    out = np.zeros((x.shape[0], w.shape[2]))
    for g, (start, size) in enumerate(zip(starts, sizes, strict=True)):
        out[start : start + size] = x[start : start + size] @ w[g]
    return out


@functools.cache
def compiled(kernel):
    """Jitted (y, dx, dw)."""

    def run(x, w, starts, sizes, dy):
        y, gradient = jax.vjp(lambda x, w: kernels.grouped_matmul(x, w, starts, sizes, kernel), x, w)
        return y, *gradient(dy)

    return jax.jit(run)


@pytest.mark.parametrize("kernel", ["auto", *kernels.KERNELS])
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_loop(kernel, sizes):
    """Empty groups get a gradient of exactly 0, rows outside all groups give exactly 0, whatever they hold."""
    random = np.random.default_rng(4)
    x, w, dy = (random.normal(size=shape) for shape in ((ROWS, 3), (GROUPS, 3, 5), (ROWS, 5)))
    first = (ROWS - sum(sizes)) // 2
    starts = first + np.cumsum(sizes) - np.array(sizes)
    inside = np.zeros(ROWS, bool)
    inside[first : first + sum(sizes)] = True
    expected_dx = by_loop(dy, w.transpose(0, 2, 1), starts, sizes)
    expected_dw = np.stack([x[s : s + n].T @ dy[s : s + n] for s, n in zip(starts, sizes, strict=True)])
    expected_y = by_loop(x, w, starts, sizes)
    x[~inside] = dy[~inside] = np.nan
    w[[size == 0 for size in sizes]] = np.nan
    f32 = [jnp.asarray(array, jnp.float32) for array in (x, w, dy)]
    y, dx, dw = compiled(kernel)(*f32[:2], jnp.array(starts, jnp.int32), jnp.array(sizes, jnp.int32), f32[2])
    close(y, expected_y)
    close(dx, expected_dx)
    close(dw, expected_dw, 1e-4)
    assert not np.asarray(y)[~inside].any() and not np.asarray(dx)[~inside].any()
    assert not np.asarray(dw)[[size == 0 for size in sizes]].any()


@pytest.mark.parametrize("kernel", ["blocks", "dense"])
def test_nan_in_one_group_leaves_the_bits_of_the_others_alone(kernel):
    random, sizes = np.random.default_rng(6), np.array([100, 0, 60, 140])
    starts = np.cumsum(sizes) - sizes
    x, w, dy = (random.normal(size=s).astype(np.float32) for s in ((ROWS, 3), (GROUPS, 3, 5), (ROWS, 5)))
    clean = compiled(kernel)(x, w, starts, sizes, dy)
    x[100:160] = dy[100:160] = w[2] = np.nan
    others = np.r_[0:100, 160:300]
    for before, after in zip(clean[:2], compiled(kernel)(x, w, starts, sizes, dy), strict=False):
        np.testing.assert_array_equal(np.asarray(before)[others], np.asarray(after)[others])
    after = np.asarray(compiled(kernel)(x, w, starts, sizes, dy)[2])
    np.testing.assert_array_equal(np.asarray(clean[2])[[0, 1, 3]], after[[0, 1, 3]])
    assert np.isnan(after[2]).all()


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_bfloat16(kernel):
    random = np.random.default_rng(5)
    x, w = (jnp.asarray(random.normal(size=shape), jnp.bfloat16) for shape in ((ROWS, 3), (GROUPS, 3, 5)))
    sizes = np.array([10, 140, 0, 150])
    starts = np.cumsum(sizes) - sizes
    y, dx, dw = compiled(kernel)(x, w, jnp.array(starts), jnp.array(sizes), jnp.ones((ROWS, 5), jnp.bfloat16))
    assert {a.dtype for a in (y, dx, dw)} == {jnp.dtype(jnp.bfloat16)}
    f64 = [np.asarray(array, np.float64) for array in (x, w)]
    close(np.asarray(y, np.float64), by_loop(*f64, starts, sizes), 2e-2)


def test_the_self_test_takes_the_preferred_kernel():
    verdict = kernels.self_test()
    assert verdict.kernel == "blocks"
    assert verdict.text == "grouped matmul on cpu: 'blocks' passed its test"


def spoiled(change):
    """The kernel of blocks, with `change(y, dx, dw, starts, sizes)` applied to what it returns."""
    blocks = kernels.KERNELS["blocks"]

    def forward(x, w, starts, sizes):
        return change(blocks.forward(x, w, starts, sizes), x, w, starts, sizes)[0]

    def backward(x, w, starts, sizes, dy):
        return change(dy, *blocks.backward(x, w, starts, sizes, dy), starts, sizes)[1:]

    return dataclasses.replace(blocks, forward=forward, backward=backward)


FAULTS = {
    "a wrong value": lambda y, dx, dw, starts, sizes: (1.01 * y, dx, dw),
    "a wrong gradient of rows": lambda y, dx, dw, starts, sizes: (y, 0.99 * dx, dw),
    "a wrong gradient of weights": lambda y, dx, dw, starts, sizes: (y, dx, 0.99 * dw),
    "what no row asked for is not 0": lambda y, dx, dw, starts, sizes: (y, dx, jnp.where(dw == 0, 1e-30, dw)),
    "the value of other groups feels a NaN": lambda y, dx, dw, starts, sizes: (jnp.where(y == 0, 0, y + 0 * y.sum()), dx, dw),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_faults_are_found(monkeypatch, fault):
    monkeypatch.setitem(kernels.KERNELS, "blocks", spoiled(FAULTS[fault]))
    assert kernels._fault("blocks", np.random.default_rng(), "float32", 1e-5) == fault


def test_a_kernel_with_a_fault_is_refused_and_the_next_one_taken(monkeypatch):
    monkeypatch.setitem(kernels.KERNELS, "blocks", spoiled(FAULTS["a wrong value"]))
    verdict = kernels.self_test()
    assert verdict.kernel == "dense"
    assert verdict.text == "grouped matmul on cpu: 'dense' passed its test; 'blocks' refused: a wrong value"


def test_a_kernel_that_does_not_run_is_refused(monkeypatch):
    def forward(x, w, starts, sizes):
        return jnp.asarray(jax.pure_callback(lambda: 1 / 0, jax.ShapeDtypeStruct((x.shape[0], w.shape[2]), x.dtype)))

    blocks = dataclasses.replace(kernels.KERNELS["blocks"], forward=forward)
    monkeypatch.setitem(kernels.KERNELS, "blocks", blocks)
    assert kernels._fault("blocks", np.random.default_rng(), "float32", 1e-5).startswith("it does not run, ")


def test_ragged_dot_is_refused_where_it_is_lowered_densely():
    assert kernels._fault("ragged", np.random.default_rng(), "float32", 1e-5) == "the value of other groups feels a NaN"


def test_without_a_preference_the_fastest_is_taken(monkeypatch):
    monkeypatch.delitem(kernels.CANDIDATES, "cpu")
    seconds = {"blocks": 0.002, "dense": 0.001}
    monkeypatch.setattr(kernels, "_seconds", lambda name: seconds[name])
    verdict = kernels.self_test()
    assert verdict.kernel == "dense"
    assert "'blocks' 2.0 ms; 'dense' 1.0 ms" in verdict.text and "'ragged' refused" in verdict.text


def test_kernels_are_timed_on_the_device():
    assert 0 < kernels._seconds("dense", groups=2, rows=32, d=8, f=8) < 10


def test_without_a_right_kernel_there_is_no_start(monkeypatch):
    for name in ("blocks", "dense"):
        monkeypatch.setitem(kernels.KERNELS, name, spoiled(FAULTS["a wrong value"]))
    with pytest.raises(
        errors.NumericError, match=r"no grouped matmul is right on cpu \('blocks' refused: a wrong value; 'dense'"
    ):
        kernels.self_test()


@pytest.mark.parametrize("kernel", kernels.KERNELS)
def test_groups_from_the_first_row_need_no_starts(kernel):
    random = np.random.default_rng(5)
    x, w, dy = (jnp.asarray(random.normal(size=shape), jnp.float32) for shape in ((40, 6), (3, 6, 5), (40, 5)))
    sizes = jnp.array([9, 0, 20], jnp.int32)
    given = compiled(kernel)(x, w, jnp.cumsum(sizes) - sizes, sizes, dy)
    for a, b in zip(given, compiled(kernel)(x, w, None, sizes, dy), strict=True):
        assert np.array_equal(a, b)
