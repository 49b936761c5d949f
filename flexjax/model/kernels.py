"""Matrix products: the plain one, and the grouped one, which depends on the platform a program is compiled for.

Grouped: rows of `x` that belong to group g lie together, from `starts[g]` on, `sizes[g]` of them; groups may be empty, and
rows that belong to no group give zeros. On CPU a group is worked off in blocks of rows with the group's weights held in
place, so the cost follows the rows that exist: nothing is dropped, nothing is padded, no weight is copied. Elsewhere it is
`jax.lax.ragged_dot`.
"""

from collections.abc import Callable
from functools import partial

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

BLOCK_ROWS = 128


def project(x: Float[Array, "... D"], w: Float[Array, "D F"]) -> Float[Array, "... F"]:
    """x @ w in the dtype of `x`, as one matrix: on CPU, a weight gradient over two axes takes three times as long."""
    return jnp.dot(x.reshape(-1, x.shape[-1]), w.astype(x.dtype)).reshape(*x.shape[:-1], w.shape[1])


def _fold(starts: Array, sizes: Array, group: int, step: Callable[[Array, Array, Array], Array], initial: Array) -> Array:
    """Folds `step(carry, first_row, rows_that_count)` over the blocks of one group."""

    def body(i: Array, carry: Array) -> Array:
        counts = i * BLOCK_ROWS + jnp.arange(BLOCK_ROWS) < sizes[group]
        return step(carry, starts[group] + i * BLOCK_ROWS, counts[:, None])

    return jax.lax.fori_loop(0, (sizes[group] + BLOCK_ROWS - 1) // BLOCK_ROWS, body, initial)


def _block(x: Array, start: Array) -> Array:
    return jax.lax.dynamic_slice_in_dim(x, start, BLOCK_ROWS)


def _pad(x: Array) -> Array:
    return jnp.pad(x, ((0, BLOCK_ROWS), (0, 0)))  # a block never reaches past the end, where a slice would be moved


def _matmul_by_blocks(x: Array, w: Array, starts: Array, sizes: Array, *, transpose: bool = False) -> Array:
    rows, padded = x.shape[0], _pad(x)
    out = jnp.zeros((rows + BLOCK_ROWS, w.shape[1 if transpose else 2]), x.dtype)
    contract = (((1,), (1 if transpose else 0,)), ((), ()))
    for group in range(w.shape[0]):
        weight = w[group]

        def step(carry: Array, start: Array, counts: Array, weight: Array = weight) -> Array:
            y = jax.lax.dot_general(_block(padded, start), weight, contract)
            return jax.lax.dynamic_update_slice_in_dim(carry, jnp.where(counts, y, _block(carry, start)), start, 0)

        out = _fold(starts, sizes, group, step, out)
    return out[:rows]


def _weight_grad_by_blocks(x: Array, dy: Array, starts: Array, sizes: Array) -> Array:
    x, dy = _pad(x), _pad(dy)

    def step(carry: Array, start: Array, counts: Array) -> Array:
        rows, grads = jnp.where(counts, _block(x, start), 0), jnp.where(counts, _block(dy, start), 0)
        return carry + jnp.einsum("RD,RF->DF", rows, grads, preferred_element_type=jnp.float32)

    zero = jnp.zeros((x.shape[1], dy.shape[1]), jnp.float32)
    return jnp.stack([_fold(starts, sizes, group, step, zero) for group in range(sizes.shape[0])]).astype(x.dtype)


def _ragged(x: Array, w: Array, starts: Array, sizes: Array) -> Array:
    w = jnp.where(sizes[:, None, None] > 0, w, 0)  # on GPU every group is computed: an unused one may hold NaN
    rolled = jax.lax.ragged_dot(jnp.roll(x, -starts[0], axis=0), w, sizes)
    return jnp.roll(rolled, starts[0], axis=0)


@jax.custom_vjp
def grouped_matmul(
    x: Float[Array, "R D"], w: Float[Array, "G D F"], starts: Int[Array, " G"], sizes: Int[Array, " G"]
) -> Float[Array, "R F"]:
    """Multiplies each row of group g by w[g]; rows outside every group give 0, whatever they and the weights hold."""
    return jax.lax.platform_dependent(x, w, starts, sizes, cpu=_matmul_by_blocks, default=_ragged)


def _forward(x: Array, w: Array, starts: Array, sizes: Array) -> tuple[Array, tuple[Array, ...]]:
    return grouped_matmul(x, w, starts, sizes), (x, w, starts, sizes)


def _backward_by_blocks(x: Array, w: Array, starts: Array, sizes: Array, dy: Array) -> tuple[Array, Array]:
    dx = partial(_matmul_by_blocks, transpose=True)(dy, w, starts, sizes)
    return dx, _weight_grad_by_blocks(x, dy, starts, sizes)


def _backward_ragged(x: Array, w: Array, starts: Array, sizes: Array, dy: Array) -> tuple[Array, Array]:
    return jax.vjp(lambda x, w: _ragged(x, w, starts, sizes), x, w)[1](dy)


def _backward(saved: tuple[Array, ...], dy: Array) -> tuple[Array, Array, None, None]:
    dx, dw = jax.lax.platform_dependent(*saved, dy, cpu=_backward_by_blocks, default=_backward_ragged)
    return dx, dw, None, None


grouped_matmul.defvjp(_forward, _backward)
