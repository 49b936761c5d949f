"""Starts, watches and inspects training processes from outside, by what lies on the disk."""

import hashlib
import json
import os
import pathlib
import re
import subprocess
import sys
import time

import flexjax

ROOT = pathlib.Path(flexjax.__file__).parents[1]
COMMIT = "commit.json"


def command(directory, cache, **flags):
    """The command line of a training process."""
    arguments = [f"--{name}={value}" for name, value in flags.items()]
    return [sys.executable, "-m", "tests.reliability.child", str(directory), f"--cache={cache}", *arguments]


def start(directory, cache, **flags):
    """A training process; its stderr is collected in `directory.log`."""
    with open(f"{directory}.log", "ab") as log:
        return subprocess.Popen(command(directory, cache, **flags), cwd=ROOT, stdout=log, stderr=log)


def said(directory):
    return pathlib.Path(f"{directory}.log").read_text()


def listing(directory):
    """Names in `checkpoints/`, none if it does not exist yet."""
    try:
        return set(os.listdir(directory / "checkpoints"))
    except FileNotFoundError:
        return set()


def committed(directory):
    """Numbers of the steps that are there with their commit.json."""
    home = directory / "checkpoints"
    return {int(name) for name in listing(directory) if name.isdigit() and (home / name / COMMIT).exists()}


def wait_for(condition, child, directory, timeout=90):
    """Waits until a condition holds; the child must still be running then or have ended well."""
    end = time.monotonic() + timeout
    while not (found := condition()):
        assert child.poll() in (None, 0), f"the child ended with {child.poll()}: {said(directory)[-2000:]}"
        assert time.monotonic() < end, f"nothing within {timeout} s: {said(directory)[-2000:]}"
        time.sleep(0.0005)
    return found


def content(directory, step):
    """{file: SHA-256} of the arrays of a committed step; asserts that every file is there as its commit says."""
    home = directory / "checkpoints" / str(step)
    commit = json.loads((home / COMMIT).read_text())
    files = {str(path.relative_to(home)) for path in home.rglob("*") if path.is_file()}
    assert files == {*commit["files"], COMMIT}, step
    for name, digest in commit["files"].items():
        assert hashlib.sha256((home / name).read_bytes()).hexdigest() == digest, f"wrong bytes in {home / name}"
    assert commit["step"] == step
    arrays = {name: digest for name, digest in commit["files"].items() if re.search("/c(/|$)", name)}
    assert len({re.split("/c(?:/|$)", name)[0] for name in arrays}) == len(commit["arrays"])  # a file per layer each
    return arrays


def rows(directory):
    """(step, loss, gradient norm) of metrics.jsonl; asserts that every line is whole."""
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [(row["step"], row["loss"], row["gradient_norm"]) for row in map(json.loads, lines)]
