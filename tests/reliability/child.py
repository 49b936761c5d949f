"""A training run in a process of its own, to be killed.

python -m tests.reliability.child DIRECTORY --cache=DIR [--steps=N ...]
"""

import resource
import signal
import sys
import time

import jax
from absl import flags

from flexjax import command, workdir
from tests.train import tiny

CACHE = flags.DEFINE_string("cache", None, "Where compiled programs are shared.", required=True)
STALL = flags.DEFINE_integer("stall", 0, "The step whose batch never comes.")
LIMIT = flags.DEFINE_integer("limit", 0, "The largest file, in bytes, that may be written from step 4 on: a full disk.")
SETTINGS = {
    name: flags.DEFINE_integer(name, default, f"train.{name}")
    for name, default in {"steps": 20, "save_every": 1, "keep": 2, "log_every": 1}.items()
}


def main(positional):
    jax.config.update("jax_compilation_cache_dir", CACHE.value)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)

    def stall(batch):
        print("stalled", file=sys.stderr, flush=True)
        time.sleep(120)
        return batch

    def fill_disk(batch):
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT.value, resource.RLIM_INFINITY))
        return batch

    actions = ({STALL.value: stall} if STALL.value else {}) | ({4: fill_disk} if LIMIT.value else {})
    directory = workdir.create(positional[0])
    with workdir.lock(directory):
        # a constant rate: the number of steps does not shape them
        settings = {name: flag.value for name, flag in SETTINGS.items()} | {"decay": "constant"}
        tiny.train("pair", directory, tiny.Tampered(tiny.stream(), actions), **settings)


if __name__ == "__main__":
    command.run(main)
