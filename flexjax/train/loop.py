"""The training loop, for every phase: public, expert, joint, router."""

import contextlib
import dataclasses
import os
import signal
from collections.abc import Callable, Iterator
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from flexjax import checkpoint as checkpoint_lib
from flexjax import config as config_lib
from flexjax import distributed, errors, memory, sharding, tree, workdir
from flexjax.data import pipeline as pipeline_lib
from flexjax.model import dispatch, kernels, router, transformer
from flexjax.train import flops, metrics, program


@dataclasses.dataclass
class Options:
    """Where a run goes on, and how: decided by the command line and the machine, never by the run itself."""

    mesh: Mesh = dataclasses.field(default_factory=sharding.one_device)
    fall_back: bool = False  # skip damaged checkpoints
    allow_schedule_change: bool = False


def train(
    params: tree.Tree,
    architecture: transformer.Architecture,
    pipeline: pipeline_lib.Pipeline,
    config: config_lib.Config,
    directory: epath.Path,
    title: str,
    options: Options,
    origin: str,
) -> tuple[tree.Tree, dict[str, Any]]:
    """Trains what `config.train.trainable` selects, from the last committed step if there is one.

    Args:
      params: the whole model, biases effective; frozen leaves are used as they are or cast, never written, arrays of the
        mesh that are trained are donated.
      architecture: what `params` mean.
      pipeline: the stream of batches; its position is the step.
      config: the resolved job; `config.train` drives the loop, all of it is compared on resume.
      directory: gets checkpoints/, metrics.jsonl and tensorboard/; the caller holds its lock.
      title: for whoever watches.
      options: the mesh of all processes' devices, and how to resume.
      origin: digest of the anchor or model that `params` come from; empty for a fresh start.

    Returns:
      The trained leaves (float32, biases effective), still on the mesh, and facts for the manifest: tokens, steps, FLOPs.

    Raises:
      Preempted: SIGTERM came; the state is saved. NumericError: too many steps in a row were skipped.
    """
    settings, mesh = config.train, options.mesh
    job = program.Program(architecture, settings, mesh, config.mesh, config.data.seq_len, _kernel(architecture, title))
    rows, clock = sharding.local_rows(mesh, settings.batch_size), metrics.Clock()
    checkpoints = checkpoint_lib.Checkpoints(directory / "checkpoints", settings.keep)
    missing = max(1, settings.keep + 1 - len(checkpoints.steps()))  # one more than are kept, while it is written
    workdir.need_space(directory, checkpoint_lib.size(job.state) * missing, f"{missing} checkpoints")
    facts = {"config": config_lib.to_dict(config), "data": pipeline.identity() | {"origin": origin}}
    distributed.agree({"data": tree.sha256(tree.canonical_json(facts["data"]))[:12]})
    with clock.lost("restoring"):
        restored = _resume(checkpoints, job.state, facts, options)
        state, frozen = job.place(params, restored)
    del params  # what was cast or donated is not held twice
    start = int(state.step)
    cost = flops.per_token(architecture, state.trainable, config.data.seq_len)
    tokens_per_step = settings.batch_size * config.data.seq_len
    log: metrics.Log | metrics.Silent = metrics.Silent()
    if distributed.is_main():
        log = metrics.Log(directory, title, start, settings.steps, tokens_per_step, cost.total, mesh.size)
    whole = transformer.abstract(architecture)
    trained = tree.count(tree.partition(whole, settings.trainable)[0])
    log.note(f"{title}: trains {trained:,} of {tree.count(whole):,} parameters: {tree.summary(state.trainable)}")
    if start:
        log.note(f"{title}: resumed at step {start} of {settings.steps}")
    with clock.lost("compiling"):
        train_step = job.compile()
        memory.give_back()
        distributed.barrier("compiled")  # the connections that the first step opens do not wait long
    log.note(f"{title}: {sharding.describe(mesh)}, compiled in {clock.seconds['compiling']:.1f} s")
    if architecture.sparse and mesh.size > 1:
        tokens = tokens_per_step // settings.accumulation // sharding.size(mesh, *sharding.BATCH)
        shape = (tokens, architecture.top_k, architecture.config.d_model, settings.compute_dtype)
        log.note(f"{title}: exchange of tokens: {dispatch.buffer_bound(architecture.banks, mesh, *shape)}")

    def record(step: int, values: dict[str, Any]) -> None:
        """Reads the metrics of a finished step; called after the next one was dispatched."""
        if bool(values["skipped"]):
            loss, norm = float(values["loss"]), float(values["gradient_norm"])
            log.note(f"warning: step {step} skipped: loss {loss:.4g}, gradient norm {norm:.4g}")
        if int(values["bad_steps"]) >= settings.max_bad_steps:
            raise errors.NumericError(
                f"{directory}: {settings.max_bad_steps} steps in a row gave no usable gradient, the last was {step}; "
                "lower train.learning_rate or look at the data, then start again from the last checkpoint"
            )
        if step % settings.log_every == 0 or step in (1, settings.steps) or bool(values["skipped"]):
            log.write(step, values | {"goodput": clock.goodput()}, architecture.experts)

    previous: tuple[int, dict[str, Any]] | None = None
    batches = pipeline.iterate(start, rows)
    try:
        with _stop_signal() as stop, _profile(settings, directory) as profile:
            for step in range(start + 1, settings.steps + 1):
                with clock.lost("waiting for data"):
                    batch = job.put_batch(next(batches), rows)
                profile(step)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, values = train_step(state, frozen, batch)
                if step == start + 1:
                    jax.block_until_ready(state)
                    memory.give_back()
                if previous is not None:
                    record(*previous)
                previous = (step, values)
                stopping = distributed.stop_requested(stop.requested)
                if stopping or step % settings.save_every == 0 or step == settings.steps:
                    record(step, values)  # no kill after the commit loses the row; saving waits for the step anyway
                    previous = None
                    with clock.lost("saving"):
                        checkpoints.save(step, state, facts)
                if stopping:
                    break
            if previous is not None:
                record(*previous)
            with clock.lost("saving"):
                checkpoints.wait()
            if int(state.step) < settings.steps:
                raise errors.Preempted(
                    f"{directory}: asked to stop, saved step {int(state.step)}; start the same command again"
                )
        log.note(f"{title}: {clock}")
    finally:
        batches.close()
        log.close()
        checkpoints.close()
    steps = int(state.step)
    tokens = steps * tokens_per_step
    return router.constrain(state.trainable), {"steps": steps, "tokens": tokens, "flops": cost.total * tokens}


def _kernel(architecture: transformer.Architecture, title: str) -> str:
    """The grouped matmul that all processes use: the first that passes its test on process 0."""
    if not architecture.sparse:
        return "auto"
    verdict = kernels.self_test() if distributed.is_main() else None
    name, text = distributed.exchange("kernel", None if verdict is None else [verdict.kernel, verdict.text])[0]
    distributed.say(f"{title}: {text}")
    return name


def _resume(checkpoints: checkpoint_lib.Checkpoints, like: Any, facts: dict[str, Any], options: Options) -> Any:
    """The newest committed state, as the shapes `like` say, or None if there is none."""
    damaged = []
    for step in reversed(distributed.main_says("steps", checkpoints.steps)):
        try:
            saved = checkpoints.facts(step)
            changed = config_lib.check_same_run(saved["config"], facts["config"], options.allow_schedule_change)
            for change in changed:
                distributed.say(f"warning: schedule changed by request: {change}")
            pipeline_lib.check_identity(saved["data"], facts["data"])
            restored = checkpoints.restore(step, like)
        except errors.IntegrityError as error:
            if not options.fall_back:
                raise
            distributed.say(f"warning: {error}; step {step} is passed over")
            damaged.append(step)
        else:
            checkpoints.set_aside(damaged)  # or the run would find them again where it is about to write
            return restored
    if damaged:
        raise errors.IntegrityError(f"{checkpoints.directory}: no committed step is intact; remove them to begin from scratch")
    return None


@dataclasses.dataclass
class _Stop:
    requested: bool = False


@contextlib.contextmanager
def _stop_signal() -> Iterator[_Stop]:
    """SIGTERM or Ctrl-C asks for a stop at the next step boundary; a second one ends the process at once."""
    stop = _Stop()

    def handle(*_: Any) -> None:
        if stop.requested:
            os._exit(errors.Preempted.exit_code)
        stop.requested = True

    before = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@contextlib.contextmanager
def _profile(settings: config_lib.TrainConfig, directory: epath.Path) -> Iterator[Callable[[int], None]]:
    """Traces `train.profile_steps` steps from `train.profile_at` on into `directory/profile`; process 0 alone."""
    first, last = settings.profile_at, settings.profile_at + settings.profile_steps
    running = False

    def at(step: int) -> None:
        nonlocal running
        if first and distributed.is_main() and running != (first <= step < last):
            running = not running
            jax.profiler.start_trace(os.fspath(directory / "profile")) if running else jax.profiler.stop_trace()

    try:
        yield at
    finally:
        at(last)
