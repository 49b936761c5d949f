"""The step that trains one expert beside the frozen public one, against transformers' FlexOlmo in the same run.

    python -m benchmarks.expert_step                        # all cases on the cores at hand; prefix `taskset -c 0` for one
    python -m benchmarks.expert_step --cases=small,parts    # some of them
    python -m benchmarks.expert_step --peer=false           # without the second environment

Rows go to results/expert_step.jsonl.
"""

import dataclasses
import functools
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import measuring
from benchmarks.peer import call
from flexjax import checkpoint, jobs, memory, presets, sharding, tree
from flexjax import config as config_lib
from flexjax.model import attention, losses, moe, router, transformer
from flexjax.planning import hlo
from flexjax.train import flops, metrics, program

FILE = "expert_step.jsonl"
BATCH, SEQ_LEN = 8, 256
SHAPES = {
    "small": config_lib.ModelConfig(4096, d_model=256, num_layers=4, num_heads=4, num_kv_heads=4, head_dim=64, d_ff=704),
    "big": config_lib.ModelConfig(4096, d_model=512, num_layers=8, num_heads=8, num_kv_heads=8, head_dim=64, d_ff=1408),
    "toy": config_lib.ModelConfig(64, d_model=16, num_layers=2, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=32),
}


def job(size: str, dtype: str = "float32", rank: int = 0) -> config_lib.Config:
    """An expert's job at one of `SHAPES`; a rank above 0 makes the expert a low-rank one."""
    config = presets.base("quickstart")
    config.phase, config.train = "expert", presets.expert_training("quickstart")
    config.model = dataclasses.replace(SHAPES[size])
    config.data.seq_len, config.train.batch_size, config.train.compute_dtype = SEQ_LEN, BATCH, dtype
    config.expert.name = "math"
    if rank:
        config.expert.kind, config.expert.rank = "low_rank", rank
    return config


@dataclasses.dataclass
class Ready:
    """A compiled step with everything that it works on."""

    job: program.Program
    run: Any
    state: Any
    frozen: tree.Tree
    batch: dict[str, jax.Array]

    def once(self) -> None:
        """One step, waited for."""
        self.state, _ = self.run(self.state, self.frozen, self.batch)
        jax.block_until_ready(self.state)


def ready(config: config_lib.Config, kernel: str = "auto") -> Ready:
    """Compiles a job's step and puts random tokens before it; `kernel` as for `moe.Dispatch`."""
    config_lib.resolve(config)
    architecture, settings, mesh = jobs.architecture(config), config.train, sharding.one_device()
    made = program.Program(architecture, settings, mesh, config_lib.MeshConfig(), config.data.seq_len, kernel)
    shape = (settings.batch_size, config.data.seq_len)
    ids = np.random.default_rng(0).integers(0, config.model.vocab_size, shape).astype(np.int32)
    rows = {"tokens": ids, "targets": ids, "weights": np.ones(shape, np.float32), "segments": np.zeros(shape, np.int32)}
    batch = made.put_batch(rows, sharding.local_rows(mesh, settings.batch_size))
    state, frozen = made.place(transformer.init(architecture, 0))
    return Ready(made, made.compile(), state, frozen, batch)


def analytic(step: Ready) -> float:
    """FLOPs of a step, by formula."""
    (batch_size, seq_len), trained = step.batch["tokens"].shape, step.job.state.trainable
    return flops.per_token(step.job.architecture, trained, seq_len).total * batch_size * seq_len


def measure(config: config_lib.Config) -> measuring.Row:
    """A job's step: what is trained, what it costs, and how long it takes."""
    step = ready(config)
    memory.give_back()  # as the training loop does
    step.once()
    memory.give_back()
    wall, cpu = measuring.timed(step.once)
    tokens = config.train.batch_size * config.data.seq_len
    trained = step.job.state.trainable
    least = analytic(step)
    executed = sum(hlo.dot_flops(hlo.Module(step.run.as_text())).values())
    return {
        "trainable": tree.count(trained),
        "optimizer_bytes": checkpoint.size(step.job.state.optimizer),
        "gflops": least / 1e9,
        "executed_over_analytic": executed / least,
        "micro_batches": program.micro_batches(config.train, sharding.one_device(), config.data.seq_len),
        "ms": wall * 1e3,
        "cpu_ms": cpu * 1e3,
        "tokens_per_second": tokens / wall,
        "rss_mb": measuring.resident(),
    }


def against_peer(size: str, dtype: str, peer: bool) -> measuring.Row:
    """Our step and the peer's, in turn; `ratio` is how many times as fast ours is."""
    shape = {**dataclasses.asdict(SHAPES[size]), "batch_size": BATCH, "seq_len": SEQ_LEN}
    sides: dict[str, Callable[[], measuring.Row]] = {"ours": lambda: measuring.apart(measure, job(size, dtype))}
    if peer:
        sides["fair"] = functools.partial(call.run, "train", call.shape(shape), dtype)
        sides["plain"] = functools.partial(call.run, "train", call.shape(shape), dtype, fair=False)
    found = measuring.in_turn(sides)
    row = {"what": f"expert step, {size}, {dtype}", **found["ours"]}
    row["optimizer_over_8_bytes"] = row["optimizer_bytes"] / (8 * row["trainable"])
    return row | {
        f"{what}_{side}": value
        for side in ("fair", "plain")
        if side in found
        for what, value in (
            ("peer_ms", found[side]["ms"]),
            ("ratio", found[side]["ms"] / row["ms"]),
            ("rss_over_peer", row["rss_mb"] / found[side]["rss_mb"]),
        )
    }


def low_rank() -> measuring.Row:
    """A step of a rank-64 expert over that of a full one, beside the same ratio of their FLOPs."""
    sides = {
        name: functools.partial(measuring.apart, measure, job("small", rank=rank)) for name, rank in (("full", 0), ("low", 64))
    }
    found = measuring.in_turn(sides)
    time_, work = (found["low"][field] / found["full"][field] for field in ("ms", "gflops"))
    return {"what": "expert step, small, rank 64 over full", "ms": found["low"]["ms"], "full_ms": found["full"]["ms"]} | {
        "time": time_,
        "flops": work,
        "time_over_flops": time_ / work,
    }


def parts() -> measuring.Row:
    """What one step is made of: each part of a layer timed alone, forward and backward, with the least its FLOPs could take."""
    config = job("small")
    config_lib.resolve(config)
    architecture, model = jobs.architecture(config), config.model
    params = transformer.init(architecture, 0)
    layer = jax.tree.map(lambda leaf: leaf[0], {name: params[name] for name in ("layers", "experts")})
    rows = SEQ_LEN * BATCH // program.micro_batches(config.train, sharding.one_device(), SEQ_LEN)
    h = jax.random.normal(jax.random.key(0), (rows // SEQ_LEN, SEQ_LEN, model.d_model))
    rotary = attention.rotary(jnp.broadcast_to(jnp.arange(SEQ_LEN), h.shape[:2]), model.head_dim, model.rope_theta)
    mask = attention.causal_mask(SEQ_LEN, jnp.zeros(h.shape[:2], jnp.int32))
    targets = jnp.zeros(h.shape[:2], jnp.int32)
    expert = [layer["experts"]["math"]["ffn"][part][0] for part in ("gate", "up", "down")]

    def norm(h: jax.Array) -> jax.Array:
        return attention.rms_norm(h, params["head"]["norm"], model.norm_eps)

    def routing(h: jax.Array) -> jax.Array:
        found = router.route(h, params["experts"]["math"]["router"]["row"][:, 0][:2], jnp.zeros(2), 2, None)
        return router.dense_gates(found)

    def head(h: jax.Array) -> jax.Array:
        return losses.cross_entropy(h, params["head"]["kernel"], targets, z_weight=1e-5, head_trainable=False)[0]

    pieces: dict[str, tuple[Callable[..., jax.Array], tuple[Any, ...], float]] = {
        "attention": (lambda h: attention.block(h, layer["layers"], model, rotary, mask)[0], (h,), _attention(model) * 2),
        "frozen expert": (lambda h: moe.swiglu(h, *expert), (h,), 6.0 * model.d_model * model.d_ff * 2),
        "trained expert": (moe.swiglu, (h, *expert), 6.0 * model.d_model * model.d_ff * 3),
        "router": (routing, (h,), 0.0),
        "norm": (norm, (h,), 0.0),
        "head": (head, (h,), 4.0 * model.d_model * model.vocab_size),
    }
    peak = metrics.peak_flops()
    found: measuring.Row = {"what": f"parts of a step, small, ms for {rows} tokens", "peak_gflops": peak / 1e9}
    for name, (function, arguments, cost) in pieces.items():
        wall, _ = measuring.timed(_both_ways(function, arguments), 3 * measuring.REPEATS)
        found[name] = {"ms": wall * 1e3, "least_ms": cost * rows / peak * 1e3}
    return found


def _attention(model: config_lib.ModelConfig) -> float:
    """Forward FLOPs per token of a layer's attention, with what causality leaves of the scores in blocks of queries."""
    width = model.num_heads * model.head_dim
    blocks = SEQ_LEN // attention.CPU_BLOCK
    return 8.0 * model.d_model * width + 4.0 * SEQ_LEN * width * (blocks + 1) / (2 * blocks)


def _both_ways(function: Callable[..., jax.Array], arguments: tuple[Any, ...]) -> Callable[[], Any]:
    """A call of a function and its gradients by all arguments."""

    @jax.jit
    def run(arguments: tuple[Any, ...]) -> Any:
        y, pullback = jax.vjp(function, *arguments)
        return y, pullback(jnp.ones_like(y))

    return lambda: jax.block_until_ready(run(arguments))


def first_step() -> measuring.Row:
    """Seconds from starting python to the end of a quickstart expert's first step, without and with kept programs."""
    with tempfile.TemporaryDirectory() as home:
        environment = os.environ | {"JAX_COMPILATION_CACHE_DIR": home, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        seconds = []
        for _ in range(2):
            start = time.perf_counter()
            code = "from benchmarks import expert_step as e; from flexjax import main, presets; e.quickstart().once()"
            subprocess.run([sys.executable, "-c", code], env=environment, check=True)
            seconds.append(time.perf_counter() - start)
    return {"what": "first step of the quickstart's expert, s", "cold": seconds[0], "warm": seconds[1]}


def quickstart() -> Ready:
    """The quickstart's expert, ready to train."""
    return ready(_quickstart("expert"))


def _quickstart(phase: str) -> config_lib.Config:
    """The quickstart's public phase, or its expert's."""
    config = presets.base("quickstart")
    config.phase = phase
    config.train = config.anchor.train if phase == "public" else presets.expert_training("quickstart")
    config.expert.name = "math"
    return config


def whole_quickstart() -> measuring.Row:
    """What the README's first command trains: the anchor's step, and the expert's."""
    found = {phase: measuring.apart(measure, _quickstart(phase)) for phase in ("public", "expert")}
    fields = ("ms", "cpu_ms", "tokens_per_second")
    return {"what": "quickstart", **{f"{phase}_{field}": row[field] for phase, row in found.items() for field in fields}}


CASES: dict[str, Callable[[bool], measuring.Row]] = {
    "small": lambda peer: against_peer("small", "float32", peer),
    "big": lambda peer: against_peer("big", "float32", peer),
    "bf16": lambda peer: against_peer("small", "bfloat16", peer),
    "low_rank": lambda peer: low_rank(),
    "quickstart": lambda peer: whole_quickstart(),
    "parts": lambda peer: measuring.apart(parts),
    "first_step": lambda peer: first_step(),
    "toy": lambda peer: against_peer("toy", "float32", False),
}
_CASES = flags.DEFINE_list(
    "cases", ["small", "big", "bf16", "low_rank", "quickstart", "parts", "first_step"], f"Of {', '.join(CASES)}."
)
PEER = flags.DEFINE_bool("peer", True, "Measure transformers too, in .venv-torch.")


def main(argv: list[str]) -> None:
    facts = measuring.machine()
    for name in _CASES.value:
        measuring.keep(FILE, [CASES[name](PEER.value)], facts)


if __name__ == "__main__":
    app.run(main)
