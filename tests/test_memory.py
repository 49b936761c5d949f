"""What glibc does with freed memory, in a process of its own."""

import json
import subprocess
import sys

import pytest

SCRIPT = """
import json, os
from flexjax import memory

def resident():
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20

memory.keep_freed()
import numpy as np
start, large = resident(), np.ones(2**25)
last = np.ones(2**10)  # behind it, so that it is no end of the heap
held = resident()
del large
kept = resident()
memory.give_back()
print(json.dumps([held - start, kept - start, resident() - start]))
"""


@pytest.mark.skipif(sys.platform != "linux", reason="glibc only")
def test_freed_memory_is_kept_until_it_is_given_back():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, check=True)
    held, kept, left = json.loads(done.stdout)
    assert held > 250 and held - 10 < kept, "kept for the next step"
    assert left < kept - 200
