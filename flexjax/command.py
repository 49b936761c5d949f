"""Entry points: flags in, one call, one line and an exit code out."""

import difflib
import os
import re
import shlex
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

import jax
from absl import flags, logging
from etils import epath

from flexjax import config as config_lib
from flexjax import distributed, errors, hardware
from flexjax.data import corpus

BROKEN_PIPE = 141
INTERRUPTED = 130
CACHED_FROM_SECONDS = 0.5  # what compiles faster is not worth a file
HELP = {"--help", "-help", "-h"}


def run(main: Callable[[list[str]], Any]) -> NoReturn:
    """Parses the command line, calls `main(positional arguments)`, and exits.

    A `FlexjaxError` becomes one line on stderr and its exit code; a flag or config that cannot be loaded is exit code 2.
    Any other exception is a bug of ours and keeps its traceback. However it ends, the other processes are told.
    """
    logging.set_verbosity(logging.FATAL)  # Orbax logs tracebacks of what it also raises
    code = 1
    try:
        code = _run(main)
    finally:
        distributed.finish(code)
    _close_stdout()
    sys.exit(code)


def _run(main: Callable[[list[str]], Any]) -> int:
    """Calls `main` and returns the exit code that what it raises stands for."""
    code = 0
    try:
        if HELP.isdisjoint(sys.argv[1:]):
            with distributed.lost_peers_are_preemption():
                main(_parse(sys.argv))
                distributed.finish(0)  # waits for the others, and may be told to stop meanwhile
        else:
            print(f"{(sys.modules[main.__module__].__doc__ or '').strip()}\n{flags.FLAGS.main_module_help()}")
        sys.stdout.flush()
    except errors.FlexjaxError as error:
        code = error.exit_code
        label = "stopped" if isinstance(error, errors.Preempted) else "error"
        print(f"{label}: {' '.join(str(error).split())}", file=sys.stderr)
    except (jax.errors.JaxRuntimeError, MemoryError) as error:
        if "RESOURCE_EXHAUSTED" not in str(error) and not isinstance(error, MemoryError):
            raise
        code = errors.ConfigError.exit_code
        print(f"error: {_out_of_memory(str(error))}", file=sys.stderr)
    except BrokenPipeError:
        code = BROKEN_PIPE
    except KeyboardInterrupt:
        print("stopped: interrupted; what was finished is kept, start the same command again", file=sys.stderr)
        code = INTERRUPTED
    except OSError as error:
        code = errors.StorageError.exit_code
        print(f"error: {error.filename or 'storage'}: {error.strerror or error}; check space and permissions", file=sys.stderr)
    except (ImportError, KeyError) as error:  # of a path like gs://..., whose package is missing or unknown
        if not re.search("fsspec|etils", traceback.extract_tb(error.__traceback__)[-1].filename):
            raise
        code = errors.StorageError.exit_code
        advice = "use a local path, or gs:// after: pip install -e '.[gcs]'"
        print(f"error: this kind of path cannot be opened ({error}); {advice}", file=sys.stderr)
    return code


def use_cpu() -> None:
    """Leaves accelerators, and their compiler's own search for them, alone."""
    jax.config.update("jax_platforms", "cpu")


def compilation_cache(directory: os.PathLike[str]) -> None:
    """Keeps compiled programs in a directory, unless the user chose another, so that starting again does not compile again."""
    if jax.config.jax_compilation_cache_dir:
        return
    jax.config.update("jax_compilation_cache_dir", os.fspath(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", CACHED_FROM_SECONDS)


def _out_of_memory(message: str) -> str:
    """What was asked for and what there was, as far as the runtime says, and the command that plans the same job."""
    asked = re.search(r"(?:allocate|allocating|reserve|Used) ([\d.]+ ?[KMGT]?i?B?)", message)
    said = asked[1].strip() if asked else "more"
    size = f"{int(said) / 2**30:.1f} GiB" if said.isdigit() else said
    device = jax.local_devices()[0]
    stats = device.memory_stats() or {}
    limit = stats.get("bytes_limit") or os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    return f"out of memory: asked for {size}, a {device.platform} device has {limit / 2**30:.1f} GiB; {_advice(device)}"


def _advice(device: jax.Device) -> str:
    """What helps; for a job, with the command that plans it on such devices."""
    job = [argument for argument in sys.argv[1:] if argument.startswith("--config")]
    if not any(argument.startswith("--config=") for argument in job):
        return "smaller batches help, and so may a mesh of more devices"
    chip = hardware.of_device(device.device_kind)
    machine = [f"--topology={device.platform}:{jax.device_count()}"]
    if chip is not None and chip.dimensions:
        machine = [f"--topology={chip.name}:SLICE"]
    elif chip is not None:
        machine += [f"--gpu={chip.name}"]
    return f"smaller batches help, and so may another mesh: {shlex.join(['python', '-m', 'flexjax.plan', *job, *machine])}"


def _close_stdout() -> None:
    """Lets nobody hear of a pipe or disk that took no more; the exit code says it."""
    try:
        sys.stdout.flush()
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())


def _parse(argv: list[str]) -> list[str]:
    for argument in argv[1:]:
        name, equals, value = argument.lstrip("-").partition("=")
        if argument.startswith("-") and name.startswith("config."):
            config_lib.check_field(name.removeprefix("config."))
        if argument.startswith("-") and name == "config" and equals and not os.path.isfile(path := value.partition(":")[0]):
            raise errors.ConfigError(f"--config={path}: there is no such file; for instance --config=configs/math_expert.py")
    try:
        return list(flags.FLAGS(argv))[1:]
    except errors.FlexjaxError:
        raise
    except flags.UnrecognizedFlagError as error:
        raise errors.ConfigError(f"unknown flag --{error.flagname}; {_suggestion(error.flagname)}") from None
    except flags.Error as error:
        raise errors.ConfigError(f"{_reason(str(error))}; see --help") from None
    except Exception as error:  # a config file runs the user's own code, which may fail in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0][:200]
        raise errors.ConfigError(f"the config cannot be loaded ({reason}); check the file named by --config") from None


def _reason(message: str) -> str:
    """What absl says of a value in one line; of a config file that failed, the last line of its traceback."""
    lines = message.strip().splitlines()
    if value := re.match(r"flag --config\.([\w.]+)=(.*?): ", lines[0]):
        expected = config_lib.check_field(value[1]).__name__
        return f"config.{value[1]} is '{value[2]}', expected a value of type {expected}"
    return lines[0] if len(lines) == 1 else f"{lines[0]} {lines[-1]}"


def _suggestion(name: str) -> str:
    known = [flag.name for flag in flags.FLAGS.get_key_flags_for_module(sys.argv[0])]
    known += [f"config.{path}" for path in config_lib.classes()] if "config" in known else []
    close = difflib.get_close_matches(name, known, n=1, cutoff=0.7)
    return f"did you mean --{close[0]}?" if close else "see --help"


def named_texts(entries: list[str], flag: str) -> dict[str, list[epath.Path]]:
    """Files by name, from a flag of NAME=PATH entries.

    Raises:
      ConfigError: an entry is not of that form, or a name is given twice. DataError: no file is there.
    """
    texts: dict[str, list[epath.Path]] = {}
    for entry in entries:
        name, _, path = entry.partition("=")
        if not (name and path):
            raise errors.ConfigError(f"--{flag} entry '{entry}' must be NAME=PATH, for instance math=validation.jsonl.gz")
        if name in texts:
            raise errors.ConfigError(
                f"--{flag} names '{name}' twice; give each text its own name, or one pattern for both files"
            )
        texts[name] = corpus.expand(path, "", name)
    return texts
