"""Matrix products: the plain one, and the grouped one, which depends on the platform a program is compiled for.

Grouped: rows of `x` that belong to group g lie together, from `starts[g]` on, `sizes[g]` of them; groups may be empty, and
rows that belong to no group give zeros. Three kernels do it:

    blocks  works a group off in blocks of rows, so the cost follows the rows that exist: nothing is dropped and the last
            block of a group, a small one, alone is padded; XLA copies a group's weights once, as part of reading them
    ragged  `jax.lax.ragged_dot`: a kernel of its own on TPU. On CPU, and where else XLA has none, every row is multiplied by
            every group and zeros are added up, so that a NaN in one group's weights reaches the rows of all
    dense   multiplies every row by every group and selects: slow, and right everywhere

"auto" takes what is known to be right and fast on the platform; `self_test` finds out on the devices at hand.
"""

import dataclasses
import statistics
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from flexjax import errors

BLOCKS = (512, 256, 64)  # rows
CANDIDATES = {"cpu": ("blocks", "dense"), "tpu": ("ragged", "blocks", "dense")}  # in order of preference
BY_TIME = ("blocks", "ragged", "dense")  # elsewhere, what is fastest depends on the device and the version of XLA
TOLERANCES = {"cpu": {"float32": 1e-5}}  # of the largest value
ROUGH = {"float32": 2e-2, "bfloat16": 2e-2}  # elsewhere, where a float32 product may be made of bfloat16 ones


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Transposed:
    """A weight [D, F] that lies as [F, D]."""

    array: Float[Array, "F D"]


def to_decode(w: Float[Array, "D F"]) -> Float[Array, "D F"] | Transposed:
    """A weight as it is multiplied fastest by a few rows: on CPU it lies the other way round, so that it needs no packing."""
    return Transposed(jnp.transpose(w)) if jax.default_backend() == "cpu" else w


def to_prefill(w: Float[Array, "D F"] | Transposed) -> Float[Array, "D F"]:
    """The weight as it was before `to_decode`."""
    return w.array.T if isinstance(w, Transposed) else w


def project(x: Float[Array, "... D"], w: Float[Array, "D F"] | Transposed) -> Float[Array, "... F"]:
    """x @ w in the dtype of `x`, as one matrix: on CPU, a weight gradient over two axes takes three times as long."""
    rows = x.reshape(-1, x.shape[-1])
    if isinstance(w, Transposed):  # `keep`: or XLA turns it into the other product, for which it packs the weight
        y = keep(jax.lax.dot_general(w.array.astype(x.dtype), rows, (((1,), (1,)), ((), ())))).T
    else:
        y = jnp.dot(rows, w.astype(x.dtype))
    return y.reshape(*x.shape[:-1], y.shape[-1])


def keep(x: Array) -> Array:
    """x, computed once: on CPU, XLA computes what looks cheap again in each loop that reads it, a sine for every head."""
    return jax.lax.platform_dependent(x, cpu=jax.lax.optimization_barrier, default=lambda x: x)


def _begin(starts: Array | None, sizes: Array) -> Array:
    return jnp.cumsum(sizes) - sizes if starts is None else starts


def _fold(begin: Array, end: Array, rows: int, step: Callable[[Array, Array, Array | None, int], Array], carry: Array) -> Array:
    """Folds `step(carry, first_row, rows_that_count, size)` over a group: as many large blocks as fill, then smaller ones.

    The last block alone may hold rows of others: `rows_that_count` is None for all before it. It never reaches past the end.
    """
    sizes = [size for size in BLOCKS if size <= rows] or [rows]
    for index, size in enumerate(sizes):
        last = index == len(sizes) - 1
        count = (end - begin + (size - 1 if last else 0)) // size

        def body(i: Array, carry: Array, begin: Array = begin, size: int = size, last: bool = last) -> Array:
            first = jnp.minimum(begin + i * size, rows - size)
            row = first + jnp.arange(size)
            counts = (row >= begin + i * size) & (row < end)
            return step(carry, first, counts[:, None] if last else None, size)

        carry = jax.lax.fori_loop(0, count, body, carry)
        begin = begin + count * size
    return carry


def _matmul_by_blocks(x: Array, w: Array, starts: Array | None, sizes: Array, *, transpose: bool = False) -> Array:
    starts, rows = _begin(starts, sizes), x.shape[0]
    contract = (((1,), (1 if transpose else 0,)), ((), ()))

    def of_group(group: Array, out: Array) -> Array:
        weight = w[group]

        def step(out: Array, first: Array, counts: Array | None, size: int) -> Array:
            y = jax.lax.dot_general(jax.lax.dynamic_slice_in_dim(x, first, size), weight, contract)
            if counts is not None:
                y = jnp.where(counts, y, jax.lax.dynamic_slice_in_dim(out, first, size))
            return jax.lax.dynamic_update_slice_in_dim(out, y, first, 0)

        return _fold(starts[group], starts[group] + sizes[group], rows, step, out)

    return jax.lax.fori_loop(0, w.shape[0], of_group, jnp.zeros_like(x, shape=(rows, w.shape[1 if transpose else 2])))


def _weight_grad_by_blocks(x: Array, dy: Array, starts: Array, sizes: Array) -> Array:
    def of_group(group: Array) -> Array:
        def step(total: Array, first: Array, counts: Array | None, size: int) -> Array:
            mine = [jax.lax.dynamic_slice_in_dim(array, first, size) for array in (x, dy)]
            if counts is not None:
                mine = [jnp.where(counts, array, 0) for array in mine]
            return total + jnp.einsum("RD,RF->DF", *mine, preferred_element_type=jnp.float32)

        zero = jnp.zeros_like(x, jnp.float32, shape=(x.shape[1], dy.shape[1]))
        return _fold(starts[group], starts[group] + sizes[group], x.shape[0], step, zero).astype(x.dtype)

    return jax.lax.map(of_group, jnp.arange(sizes.shape[0]))


def _backward_by_blocks(x: Array, w: Array, starts: Array | None, sizes: Array, dy: Array) -> tuple[Array, Array]:
    starts = _begin(starts, sizes)
    return _matmul_by_blocks(dy, w, starts, sizes, transpose=True), _weight_grad_by_blocks(x, dy, starts, sizes)


def _members(rows: int, starts: Array | None, sizes: Array) -> Array:
    """[R, G]: whether a row belongs to a group."""
    starts = _begin(starts, sizes)
    row = jnp.arange(rows)[:, None]
    return (starts[None] <= row) & (row < (starts + sizes)[None])


@jax.custom_vjp
def _turn(x: Float[Array, "R D"], by: Int[Array, ""]) -> Float[Array, "R D"]:
    """Row i becomes row i - by, round and round: `jnp.roll` and its gradient would hold every row twice."""
    return x[(jnp.arange(x.shape[0]) + by) % x.shape[0]]


def _turn_forward(x: Array, by: Array) -> tuple[Array, Array]:
    return _turn(x, by), by


def _turn_backward(by: Array, dy: Array) -> tuple[Array, None]:
    return _turn(dy, -by), None


_turn.defvjp(_turn_forward, _turn_backward)


def _ragged(x: Array, w: Array, starts: Array | None, sizes: Array) -> Array:
    w = jnp.where(sizes[:, None, None] > 0, w, 0)  # where every group is computed, an unused one may hold NaN
    belongs = _members(x.shape[0], starts, sizes).any(axis=1, keepdims=True)
    y = jax.lax.ragged_dot(x if starts is None else _turn(x, starts[0]), w, sizes)
    return jnp.where(belongs, y if starts is None else _turn(y, -starts[0]), 0)  # nobody says what is left of other rows


def _backward_ragged(x: Array, w: Array, starts: Array | None, sizes: Array, dy: Array) -> tuple[Array, Array]:
    belongs = _members(x.shape[0], starts, sizes).any(axis=1, keepdims=True)
    x, dy = jnp.where(belongs, x, 0), jnp.where(belongs, dy, 0)
    dx, dw = jax.vjp(lambda x, w: _ragged(x, w, starts, sizes), x, w)[1](dy)
    return jnp.where(belongs, dx, 0), jnp.where(sizes[:, None, None] > 0, dw, 0)


def _dense(x: Array, w: Array, starts: Array | None, sizes: Array) -> Array:
    member = _members(x.shape[0], starts, sizes)
    y = jnp.zeros_like(x, shape=(x.shape[0], w.shape[2]))
    for group in range(w.shape[0]):
        y = jnp.where(member[:, group, None], x @ w[group], y)
    return y


def _backward_dense(x: Array, w: Array, starts: Array | None, sizes: Array, dy: Array) -> tuple[Array, Array]:
    member = _members(x.shape[0], starts, sizes)
    dw = []
    for group in range(w.shape[0]):
        rows, grads = (jnp.where(member[:, group, None], array, 0) for array in (x, dy))
        dw.append(jnp.einsum("RD,RF->DF", rows, grads, preferred_element_type=jnp.float32).astype(w.dtype))
    return _dense(dy, jnp.swapaxes(w, 1, 2), starts, sizes), jnp.stack(dw)


@dataclasses.dataclass(frozen=True)
class Kernel:
    """One way: `forward(x, w, starts, sizes) -> y` and `backward(x, w, starts, sizes, dy) -> (dx, dw)`."""

    forward: Callable[..., Array]
    backward: Callable[..., tuple[Array, Array]]


KERNELS = {
    "blocks": Kernel(_matmul_by_blocks, _backward_by_blocks),
    "ragged": Kernel(_ragged, _backward_ragged),
    "dense": Kernel(_dense, _backward_dense),
}


def _by_platform(kernel: str, direction: str, *args: Array | None) -> Any:
    if kernel != "auto":
        return getattr(KERNELS[kernel], direction)(*args)
    ways = {platform: getattr(KERNELS[names[0]], direction) for platform, names in CANDIDATES.items()}
    return jax.lax.platform_dependent(*args, **ways, default=getattr(KERNELS[BY_TIME[0]], direction))


def grouped_matmul(
    x: Float[Array, "R D"],
    w: Float[Array, "G D F"],
    starts: Int[Array, " G"] | None,
    sizes: Int[Array, " G"],
    kernel: str = "auto",
) -> Float[Array, "R F"]:
    """Multiplies each row of group g by w[g]; rows outside every group give 0, whatever they and the weights hold.

    Args:
      x, w: of one dtype.
      starts, sizes: the groups follow each other without a gap, from starts[0] on; None is the first row.
      kernel: a key of `KERNELS`, or "auto": by the platform that the program is compiled for.
    """
    return _grouped_matmul(kernel, x, w, starts, sizes)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _grouped_matmul(kernel: str, x: Array, w: Array, starts: Array | None, sizes: Array) -> Array:
    return _by_platform(kernel, "forward", x, w, starts, sizes)


def _forward(kernel: str, x: Array, w: Array, starts: Array | None, sizes: Array) -> tuple[Array, tuple[Array | None, ...]]:
    return _grouped_matmul(kernel, x, w, starts, sizes), (x, w, starts, sizes)


def _backward(kernel: str, saved: tuple[Array | None, ...], dy: Array) -> tuple[Array, Array, None, None]:
    dx, dw = _by_platform(kernel, "backward", *saved, dy)
    return dx, dw, None, None


_grouped_matmul.defvjp(_forward, _backward)


@dataclasses.dataclass(frozen=True)
class Verdict:
    """The kernel to use on these devices, and one line that says why."""

    kernel: str
    text: str


def self_test() -> Verdict:
    """Compares the kernels with NumPy on the default backend and fresh random inputs.

    A kernel passes if values and gradients agree, an empty group has a gradient of exactly 0, and what is NaN in one group
    or in a row of none stays there. The first of the platform's `CANDIDATES` that passes is taken; on other platforms the
    fastest.

    Raises:
      NumericError: no kernel passes.
    """
    platform, random = jax.default_backend(), np.random.default_rng()
    precisions = TOLERANCES.get(platform, ROUGH)
    refused: list[str] = []
    seconds: dict[str, float] = {}
    for name in CANDIDATES.get(platform, BY_TIME):
        faults = (_fault(name, random, dtype, tolerance) for dtype, tolerance in precisions.items())
        if fault := next(filter(None, faults), ""):
            refused.append(f"'{name}' refused: {fault}")
        elif platform in CANDIDATES:
            seconds[name] = 0.0
            break
        else:
            seconds[name] = _seconds(name)
    if not seconds:
        raise errors.NumericError(f"no grouped matmul is right on {platform} ({'; '.join(refused)}); train on other devices")
    best = min(seconds, key=lambda name: seconds[name])
    timed = [f"'{name}' {1e3 * value:.1f} ms" for name, value in seconds.items() if value]
    return Verdict(best, "; ".join([f"grouped matmul on {platform}: '{best}' passed its test", *timed, *refused]))


def _draw(random: np.random.Generator, groups: int = 4, rows: int = 300, d: int = 128, f: int = 256) -> list[np.ndarray]:
    """x, w, dy, starts and sizes; one group is empty, and rows before and behind the groups belong to none."""
    sizes = 20 + random.multinomial(rows - 30 - 20 * groups, random.dirichlet(np.ones(groups)))
    sizes[random.integers(groups)] = 0
    starts = 1 + random.integers(20) + np.cumsum(sizes) - sizes
    shapes = (rows, d), (groups, d, f), (rows, f)
    return [
        *(random.normal(size=shape).astype(np.float32) for shape in shapes),
        starts.astype(np.int32),
        sizes.astype(np.int32),
    ]


def _fault(name: str, random: np.random.Generator, dtype: str, tolerance: float) -> str:
    """What is wrong with a kernel; empty if nothing is."""

    @jax.jit
    def products(x: Array, w: Array, dy: Array, starts: Array, sizes: Array) -> tuple[Array, ...]:
        y, pullback = jax.vjp(lambda x, w: grouped_matmul(x, w, starts, sizes, name), x.astype(dtype), w.astype(dtype))
        return tuple(array.astype(jnp.float32) for array in (y, *pullback(dy.astype(dtype))))

    x, w, dy, starts, sizes = _draw(random)
    inside = [slice(start, start + size) for start, size in zip(starts, sizes, strict=True)]
    outside = np.ones(len(x), bool)
    expected = np.zeros_like(dy), np.zeros_like(x), np.zeros_like(w)
    for group, rows in enumerate(inside):
        outside[rows] = False
        expected[0][rows] = x[rows] @ w[group]
        expected[1][rows] = dy[rows] @ w[group].T
        expected[2][group] = x[rows].T @ dy[rows]
    x[outside] = dy[outside] = w[sizes == 0] = np.nan
    broken = int(np.argmax(sizes))
    for poisoned in (False, True):
        if poisoned:
            x[inside[broken]] = dy[inside[broken]] = w[broken] = np.nan
        try:
            found = [np.array(array) for array in products(x, w, dy, starts, sizes)]
        except (jax.errors.JaxRuntimeError, NotImplementedError) as error:
            return f"it does not run, {str(error).partition(chr(10))[0]}"
        if found[2][sizes == 0].any() or found[0][outside].any() or found[1][outside].any():
            return "what no row asked for is not 0"
        for what, mine, theirs in zip(("value", "gradient of rows", "gradient of weights"), found, expected, strict=True):
            if poisoned:
                place = broken if what == "gradient of weights" else inside[broken]
                mine[place] = theirs[place] = 0
            if not np.allclose(mine, theirs, rtol=0, atol=tolerance * np.abs(theirs).max(initial=1)):
                return f"the {what} of other groups feels a NaN" if poisoned else f"a wrong {what}"
    return ""


def _seconds(name: str, groups: int = 8, rows: int = 16384, d: int = 1024, f: int = 2048) -> float:
    """Median time of a product and its gradients in bfloat16, where half of the rows are in use."""
    sizes = jnp.full(groups, rows // groups // 2, jnp.int32)
    starts = jnp.cumsum(sizes) - sizes

    @jax.jit
    def products(x: Array, w: Array) -> Any:
        return jax.grad(lambda x, w: grouped_matmul(x, w, starts, sizes, name).sum(), (0, 1))(x, w)

    x, w, times = jnp.ones((rows, d), jnp.bfloat16), jnp.ones((groups, d, f), jnp.bfloat16), []
    for _ in range(6):
        start = time.perf_counter()
        jax.block_until_ready(products(x, w))
        times.append(time.perf_counter() - start)
    return statistics.median(times[1:])
