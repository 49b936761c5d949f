"""Runs the peer: transformers' FlexOlmo on torch, in the second environment, as a process of its own.

    bash tests/parity/setup_torch.sh      # builds the environment, .venv-torch

The fair peer is told that the CPU is Intel's: MKL would take slower paths on others. Comparisons that count are made
with it; "plain" is what a user gets who does not know.
"""

import functools
import json
import os
import pathlib
import subprocess
import tempfile

from benchmarks import measuring
from flexjax import errors

HERE = pathlib.Path(__file__).parent
PYTHON = HERE.parents[1] / ".venv-torch" / "bin" / "python"


def run(*arguments: str, fair: bool = True) -> measuring.Row:
    """The row that `flex_olmo.py` prints.

    Raises:
      ConfigError: there is no second environment, or the peer failed.
    """
    if not PYTHON.exists():
        raise errors.ConfigError(f"{PYTHON} is missing; build it: bash tests/parity/setup_torch.sh")
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": str(len(os.sched_getaffinity(0)))}
    if fair:
        environment["LD_PRELOAD"] = _told()
    command = [os.fspath(PYTHON), os.fspath(HERE / "flex_olmo.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise errors.ConfigError(f"the peer failed: {' '.join(done.stderr.split())[-300:]}")
    row: measuring.Row = json.loads(done.stdout.splitlines()[-1])
    return row


@functools.cache
def _told() -> str:
    """The library that answers MKL."""
    library = pathlib.Path(tempfile.mkdtemp()) / "intel.so"
    done = subprocess.run(["cc", "-shared", "-fPIC", HERE / "intel.c", "-o", library], capture_output=True, text=True)
    if done.returncode:
        raise errors.ConfigError(f"the fair peer needs a C compiler, cc: {done.stderr[-200:]}")
    return os.fspath(library)


def shape(values: dict[str, object]) -> str:
    """Shapes as the peer reads them."""
    return json.dumps({name: value for name, value in values.items() if isinstance(value, int)})
