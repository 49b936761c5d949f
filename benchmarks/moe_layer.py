"""One sparse mixture layer, 8 experts of which a token uses 2, against transformers' in the same run.

taskset -c 0 python -m benchmarks.moe_layer      # one core; rows go to results/moe_layer.jsonl
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from absl import app, flags

from benchmarks import expert_step, measuring
from benchmarks.peer import call
from flexjax import config as config_lib
from flexjax.model import moe, router

FILE = "moe_layer.jsonl"
EXPERTS, ACTIVE = 8, 2
PEERS = ("eager", "grouped_mm")  # how transformers computes experts; what counts is the faster one


def measure(size: str) -> measuring.Row:
    """Our layer on random tokens: routing, dispatch and experts; backward by everything."""
    model = expert_step.SHAPES[size]
    names = tuple(f"e{e}" for e in range(EXPERTS))
    banks = (config_lib.Bank("all", names, model.d_ff, biased=False),)
    keys = jax.random.split(jax.random.key(0), 5)

    def draw(key: jax.Array, *shape: int) -> jax.Array:
        return 0.05 * jax.random.normal(key, shape)

    h = jax.random.normal(keys[0], (expert_step.BATCH, expert_step.SEQ_LEN, model.d_model))
    weights = {
        "rows": draw(keys[1], EXPERTS, model.d_model),
        "ffn": {
            "gate": draw(keys[2], EXPERTS, model.d_model, model.d_ff),
            "up": draw(keys[3], EXPERTS, model.d_model, model.d_ff),
            "down": draw(keys[4], EXPERTS, model.d_ff, model.d_model),
        },
    }

    def layer(h: jax.Array, weights: Any) -> jax.Array:
        routing = router.route(h, weights["rows"], jnp.zeros(EXPERTS), ACTIVE, None)
        return moe.apply(h, [weights["ffn"]], banks, routing, None)

    forward = jax.jit(layer)
    both = jax.jit(jax.value_and_grad(lambda h, weights: jnp.square(layer(h, weights)).sum(), (0, 1)))
    found = {}
    for name, run in (("forward", forward), ("both", both)):
        wall, _ = measuring.timed(functools.partial(_wait, run, h, weights))
        found[f"{name}_ms"] = 1e3 * wall
    return found


def _wait(run: Callable[..., Any], *arguments: Any) -> None:
    jax.block_until_ready(run(*arguments))


def against_peer(size: str, peer: bool) -> measuring.Row:
    """Ours and each kind of the peer, in turn; a ratio is how many times as fast ours is."""
    shapes = dataclasses.asdict(expert_step.SHAPES[size]) | {"batch_size": expert_step.BATCH, "seq_len": expert_step.SEQ_LEN}
    sides: dict[str, Callable[[], measuring.Row]] = {"ours": lambda: measuring.apart(measure, size)}
    if peer:
        sides |= {kind: functools.partial(_peer, call.shape(shapes), kind) for kind in PEERS}
    found = measuring.in_turn(sides)
    row = {"what": f"MoE layer, {size}, {EXPERTS} experts, {ACTIVE} active", **found["ours"]}
    for name in ("forward", "both"):
        theirs = {kind: found[kind][f"{name}_ms"] for kind in PEERS if kind in found}
        if theirs:
            row |= {f"peer_{name}_ms": theirs, f"ratio_{name}": min(theirs.values()) / row[f"{name}_ms"]}
    return row


def _peer(shapes: str, kind: str) -> measuring.Row:
    found = call.run("moe", shapes, kind)
    return {f"{name}_ms": found[name]["ms"] for name in ("forward", "both")}


_SHAPES = flags.DEFINE_list("shapes", ["small"], f"Of {', '.join(expert_step.SHAPES)}.")


def main(argv: list[str]) -> None:
    facts = measuring.machine()
    for size in _SHAPES.value:
        measuring.keep(FILE, [against_peer(size, expert_step.PEER.value)], facts)


if __name__ == "__main__":
    app.run(main)
