"""The flags with which a command becomes one of several processes, and how it joins the others."""

import os
import sys
from typing import Any

import jax
from absl import flags

from flexjax import config as config_lib
from flexjax import distributed, errors, sharding

DISTRIBUTED = flags.DEFINE_bool("distributed", False, "One of several processes, as the cluster says: TPU pod, SLURM, GKE.")
COORDINATOR = flags.DEFINE_string("coordinator", "", "HOST:PORT of process 0, where no cluster says it.")
NUM_PROCESSES = flags.DEFINE_integer("num_processes", 0, "How many processes there are; with --coordinator.")
PROCESS_ID = flags.DEFINE_integer("process_id", -1, "Which of them this is, from 0 on; with --coordinator.")
LOG_ALL = flags.DEFINE_bool("log_all", False, "All processes log, not process 0 alone.")


def join(facts: dict[str, Any]) -> None:
    """Joins the other processes, if there are any, before a device is used.

    Args:
      facts: beside the versions of code and libraries, what must be the same in all of them; values that can be read aloud.

    Raises:
      ConfigError: the flags do not go together, or a process differs from process 0.
    """
    if DISTRIBUTED.value or COORDINATOR.value:
        _keep_stdout()
    distributed.start(COORDINATOR.value, NUM_PROCESSES.value, PROCESS_ID.value, DISTRIBUTED.value)
    distributed.log_all(LOG_ALL.value)
    distributed.agree({name: str(value) for name, value in facts.items()} | distributed.versions())
    if distributed.count() > 1:
        distributed.agree({"device": jax.local_devices()[0].device_kind, "local devices": str(jax.local_device_count())})


def _keep_stdout() -> None:
    """Leaves stdout to us: the library beneath CPU collectives reports its connections there."""
    sys.stdout.flush()
    ours = os.dup(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 1)
    sys.stdout = os.fdopen(ours, "w", encoding=sys.stdout.encoding, errors=sys.stdout.errors)


def mesh_sizes(entries: list[str]) -> config_lib.MeshConfig:
    """Parses AXIS=SIZE entries; raises ConfigError for an unknown axis or a size that is no number."""
    sizes = config_lib.MeshConfig()
    for entry in entries:
        axis, _, value = entry.partition("=")
        if axis not in sharding.AXES or not value.isdecimal():
            raise errors.ConfigError(f"--mesh entry '{entry}' must be AXIS=SIZE with an axis of {', '.join(sharding.AXES)}")
        setattr(sizes, axis, int(value))
    return sizes
