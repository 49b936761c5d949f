"""One training step, the same for every phase: differentiate by the trainable tree only, guard, update.

`trainable` and `frozen` are disjoint trees; gradients and optimizer state have the structure of `trainable` and nothing
else, so there is nothing to mask. A step whose loss or gradient is not finite, or whose gradient norm jumps, leaves the
state bitwise as it was.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh
from jaxtyping import Array, Float, Int

from flexjax import config as config_lib
from flexjax import sharding, tree
from flexjax.model import losses, router, transformer
from flexjax.train import optimizer as optimizer_lib

GUARD_WARMUP = 20  # applied updates before a jump of the gradient norm can be told
GUARD_DECAY = 0.95
Batch = dict[str, Any]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class TrainState:
    """Everything that a checkpoint holds."""

    trainable: tree.Tree
    optimizer: Any
    step: Int[Array, ""]  # steps taken, skipped ones included: the position in the data
    updates: Int[Array, ""]  # steps applied: the position in the schedule
    bad_steps: Int[Array, ""]  # skipped in a row
    norm_mean: Float[Array, ""]  # running mean of the gradient norm


def init_state(trainable: tree.Tree, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step."""
    step, updates, bad_steps = (jnp.zeros((), jnp.int32) for _ in range(3))  # three buffers: each is donated
    norm_mean = jnp.zeros((), jnp.float32)
    return TrainState(trainable, optimizer.init(trainable), step, updates, bad_steps, norm_mean)


def sequence_losses(
    params: tree.Tree,
    batch: Batch,
    architecture: transformer.Architecture,
    compute: transformer.Compute,
    config: config_lib.TrainConfig,
    head_trainable: bool,
) -> tuple[Float[Array, " B"], dict[str, Any]]:
    """Loss of each sequence in nats per token, and its parts; a sequence's loss depends on that sequence alone."""
    out = transformer.forward(
        params, batch["tokens"], architecture, compute, segments=batch["segments"], weights=batch["weights"]
    )
    with jax.named_scope("head"):
        total, cross_entropy, z = losses.cross_entropy(
            out.hidden,
            transformer.head_kernel(params),
            batch["targets"],
            z_weight=config.z_loss,
            head_trainable=head_trainable,
            mesh=compute.mesh,
        )
    loss = losses.sequence_mean(total, batch["weights"])
    parts = {
        "cross_entropy": losses.sequence_mean(cross_entropy, batch["weights"]),
        "z": losses.sequence_mean(z, batch["weights"]),
    }
    if out.routing is not None:
        router_z = out.routing.z.mean(axis=0)
        loss = loss + config.router_z_loss * router_z
        parts["router_z"] = router_z
    return loss, {"parts": parts, "routing": out.routing}


def batch_loss(
    params: tree.Tree,
    batch: Batch,
    architecture: transformer.Architecture,
    compute: transformer.Compute,
    config: config_lib.TrainConfig,
    head_trainable: bool,
) -> tuple[Float[Array, ""], dict[str, Any]]:
    """Token-weighted mean of the sequence losses plus the load-balancing loss of this (micro-)batch, and the metrics."""
    per_sequence, extra = sequence_losses(params, batch, architecture, compute, config, head_trainable)
    tokens = batch["weights"].sum(axis=1)
    share = tokens / jnp.maximum(tokens.sum(), 1)
    loss = (per_sequence * share).sum()
    metrics = {name: (values * share).sum() for name, values in extra["parts"].items()}
    routing = extra["routing"]
    if routing is not None:
        balance = losses.load_balance(routing, share)
        loss = loss + config.load_balance_loss * balance
        metrics |= {
            "load_balance": balance,
            "share": jnp.einsum("LBE,B->LE", routing.share, share),
            "entropy": jnp.einsum("LB,B->L", routing.entropy, share),
            "bias": biases(params, architecture),
        }
    return loss, metrics | {"loss": loss}


def biases(params: tree.Tree, architecture: transformer.Architecture) -> Float[Array, "L E"]:
    """Effective router biases in canonical order, 0 where a bank has none."""
    routers = [params["experts"][bank.name]["router"] for bank in architecture.banks]
    laid = [leaves.get("bias", jnp.zeros(leaves["row"].shape[:2], jnp.float32)) for leaves in routers]
    return jnp.concatenate(laid, axis=1)[:, jnp.array(router.positions(architecture.banks))]


def _deal(rows: Array, parts: int, mesh: Mesh | None) -> Array:
    """[B, T] as [parts, B / parts, T]: micro-batch i holds rows i, i + parts, ..., so that no row leaves its device."""
    dealt = jnp.swapaxes(rows.reshape(rows.shape[0] // parts, parts, *rows.shape[1:]), 0, 1)
    return sharding.constrain(dealt, mesh, None, "batch", None)


def make_gradient(
    architecture: transformer.Architecture,
    compute: transformer.Compute,
    config: config_lib.TrainConfig,
    head_trainable: bool,
) -> Callable[[tree.Tree, tree.Tree, Batch], tuple[tree.Tree, dict[str, Any]]]:
    """Returns `gradient(trainable, frozen, batch) -> (gradients, metrics)`, over micro-batches if the config says so."""
    mesh, axes = compute.mesh, transformer.logical_axes(architecture)

    def as_stored(gradients: tree.Tree) -> tree.Tree:
        """Each device keeps the part of the sum over all devices that belongs to its part of the state."""
        if mesh is None or mesh.size == 1:
            return gradients
        return jax.lax.with_sharding_constraint(gradients, sharding.of_state(gradients, axes, mesh))

    @jax.jit  # traced once, for its shapes and for its values
    def gradient(trainable: tree.Tree, frozen: tree.Tree, batch: Batch) -> tuple[tree.Tree, dict[str, Any]]:
        def loss(trainable: tree.Tree) -> tuple[Array, dict[str, Any]]:
            params = router.constrain(tree.combine(trainable, frozen))
            return batch_loss(params, batch, architecture, compute, config, head_trainable)

        gradients, metrics = jax.grad(loss, has_aux=True)(trainable)
        return as_stored(gradients), metrics

    def as_computed(path: str, leaf: Array) -> Array:
        """A layer's matrix in the dtype in which it is used: its gradient has no more digits, and half the bytes."""
        names = tree.flatten(axes).get(path, ())
        return leaf.astype(compute.dtype) if "layer" in names and "embed" in names else leaf

    def accumulated(trainable: tree.Tree, frozen: tree.Tree, batch: Batch) -> tuple[tree.Tree, dict[str, Any]]:
        parts = config.accumulation
        copies = tree.map_with_path(as_computed, trainable)
        micro = {name: _deal(rows, parts, mesh) for name, rows in batch.items()}
        tokens = micro["weights"].sum(axis=(1, 2))
        share = tokens / jnp.maximum(tokens.sum(), 1)

        def add(total: Any, part: tuple[Batch, Array]) -> tuple[Any, None]:
            new = gradient(copies, frozen, part[0])
            return jax.tree.map(lambda sum_, value: sum_ + part[1] * value.astype(sum_.dtype), total, new), None

        first = jax.tree.map(lambda x: x[0], micro)
        shapes = jax.eval_shape(gradient, trainable, frozen, first)
        gradients, metrics = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add, (as_stored(gradients), metrics), (micro, share))[0]

    return gradient if config.accumulation == 1 else accumulated


def make_step(
    architecture: transformer.Architecture,
    compute: transformer.Compute,
    config: config_lib.TrainConfig,
    optimizer: optax.GradientTransformation,
    head_trainable: bool,
) -> Callable[[TrainState, tree.Tree, Batch], tuple[TrainState, dict[str, Any]]]:
    """Returns `step(state, frozen, batch) -> (state, metrics)`, to be compiled by the caller."""
    gradient = make_gradient(architecture, compute, config, head_trainable)

    def step(state: TrainState, frozen: tree.Tree, batch: Batch) -> tuple[TrainState, dict[str, Any]]:
        grads, metrics = gradient(state.trainable, frozen, batch)
        with jax.named_scope("optimizer"):
            norm = optax.tree.norm(grads)
            rate = optimizer_lib.learning_rate(config, state.updates)
            with jax.numpy_dtype_promotion("standard"):  # optax itself raises a float to an integer power
                updates, moments = optimizer.update(grads, state.optimizer, state.trainable)
            trainable = jax.tree.map(lambda p, u: p - rate * u, state.trainable, updates)
        jumps = (state.updates >= GUARD_WARMUP) & (norm > config.spike_factor * state.norm_mean)
        good = jnp.isfinite(metrics["loss"]) & jnp.isfinite(norm) & ~jumps
        mean = jnp.where(state.updates == 0, norm, GUARD_DECAY * state.norm_mean + (1 - GUARD_DECAY) * norm)
        kept = jax.tree.map(
            lambda new, old: jnp.where(good, new, old),
            (trainable, moments, state.updates + 1, jnp.zeros_like(state.bad_steps), mean),
            (state.trainable, state.optimizer, state.updates, state.bad_steps + 1, state.norm_mean),
        )
        metrics |= {"gradient_norm": norm, "learning_rate": rate, "skipped": ~good, "bad_steps": kept[3]}
        return TrainState(kept[0], kept[1], state.step + 1, kept[2], kept[3], kept[4]), metrics

    return step
