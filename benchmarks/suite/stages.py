"""Stages of a suite, each done once and known by what it was made of.

A stage is a directory `HOME/<name>-<key>`, finished when it holds `done.json`; the key is a digest of its inputs. Starting a
suite again skips what is finished, whatever method asks for it; a stage whose inputs changed is done anew, beside the old one.
"""

import time
from collections.abc import Callable, Mapping
from typing import Any

from etils import epath

from flexjax import tree, workdir

DONE = "done.json"
KEY_LENGTH = 12


class Stages:
    """The stages below one directory.

    Args:
      home: of one seed of one suite.
      say: tells whoever watches.
    """

    def __init__(self, home: epath.Path, say: Callable[[str], None]) -> None:
        self.home, self._say = home, say

    def run(self, name: str, inputs: Mapping[str, Any], make: Callable[[epath.Path], dict[str, Any]]) -> epath.Path:
        """The finished directory of a stage; `make(directory)` fills it and returns facts, unless that was done before.

        What was interrupted finds its directory as it left it, and goes on there.
        """
        key = tree.sha256(tree.canonical_json({"name": name, "inputs": dict(inputs)}))[:KEY_LENGTH]
        directory = self.home / f"{name}-{key}"
        if (directory / DONE).exists():
            return directory
        others = [path for path in self.home.glob(f"{name}-*") if len(path.name) == len(name) + 1 + KEY_LENGTH]
        begun = directory in others
        if any((path / DONE).exists() for path in others):
            self._say(f"{name}: its inputs changed since it was made; made anew")
        self._say(f"{name}: {'goes on' if begun else 'begins'}")
        directory.mkdir(parents=True, exist_ok=True)
        started = time.monotonic()
        facts = make(directory)
        seconds = round(time.monotonic() - started, 1)
        workdir.write_json(directory / DONE, {"inputs": dict(inputs), "seconds": seconds, "resumed": begun, **facts})
        self._say(f"{name}: finished in {seconds:.0f} s")
        return directory


def facts(directory: epath.Path) -> dict[str, Any]:
    """What a finished stage says of itself."""
    saved = workdir.read_json(directory / DONE)
    assert saved is not None, f"{directory} is not finished"
    return saved


def key(directory: epath.Path) -> str:
    """The digest of a stage's inputs, by which later stages know it."""
    return directory.name[-KEY_LENGTH:]
