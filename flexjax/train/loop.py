"""The training loop, for every phase: public, expert, joint, router."""

import contextlib
import dataclasses
import os
import signal
import sys
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from flexjax import checkpoint as checkpoint_lib
from flexjax import config as config_lib
from flexjax import errors, tree, workdir
from flexjax.data import pipeline as pipeline_lib
from flexjax.model import router, transformer
from flexjax.train import flops, metrics
from flexjax.train import optimizer as optimizer_lib
from flexjax.train import step as step_lib

KEPT_IN_FLOAT32 = r".*(norm|norms/.*|router/.*)"


@dataclasses.dataclass
class Options:
    """What the command line decides about a resume."""

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
      params: the whole model, biases effective; frozen leaves are used as they are or cast, never written.
      architecture: what `params` mean.
      pipeline: the stream of batches; its position is the step.
      config: the resolved job; `config.train` drives the loop, all of it is compared on resume.
      directory: gets checkpoints/, metrics.jsonl and tensorboard/; the caller holds its lock.
      title: for whoever watches.
      options: of the resume.
      origin: digest of the anchor or model that `params` come from; empty for a fresh start.

    Returns:
      The trained leaves (float32, biases effective) and facts for the manifest: tokens, steps, FLOPs.

    Raises:
      Preempted: SIGTERM came; the state is saved. NumericError: too many steps in a row were skipped.
    """
    settings = config.train
    _check(settings, architecture)
    compute = transformer.Compute(jnp.dtype(settings.compute_dtype), settings.remat, settings.scan_layers)
    trainable, frozen = tree.partition(params, settings.trainable)
    trainable = jax.tree.map(lambda leaf: jnp.array(leaf, jnp.float32), router.free(trainable))  # a copy: it is donated
    frozen = _cast(frozen, jnp.dtype(settings.frozen_dtype))
    optimizer = optimizer_lib.make(settings, trainable)
    state = step_lib.init_state(trainable, optimizer)
    head = "embed/embedding" if architecture.config.tied_head else "head/kernel"
    step_function = step_lib.make_step(architecture, compute, settings, optimizer, head in tree.flatten(trainable))
    train_step = jax.jit(step_function, donate_argnums=0)

    checkpoints = checkpoint_lib.Checkpoints(directory / "checkpoints", settings.keep)
    missing = max(1, settings.keep + 1 - len(checkpoints.steps()))  # one more than are kept, while it is written
    workdir.need_space(directory, checkpoint_lib.size(state) * missing, f"{missing} checkpoints")
    facts = {"config": config_lib.to_dict(config), "data": pipeline.identity() | {"origin": origin}}
    state = _resume(checkpoints, state, facts, options)
    start = int(state.step)
    cost = flops.per_token(architecture, trainable, config.data.seq_len)
    tokens_per_step = settings.batch_size * config.data.seq_len
    log = metrics.Log(directory, title, start, settings.steps, tokens_per_step, cost.total)
    log.note(f"{title}: trains {tree.count(trainable):,} of {tree.count(params):,} parameters: {tree.summary(trainable)}")
    if start:
        log.note(f"{title}: resumed at step {start} of {settings.steps}")

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
            log.write(step, values, architecture.experts)

    previous: tuple[int, dict[str, Any]] | None = None
    batches = pipeline.iterate(start)
    try:
        with _stop_signal() as stop:
            for step in range(start + 1, settings.steps + 1):
                batch = next(batches)
                with jax.profiler.StepTraceAnnotation("train", step_num=step):
                    state, values = train_step(state, frozen, _model_inputs(batch))
                if previous is not None:
                    record(*previous)
                previous = (step, values)
                if stop.requested or step % settings.save_every == 0 or step == settings.steps:
                    record(step, values)  # no kill after the commit loses the row; saving waits for the step anyway
                    previous = None
                    checkpoints.save(step, state, facts)
                if stop.requested:
                    break
            if previous is not None:
                record(*previous)
            checkpoints.wait()
            if stop.requested and int(state.step) < settings.steps:
                raise errors.Preempted(
                    f"{directory}: asked to stop, saved step {int(state.step)}; start the same command again"
                )
    finally:
        batches.close()
        log.close()
        checkpoints.close()
    trained = router.constrain(state.trainable)
    steps = int(state.step)
    tokens = steps * tokens_per_step
    return jax.tree.map(np.asarray, trained), {"steps": steps, "tokens": tokens, "flops": cost.total * tokens}


def _check(settings: config_lib.TrainConfig, architecture: transformer.Architecture) -> None:
    transformer.check(architecture)
    for name in ("steps", "batch_size", "accumulation", "save_every", "keep", "log_every", "max_bad_steps"):
        if getattr(settings, name) < 1:
            raise errors.ConfigError(f"train.{name} is {getattr(settings, name)}, expected at least 1")
    if settings.batch_size % settings.accumulation:
        raise errors.ConfigError(
            f"train.accumulation={settings.accumulation} must divide train.batch_size={settings.batch_size}"
        )
    for name in ("b1", "b2"):
        if not 0 <= getattr(settings, name) < 1:
            raise errors.ConfigError(f"train.{name} is {getattr(settings, name)}, expected a value from 0 to below 1")
    if settings.clip_norm <= 0 or settings.spike_factor <= 1:
        raise errors.ConfigError(
            f"train.clip_norm={settings.clip_norm} must be above 0 and train.spike_factor={settings.spike_factor} above 1"
        )
    for name in ("compute_dtype", "frozen_dtype"):
        if getattr(settings, name) not in ("float32", "bfloat16"):
            raise errors.ConfigError(f"train.{name} is '{getattr(settings, name)}', expected 'float32' or 'bfloat16'")
    if settings.remat not in transformer.REMAT:
        raise errors.ConfigError(f"train.remat is '{settings.remat}', expected one of {', '.join(transformer.REMAT)}")


def _cast(frozen: tree.Tree, dtype: Any) -> tree.Tree:
    small = tree.matches(frozen, KEPT_IN_FLOAT32)
    return jax.tree.map(lambda leaf, keep: jnp.asarray(leaf, jnp.float32 if keep else dtype), frozen, small)


def _model_inputs(batch: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {name: batch[name] for name in ("tokens", "targets", "weights", "segments")}


def _resume(checkpoints: checkpoint_lib.Checkpoints, state: Any, facts: dict[str, Any], options: Options) -> Any:
    """The newest committed state, or the given one if there is none."""
    damaged = []
    for step in reversed(checkpoints.steps()):
        try:
            saved = checkpoints.facts(step)
            changed = config_lib.check_same_run(saved["config"], facts["config"], options.allow_schedule_change)
            for change in changed:
                print(f"warning: schedule changed by request: {change}", file=sys.stderr)
            pipeline_lib.check_identity(saved["data"], facts["data"])
            restored = checkpoints.restore(step, state)
        except errors.IntegrityError as error:
            if not options.fall_back:
                raise
            print(f"warning: {error}; step {step} is passed over", file=sys.stderr)
            damaged.append(step)
        else:
            checkpoints.set_aside(damaged)  # or the run would find them again where it is about to write
            return restored
    if damaged:
        raise errors.IntegrityError(f"{checkpoints.directory}: no committed step is intact; remove them to begin from scratch")
    return state


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
