"""Several processes that train one model: how they begin, compare, speak, stop and end together.

An entry point calls `start` before anything touches a device, `agree` right behind it, and `finish` with its exit code at the
very end. A single process returns from every function here at once, so callers need no `if`.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import pathlib
import platform
import re
import socket
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src import distributed as runtime

from flexjax import errors, peers

CONNECTION = re.compile(
    "gloo|nccl|rccl|connection|socket|coordination|unavailable|aborted|cancelled|deadline_exceeded", re.IGNORECASE
)

_peers: peers.Peers | None = None
_all_speak = False
LONGEST_WORK = 7 * 24 * 3600  # seconds that one process may do for all, such as tokenising


def start(
    coordinator: str = "", num_processes: int = 0, process_id: int = -1, detect: bool = False, timeout: int = 300
) -> None:
    """Joins the other processes and returns when all have come; does nothing if no argument is given.

    Args:
      coordinator: HOST:PORT on which process 0 listens; the same for all.
      num_processes, process_id: how many, and which of them this is, from 0.
      detect: finds the three in the environment instead: a TPU pod, SLURM, Open MPI, Kubernetes.
      timeout: seconds in which all must have come.

    Raises:
      ConfigError: the arguments do not go together, or not all came. Where only jax's C++ code notices that, the process
        ends with that line and exit code, below the trace of that code.
    """
    given = {"--coordinator": coordinator != "", "--num_processes": num_processes != 0, "--process_id": process_id != -1}
    if detect and any(given.values()):
        raise errors.ConfigError(f"{', '.join(name for name in given if given[name])}: leave out what is to be detected")
    if detect:
        _join({}, "this job's processes", timeout)
    elif any(given.values()):
        if missing := [name for name in given if not given[name]]:
            raise errors.ConfigError(f"{', '.join(missing)} missing; {', '.join(given)} belong together")
        address = _parse(coordinator)
        if not 0 <= process_id < num_processes:
            raise errors.ConfigError(
                f"--process_id is {process_id} and --num_processes is {num_processes}, expected 0 <= process_id < num_processes"
            )
        if num_processes == 1:
            return
        if process_id:
            _wait_for(address, timeout)
        explicit = {"coordinator_address": coordinator, "num_processes": num_processes, "process_id": process_id}
        _join(explicit | {"cluster_detection_method": "deactivate"}, f"{num_processes} processes at {coordinator}", timeout)


def _parse(coordinator: str) -> tuple[str, int]:
    host, _, port = coordinator.rpartition(":")
    if not host or not port.isdecimal() or not 0 < int(port) < 2**16:
        raise errors.ConfigError(f"--coordinator is '{coordinator}', expected HOST:PORT, for instance 10.0.0.1:8476")
    return host.strip("[]"), int(port)


def _wait_for(address: tuple[str, int], timeout: float) -> None:
    """Returns when process 0 listens; jax's client would abort instead of raising."""
    end = time.monotonic() + timeout
    while True:
        try:
            return socket.create_connection(address, timeout=2).close()
        except OSError as error:
            if time.monotonic() > end:
                raise errors.ConfigError(
                    f"--coordinator {address[0]}:{address[1]} cannot be reached within {timeout} s "
                    f"({error.strerror or error}); check the address, and that process 0 runs"
                ) from None
            time.sleep(0.2)


def _join(arguments: dict[str, Any], who: str, timeout: int) -> None:
    """Joins through jax, without its handler of SIGTERM and without its own reaction to a death."""
    jax.config.update("jax_enable_preemption_service", False)
    jax.config.update("jax_enable_recoverability", True)
    hint = "start the same command once on every host, with the same --num_processes and each --process_id once"
    line = f"error: {who} did not all come within {timeout} s, or do not belong together; {hint}"
    peers.on_abort(lambda: peers.leave(line, errors.ConfigError.exit_code))
    try:
        jax.distributed.initialize(
            **arguments,
            initialization_timeout=timeout,
            heartbeat_timeout_seconds=peers.HEARTBEAT_SECONDS,
            shutdown_timeout_seconds=peers.HEARTBEAT_SECONDS,
        )
    except ValueError:
        raise errors.ConfigError(
            "no TPU pod, SLURM, Open MPI or Kubernetes job is found here; pass --coordinator, --num_processes and --process_id"
        ) from None
    except RuntimeError as error:
        raise errors.ConfigError(f"{who} cannot be joined: {str(error).splitlines()[0]}") from None
    finally:
        peers.on_abort(None)
    state = runtime.global_state
    if state.num_processes > 1:
        global _peers
        _peers = peers.Peers(state.client, state.process_id, state.num_processes)


def index() -> int:
    """Which of the processes this is, from 0."""
    return _peers.index if _peers else 0


def count() -> int:
    """How many processes train together."""
    return _peers.count if _peers else 1


def is_main() -> bool:
    """Whether this is process 0: the one that logs, and writes what is not split among all."""
    return index() == 0


def exchange(name: str, value: Any, timeout: float = LONGEST_WORK) -> list[Any]:
    """Gives a JSON value of at most some kB to the others, and returns everybody's, by process.

    Every process must call it, equally often for each name; one name is used by one thread at a time.

    Args:
      name: what the values are; may be used again.
      value: this process's.
      timeout: seconds for which the others are waited for, as long as they live.

    Raises:
      Preempted: a process lives but did not come in time, or the connection broke.
    """
    if _peers is None:
        return [json.loads(json.dumps(value))]
    with lost_peers_are_preemption():
        return _peers.exchange(name, value, timeout)


def barrier(name: str, timeout: float = LONGEST_WORK) -> None:
    """Returns when every process has come here; otherwise as `exchange`."""
    exchange(f"barrier {name}", None, timeout)


def agree(facts: dict[str, str]) -> None:
    """Compares with process 0 what must be the same everywhere, such as `versions()` and the config's digest.

    Raises:
      ConfigError: anybody differs; it is raised in every process.
    """
    everybody = exchange("facts", facts)
    expected = everybody[0]
    for number, theirs in enumerate(everybody):
        differing = [name for name in sorted(theirs | expected) if theirs.get(name) != expected.get(name)]
        if _peers and differing:
            values = "; ".join(f"{name} is {theirs.get(name)}, expected {expected.get(name)}" for name in differing)
            raise errors.ConfigError(
                f"{_peers.who(number)} differs from {_peers.who(0)}: {values}; start the same command with the same code on all"
            )


def versions() -> dict[str, str]:
    """Versions of python, jax, jaxlib and flexjax, and `code_version()`."""
    found = {"python": platform.python_version(), "code": code_version()}
    for package in ("jax", "jaxlib", "flexjax"):
        try:
            found[package] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:  # flexjax, run from a checkout
            found[package] = "not installed"
    return found


def code_version() -> str:
    """Hex SHA-256 of the package's source: relative path, length and bytes of each .py file, sorted by path."""
    root, digest = pathlib.Path(__file__).parent, hashlib.sha256()
    for name, path in sorted((path.relative_to(root).as_posix(), path) for path in root.rglob("*.py")):
        content = path.read_bytes()
        digest.update(f"{name}\0{len(content)}\0".encode() + content)
    return digest.hexdigest()


def stop_requested(wanted: bool) -> bool:
    """Whether all stop at this step boundary: the same answer everywhere, without a round trip.

    Every process must call it at every boundary. Within about a second a wish is known to all; then each says how many
    boundaries it has passed, and all stop at the one behind the furthest.

    Args:
      wanted: whether this process was asked to stop. Alone, that is the answer.
    """
    return _peers.stop_requested(wanted) if _peers else wanted


@contextlib.contextmanager
def lost_peers_are_preemption() -> Iterator[None]:
    """Around collectives: an error of the connection is no bug of ours if a process is gone.

    It waits until that is certain; then the watch ends this process.

    Raises:
      Preempted: the connection broke, though all processes live.
    """
    try:
        yield
    except jax.errors.JaxRuntimeError as error:
        if _peers is None or not CONNECTION.search(str(error)):
            raise
        time.sleep(peers.HEARTBEAT_SECONDS + 5)
        reason = str(error).splitlines()[0][:200]
        raise errors.Preempted(f"the connection between the processes broke ({reason}); {peers.AGAIN}") from None


def finish(code: int = 0) -> None:
    """Announces how this process ends, so that nobody takes it for dead; then exit with that code.

    With 0 it returns when all have ended so; a signal's handler may raise out of that, and `finish` with another code
    follows. With another code the others stop too, within some seconds, signals are ignored, and from here on this process
    waits for nobody but, if it is process 0, for the others to hear of it.
    """
    if _peers:
        _peers.finish(code)


def main_says(name: str, look: Callable[[], Any]) -> Any:
    """What process 0 finds, a JSON value, in all: others may see a shared directory a moment later than it is."""
    return exchange(name, look() if is_main() else None)[0]


@contextlib.contextmanager
def main_first(name: str) -> Iterator[None]:
    """Around work whose result all processes find on disk: process 0 does it while the others wait, then they follow."""
    if not is_main():
        barrier(name)
    yield
    if is_main():
        barrier(name)


def log_all(wanted: bool) -> None:
    """Whether `say` speaks in every process, not in process 0 alone."""
    global _all_speak
    _all_speak = wanted


def say(text: str) -> None:
    """Tells whoever watches what is going on."""
    if is_main() or _all_speak:
        print(text if count() == 1 or not _all_speak else f"[{index()}] {text}", file=sys.stderr, flush=True)
