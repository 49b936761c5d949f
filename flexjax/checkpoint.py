"""Training checkpoints: asynchronous, atomic, verified.

    checkpoints/<step>/state/...      arrays, written by Orbax without packing or compression, a file per layer
    checkpoints/<step>/commit.json    facts, shapes and dtypes, the SHA-256 of every file, and its own

A step is written under another name and renamed when `commit.json` is on disk: that rename is the commit. Whatever has no
commit.json is never restored; what this module left half-done is swept at the start. With several processes each writes the
arrays of its own devices and hashes its share of the files, in a directory that all of them see; process 0 commits. The only
room that imports Orbax.
"""

import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath
from orbax.checkpoint import v1 as ocp

from flexjax import distributed, errors, tree, workdir

COMMIT = "commit.json"
PENDING = "writing-"
DISCARDED = "discarded-"
SHARE = "digests-of-process-"  # what a process hashed, until the commit gathers it


class Checkpoints:
    """The checkpoints of one run.

    Args:
      directory: created if absent; its owner must hold the run's lock.
      keep: how many of the newest steps are kept.
    """

    def __init__(self, directory: epath.PathLike, keep: int) -> None:
        self.directory = epath.Path(directory)
        self.keep = keep
        self._writer: threading.Thread | None = None
        self._failure: BaseException | None = None
        if distributed.is_main():
            self.directory.mkdir(parents=True, exist_ok=True)
            workdir.sync(self.directory.parent)
            self._sweep()
        distributed.barrier("checkpoints")

    def steps(self) -> list[int]:
        """Committed steps, ascending by number, never by time."""
        return sorted(int(entry.name) for entry in self._step_directories() if (entry / COMMIT).exists())

    def save(self, step: int, state: Any, facts: dict[str, Any]) -> None:
        """Starts to write a step and returns as soon as its arrays are copied; waits for the previous write first.

        Raises:
          StorageError: the previous write failed.
        """
        self.wait()
        pending = self.directory / f"{PENDING}{step}"
        if distributed.main_says("committed", (self.directory / str(step) / COMMIT).exists):
            return
        snapshot = state  # Orbax returns when the host has it, so that a device need not hold it twice,
        if jax.default_backend() == "cpu":
            snapshot = jax.tree.map(jnp.copy, state)  # but here host and device share the buffers that the next step reuses
        try:
            if distributed.is_main():
                pending.mkdir()
            distributed.barrier("checkpoint")
            with _plain_files():
                response = ocp.save_async(pending / "state", snapshot)
        except errors.Preempted:  # another process is gone: no fault of the storage
            raise
        except Exception as error:
            raise self._storage_error(step, _first_line(error)) from None
        self._writer = threading.Thread(target=self._finish, args=(step, pending, response, describe(state), facts))
        self._writer.start()

    def wait(self) -> None:
        """Returns when the last save is committed.

        Raises:
          StorageError: it could not be written; older steps are intact.
        """
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        if self._failure is not None:
            failure, self._failure = self._failure, None
            raise failure

    def close(self) -> None:
        """Returns when nothing is being written any more, so that the directory's lock may be given up; raises nothing."""
        if self._writer is not None:
            self._writer.join()

    def facts(self, step: int) -> dict[str, Any]:
        """What was saved beside the arrays of a step."""
        return self._commit(step)["facts"]

    def restore(self, step: int, like: Any) -> Any:
        """Reads a step into arrays of the structure, dtypes and shardings of `like`, after verifying every byte.

        A step written on another mesh or number of processes is restored exactly; only the slots that fill a bank of
        experts up to a multiple of the mesh's `expert` axis may come or go.

        Raises:
          IntegrityError: a file is missing, damaged or unknown, or the arrays are not those of `like`.
        """
        home = self.directory / str(step)
        self._check(step, like)
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        try:
            with _slots_may_differ():
                return ocp.load(home / "state", shapes)
        except Exception as error:
            raise errors.IntegrityError(
                f"{home} cannot be read: {_first_line(error)}; remove it to use an older step"
            ) from None

    def verify(self, step: int) -> None:
        """Raises IntegrityError, naming the file, if a committed step is not as it was written."""
        self._check(step, None)

    def _check(self, step: int, like: Any) -> None:
        """Raises, in all processes, what one of them finds wrong with its share of a step."""
        said = ""
        try:
            commit = self._commit(step)
            if like is not None:
                _check_arrays(self.directory / str(step), commit["arrays"], like)
            self._verify(self.directory / str(step), commit["files"])
        except errors.IntegrityError as error:
            said = str(error)
        for problem in distributed.exchange("verify", said):
            if problem:
                raise errors.IntegrityError(problem)

    def set_aside(self, steps: Iterable[int]) -> None:
        """Renames committed steps that turned out to be damaged; they are steps no more, and nobody deletes them."""
        for step in steps if distributed.is_main() else ():
            self._rename_away(step, "damaged")

    def _rename_away(self, step: int, reason: str) -> None:
        (self.directory / str(step)).rename(self.directory / f"{reason}-{step}-{time.time_ns()}")

    def _step_directories(self) -> list[epath.Path]:
        return [entry for entry in self.directory.iterdir() if re.fullmatch("0|[1-9][0-9]*", entry.name)]

    def _finish(self, step: int, pending: epath.Path, response: Any, arrays: Any, facts: dict[str, Any]) -> None:
        try:
            self._together(response.result)
            share = pending / f"{SHARE}{distributed.index()}.json"
            self._together(lambda: share.write_bytes(tree.canonical_json(_digests(pending))))
            if distributed.is_main():
                self._commit_step(step, pending, {"step": step, "facts": facts, "arrays": arrays})
            self._together(lambda: None)
        except errors.Preempted as error:
            self._failure = error
        except Exception as error:
            self._failure = self._storage_error(step, _first_line(error))

    def _together(self, work: Callable[[], Any]) -> None:
        """Does a piece of work in every process; if it fails in one, all raise what that one says."""
        said = ""
        try:
            work()
        except errors.Preempted:
            raise
        except Exception as error:
            said = _first_line(error)
        for process, problem in enumerate(distributed.exchange("checkpoint", said)):
            if problem:
                raise OSError(problem if distributed.count() == 1 else f"process {process}: {problem}")

    def _commit_step(self, step: int, pending: epath.Path, content: dict[str, Any]) -> None:
        files: dict[str, str] = {}
        for share in sorted(entry for entry in pending.iterdir() if entry.name.startswith(SHARE)):
            files |= json.loads(share.read_bytes())
            share.unlink()
        if unread := _files(pending) - set(files):
            raise OSError(f"{sorted(unread)[0]} was written but read back by no process")
        (pending / COMMIT).write_bytes(tree.canonical_json(_sealed(content | {"files": files})))
        workdir.sync_below(pending)
        target = self.directory / str(step)
        if target.exists():  # without a commit.json, as `save` saw: not ours to delete
            self._rename_away(step, "uncommitted")
        pending.rename(target)
        workdir.sync(self.directory)
        for old in self.steps()[: -self.keep]:
            self._discard(old)

    def _discard(self, step: int) -> None:
        gone = self.directory / f"{DISCARDED}{step}"
        (self.directory / str(step)).rename(gone)  # first, so that a kill in between leaves no half a step
        gone.rmtree()

    def _commit(self, step: int) -> dict[str, Any]:
        home = self.directory / str(step)
        try:
            data = (home / COMMIT).read_bytes()
            commit = json.loads(data)
            if data == tree.canonical_json(_sealed(commit)) and commit["step"] == step:
                return commit
        except (FileNotFoundError, ValueError, TypeError, AttributeError):
            pass
        raise errors.IntegrityError(f"{home / COMMIT} is damaged; pass --fall_back to use the next older step")

    def _verify(self, home: epath.Path, files: dict[str, str]) -> None:
        found = _files(home) - {COMMIT}
        for name in sorted(found ^ set(files)):
            state = "is missing" if name in files else "was not written by this run"
            raise errors.IntegrityError(f"{home / name} {state}; pass --fall_back to use the next older step")
        for name in _share(files):
            if workdir.file_digest(home / name) != files[name]:
                raise errors.IntegrityError(f"{home / name} is damaged; pass --fall_back to use the next older step")

    def _sweep(self) -> None:
        for entry in self.directory.iterdir():
            if entry.name.startswith((PENDING, DISCARDED)):
                entry.rmtree()
        committed = self.steps()
        stray = [entry for entry in self._step_directories() if int(entry.name) not in committed]
        for entry in stray:
            print(f"warning: {entry} was never committed and is ignored", file=sys.stderr)
        if not committed and any(any(entry.iterdir()) for entry in stray if entry.is_dir()):
            raise errors.IntegrityError(
                f"{self.directory} holds step directories but none that was committed; "
                "restore one from a backup, or remove them to begin from scratch"
            )

    def _storage_error(self, step: int, said: str) -> errors.StorageError:
        kept = ", ".join(map(str, self.steps())) or "none"
        if distributed.is_main():
            shutil.rmtree(os.fspath(self.directory / f"{PENDING}{step}"), ignore_errors=True)
        return errors.StorageError(
            f"cannot write checkpoint {self.directory / str(step)}: {said}; committed steps are intact: {kept}"
        )


def describe(state: Any) -> dict[str, str]:
    """{path: "dtype[shape]"} of every array of a state."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {jax.tree_util.keystr(path): f"{leaf.dtype}{list(leaf.shape)}" for path, leaf in leaves}


def _check_arrays(home: epath.Path, arrays: dict[str, str], like: Any) -> None:
    expected, found = _without_slots(describe(like)), _without_slots(arrays)
    for path in sorted(set(expected) | set(found)):
        if expected.get(path) != found.get(path):
            raise errors.IntegrityError(
                f"{home}: array {path} is {found.get(path, 'absent')}, this run needs {expected.get(path, 'none')}; "
                "resume with the config that wrote it"
            )


def _without_slots(arrays: dict[str, str]) -> dict[str, str]:
    """Descriptions without the number of slots in a bank of experts, a matter of the mesh."""
    return {
        path: re.sub(r"\[(\d+), \d+,", r"[\1, slots,", text) if "['ffn']" in path else text for path, text in arrays.items()
    }


def _share(files: Iterable[str]) -> list[str]:
    """The files that this process reads for all."""
    return sorted(files)[distributed.index() :: distributed.count()]


def _digests(pending: epath.Path) -> dict[str, str]:
    names = [name for name in _files(pending) if not name.startswith(SHARE)]
    return {name: workdir.file_digest(pending / name) for name in _share(names)}


def _sealed(commit: dict[str, Any]) -> dict[str, Any]:
    """The same with the digest of all but the digest."""
    content = {key: value for key, value in commit.items() if key != "digest"}
    return {**content, "digest": tree.sha256(tree.canonical_json(content))}


def size(state: Any) -> int:
    """Bytes of all arrays of a state."""
    return sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(state))


def _plain_files() -> ocp.Context:
    context = ocp.Context()
    context.array.saving.use_ocdbt = False
    context.array.saving.use_compression = False
    context.array.saving.scoped_storage_options_creator = _one_chunk_per_layer
    return context


def _slots_may_differ() -> ocp.Context:
    context = ocp.Context()
    context.array.loading.enable_padding_and_truncation = True
    return context


def _one_chunk_per_layer(path: Any, leaf: Any) -> ocp.options.ArrayOptions.Saving.StorageOptions | None:
    """How a file is divided within: a leaf with a layer axis along that axis alone, any other not at all."""
    names = "/".join(key.key for key in path if isinstance(key, jax.tree_util.DictKey))
    if leaf.ndim < 2 or not tree.is_stacked(names):
        return None
    return ocp.options.ArrayOptions.Saving.StorageOptions(shard_axes=(0,))


def _files(directory: epath.Path) -> set[str]:
    root = os.fspath(directory)
    return {os.path.relpath(os.path.join(where, name), root) for where, _, names in os.walk(root) for name in names}


def _first_line(error: BaseException) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0][:200] if text else ''}"
