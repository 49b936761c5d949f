"""Entry points: flags in, one call, one line and an exit code out."""

import difflib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any, NoReturn

from absl import flags, logging

from flexjax import config as config_lib
from flexjax import errors

BROKEN_PIPE = 141
INTERRUPTED = 130


def run(main: Callable[[list[str]], Any], argv: list[str] | None = None) -> NoReturn:
    """Parses flags, calls `main(positional arguments)`, and exits.

    A `FlexjaxError` becomes one line on stderr and its exit code; a flag or config that cannot be loaded is exit code 2.
    Any other exception is a bug of ours and keeps its traceback.
    """
    logging.set_verbosity(logging.ERROR)
    try:
        positional = _parse(sys.argv if argv is None else argv)
        main(positional)
        sys.stdout.flush()
        code = 0
    except errors.FlexjaxError as error:
        code = error.exit_code
        label = "stopped" if isinstance(error, errors.Preempted) else "error"
        print(f"{label}: {' '.join(str(error).split())}", file=sys.stderr)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        code = BROKEN_PIPE
    except KeyboardInterrupt:
        print("stopped: interrupted; start the same command again to continue from the last checkpoint", file=sys.stderr)
        code = INTERRUPTED
    except OSError as error:
        code = errors.StorageError.exit_code
        print(f"error: {error.filename or 'storage'}: {error.strerror or error}; check space and permissions", file=sys.stderr)
    except SystemExit:
        raise
    except Exception:
        traceback.print_exc()
        code = errors.FlexjaxError.exit_code
    sys.exit(code)


def _parse(argv: list[str]) -> list[str]:
    for argument in argv[1:]:
        name = argument.lstrip("-").split("=", 1)[0]
        if argument.startswith("-") and name.startswith("config."):
            config_lib.check_field(name.removeprefix("config."))
    try:
        return list(flags.FLAGS(argv))[1:]
    except errors.FlexjaxError:
        raise
    except flags.Error as error:
        first = str(error).strip().splitlines()[0]
        raise errors.ConfigError(f"{first}; {_suggestion(first)}") from None
    except Exception as error:  # a config file runs the user's own code, which may fail in any way
        reason = f"{type(error).__name__}: {error}".splitlines()[0]
        raise errors.ConfigError(f"the config cannot be loaded ({reason}); check the file named by --config") from None


def _suggestion(message: str) -> str:
    known = [name for name in flags.FLAGS if not name.startswith("config.")]
    words = message.replace("'", " ").replace("--", " ").split()
    for word in words:
        close = difflib.get_close_matches(word, known, n=1, cutoff=0.7)
        if close and close[0] != word:
            return f"did you mean --{close[0]}?"
    return "see --help"
