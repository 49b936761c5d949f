"""Runs a command many times for the price of one start: a process that has imported an entry point, and forks per request.

A child is as good as a fresh process: no flag is parsed and no JAX backend is started before the fork.

    python -m tests.commands.zygote flexjax.main      # JSON requests on stdin, one exit code per line on stdout
"""

import contextlib
import dataclasses
import importlib
import json
import os
import pathlib
import resource
import signal
import subprocess
import sys

from flexjax import command

ROOT = pathlib.Path(__file__).parents[2]
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "PYTHONUNBUFFERED": "",  # stdout as a user has it
    "XLA_FLAGS": "--xla_backend_optimization_level=0",
    "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
}
SECONDS = 120  # after which a run counts as hanging
BROKEN_PIPE = "(a pipe that nobody reads)"


@dataclasses.dataclass
class Result:
    """What a command left: exit code (negative: the signal that ended it), stdout and stderr."""

    code: int
    out: str
    err: str


class Zygote:
    """A command that can be called with its arguments, in a directory, with a limit on the size of files."""

    def __init__(self, module, scratch):
        self.scratch = scratch
        self.environment = os.environ | ENVIRONMENT | {"JAX_COMPILATION_CACHE_DIR": str(scratch / "compiled")}
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.commands.zygote", module],
            cwd=ROOT,
            env=self.environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def __call__(self, *arguments, cwd=ROOT, max_bytes=None, stdout=None):
        out, err = self.scratch / "stdout", self.scratch / "stderr"
        out.write_text("")
        request = {"arguments": [str(argument) for argument in arguments], "cwd": str(cwd), "max_bytes": max_bytes}
        request |= {"stdout": str(stdout or out), "stderr": str(err)}
        self.process.stdin.write(json.dumps(request) + "\n")
        self.process.stdin.flush()
        code = int(self.process.stdout.readline())
        return Result(code, out.read_text(), err.read_text())

    def close(self):
        self.process.stdin.close()
        self.process.wait(timeout=30)
        self.process.stdout.close()


def main():
    module = importlib.import_module(sys.argv[1])
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 1
            with contextlib.suppress(Exception):
                code = serve(module, request)
            os._exit(code)
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), flush=True)


def serve(module, request):
    signal.alarm(SECONDS)
    os.chdir(request["cwd"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    if request["stdout"] == BROKEN_PIPE:
        reader, writer = os.pipe()
        os.close(reader)
    else:
        writer = os.open(request["stdout"], os.O_WRONLY)
    os.dup2(writer, 1)
    os.dup2(os.open(request["stderr"], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), 2)
    if request["max_bytes"] is not None:
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (request["max_bytes"], request["max_bytes"]))
    sys.argv[1:] = request["arguments"]
    sys.argv[0] = module.__name__
    try:
        command.run(module.main)
    except SystemExit as done:
        return done.code
    except BaseException:
        sys.excepthook(*sys.exc_info())
        return 1
    finally:
        sys.stdout.flush()
        sys.stderr.flush()


if __name__ == "__main__":
    main()
