"""Every row that needs a GPU or TPU, in one run of less than nine minutes.

    python -m benchmarks.accelerator                         # full shapes; about 110 GB of device memory
    python -m benchmarks.accelerator --only=decode,prefill   # the peaks, and cases with such names
    python -m benchmarks.accelerator --size=toy              # the same code on any machine, in seconds

Rows go to results/accelerator.jsonl as they are measured; a case that fails leaves its error, and the others go on. MFU is
useful FLOPs (`train.flops`) over the bfloat16 peak that is measured in the same run.
"""

import dataclasses
import functools
import gc
import os
import re
import statistics
import time
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import app, flags

from benchmarks import expert_step, measuring, oracle, profiles
from flexjax import config as config_lib
from flexjax import errors, hardware, presets, tree
from flexjax.inference import decode
from flexjax.model import kernels, moe, transformer
from flexjax.planning import analytic
from flexjax.train import flops, program

FILE = "accelerator.jsonl"
OWNERS = tuple(f"e{e}" for e in range(1, 8))  # beside `public`: 8 experts
TOLERANCE = 2e-2  # relative error norm; a float32 product of an accelerator may be made of shorter ones
DTYPE = jnp.bfloat16


def _model(
    d_model: int, layers: int, heads: int, d_ff: int, vocab: int = 100_352, head_dim: int = 128
) -> config_lib.ModelConfig:
    return config_lib.ModelConfig(vocab, d_model, layers, heads, heads, head_dim, d_ff)


@dataclasses.dataclass(frozen=True)
class Work:
    """A model and the tokens that it is given at once."""

    model: config_lib.ModelConfig
    batch: int
    seq_len: int


@dataclasses.dataclass(frozen=True)
class Size:
    """All shapes: layers of a 1B and a 7B model as wide as they are, but few."""

    product: int = 8192  # rows and columns of the matrices that show the peak
    copied: int = 2**30  # float32 numbers
    layer: tuple[int, int, int] = (1024, 128, 256)  # tokens, D and F of the layers that are compared with the oracle
    pairs: tuple[tuple[str, Work], ...] = (
        ("7B", Work(_model(4096, 4, 32, 11_008), 4, 4096)),
        ("1B", Work(_model(2048, 8, 16, 8192), 8, 2048)),
    )
    rank: int = 64
    joint: Work = Work(_model(4096, 2, 32, 11_008), 2, 4096)
    merged: Work = Work(_model(4096, 4, 32, 11_008), 4, 4096)
    active: tuple[int, ...] = (2, 4)
    served: tuple[int, ...] = (1, 32)  # requests at once
    new_tokens: int = 128


_TOY = Work(_model(16, 2, 2, 32, vocab=64, head_dim=8), 2, 32)
SIZES = {"full": Size(), "toy": Size(128, 2**16, (128, 32, 64), (("7B", _TOY),), 4, _TOY, _TOY, (2,), (2,), 4)}


class Session:
    """What cases share: shapes, the peaks once they are measured, the best grouped matmul, and the merged model."""

    def __init__(self, size: Size) -> None:
        self.size, self.kernel = size, "auto"
        self.peak = self.bandwidth = 0.0  # FLOP/s, bytes/s
        self.off: list[str] = []  # what is not what the oracle says

    def architecture(self, top_k: int) -> transformer.Architecture:
        """The merged model, 8 experts in two banks."""
        model = self.size.merged.model
        banks = (*transformer.dense_banks(model), config_lib.Bank("owners", OWNERS, model.d_ff))
        return transformer.Architecture(model, banks, top_k)

    @functools.cached_property
    def params(self) -> tree.Tree:
        """Its random weights, as they are served."""

        def cast(path: str, leaf: jax.Array) -> jax.Array:
            return leaf if re.fullmatch(program.KEPT_IN_FLOAT32, path) else leaf.astype(DTYPE)

        return jax.jit(lambda: tree.map_with_path(cast, transformer.init(self.architecture(2), 0)))()

    @functools.cached_property
    def decoder(self) -> decode.Decoder:
        """It decodes with 4 active experts; the vocabulary ends before EOS, which so is never drawn."""
        last = self.size.merged.model.vocab_size - 1
        return decode.Decoder(self.params, self.architecture(4), eos_id=last, vocab_size=last, dtype=DTYPE)

    def speed(self, wall: float, tokens: int, cost: float) -> measuring.Row:
        """Time, tokens per second and MFU of a call that does `cost` FLOPs."""
        mfu = cost / wall / self.peak if self.peak else None
        return {"ms": 1e3 * wall, "tokens_per_second": tokens / wall, "tflops": cost / 1e12, "mfu": mfu}


def correctness(session: Session) -> measuring.Row:
    """The sparse layer and an expert's pair against the oracle, fresh random inputs each time."""
    found: measuring.Row = {}
    for name, owners in (("sparse", OWNERS), ("pair", OWNERS[:1])):
        for dtype in ("float32", "bfloat16"):
            error, otherwise = oracle.deviation(session.size.layer, 1 + len(owners), dtype)
            found |= {f"{name}_{dtype}": error, f"{name}_{dtype}_routed_otherwise": otherwise}
            if not (error <= TOLERANCE and otherwise <= TOLERANCE):
                session.off.append(f"{name} layer in {dtype}: error {error:.1e}, {otherwise:.1%} of tokens routed otherwise")
    return found | ({"far_off": "; ".join(session.off)} if session.off else {})


def peak(session: Session, products: int = 10) -> measuring.Row:
    """FLOP/s of products in bfloat16, and bytes/s of adding 1 to a large array: what all other rows are compared with."""
    n, keys = session.size.product, jax.random.split(jax.random.key(0))
    x, w = (jax.random.normal(key, (n, n), DTYPE) for key in keys)
    chain = jax.jit(lambda x, w: functools.reduce(lambda y, _: y @ w, range(products), x))
    w = w / n**0.5
    wall, _ = measuring.timed(lambda: jax.block_until_ready(chain(x, w)))
    session.peak = 2.0 * n**3 * products / wall
    numbers, copy = jnp.zeros(session.size.copied, jnp.float32), jax.jit(lambda x: x + 1)
    wall, _ = measuring.timed(lambda: jax.block_until_ready(copy(numbers)))
    session.bandwidth = 2.0 * numbers.nbytes / wall
    chip = hardware.of_device(jax.devices()[0].device_kind)
    published = {"published_tflops": chip.flops["bfloat16"] / 1e12, "published_gbps": chip.bandwidth / 1e9} if chip else {}
    return {"peak_tflops": session.peak / 1e12, "bandwidth_gbps": session.bandwidth / 1e9} | published


def grouped_matmul(session: Session) -> measuring.Row:
    """Which kernel training would take here, and why; the sparse cases below use it, as training does."""
    verdict = kernels.self_test()
    session.kernel = verdict.kernel
    return {"kernel": verdict.kernel, "verdict": verdict.text}


def _job(work: Work, phase: str, rank: int = 0, top_k: int = 2) -> config_lib.Config:
    """The 7b recipe (bfloat16, remat "full") at other shapes, without accumulation."""
    config = presets.base("7b")
    config.phase, config.model, config.data.seq_len = phase, dataclasses.replace(work.model), work.seq_len
    config.train = (presets.expert_training if phase == "expert" else presets.joint_training)("7b")
    config.train.batch_size, config.train.accumulation = work.batch, 1
    config.mixture.experts, config.mixture.top_k = OWNERS, top_k
    if rank:
        config.expert.kind, config.expert.rank = "low_rank", rank
    return config


def step(session: Session, work: Work, phase: str, rank: int = 0, top_k: int = 2, profiled: bool = False) -> measuring.Row:
    """A training step: its speed, and its memory beside what the planner's formulas say."""
    config = _job(work, phase, rank, top_k)
    ready = expert_step.ready(config, session.kernel)
    job, settings = ready.job, config.train
    wall, _ = measuring.timed(ready.once)
    tokens, trained, sizes = work.batch * work.seq_len, job.state.trainable, ready.run.memory_analysis()
    cost = flops.per_token(job.architecture, trained, work.seq_len).total * tokens
    chip, parts = hardware.of_device(jax.devices()[0].device_kind), program.micro_batches(settings, job.mesh, work.seq_len)
    predicted = analytic.estimate(job, chip, "beside a compiler", parts).peak
    found = session.speed(wall, tokens, cost) | _shape(work, top_k=job.architecture.top_k, rank=rank, remat=settings.remat)
    return found | {
        "kernel": session.kernel if job.architecture.sparse else None,
        "trainable": tree.count(trained),
        "argument_gb": sizes.argument_size_in_bytes / 1e9,
        "temporary_gb": sizes.temp_size_in_bytes / 1e9,
        "predicted_gb": predicted / 1e9,
        "predicted_over_compiled": predicted / (sizes.argument_size_in_bytes + sizes.temp_size_in_bytes),
        **(profiles.profile(ready) if profiled else {}),
    }


def _shape(work: Work, **others: Any) -> measuring.Row:
    model = work.model
    shape = {"layers": model.num_layers, "d_model": model.d_model, "d_ff": model.d_ff, "vocab": model.vocab_size}
    return shape | {"batch": work.batch, "seq_len": work.seq_len} | others


def forward(session: Session, top_k: int) -> measuring.Row:
    """The merged model's forward pass with logits of all tokens."""
    work, architecture = session.size.merged, session.architecture(top_k)
    compute = transformer.Compute(DTYPE, scan=True, dispatch=moe.Dispatch(kernel=session.kernel))

    @jax.jit
    def run(params: tree.Tree, tokens: jax.Array) -> jax.Array:
        return transformer.logits(params, transformer.forward(params, tokens, architecture, compute).hidden).max(axis=-1)

    tokens = jax.random.randint(jax.random.key(1), (work.batch, work.seq_len), 0, work.model.vocab_size)
    wall, _ = measuring.timed(lambda: jax.block_until_ready(run(session.params, tokens)))
    cost = flops.forward_per_token(architecture, work.seq_len) * tokens.size
    return session.speed(wall, tokens.size, cost) | _shape(work, top_k=top_k, kernel=session.kernel)


def _requests(session: Session, batch: int, length: int) -> list[decode.Request]:
    """Random prompts that fill `length` slots with the EOS before them."""
    vocabulary = session.size.merged.model.vocab_size - 1
    return [decode.Request(row, None) for row in np.random.default_rng(0).integers(0, vocabulary, (batch, length - 1)).tolist()]


def prefill(session: Session) -> measuring.Row:
    """Keys and values of prompts, without the head."""
    work, decoder = session.size.merged, session.decoder
    requests, tokens = _requests(session, work.batch, work.seq_len), work.batch * (work.seq_len - 1)
    wall, _ = measuring.timed(lambda: jax.block_until_ready(decoder.start(requests, 1)))
    head = 2.0 * work.model.d_model * work.model.vocab_size
    cost = (flops.forward_per_token(decoder.architecture, work.seq_len - 1) - head) * tokens
    return session.speed(wall, tokens, cost) | _shape(work, top_k=decoder.architecture.top_k)


def decoding(session: Session, batch: int) -> measuring.Row:
    """Steps of one token for each request; `of_bandwidth` is the least time to read the weights they need over that taken."""
    decoder, new, walls = session.decoder, session.size.new_tokens, []
    requests = _requests(session, batch, decode.PROMPT_BUCKET)
    for _ in range(measuring.REPEATS + 1):
        state = jax.block_until_ready(decoder.start(requests, new))
        begin = time.perf_counter()
        state = jax.block_until_ready(decoder.advance(decoder.weights, state, decode.PROMPT_BUCKET + new))
        walls.append((time.perf_counter() - begin) / new)
    wall, read = statistics.median(walls[1:]), _experts_read(session, state.tokens[:, :-1])
    layer, ends = decoder.weights["layers"][0], decoder.weights["head"]
    expert = 3 * session.size.merged.model.d_model * session.size.merged.model.d_ff * jnp.dtype(DTYPE).itemsize
    shared = sum(leaf.nbytes for leaf in jax.tree.leaves(layer)) + read * expert
    needed = sum(leaf.nbytes for leaf in jax.tree.leaves(ends)) + shared * session.size.merged.model.num_layers
    return {
        "ms": 1e3 * wall,
        "tokens_per_second": batch / wall,
        "experts_read": read,
        "read_gb": needed / 1e9,
        "of_bandwidth": needed / wall / session.bandwidth if session.bandwidth else None,
    } | _shape(dataclasses.replace(session.size.merged, batch=batch, seq_len=new), top_k=decoder.architecture.top_k)


def _experts_read(session: Session, tokens: jax.Array) -> float:
    """How many experts of a layer any row's last token chose, on average over layers."""
    architecture, compute = session.decoder.architecture, transformer.Compute(DTYPE, scan=True)

    @jax.jit
    def load(params: tree.Tree, tokens: jax.Array) -> Any:
        last = jnp.zeros(tokens.shape, jnp.float32).at[:, -1].set(1)
        return transformer.forward(params, tokens, architecture, compute, weights=last).routing

    return float((load(session.params, tokens).load > 0).any(axis=1).sum(axis=-1).mean())


Case = Callable[[Session], measuring.Row]


def cases(size: Size) -> dict[str, Case]:
    """All cases by name, in the order in which they are measured: what others need first, what costs most memory alone."""
    found: dict[str, Case] = {"correctness": correctness, "peak": peak, "grouped matmul": grouped_matmul}
    for index, (name, work) in enumerate(size.pairs):
        full, low = (functools.partial(step, work=work, phase="expert", rank=rank) for rank in (0, size.rank))
        found[f"expert step, {name}, full"] = full if index else functools.partial(full, profiled=True)
        found[f"expert step, {name}, rank {size.rank}"] = low
    for k in size.active:
        found[f"joint step, 7B, {k} of 8 experts"] = functools.partial(step, work=size.joint, phase="joint", top_k=k)
    for k in size.active:
        found[f"merged forward, 7B, {k} of 8 experts"] = functools.partial(forward, top_k=k)
    found["prefill, 7B, 4 of 8 experts"] = prefill
    for batch in size.served:
        found[f"decode, 7B, 4 of 8 experts, batch {batch}"] = functools.partial(decoding, batch=batch)
    return found


def measure(size: str, seconds: float, only: Sequence[str] = ()) -> list[measuring.Row]:
    """Measures and keeps row after row; the last one says how long all took and what the deadline left out.

    Raises:
      NumericError: a layer is not what the oracle says.
    """
    start, facts, session = time.monotonic(), measuring.machine(), Session(SIZES[size])
    rows: list[measuring.Row] = []

    def keep(name: str, row: measuring.Row) -> None:
        rows.append({"what": f"{name}, {size}", **row})
        measuring.keep(FILE, rows[-1:], facts)

    left = []
    for name, case in cases(session.size).items():
        if only and name != "peak" and not any(word in name for word in only):
            continue
        begin = time.monotonic()
        if begin - start > seconds:
            left.append(name)
            continue
        try:
            row = case(session)
        except Exception as error:  # whatever it is, the others go on
            row = {"error": measuring.line(error)}
        keep(name, row | {"case_seconds": time.monotonic() - begin})
        gc.collect()  # what a failed case held
    late = {"error": f"the deadline of {seconds:g} s left out {len(left)} cases"} if left else {}
    keep("whole run", {"seconds": time.monotonic() - start, "left_out": left, **late})
    print(table(rows))
    if session.off:
        raise errors.NumericError(f"far from the oracle: {'; '.join(session.off)}; trust no other row")
    return rows


def table(rows: Sequence[measuring.Row]) -> str:
    """The figures of most interest, a line per row."""
    fields = {"ms": ".2f", "tokens_per_second": ",.0f", "mfu": ".1%", "of_bandwidth": ".1%", "predicted_over_compiled": ".2f"}
    lines = [f"{'':50}" + "".join(f"{name.replace('_', ' '):>26}" for name in fields)]
    for row in rows:
        cells = (f"{row[name]:{form}}" if row.get(name) is not None else "" for name, form in fields.items())
        lines.append(f"{row['what']:50}" + (row["error"] if "error" in row else "".join(f"{cell:>26}" for cell in cells)))
    return "\n".join(lines)


def main(argv: list[str]) -> None:
    os.environ.setdefault("XLA_PYTHON_CLIENT_MEM_FRACTION", "0.92")  # read when the first device is asked for
    values = flags.FLAGS
    measure(values.size, values.seconds, values.only)


if __name__ == "__main__":  # flags here: in one process with others' benchmarks, names would clash
    flags.DEFINE_enum("size", "full", list(SIZES), "Shapes.")
    flags.DEFINE_float("seconds", 500, "No case begins later.")
    flags.DEFINE_list("only", [], "Cases whose names contain one of these, beside the peaks; empty: all.")
    app.run(main)
