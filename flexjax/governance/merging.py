"""Surgery on merged models: experts in, out and exchanged, in a directory or a bucket, whoever made them.

Every operation goes the same way: read and check, copy what is new beside what is there, write a line of history, replace
the manifest, delete what it no longer names. The manifest is the only commit point, so an operation that is cut off leaves
the old model or the new one; whatever else it left is swept by the next.
"""

import dataclasses
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

from etils import epath

from flexjax import config as config_lib
from flexjax import errors, storage, workdir
from flexjax.experts import averaging, copying, models, store
from flexjax.experts import manifest as manifest_lib
from flexjax.governance import card, compatibility, health, history, signatures

Report = list[compatibility.Row]


@dataclasses.dataclass(frozen=True)
class Terms:
    """On which terms bundles are let in.

    Attributes:
      policy: what becomes of shared leaves that a bundle carries, see `compatibility.POLICIES`.
      trust: whose signatures count; None: nobody's is asked for.
      read_content: from one bucket to another, read every byte instead of rows and biases only.
      announce: called with the report before it is acted on.
      dry_run: stop after the report, and return None.
    """

    policy: str = "strict"
    trust: signatures.Trust | None = None
    read_content: bool = False
    announce: Callable[[Report], None] = lambda rows: None
    dry_run: bool = False


def create(
    target: epath.PathLike, anchor: epath.PathLike, bundles: Sequence[epath.PathLike], top_k: int | None, terms: Terms = Terms()
) -> models.Model | None:
    """Merges bundles with their anchor into a new model; their order does not matter.

    Args:
      target: a new directory, or one that an interrupted `create` left behind.
      anchor, bundles: directories.
      top_k: experts per token; None: all, but at most `compatibility.ENOUGH_ACTIVE`.
      terms: on which the bundles are let in.

    Raises:
      FlexjaxError: of the class that the first refused row of the report has; nothing was written.
      StorageError: the target is in use or not empty, or something cannot be read or written.
    """
    home = epath.Path(target)
    manifest_lib.check_free(home)
    opened = store.open_anchor(anchor)
    given = [store.open_bundle(path, None) for path in bundles]
    k = compatibility.default_top_k(len(given) + 1) if top_k is None else top_k
    admit(opened, given, {}, k, terms)
    if terms.dry_run:
        return None
    with _made(home), workdir.lock(home):
        manifest_lib.fresh(home)
        copying.copy(opened, home / "anchor", terms.read_content)
        parts = {bundle.manifest["name"]: bundle for bundle in given}
        return _commit(home, None, opened, parts, k, {}, terms, "create")


def add(
    model: epath.PathLike, bundles: Sequence[epath.PathLike], top_k: int | None = None, terms: Terms = Terms()
) -> models.Model | None:
    """Adds experts to a model: their own bytes are copied and the manifest is replaced, nothing else.

    Raises:
      ConfigError: the model has an expert of that name; `replace` exchanges it. Others as `create`.
    """
    with _held(model) as found:
        given = [store.open_bundle(path, None) for path in bundles]
        k = found.manifest["top_k"] if top_k is None else top_k
        for bundle in given:
            if bundle.manifest["name"] in found.bundles:
                raise errors.ConfigError(
                    f"{found.directory} has an expert '{bundle.manifest['name']}'; "
                    f"use replace to exchange it for {bundle.directory}"
                )
        admit(found.anchor, given, found.bundles, k, terms)
        if terms.dry_run:
            return None
        parts = {**found.bundles, **{bundle.manifest["name"]: bundle for bundle in given}}
        name = given[0].manifest["name"] if len(given) == 1 else ""
        return _commit(found.directory, found, found.anchor, parts, k, found.manifest["calibration"], terms, "add", name)


def replace(
    model: epath.PathLike, bundle: epath.PathLike, top_k: int | None = None, terms: Terms = Terms(), allow_older: bool = False
) -> models.Model | None:
    """Exchanges an expert for another bundle of the same name; a calibration of the former is dropped with it.

    Raises:
      PolicyError: there is no such expert, its version is higher, or biases of others were fitted with it. Others as `create`.
    """
    with _held(model) as found:
        new = store.open_bundle(bundle, None)
        name, version = new.manifest["name"], new.manifest["version"]
        check_known(found, name)
        former = found.bundles[name].manifest["version"]
        if version < former and not allow_older:
            raise errors.PolicyError(
                f"expert '{name}': version expected {former} or later, found {version} in {new.directory}; "
                "is it an old copy? pass --allow_older to go back to it"
            )
        check_separable(found, name)
        others = {other: kept for other, kept in found.bundles.items() if other != name}
        k = found.manifest["top_k"] if top_k is None else top_k
        admit(found.anchor, [new], others, k, terms)
        if terms.dry_run:
            return None
        calibration = {other: entry for other, entry in found.manifest["calibration"].items() if other != name}
        return _commit(found.directory, found, found.anchor, {**others, name: new}, k, calibration, terms, "replace", name)


def remove(model: epath.PathLike, name: str, out: epath.PathLike | None = None, dry_run: bool = False) -> models.Model | None:
    """Takes an expert out: in place its bytes are deleted; with `out` a smaller model is written there, and this one stays.

    Returns None for a dry run.

    Raises:
      PolicyError: there is no such expert, or biases of others were fitted with it. ConfigError: it is `public`.
    """
    with _held(model) as found:
        check_known(found, name)
        check_separable(found, name)
        if dry_run:
            return None
        kept = {other: bundle for other, bundle in found.bundles.items() if other != name}
        k = min(found.manifest["top_k"], len(kept) + 1)
        calibration = {other: entry for other, entry in found.manifest["calibration"].items() if other != name}
        terms = Terms(policy="report")  # those that stay were let in before
        left = found.bundles[name].manifest
        size = {"d_ff": left["d_ff"], "rank": left["rank"]}
        if out is None:
            return _commit(found.directory, found, found.anchor, kept, k, calibration, terms, "remove", name, size)
        home = epath.Path(out)
        manifest_lib.check_free(home)
        with _made(home), workdir.lock(home):
            manifest_lib.fresh(home)
            copying.copy(found.anchor, home / "anchor")
            average = dataclasses.replace(terms, policy="average") if found.shared is not None else terms
            return _commit(home, None, found.anchor, kept, k, calibration, average, "create")


def calibrate(model: epath.PathLike, entries: Mapping[str, Any], fitted: models.Model | None = None) -> models.Model:
    """Replaces a model's calibration by these entries, {} for none; bundles stay as they are.

    Args:
      model: the directory.
      entries: by expert, as `calibration.entry` makes them.
      fitted: what they were fitted on; None for whatever there is.

    Raises:
      StorageError: the model is another by now.
    """
    with _held(model) as found:
        if fitted is not None and fitted.tree_digest != found.tree_digest:
            raise errors.StorageError(f"{found.directory} was changed while its biases were fitted; calibrate again")
        terms, k = Terms(policy="report"), found.manifest["top_k"]
        return _commit(found.directory, found, found.anchor, found.bundles, k, dict(entries), terms, "calibrate")


def revert(model: epath.PathLike, bundles: Sequence[epath.PathLike], terms: Terms = Terms()) -> models.Model | None:
    """Undoes the last operation that took effect.

    Args:
      model: the directory.
      bundles: what has to come back, since its bytes are gone: found by digest.
      terms: on which it is let in again.

    Raises:
      PolicyError: there is nothing to undo, or the bundle with the digest that left was not given.
    """
    with _held(model) as found:
        plan = history.revert_plan(history.settled(history.read(model), found.tree_digest))
        given = {bundle.manifest["digest"]: bundle for bundle in (store.open_bundle(path, None) for path in bundles)}
        for name, digest in plan["add"].items():
            if digest not in given:
                raise errors.PolicyError(
                    f"expert '{name}' with digest {digest} has to come back and its bytes are gone; "
                    "ask its owner for that very bundle and pass --expert=DIR"
                )
        back = [given[digest] for digest in plan["add"].values()]
        parts = {name: b for name, b in found.bundles.items() if name not in {*plan["remove"], *plan["add"]}}
        restore = plan["restore"]
        k = restore.get("top_k", found.manifest["top_k"])
        admit(found.anchor, back, parts, k, terms)
        if terms.dry_run:
            return None
        parts |= {bundle.manifest["name"]: bundle for bundle in back}
        calibration = restore.get("calibration", found.manifest["calibration"])
        return _commit(
            found.directory, found, found.anchor, parts, k, calibration, terms, "revert", facts={"of": plan["operation"]}
        )


def admit(
    anchor: store.Artefact, given: Sequence[store.Artefact], present: Mapping[str, store.Artefact], top_k: int, terms: Terms
) -> Report:
    """Checks new bundles against an anchor and the experts that are there: manifests, then routers, then carried leaves.

    Raises:
      FlexjaxError: a row of the report is refused; if that is known from the manifests, no tensor is opened.
    """
    rows = compatibility.report(anchor, given, top_k, terms.policy, terms.trust, len(present))
    if all(row.verdict != compatibility.REFUSED for row in rows):
        for bundle in given:
            store.check_files(bundle)
        everybody = [*present.values(), *given]
        rows += compatibility.routers(everybody)
        rows += [row for bundle in given for row in compatibility.drift(anchor, bundle)]
        rows += _claims(anchor, {bundle.manifest["name"]: bundle for bundle in everybody})
    terms.announce(rows)
    compatibility.check(rows)
    return rows


def _claims(anchor: store.Artefact, bundles: Mapping[str, store.Artefact]) -> Report:
    """Whether routers do on public text what honest ones do, as far as the anchor lets us see it."""
    row, what = compatibility.Row, "router health"
    if "statistics/states" not in anchor.manifest["tensors"]:
        return [row("", what, "a probe", "no public statistics in the anchor", compatibility.NOTE, "routers were not probed")]
    found = health.probe(anchor, bundles)
    bad = [
        row(finding.expert, what, "as honest ones", f"{finding.kind} {finding.value:.3g}", compatibility.REFUSED, str(finding))
        for finding in found.findings
    ]
    return bad or [row("", what, "as honest ones", "as honest ones", compatibility.OK)]


def check_known(model: models.Model, name: str) -> None:
    """Raises PolicyError if the model has no such expert, ConfigError if it is the anchor's own."""
    if name == config_lib.PUBLIC:
        raise errors.ConfigError("'public' is the anchor's own expert and cannot be removed")
    if name not in model.bundles:
        known = ", ".join(sorted(model.bundles)) or "none but public"
        raise errors.PolicyError(f"no expert '{name}' in {model.directory}; it has {known}")


def check_separable(model: models.Model, name: str) -> None:
    """Raises PolicyError if biases of others were fitted with an expert: they would keep what it did to them."""
    tied = [other for other, entry in model.manifest["calibration"].items() if name in entry["with"] and other != name]
    if tied:
        raise errors.PolicyError(
            f"biases of {', '.join(sorted(tied))} were fitted jointly with '{name}'; first take that back "
            f"(merge calibrate --model={model.directory} --revert), or calibrate each expert alone"
        )


@contextmanager
def _held(directory: epath.PathLike) -> Iterator[models.Model]:
    """A model that nobody else changes meanwhile."""
    manifest_lib.read(directory, "model")  # what is no model is not locked either
    home = epath.Path(directory)
    with workdir.lock(home):
        yield models.open_model(home)


@contextmanager
def _made(home: epath.Path) -> Iterator[None]:
    """A directory that can be locked."""
    if workdir.is_local(home):
        try:
            home.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise errors.StorageError(f"cannot write {home}: {error.strerror or error}; check space and permissions") from None
    yield


def _commit(
    home: epath.Path,
    before: models.Model | None,
    anchor: store.Artefact,
    bundles: Mapping[str, store.Artefact],
    top_k: int,
    calibration: Mapping[str, Any],
    terms: Terms,
    operation: str,
    name: str = "",
    facts: Mapping[str, Any] | None = None,
) -> models.Model:
    """Brings what is new to its place, announces the new manifest in the history, writes it, and sweeps."""
    generation = storage.generation(home / manifest_lib.FILE)
    if generation and (before is None or manifest_lib.read(home, "model") != before.manifest):
        raise errors.StorageError(f"{home} was changed meanwhile by somebody else; run the command again")
    there = storage.files(home)  # what others bring from now on is not ours to sweep
    for bundle in bundles.values():
        place = home / "experts" / bundle.manifest["digest"]
        if bundle.directory != place and not _is_there(place, bundle):
            try:
                copying.copy(bundle, place, terms.read_content)
            except errors.IntegrityError:
                storage.delete(place)  # what a hostile bundle left must not stop the model from being verified
                raise
    averaged = terms.policy == "average" or (before is not None and before.shared is not None)
    shared = averaging.write(home, anchor, bundles) if averaged else None
    manifest = models.describe(anchor, bundles, top_k, calibration, shared)
    history.record(home, history.entry(operation, before.manifest if before else None, manifest, name, facts))
    described = card.withdraw(home)  # it names experts that may be leaving
    manifest_lib.write(home, manifest, generation)
    model = models.open_model(home)
    sweep(model, there)
    if described:
        card.write(home)
    return model


def _is_there(place: epath.Path, bundle: store.Artefact) -> bool:
    """Whether an interrupted operation has brought a whole bundle already; in a bucket it is brought again."""
    if not workdir.is_local(place) or not storage.exists(place / manifest_lib.FILE):
        return False
    return manifest_lib.read(place, "expert") == bundle.manifest


def sweep(model: models.Model, found: Mapping[str, storage.Entry]) -> None:
    """Deletes what a model's manifest does not name, of the files that were found before it was written."""
    kept = [f"{artefact.directory.relative_to(model.directory)}/" for artefact in model.artefacts]
    stray: dict[str, dict[str, storage.Entry]] = {}
    for name, entry in found.items():
        part, _, rest = name.partition("/")
        if part in ("experts", "shared") and not name.startswith(tuple(kept)):
            stray.setdefault(f"{part}/{rest.partition('/')[0]}", {})[name] = entry
    for directory, files in stray.items():
        below = f"{directory}/"
        storage.delete(model.directory / directory, {name.removeprefix(below): entry for name, entry in files.items()})
