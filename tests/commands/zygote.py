"""Runs a command many times for the price of one start: a process that has imported an entry point, and forks per request.

A child is as good as a fresh process: no flag is parsed and no JAX backend is started before the fork.

    python -m tests.commands.zygote flexjax.main      # JSON requests on stdin, one answer per line on stdout
"""

import importlib
import json
import os
import signal
import sys

from flexjax import command

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
ENVIRONMENT = {"PYTHONPATH": ROOT, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "PYTHONHASHSEED": "0"}
SECONDS = 120


def main():
    module = importlib.import_module(sys.argv[1])
    answers = os.fdopen(os.dup(1), "w")
    for line in sys.stdin:
        request = json.loads(line)
        child = os.fork()
        if child == 0:
            os._exit(serve(module, request))
        _, status = os.waitpid(child, 0)
        print(os.waitstatus_to_exitcode(status), file=answers, flush=True)


def serve(module, request):
    signal.alarm(SECONDS)
    os.chdir(request["cwd"])
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(request[name], os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), number)
    code = 99
    try:
        if request["limit"]:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            import resource

            resource.setrlimit(resource.RLIMIT_FSIZE, (request["limit"], request["limit"]))
        sys.argv[1:] = request["arguments"]
        command.run(module.main)
    except SystemExit as done:
        code = done.code
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
    return code


if __name__ == "__main__":
    main()
