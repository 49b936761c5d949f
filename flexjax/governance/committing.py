"""How a model becomes another: what is new is copied beside what is there, the manifest is replaced, the rest is swept.

The manifest is the only commit point, so an operation that is cut off leaves the old model or the new one; on a disk, the
next operation of any kind begins by sweeping what it left.
"""

import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from etils import epath

from flexjax import errors, storage, workdir
from flexjax.experts import averaging, copying, models, store
from flexjax.experts import manifest as manifest_lib
from flexjax.governance import card, history


def planned(
    home: epath.Path,
    anchor: store.Artefact,
    bundles: Mapping[str, store.Artefact],
    top_k: int,
    calibration: Mapping[str, Any],
    averaged: bool,
) -> models.Model:
    """A model as it is to be: its parts where they lie now, and of its manifest what is decided."""
    decided = {"top_k": top_k, "calibration": dict(calibration), "shared": averaged}
    return models.Model(home, decided, anchor, dict(bundles))


def new(after: models.Model, read_content: bool) -> models.Model:
    """Writes a model to a directory of its own."""
    home = after.directory
    manifest_lib.check_free(home)
    with _made(home), workdir.lock(home):
        manifest_lib.fresh(home)
        copying.copy(after.anchor, home / "anchor", read_content)
        return commit(home, None, after, "create", read_content)


def finish(model: models.Model) -> models.Model:
    """Deletes what an interrupted operation left; in a bucket, once others who began before can no longer commit."""
    home = model.directory
    there, generation = storage.files(home), storage.generation(home / manifest_lib.FILE)
    if not workdir.is_local(home):
        manifest_lib.write(home, model.manifest, generation)
    sweep(model, there)
    return model


@contextmanager
def held(directory: epath.PathLike, dry_run: bool = False) -> Iterator[models.Model]:
    """A model that nobody else changes meanwhile; unless it is a dry run, without what interrupted operations left."""
    manifest_lib.read(directory, "model")  # what is no model is not locked either
    home = epath.Path(directory)
    with workdir.lock(home):
        model = models.open_model(home)
        if workdir.is_local(home) and not dry_run:  # in a bucket, what is not named yet may be somebody's who is at work
            sweep(model, {})
        yield model


@contextmanager
def _made(home: epath.Path) -> Iterator[None]:
    """A directory that can be locked."""
    if workdir.is_local(home):
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise errors.StorageError(f"cannot write {home}: {error.strerror or error}; check space and permissions") from None
    yield


def commit(
    home: epath.Path,
    before: models.Model | None,
    after: models.Model,
    operation: str,
    read_content: bool = False,
    name: str = "",
    facts: Mapping[str, Any] | None = None,
    expect: str = "",
) -> models.Model:
    """Brings what is new to its place, announces the new manifest in the history, writes it, and sweeps.

    Args:
      home: the model's directory.
      before: what it holds; None for nothing.
      after: the parts that it is to hold, and the manifest's top_k, calibration and whether leaves are averaged (`shared`).
      operation, name, facts: for the history.
      read_content: from bucket to bucket, see `copying.copy`.
      expect: the tree digest that must come out; "" for any.
    """
    generation = storage.generation(home / manifest_lib.FILE)
    if generation and (before is None or manifest_lib.read(home, "model") != before.manifest):
        raise errors.StorageError(f"{home} was changed meanwhile by somebody else; run the command again")
    there = storage.files(home)  # what others bring from now on is not ours to sweep
    present = set() if before is None else set(before.manifest["experts"].values())
    for bundle in after.bundles.values():
        _bring(bundle, home / "experts" / bundle.manifest["digest"], present, read_content)
    shared = averaging.write(home, after.anchor, after.bundles) if after.manifest["shared"] else None
    manifest = models.describe(after.anchor, after.bundles, after.manifest["top_k"], after.manifest["calibration"], shared)
    if expect not in ("", manifest["digest"]):
        raise errors.IntegrityError(
            f"{home} would become {manifest['digest'][:12]}, not {expect[:12]} as before; nothing was changed"
        )
    was, parts = (None, {}) if before is None else (before.manifest, before.bundles)
    sizes = {n: {field: bundle.manifest[field] for field in ("d_ff", "rank")} for n, bundle in parts.items()}
    history.record(home, history.entry(operation, was, manifest, name, facts, sizes=sizes))
    described = card.withdraw(home)  # it names experts that may be leaving
    storage.delete(home, {file: entry for file, entry in there.items() if file == manifest_lib.SIGNATURE})  # of another state
    manifest_lib.write(home, manifest, generation)
    model = models.open_model(home)
    sweep(model, there)
    if described:
        card.write(home)
    return model


def _bring(bundle: store.Artefact, place: epath.Path, present: set[str], read_content: bool) -> None:
    """Copies a bundle to its place, unless it is there: named by the model, or brought by an operation that was interrupted.

    In a bucket somebody else may be bringing the same bundle at this moment, so nothing is taken away there: every object is
    written again, and one of the same bytes counts as written.
    """
    if bundle.directory == place or bundle.manifest["digest"] in present:
        return
    local = workdir.is_local(place)
    if local and storage.exists(place / manifest_lib.FILE) and manifest_lib.read(place, "expert") == bundle.manifest:
        return
    try:
        copying.copy(bundle, place, read_content, again=not local)
    except errors.IntegrityError:
        if local:
            storage.delete(place)  # what a hostile bundle left must not stop the model from being verified
        raise


def sweep(model: models.Model, found: Mapping[str, storage.Entry]) -> None:
    """Deletes what a model's manifest does not name: on a disk all of it, in a bucket of the files that were found before."""
    kept = {str(artefact.directory.relative_to(model.directory)) for artefact in model.artefacts}
    for part in ("experts", "shared"):
        home = model.directory / part
        if workdir.is_local(home):
            for child in home.iterdir() if home.exists() else ():
                if f"{part}/{child.name}" not in kept:
                    storage.delete(child) if child.is_dir() and not os.path.islink(child) else child.unlink()
            continue
        stray: dict[str, dict[str, storage.Entry]] = {}
        for name, entry in found.items():
            child, _, below = name.removeprefix(f"{part}/").partition("/")
            if name.startswith(f"{part}/") and f"{part}/{child}" not in kept:
                stray.setdefault(child, {})[below] = entry
        for child, files in stray.items():
            storage.delete(home / child, files)
