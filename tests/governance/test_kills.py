"""Real SIGKILLs at random moments of every operation: the old model or the new one, and a second run finishes."""

import contextlib
import random
import subprocess
import sys
import time

import pytest

from flexjax import errors
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import models, store
from flexjax.governance import history, merging
from tests.commands.conftest import snapshot
from tests.governance import parts

CHILD = """
import sys
from flexjax.governance import merging
operation, model, *rest = sys.argv[1:]
print("ready", flush=True)
sys.stdin.readline()
if operation == "create":
    merging.create(model, rest[0], rest[1:], 2)
elif operation == "add":
    merging.add(model, rest)
elif operation == "replace":
    merging.replace(model, rest[0])
else:
    merging.remove(model, rest[0])
print("done", flush=True)
"""
ROUNDS = 24


@pytest.mark.reliability
def test_kills(tmp_path):
    home, dice, killed = tmp_path / "parts", random.Random(0), 0
    anchor, _ = parts.write_all(home)
    parts.write_bundle(home / "newer", "beta", anchor, version=2)
    arguments = {
        "create": [home / "anchor", home / "alpha", home / "beta"],
        "add": [home / "gamma"],
        "replace": [home / "newer"],
        "remove": ["beta"],
    }

    def finish(operation, model):
        paths = arguments[operation]
        if operation == "create":
            return merging.create(model, paths[0], paths[1:], 2)
        return getattr(merging, operation)(model, paths if operation == "add" else paths[0])

    for number in range(ROUNDS):
        operation, model = list(arguments)[number % 4], tmp_path / str(number)
        if operation != "create":
            finish("create", model)
        old = snapshot(model) if model.exists() else {}
        finish("create", tmp_path / f"expected{number}")
        expected = finish(operation, tmp_path / f"expected{number}") if operation != "create" else None
        expected = expected or models.open_model(tmp_path / f"expected{number}")
        command = [sys.executable, "-c", CHILD, operation, str(model), *map(str, arguments[operation])]
        child = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        assert child.stdout.readline() == "ready\n"
        child.stdin.write("go\n")
        child.stdin.flush()
        time.sleep(dice.uniform(0, 0.12))
        child.kill()
        killed += "done" not in child.communicate()[0]
        if (model / manifest_lib.FILE).exists():
            found = models.open_model(model)
            assert found.tree_digest in (expected.tree_digest, old and models.open_model(model).tree_digest)
            for artefact in found.artefacts:
                artefact.verify()
        else:
            assert operation == "create" and not old
        with contextlib.suppress(errors.ConfigError, errors.StorageError):  # the same command finishes, or says that it is done
            finish(operation, model)
        assert snapshot(model) == snapshot(tmp_path / f"expected{number}"), f"round {number}: {operation}"
        assert history.log(model, expected.tree_digest)[-1]["state"] == "done"
    assert killed >= ROUNDS // 4, "the kills came too late to prove anything"
    assert store.open_bundle(home / "gamma", parts.CONFIG).manifest["name"] == "gamma"
