"""One writer at a time: the second is refused at once, and a dead one holds nothing."""

import contextlib
import os
import subprocess
import sys
import time

import pytest
from etils import epath

from flexjax import errors, workdir

HOLD = """
import sys, time
from etils import epath
from flexjax import errors, workdir
try:
    with workdir.lock(epath.Path(sys.argv[1])):
        print("held", flush=True)
        time.sleep(float(sys.argv[2]))
except errors.StorageError as error:
    print(f"error: {error}", flush=True)
    sys.exit(error.exit_code)
"""


@contextlib.contextmanager
def holder(directory, seconds=60):
    child = subprocess.Popen([sys.executable, "-c", HOLD, directory, str(seconds)], stdout=subprocess.PIPE, text=True)
    try:
        yield child, child.stdout.readline()
    finally:
        child.kill()
        child.wait()
        child.stdout.close()


def test_a_second_writer_is_refused_within_five_seconds_naming_the_holder(tmp_path):
    with holder(tmp_path) as (first, said):
        assert said == "held\n"
        start = time.monotonic()
        with holder(tmp_path) as (second, said):
            assert second.wait(5) == 6
        assert time.monotonic() - start < 5
        assert f"{tmp_path} is in use by process {first.pid} on {os.uname().nodename} since " in said
        with pytest.raises(errors.StorageError, match=f"in use by process {first.pid}"), workdir.lock(epath.Path(tmp_path)):
            pass


def test_the_lock_of_a_killed_process_is_free(tmp_path):
    with holder(tmp_path) as (first, said):
        assert said == "held\n"
        first.kill()
        first.wait()
        assert f"process {first.pid}" in (tmp_path / ".lock").read_text()  # its name is still there, and means nothing
        with workdir.lock(epath.Path(tmp_path)):
            assert f"process {os.getpid()}" in (tmp_path / ".lock").read_text()


def test_the_lock_is_given_up_whatever_ends_the_work(tmp_path):
    with pytest.raises(ZeroDivisionError), workdir.lock(epath.Path(tmp_path)):
        raise ZeroDivisionError
    with workdir.lock(epath.Path(tmp_path)):
        pass


def test_a_process_that_was_started_by_the_holder_does_not_keep_the_lock(tmp_path):
    with workdir.lock(epath.Path(tmp_path)):
        child = subprocess.Popen(["sleep", "60"])
    try:
        with workdir.lock(epath.Path(tmp_path)):
            pass
    finally:
        child.kill()
        child.wait()
