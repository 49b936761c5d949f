"""A command in several processes of this machine, as if each were a host."""

import os
import socket
import subprocess
import sys

from tests.commands.zygote import ENVIRONMENT, ROOT

DEVICES = 4  # in all, however many processes share them


def start(module, count, arguments, cache, each=lambda index: []):
    """Starts a command in `count` processes; with one, as a user on one machine does."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    flags = f"{ENVIRONMENT['XLA_FLAGS']} --xla_force_host_platform_device_count={DEVICES // count}"
    environment = os.environ | ENVIRONMENT | {"XLA_FLAGS": flags, "JAX_COMPILATION_CACHE_DIR": str(cache)}
    processes = []
    for index in range(count):
        joined = [f"--coordinator=127.0.0.1:{port}", f"--num_processes={count}", f"--process_id={index}"] if count > 1 else []
        processes.append(
            subprocess.Popen(
                [sys.executable, "-m", f"flexjax.{module}", *arguments, *joined, *each(index)],
                cwd=ROOT,
                env=environment,
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return processes


def finish(processes, seconds=120):
    """[(exit code, stdout, stderr)] of processes, in their order."""
    try:
        spoken = [process.communicate(timeout=seconds) for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, *said) for process, said in zip(processes, spoken, strict=True)]
