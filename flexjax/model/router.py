"""The routing rule, the same in training, masked, merged and exported models.

    logits = h . row_e + b_e    in float32, over all experts of all banks, in canonical order
    logits = where(allowed_e, logits, -inf)
    p      = softmax(logits);  S = the top k_eff of p, with k_eff = min(k, number of allowed experts)
    gate_e = p_e for e in S, not renormalised (the RMSNorm behind the layer cancels a common factor)

Canonical order is `public` first, then the other names sorted: experts are known by name, never by position. With
`model.router_memory` above 0, h is the running mean of the document's states (`remember`): the router then tells domains
apart by more than one token.
"""

import dataclasses
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from flexjax import config as config_lib
from flexjax import errors


def canonical_order(names: Iterable[str]) -> tuple[str, ...]:
    """`public` first, then sorted."""
    return tuple(sorted(names, key=lambda name: (name != config_lib.PUBLIC, name)))


def expert_names(banks: Sequence[config_lib.Bank]) -> tuple[str, ...]:
    """Names of all experts of all banks, in canonical order."""
    return canonical_order(name for bank in banks for name in bank.experts)


def positions(banks: Sequence[config_lib.Bank]) -> tuple[int, ...]:
    """For each expert in canonical order, its place when the banks are laid end to end."""
    laid = [name for bank in banks for name in bank.experts]
    return tuple(laid.index(name) for name in expert_names(banks))


def allowed_mask(names: Sequence[str], allowed: Iterable[str], batch: int) -> Bool[Array, "B E"]:
    """The mask that lets every row of a batch use exactly the named experts.

    Raises:
      PolicyError: a name is unknown, or no expert is left.
    """
    chosen = set(allowed)
    for name in sorted(chosen - set(names)):
        raise errors.PolicyError(f"unknown expert '{name}'; this model has {', '.join(names)}")
    if not chosen:
        raise errors.PolicyError(f"no expert is allowed; name at least one of {', '.join(names)}")
    return jnp.tile(jnp.array([[name in chosen for name in names]]), (batch, 1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Routing:
    """One layer's decision. A choice that no allowed expert can fill has gate 0 and index E, the sentinel."""

    probabilities: Float[Array, "B T E"]
    indices: Int[Array, "B T k"]
    gates: Float[Array, "B T k"]
    log_normalizer: Float[Array, "B T"]


@jax.custom_vjp
def _scores(h: Float[Array, "B T D"], rows: Float[Array, "E D"], allowed: Bool[Array, "B E"]) -> Float[Array, "B T E"]:
    return jnp.einsum("BTD,ED->BTE", h, rows)


def _scores_forward(h: Array, rows: Array, allowed: Array) -> tuple[Array, tuple[Array, Array, Array]]:
    return _scores(h, rows, allowed), (h, rows, allowed)


def _scores_backward(saved: tuple[Array, Array, Array], grad: Array) -> tuple[Array, Array, None]:
    # A forbidden expert's gradient is 0, but its row may hold anything: select, since 0 * NaN is NaN.
    h, rows, allowed = saved
    dh = jnp.zeros_like(h)
    for e in range(rows.shape[0]):
        dh = dh + jnp.where(allowed[:, e, None, None], grad[..., e, None] * rows[None, None, e], 0)
    return dh, jnp.einsum("BTE,BTD->ED", grad, h), None


_scores.defvjp(_scores_forward, _scores_backward)


def route(
    h: Float[Array, "B T D"],
    rows: Float[Array, "E D"],
    bias: Float[Array, " E"],
    top_k: int,
    allowed: Bool[Array, "B E"] | None,
) -> Routing:
    """Applies the routing rule to the un-normalised residual stream (FlexOlmo, section 3.3).

    Args:
      h: residual stream after attention, any float dtype.
      rows: router rows in canonical order.
      bias: effective biases, at most 0; 0 for the public expert.
      top_k: experts per token; may exceed the number that a row allows.
      allowed: experts that each row of the batch may use, at least one; None allows all.
    """
    h, rows, bias = h.astype(jnp.float32), rows.astype(jnp.float32), bias.astype(jnp.float32)[None, None]
    if allowed is None:
        logits = jnp.einsum("BTD,ED->BTE", h, rows) + bias
    else:
        logits = jnp.where(allowed[:, None], _scores(h, rows, allowed) + bias, -jnp.inf)
    log_normalizer = jax.nn.logsumexp(logits, axis=-1)
    probabilities = jax.nn.softmax(logits, axis=-1)
    if allowed is not None:
        probabilities = jnp.where(allowed[:, None], probabilities, 0)  # 0 already, unless an allowed logit is NaN
    gates, indices = jax.lax.top_k(probabilities, min(top_k, rows.shape[0]))
    indices = jnp.where(gates == 0, rows.shape[0], indices)  # a NaN keeps its index, and is seen
    return Routing(probabilities, indices, gates, log_normalizer)


def place_in_document(segments: Int[Array, "B T"]) -> Int[Array, "B T"]:
    """How many tokens of its own document stand before each token of a window."""
    slots = jnp.arange(segments.shape[1])
    first = jnp.concatenate([jnp.ones_like(segments[:, :1], bool), segments[:, 1:] != segments[:, :-1]], axis=1)
    return slots[None] - jax.lax.cummax(jnp.where(first, slots[None], 0), axis=1)


def forgetting(place: Int[Array, "..."], memory: float) -> Float[Array, "..."]:
    """The weight 1 / n of a token's own state in the running mean m <- m + (h - m) / n, with n = 1 + r + ... + r^place."""
    rate, count = jnp.float32(memory), (place + 1).astype(jnp.float32)
    own = (1 - rate) / (1 - jnp.power(rate, count))
    return jnp.where(place == 0, 1.0, own)  # exactly 1: nothing of another document


def remember(h: Float[Array, "B T D"], place: Int[Array, "B T"], memory: float) -> Float[Array, "B T D"]:
    """What routers read: the mean of a document's states so far, a state of s tokens ago weighing r^s; h itself if r is 0.

    Args:
      h: residual stream after attention.
      place: of each token in its document, see `place_in_document`; the mean starts anew where it is 0.
      memory: r, at least 0 and below 1.
    """
    if not memory:
        return h
    new = forgetting(place, memory)[..., None]

    def join(before: tuple[Array, Array], after: tuple[Array, Array]) -> tuple[Array, Array]:
        return before[0] * after[0], after[0] * before[1] + after[1]

    return jax.lax.associative_scan(join, (1 - new, new * h.astype(jnp.float32)), axis=1)[1]


def remember_one(
    h: Float[Array, "B 1 D"], before: Float[Array, "B 1 D"], place: Int[Array, "B 1"], memory: float
) -> Float[Array, "B 1 D"]:
    """`remember` of one more token: `before` is what the router read at the last one."""
    if not memory:
        return h
    new = forgetting(place, memory)[..., None]
    return (1 - new) * before + new * h.astype(jnp.float32)


def dense_gates(routing: Routing) -> Float[Array, "B T E"]:
    """The gates as a [B, T, E] array with 0 for experts that were not chosen."""
    E = routing.probabilities.shape[-1]
    chosen = jax.nn.one_hot(routing.indices, E, dtype=bool).any(axis=-2)
    return jnp.where(chosen, routing.probabilities, 0)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class RoutingStats:
    """Token means per sequence of one layer (or, stacked, of all layers)."""

    share: Float[Array, "B E"]  # of the gate mass of a token
    load: Float[Array, "B E"]  # of the k choices of a token
    probability: Float[Array, "B E"]
    entropy: Float[Array, " B"]  # of p, in nats
    z: Float[Array, " B"]  # squared log-normalizer


def stats(routing: Routing, weights: Float[Array, "B T"]) -> RoutingStats:
    """Means over the tokens of each sequence, weighted by `weights` (0 for padding)."""
    weights = weights / jnp.maximum(weights.sum(axis=1, keepdims=True), 1)
    gates = dense_gates(routing)
    p = routing.probabilities
    load = (gates > 0).astype(jnp.float32) / routing.indices.shape[-1]

    def mean(values: Array) -> Array:
        return jnp.einsum("BT...,BT->B...", values, weights)

    return RoutingStats(
        share=mean(gates / gates.sum(axis=-1, keepdims=True)),
        load=mean(load),
        probability=mean(p),
        entropy=mean(-jnp.where(p > 0, p * jnp.log(jnp.where(p > 0, p, 1)), 0).sum(axis=-1)),
        z=mean(jnp.square(routing.log_normalizer)),
    )


def effective_bias(raw: Float[Array, "..."]) -> Float[Array, "..."]:
    """The bias b = -softplus(raw): never positive, with a gradient everywhere."""
    return -jax.nn.softplus(raw)


def raw_bias(bias: Float[Array, "..."]) -> Float[Array, "..."]:
    """Inverse of `effective_bias` for bias < 0."""
    return jnp.log(jnp.expm1(-bias))


def constrain(params: dict[str, Any]) -> dict[str, Any]:
    """A training tree as the forward pass wants it: each `raw_bias` becomes the effective `bias`."""
    if "experts" not in params:
        return params
    return {**params, "experts": {bank: _constrain_bank(experts) for bank, experts in params["experts"].items()}}


def _constrain_bank(experts: dict[str, Any]) -> dict[str, Any]:
    if "raw_bias" not in experts.get("router", {}):
        return experts
    router = dict(experts["router"])
    router["bias"] = effective_bias(router.pop("raw_bias"))
    return {**experts, "router": router}


FLOOR = 1e-3  # a bias nearer to 0 is moved here to be trained, since the map has no gradient at 0


def free(trainable: dict[str, Any]) -> dict[str, Any]:
    """Inverse of `constrain`: each `bias` of a tree that is to be trained becomes a `raw_bias`."""
    banks = {}
    for bank, experts in trainable.get("experts", {}).items():
        router = dict(experts.get("router", {}))
        if "bias" in router:
            router["raw_bias"] = raw_bias(jnp.minimum(router.pop("bias"), -FLOOR))
            experts = {**experts, "router": router}
        banks[bank] = experts
    return {**trainable, "experts": banks} if banks else trainable
