"""The same calls against a Cloud Storage that others wrote. It knows no preconditions and lists in one page."""

import os
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request

import pytest
from etils import epath

from flexjax import errors, storage
from flexjax.bucket import attempts, objects, transfer

pytest.importorskip("gcp_storage_emulator")
DATA = os.urandom(700_000)


@pytest.fixture(scope="module")
def address():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    program = [sys.executable, "-m", "gcp_storage_emulator", "start", "--in-memory", "--default-bucket=others"]
    process = subprocess.Popen(
        [*program, "--host=127.0.0.1", f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    where = f"http://127.0.0.1:{port}"
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        for _ in range(300):
            try:
                opener.open(f"{where}/", timeout=5).close()
                break
            except urllib.error.URLError:
                time.sleep(0.1)
        yield where
    finally:
        process.kill()
        process.wait()


@pytest.fixture
def others(address, monkeypatch):
    monkeypatch.setenv("STORAGE_EMULATOR_HOST", address)
    monkeypatch.setenv("FLEXJAX_STORAGE_DEADLINE", "20")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    yield epath.Path("gs://others/models")
    objects.client().close()


def test_files_of_others(others, monkeypatch):
    storage.write(others / "a" / "x", [DATA[:1000], DATA[1000:]])
    assert storage.read(others / "a" / "x", len(DATA)) == DATA
    assert storage.read_small(others / "a" / "x", 10**6) == DATA
    monkeypatch.setattr(attempts, "STEP_BYTES", 2**18)
    monkeypatch.setattr(transfer, "WHOLE_BYTES", 2**18)
    storage.write(others / "b" / "long", [DATA[start : start + 10_000] for start in range(0, len(DATA), 10_000)])
    assert b"".join(storage.blocks(others / "b" / "long", len(DATA))) == DATA
    storage.copy(others / "a" / "x", others / "c", len(DATA))
    assert storage.read(others / "c", len(DATA)) == DATA
    storage.replace(others / "manifest.json", b"one", 0)
    storage.replace(others / "manifest.json", b"two", storage.generation(others / "manifest.json"))
    assert storage.read(others / "manifest.json", 3) == b"two"
    assert {name: entry.size for name, entry in storage.files(others).items()} == {
        "a/x": len(DATA),
        "b/long": len(DATA),
        "c": len(DATA),
        "manifest.json": 3,
    }
    with pytest.raises(errors.IntegrityError, match="is missing"):
        storage.read(others / "a" / "y", 1)
    assert storage.policies(others)["versioning"] is False
    assert storage.delete(others) == []
    assert storage.files(others) == {}
