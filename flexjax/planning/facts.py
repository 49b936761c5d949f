"""What is known of a training step on a machine: from its compiler, or (`analytic`) from formulas."""

import dataclasses
import math
import re
import resource
import time
from typing import Any

import jax

from flexjax import errors, hardware, sharding, tree
from flexjax.model import dispatch
from flexjax.planning import collectives, hlo, traffic
from flexjax.train import program

USED = re.compile(r"Used ([\d.]+)([KMGT]) of|temporaries \(([\d.]+)([KMGT])\)")
ALLOCATION = re.compile(r"Size: ([\d.]+)([KMGT])\s+(?:Operator: op_name=\"(.*?)\"\s+)?Shape: (\w+\[[\d,]*\])")
UNITS = {"K": 2**10, "M": 2**20, "G": 2**30, "T": 2**40}


@dataclasses.dataclass(frozen=True)
class Seconds:
    """Time of the operations of a step on one device, without collectives.

    Attributes:
      compute: all products at peak.
      memory: all traffic at full bandwidth.
      operations: every operation takes the longer of its two times, one after the other.
    """

    compute: float
    memory: float
    operations: float


@dataclasses.dataclass
class Facts:
    """One step on one device.

    Attributes:
      method: where all this comes from.
      arguments, temporaries, code: bytes in memory; what the step returns lies where its arguments were.
      extra: bytes of results that do not.
      flops: of matrix products, by dtype, with what remat computes again.
      moved: bytes to and from memory.
      seconds: by the chip's figures, None without a chip.
      exchanges: its collectives.
      largest: buffers, empty if there is no program to look into.
      uncounted: kernels and loops of which no FLOPs, or one trip only, are counted.
      compiling: seconds to lower and compile, and of all cores together, bytes of this process, lines of the program.
    """

    method: str
    arguments: int
    temporaries: int
    code: int = 0
    extra: int = 0
    flops: dict[str, float] = dataclasses.field(default_factory=dict)
    moved: float = 0.0
    seconds: Seconds | None = None
    exchanges: list[collectives.Collective] = dataclasses.field(default_factory=list)
    largest: list[traffic.Buffer] = dataclasses.field(default_factory=list)
    uncounted: list[str] = dataclasses.field(default_factory=list)
    compiling: dict[str, float] = dataclasses.field(default_factory=dict)

    @property
    def peak(self) -> int:
        """Bytes that the step needs on a device."""
        return self.arguments + self.temporaries + self.code + self.extra


class TooLargeError(Exception):
    """The compiler found no way to fit the program.

    Attributes:
      needed: bytes that it would take, 0 if the compiler did not say.
      largest: buffers, as far as it listed them.
    """

    def __init__(self, message: str) -> None:
        found = USED.search(message)
        value, unit = (found[1] or found[3], found[2] or found[4]) if found else ("0", "K")
        self.needed = int(float(value) * UNITS[unit])
        listed = {(source, shape): float(size) * UNITS[unit] for size, unit, source, shape in ALLOCATION.findall(message)}
        self.largest = [traffic.Buffer(int(size), shape, source) for (source, shape), size in listed.items()][: traffic.LARGEST]
        super().__init__(message.splitlines()[0])


def argument_bytes(job: program.Program) -> int:
    """Bytes of the step's arguments on each device, as they are laid on the mesh."""
    leaves = jax.tree.leaves((job.state, job.frozen, job.batch))
    return sum(math.prod(leaf.sharding.shard_shape(leaf.shape)) * leaf.dtype.itemsize for leaf in leaves)


def room(job: program.Program, accumulation: int = 0) -> dispatch.Room | None:
    """Rows that a device keeps free for tokens that chose its experts, of one micro-batch; None if none travel."""
    if not job.architecture.sparse:
        return None
    rows, length = job.batch["tokens"].shape
    parts = (accumulation or job.settings.accumulation) * sharding.size(job.mesh, *sharding.BATCH)
    config, dtype = job.architecture.config, job.settings.compute_dtype
    tokens = rows * length // parts
    return dispatch.buffer_bound(job.architecture.banks, job.mesh, tokens, job.architecture.top_k, config.d_model, dtype)


def filled(job: program.Program) -> float:
    """The share of those rows that is in use if routing is even."""
    found = room(job)
    return found.expected / found.rows if found else 1.0


def checkpoint_bytes(job: program.Program) -> int:
    """Bytes of the state that is saved, all devices together."""
    return sum(math.prod(leaf.shape) * leaf.dtype.itemsize for leaf in jax.tree.leaves(job.state))


class Lowered:
    """A job's step as a program that its machine's compiler can read, and the seconds that this took."""

    def __init__(self, job: program.Program) -> None:
        begin = time.perf_counter()
        self.job, self.stage = job, job.lower()
        self.seconds = time.perf_counter() - begin

    @property
    def digest(self) -> str:
        """Of the program's text: two jobs with one digest compile to the same."""
        return tree.sha256(self.stage.as_text().encode())


def compiled(lowered: Lowered, chip: hardware.Chip | None, compiler: str) -> Facts:
    """Compiles the step for its mesh and reads the result.

    Raises:
      TooLargeError: the compiler refuses because the program does not fit.
      ConfigError: it refuses for another reason, for instance a collective that this machine has not.
    """
    job, begin, busy = lowered.job, time.perf_counter(), time.process_time()
    try:
        executable = lowered.stage.compile()
    except jax.errors.JaxRuntimeError as error:
        if "RESOURCE_EXHAUSTED" in str(error):
            raise TooLargeError(str(error)) from None
        raise errors.ConfigError(f"{compiler} cannot compile this step: {str(error).splitlines()[0][:300]}") from None
    end, done = time.perf_counter(), time.process_time()
    sizes, text = executable.memory_analysis(), executable.as_text()
    if sizes is None or text is None:
        raise errors.ConfigError(f"{compiler} tells nothing of its programs; plan with --analytic")
    module = hlo.Module(text, filled(job))
    found = Facts(
        method=f"compiled by {compiler}",
        arguments=sizes.argument_size_in_bytes,
        temporaries=sizes.temp_size_in_bytes,
        code=sizes.generated_code_size_in_bytes,
        extra=sizes.output_size_in_bytes - sizes.alias_size_in_bytes,
        flops=hlo.dot_flops(module),
        moved=traffic.moved(module),
        seconds=None if chip is None else operations(module, chip),
        exchanges=collectives.find(module, dict(job.mesh.shape)),
        largest=traffic.largest(module),
        compiling={
            "lower_seconds": lowered.seconds,
            "compile_seconds": end - begin,
            "compile_cpu_seconds": done - busy,
            "host_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
            "lines": text.count("\n"),
        },
    )
    found.uncounted = sorted(hlo.kernels(module) | module.dynamic)
    return found


def operations(module: hlo.Module, chip: hardware.Chip) -> Seconds:
    """The roofline of every operation of a program, added up."""
    compute = memory = together = 0.0
    for step in module.walk(into_fusions=False):
        if step.instruction.op.removesuffix("-start").removesuffix("-done") in collectives.KINDS:
            continue
        products = hlo.products(module, step.computation, step.instruction)
        busy = step.times * sum(cost / peak(chip, dtype) for dtype, cost in products.items())
        waiting = step.times * traffic.of(module, step.computation, step.instruction) / chip.bandwidth
        compute, memory, together = compute + busy, memory + waiting, together + max(busy, waiting)
    return Seconds(compute, memory, together)


def peak(chip: hardware.Chip, dtype: str) -> float:
    """FLOP/s of a chip in a dtype, which HLO and JAX name differently."""
    return chip.flops["float32" if dtype in ("f32", "float32") else "bfloat16"]


def as_dict(found: Facts) -> dict[str, Any]:
    """For JSON, collectives added up by kind and axes."""
    plain = dataclasses.asdict(dataclasses.replace(found, exchanges=[]))
    del plain["exchanges"]
    rows = collectives.table(found.exchanges)
    plain["collectives"] = [
        {"kind": kind, "axes": list(axes), "times": times, "bytes": sent} for (kind, axes), (times, sent) in rows.items()
    ]
    return plain | {"peak": found.peak}
