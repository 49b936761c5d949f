"""What the sparse path of a mixture layer costs: one JSON row a line.

    experts   forward and dx (the gradient of the input alone) of one layer on one device against the number of experts, with
              as many rows in all and 128 or more each, beside a model: rows * FLOPs / peak + weight bytes / bandwidth. Both
              constants are fitted to the rows "experts/even" of the same run, separately for forward and dx; "deviation" is
              measured / model - 1. In "experts/drawn" tokens draw their experts, so that groups end inside blocks of rows.
              The clock is CPU time, which other processes lengthen less than wall time; run it on one core (`taskset`)
    skew      the same against the share of tokens that all choose the same experts
    exchange  bytes that a token sends between eight devices, there and back, as the compiled program says for the padded
              transport and as the routing says for the ragged one, over the least: each row once to each other device that
              holds a chosen expert, and one row back

taskset -c 1 python -m benchmarks.expert_parallel >> benchmarks/results/expert_parallel.jsonl
"""

import json
import os
import subprocess
import sys
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import measuring
from flexjax import config as config_lib
from flexjax import memory, sharding
from flexjax.model import dispatch, exchange, kernels, moe, router
from flexjax.planning import collectives, hlo

D, F, TOKENS, TOP_K = 256, 704, 4096, 2
EXPERTS = (2, 4, 8, 16, 32, 64)
SHARES = (0.0, 0.25, 0.5, 0.75, 1.0)
Choices = np.ndarray  # [n, k]: an expert's index


def even(experts: int, tokens: int = TOKENS) -> Choices:
    """Every expert gets as many rows as every other."""
    return (np.arange(tokens)[:, None] * TOP_K + np.arange(TOP_K)[None]) % experts


def drawn(experts: int, tokens: int = TOKENS) -> Choices:
    """Every token draws its experts."""
    random = np.random.default_rng(0)
    return np.stack([random.permutation(experts)[:TOP_K] for _ in range(tokens)])


def skewed(share: float, experts: int) -> Choices:
    """A share of the tokens chooses experts 0 and 1, the others are even."""
    return np.where(np.arange(TOKENS)[:, None] < share * TOKENS, np.arange(TOP_K)[None], even(experts))


def layer(experts: int) -> tuple[tuple[config_lib.Bank], dict[str, jax.Array]]:
    """One bank, weights as of a trained model's size."""
    random = np.random.default_rng(1)
    shapes = {"gate": (D, F), "up": (D, F), "down": (F, D)}
    ffn = {part: jnp.asarray(random.normal(size=(experts, *s)) / s[0] ** 0.5, jnp.float32) for part, s in shapes.items()}
    return (config_lib.Bank("all", tuple(f"e{e:02d}" for e in range(experts)), F),), ffn


def routing(choices: Choices, experts: int, batch: int = 1) -> router.Routing:
    """A decision that has been made."""
    shape = (batch, choices.shape[0] // batch)
    return router.Routing(
        jnp.zeros((*shape, experts)),
        jnp.asarray(choices.reshape(*shape, TOP_K), jnp.int32),
        jnp.full((*shape, TOP_K), 1 / TOP_K),
        jnp.zeros(shape),
    )


def measure(choices: Choices, experts: int) -> dict[str, Any]:
    """Milliseconds of forward and dx, wall and CPU."""
    banks, ffn = layer(experts)
    h = jnp.asarray(np.random.default_rng(2).normal(size=(1, TOKENS, D)), jnp.float32)
    chosen = routing(choices, experts)

    def run(h: jax.Array, ffn: dispatch.Ffn, chosen: router.Routing) -> jax.Array:
        return dispatch.dropless(h, [ffn], banks, chosen)

    forward, pull = jax.jit(run), jax.jit(lambda pullback, dy: pullback(dy))
    _, pullback = jax.jit(lambda h, ffn, chosen: jax.vjp(lambda h: run(h, ffn, chosen), h))(h, ffn, chosen)
    walls: dict[str, float] = {}
    for name, call in {
        "forward": lambda: jax.block_until_ready(forward(h, ffn, chosen)),
        "dx": lambda: jax.block_until_ready(pull(pullback, h)),
    }.items():
        wall, cpu = measuring.timed(call)
        walls |= {f"{name}_ms": 1e3 * wall, f"{name}_cpu_ms": 1e3 * cpu}
    sizes = np.bincount(choices.reshape(-1), minlength=experts)
    in_blocks = int(np.ceil(sizes / kernels.BLOCKS[-1]).sum()) * kernels.BLOCKS[-1]
    return {"experts": experts, "rows": int(sizes.sum()), "rows_in_blocks": in_blocks, "largest": int(sizes.max()), **walls}


def by_experts() -> list[dict[str, Any]]:
    """One row for each number of experts and way to choose, with the model's time beside the measured one."""
    rows = [
        {"what": f"experts/{choose.__name__}", **measure(choose(experts), experts)}
        for choose in (even, drawn)
        for experts in EXPERTS
    ]
    work = [TOKENS * TOP_K * 6.0 * D * F for _ in rows]
    terms = np.array([work, [row["experts"] * 3 * D * F * 4.0 for row in rows]]).T
    fitted = slice(len(EXPERTS))
    for what in ("forward", "dx"):
        measured = np.array([row[f"{what}_cpu_ms"] for row in rows]) / 1e3
        ratios = terms[fitted] / measured[fitted, None]
        inverse, *_ = np.linalg.lstsq(ratios, np.ones(len(ratios)), rcond=None)
        for row, model, seconds in zip(rows, terms @ inverse, measured, strict=True):
            row |= {f"{what}_model_cpu_ms": 1e3 * model, f"{what}_deviation": seconds / model - 1}
            row |= {f"{what}_peak_flops": 1 / inverse[0], f"{what}_bandwidth": 1 / inverse[1]}
    return rows


def by_skew(experts: int = 8) -> list[dict[str, Any]]:
    """One row for each share of tokens that agree."""
    return [{"what": "skew", "share": share, **measure(skewed(share, experts), experts)} for share in SHARES]


def by_mesh(experts: int = 8, tokens: int = 512) -> list[dict[str, Any]]:
    """One row for each size of the `expert` axis; needs eight devices."""
    banks, ffn = layer(experts)
    rows = []
    for axis in (2, 4, 8):
        mesh = sharding.make_mesh(config_lib.MeshConfig(expert=axis))
        choices = drawn(experts, 8 * tokens)
        chosen = routing(choices, experts, batch=8)
        h = jnp.zeros((8, tokens, D), jnp.float32)

        def run(h: jax.Array, ffn: dispatch.Ffn, chosen: router.Routing, mesh: Any = mesh) -> jax.Array:
            return moe.apply(h, [ffn], banks, chosen, None, mesh, moe.Dispatch("padded"))

        batch = sharding.sharding(mesh, ("batch",))
        places = (batch, {part: sharding.sharding(mesh, names) for part, names in dispatch.LOGICAL.items()}, batch)
        text = jax.jit(run, in_shardings=places).lower(h, ffn, chosen).compile().as_text()
        sent = [c for c in collectives.find(hlo.Module(text or ""), mesh.shape) if c.axes == (exchange.AXIS,)]
        device = np.arange(8 * tokens) // tokens % axis  # of the axis, that holds a token
        goes = choices // (experts // axis)
        elsewhere = goes != device[:, None]
        distinct = np.array([len(set(there[away])) for there, away in zip(goes, elsewhere, strict=True)])
        least = 2 * 4 * D * float(distinct.mean())
        row: dict[str, Any] = {
            "what": "exchange",
            "expert_axis": axis,
            "experts": experts,
            "top_k": TOP_K,
            "tokens_a_device": tokens,
        }
        row |= {"least_bytes": least, "ragged_bytes": 2 * 4 * D * float(elsewhere.sum(axis=1).mean())}
        row |= {"padded_bytes": sum(c.sent for c in sent if c.kind == "all-to-all") / tokens}
        row |= {"counts_bytes": sum(c.sent for c in sent if c.kind != "all-to-all") / tokens}
        row |= {f"{kind}_over_least": row[f"{kind}_bytes"] / least for kind in ("ragged", "padded")}
        rows.append(row)
    return rows


def main() -> None:
    memory.keep_freed()
    rows = by_mesh() if "--exchange" in sys.argv else [*by_experts(), *by_skew()]
    facts = measuring.machine() | {"cores": len(os.sched_getaffinity(0)), "d_model": D, "d_ff": F}
    for row in rows:
        print(json.dumps(row | facts), flush=True)
    if "--exchange" not in sys.argv:
        flags = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
        environment = os.environ | {"XLA_FLAGS": flags, "JAX_PLATFORMS": "cpu"}
        subprocess.run([sys.executable, "-m", "benchmarks.expert_parallel", "--exchange"], check=True, env=environment)


if __name__ == "__main__":
    main()
