"""What a run says of itself: metrics.jsonl, TensorBoard, and one moving line for whoever watches."""

import contextlib
import json
import math
import os
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import tqdm
from etils import epath
from tensorboardX import event_file_writer, summary
from tensorboardX.proto import event_pb2

from flexjax import distributed, errors, hardware


def peak_flops() -> float:
    """FLOP/s that a device of this run could do in bfloat16: published, or measured on CPU by one float32 product."""
    if known := hardware.of_device(jax.devices()[0].device_kind):
        return known.flops["bfloat16"]
    x = jnp.ones((1024, 1024), jnp.float32)
    product = jax.jit(lambda x: x @ x)
    product(x).block_until_ready()
    times = []
    for _ in range(5):
        start = time.perf_counter()
        product(x).block_until_ready()
        times.append(time.perf_counter() - start)
    return 2 * 1024**3 / min(times)


class Clock:
    """How long a run took, and how much of it brought no step forward."""

    def __init__(self) -> None:
        self._start = time.monotonic()
        self.seconds: dict[str, float] = {}

    @contextlib.contextmanager
    def lost(self, cause: str) -> Iterator[None]:
        """Books the time of a block to a cause."""
        start = time.monotonic()
        try:
            yield
        finally:
            self.seconds[cause] = self.seconds.get(cause, 0.0) + time.monotonic() - start

    def goodput(self) -> float:
        """The productive share of the wall time so far."""
        elapsed = time.monotonic() - self._start
        return 1 - min(1.0, sum(self.seconds.values()) / elapsed) if elapsed else 1.0

    def __str__(self) -> str:
        lost = ", ".join(f"{cause} {seconds:.1f} s" for cause, seconds in self.seconds.items())
        return f"goodput {self.goodput():.0%} of {time.monotonic() - self._start:.0f} s; the rest: {lost}"


class Log:
    """Writes one row per logged step.

    Args:
      directory: holds metrics.jsonl and tensorboard/. Rows after `start` are of a run that was cut off, and dropped.
      title: shown before the progress.
      start: steps already done.
      steps: steps in all.
      tokens_per_step: target tokens of a full batch.
      flops_per_token: analytic, see `flops`.
      devices: that share the work.
    """

    def __init__(
        self,
        directory: epath.Path,
        title: str,
        start: int,
        steps: int,
        tokens_per_step: int,
        flops_per_token: float,
        devices: int,
    ) -> None:
        self.path = directory / "metrics.jsonl"
        self.title, self.steps = title, steps
        self.tokens_per_step, self.flops_per_token = tokens_per_step, flops_per_token
        self.peak = peak_flops() * (devices if jax.default_backend() != "cpu" else 1)  # devices of one CPU share its cores
        kept = [row for row in read(self.path) if row["step"] <= start]
        partial = directory / ".metrics.jsonl.partial"
        try:
            partial.write_text("".join(json.dumps(row) + "\n" for row in kept))
            partial.replace(self.path)
            self._board = _Board(directory / "tensorboard", start)
            self._file = open(self.path, "a")  # noqa: SIM115  closed by `close`
        except OSError as error:
            raise errors.StorageError(f"cannot write {self.path} or tensorboard: {error.strerror or error}") from None
        self._bar = tqdm.tqdm(total=steps, initial=start, desc=title, unit="step", disable=not sys.stderr.isatty())
        self._clock: tuple[int, float] | None = None
        self._spoken = 0.0

    def write(self, step: int, metrics: dict[str, Any], experts: tuple[str, ...]) -> dict[str, Any]:
        """Logs the metrics of a step (1 for the first); returns the row."""
        now = time.perf_counter()
        row: dict[str, Any] = {"step": step}
        for name, value in metrics.items():
            array = np.asarray(value)
            row[name] = array.item() if array.ndim == 0 else array.tolist()
        if self._clock is not None and step > self._clock[0]:
            per_step = (now - self._clock[1]) / (step - self._clock[0])
            row["tokens_per_second"] = self.tokens_per_step / per_step
            row["mfu"] = row["tokens_per_second"] * self.flops_per_token / self.peak
            row["eta_seconds"] = per_step * (self.steps - step)
        self._clock = (step, now)  # the first interval holds compilation and is not counted
        try:
            self._file.write(json.dumps({name: _finite(value) for name, value in row.items()}, allow_nan=False) + "\n")
            self._file.flush()
            self._board.write(step, scalars(row, experts))
        except OSError as error:
            raise errors.StorageError(f"cannot write {self.path} or tensorboard: {error.strerror or error}") from None
        self._show(row, now)
        return row

    def note(self, text: str) -> None:
        """Says something without breaking the progress line."""
        self._bar.write(text, file=sys.stderr)

    def close(self) -> None:
        """Closes all files; every row is on disk since it was written."""
        self._bar.close()
        for file in (self._file, self._board):
            with contextlib.suppress(OSError):  # what a full disk refused was reported when it was written
                file.close()

    def _show(self, row: dict[str, Any], now: float) -> None:
        speed = row.get("tokens_per_second")
        self._bar.n = row["step"]
        self._bar.set_postfix_str(f"loss {row['loss']:.3f}" + (f", {speed:,.0f} tokens/s" if speed else ""))
        last = row["step"] >= self.steps
        if self._bar.disable and (last or now - self._spoken > 10):
            self._spoken = now
            pace = f"  {speed:,.0f} tokens/s  MFU {row['mfu']:.0%}  ETA {row['eta_seconds']:.0f} s" if speed else ""
            print(f"{self.title}  step {row['step']}/{self.steps}  loss {row['loss']:.4f}{pace}", file=sys.stderr, flush=True)


class Silent:
    """The log of a process that leaves the files to process 0."""

    def write(self, step: int, metrics: dict[str, Any], experts: tuple[str, ...]) -> None:
        """Nothing: the metrics are the same in all processes."""

    def note(self, text: str) -> None:
        """Says something if all processes were asked to."""
        distributed.say(text)

    def close(self) -> None:
        """Nothing is open."""


class _Board:
    """TensorBoard events, written at once: the library's own thread dies of a full disk, and the run would wait for it.

    Points after `start` are of a run that was cut off; the session's first event makes TensorBoard drop them.
    """

    def __init__(self, directory: epath.Path, start: int) -> None:
        directory.mkdir(parents=True, exist_ok=True)
        self._events = event_file_writer.EventsWriter(str(directory / "events"), f".{os.getpid()}.{start}")
        session = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
        self._events.write_event(event_pb2.Event(wall_time=time.time(), step=start + 1, session_log=session))
        self._events.flush()

    def write(self, step: int, points: dict[str, float]) -> None:
        now = time.time()
        for tag, value in points.items():
            self._events.write_event(event_pb2.Event(wall_time=now, step=step, summary=summary.scalar(tag, value)))
        self._events.flush()

    def close(self) -> None:
        self._events.close()


def scalars(row: dict[str, Any], experts: tuple[str, ...]) -> dict[str, float]:
    """A row as TensorBoard's scalars: [L] and [L, E] values become one curve per layer, or per expert and layer."""
    points: dict[str, float] = {}
    for name, value in row.items():
        if not isinstance(value, list):
            points[name] = value
            continue
        for layer, of_layer in enumerate(value):
            if not isinstance(of_layer, list):
                points[f"{name}/layer{layer:02d}"] = of_layer
                continue
            for expert, number in zip(experts, of_layer, strict=True):
                points[f"{name}/{expert}/layer{layer:02d}"] = number
    return points


def _finite(value: Any) -> Any:
    """The value as JSON can hold it: null for NaN and infinity."""
    if isinstance(value, list):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def read(path: epath.Path) -> list[dict[str, Any]]:
    """The rows of a metrics.jsonl; a last line that was cut off by a kill is dropped."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_bytes().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows
