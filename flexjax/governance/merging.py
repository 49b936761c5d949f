"""Surgery on merged models: experts in, out and exchanged, in a directory or a bucket, whoever made them.

Every operation goes the same way: read and check what is to come in, then commit (`committing`).
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from etils import epath

from flexjax import config as config_lib
from flexjax import errors
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import models, store
from flexjax.governance import committing, compatibility, health, history, signatures, verification

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

    Returns the model; None for a dry run, here and below.

    Raises:
      FlexjaxError: of the class that the first refused row of the report has; nothing was written.
      StorageError: the target is in use or not empty, or something cannot be read or written.
    """
    home = epath.Path(target)
    manifest_lib.check_free(home)
    opened = store.open_anchor(anchor)
    verification.vouch(opened.directory, opened.manifest, terms.trust)
    given = [store.open_bundle(path, None) for path in bundles]
    k = compatibility.default_top_k(len(given) + 1) if top_k is None else top_k
    admit(opened, given, {}, k, terms)
    if terms.dry_run:
        return None
    after = committing.planned(
        home, opened, {bundle.manifest["name"]: bundle for bundle in given}, k, {}, terms.policy == "average"
    )
    return committing.new(after, terms.read_content)


def add(
    model: epath.PathLike, bundles: Sequence[epath.PathLike], top_k: int | None = None, terms: Terms = Terms()
) -> models.Model | None:
    """Adds experts to a model: their own bytes are copied and the manifest is replaced, nothing else.

    Raises:
      ConfigError: the model has an expert of that name; `replace` exchanges it. Others as `create`.
    """
    with committing.held(model, terms.dry_run) as found:
        given = [store.open_bundle(path, None) for path in bundles]
        for bundle in given:
            if bundle.manifest["name"] in found.bundles:
                raise errors.ConfigError(
                    f"{found.directory} has an expert '{bundle.manifest['name']}'; "
                    f"use replace to exchange it for {bundle.directory}"
                )
        name = given[0].manifest["name"] if len(given) == 1 else ""
        return _let_in(found, given, found.bundles, top_k, terms, "add", name)


def replace(
    model: epath.PathLike, bundle: epath.PathLike, top_k: int | None = None, terms: Terms = Terms(), allow_older: bool = False
) -> models.Model | None:
    """Exchanges an expert for another bundle of the same name; a calibration of the former is dropped with it.

    Raises:
      PolicyError: there is no such expert, its version is higher, or biases of others were fitted with it. Others as `create`.
    """
    with committing.held(model, terms.dry_run) as found:
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
        return _let_in(found, [new], _without(found.bundles, name), top_k, terms, "replace", name)


def remove(model: epath.PathLike, name: str, out: epath.PathLike | None = None, dry_run: bool = False) -> models.Model | None:
    """Takes an expert out: in place its bytes are deleted; with `out` a smaller model is written there, and this one stays.

    Where an interrupted `remove` of this expert left bytes behind, they are deleted.

    Raises:
      PolicyError: there is no such expert, or biases of others were fitted with it. ConfigError: it is `public`.
    """
    with committing.held(model, dry_run) as found:
        if name not in found.bundles and out is None and not dry_run and _was_removed(found, name):
            return committing.finish(found)
        check_known(found, name)
        check_separable(found, name)
        if dry_run:
            return None
        kept = _without(found.bundles, name)  # they were let in before
        k = min(found.manifest["top_k"], len(kept) + 1)
        calibration = _without(found.manifest["calibration"], name)
        home = found.directory if out is None else epath.Path(out)
        after = committing.planned(home, found.anchor, kept, k, calibration, found.shared is not None)
        if out is not None:
            return committing.new(after, read_content=False)
        return committing.commit(home, found, after, "remove", name=name)


def calibrate(model: epath.PathLike, entries: Mapping[str, Any], fitted: models.Model | None = None) -> models.Model:
    """Replaces a model's calibration by these entries, {} for none; bundles stay as they are.

    Args:
      model: the directory.
      entries: by expert, as `calibration.entry` makes them.
      fitted: what they were fitted on; None for whatever there is.

    Raises:
      StorageError: the model is another by now.
    """
    with committing.held(model) as found:
        if fitted is not None and fitted.tree_digest != found.tree_digest:
            raise errors.StorageError(f"{found.directory} was changed while its biases were fitted; calibrate again")
        k, averaged = found.manifest["top_k"], found.shared is not None
        after = committing.planned(found.directory, found.anchor, found.bundles, k, entries, averaged)
        return committing.commit(found.directory, found, after, "calibrate")


def revert(model: epath.PathLike, bundles: Sequence[epath.PathLike], terms: Terms = Terms()) -> models.Model | None:
    """Undoes the last operation that took effect, so that the tree digest is the one before it.

    Args:
      model: the directory.
      bundles: what has to come back, since its bytes are gone: found by digest.
      terms: on which it is let in again.

    Raises:
      PolicyError: there is nothing to undo, or the bundle with the digest that left was not given.
      ConfigError: a bundle was given that has not to come back.
    """
    with committing.held(model, terms.dry_run) as found:
        plan = history.revert_plan(history.settled(history.read(model), found.tree_digest))
        given = {bundle.manifest["digest"]: bundle for bundle in (store.open_bundle(path, None) for path in bundles)}
        for name, digest in plan["add"].items():
            if digest not in given:
                raise errors.PolicyError(
                    f"expert '{name}' with digest {digest} has to come back and its bytes are gone; "
                    "ask its owner for that very bundle and pass --expert=DIR"
                )
        for digest in sorted(set(given) - set(plan["add"].values())):
            raise errors.ConfigError(
                f"{given[digest].label} has not to come back to revert '{plan['operation']}'; leave it out"
            )
        kept = {name: b for name, b in found.bundles.items() if name not in {*plan["remove"], *plan["add"]}}
        restored = found.manifest | plan["restore"]
        admit(found.anchor, list(given.values()), kept, restored["top_k"], terms, found.manifest["calibration"])
        if terms.dry_run:
            return None
        parts = kept | {bundle.manifest["name"]: bundle for bundle in given.values()}
        averaged = restored["shared"] is not None
        after = committing.planned(found.directory, found.anchor, parts, restored["top_k"], restored["calibration"], averaged)
        facts = {"of": plan["operation"]}
        return committing.commit(
            found.directory, found, after, "revert", terms.read_content, facts=facts, expect=plan["expect"]
        )


def _let_in(
    found: models.Model,
    given: Sequence[store.Artefact],
    kept: Mapping[str, store.Artefact],
    top_k: int | None,
    terms: Terms,
    operation: str,
    name: str,
) -> models.Model | None:
    """Commits new bundles beside those that stay, if they are let in."""
    _check_policy(found, given, kept, terms.policy)
    k = found.manifest["top_k"] if top_k is None else top_k
    calibration = {other: entry for other, entry in found.manifest["calibration"].items() if other in kept}
    admit(found.anchor, given, kept, k, terms, calibration)
    if terms.dry_run:
        return None
    parts = {**kept, **{bundle.manifest["name"]: bundle for bundle in given}}
    averaged = found.shared is not None or terms.policy == "average"
    after = committing.planned(found.directory, found.anchor, parts, k, calibration, averaged)
    return committing.commit(found.directory, found, after, operation, terms.read_content, name)


def _check_policy(
    found: models.Model, given: Sequence[store.Artefact], kept: Mapping[str, store.Artefact], policy: str
) -> None:
    """Raises ConfigError for a policy that a model's own contradicts: leaves are averaged over all its experts or over none."""
    if policy == "report" and found.shared is not None and any(map(store.carried, given)):
        raise errors.ConfigError(
            f"{found.directory} averages shared leaves; pass --anchor_policy=average, or create another model"
        )
    left_out = sorted(name for name, bundle in kept.items() if store.carried(bundle))
    if policy == "average" and found.shared is None and left_out:
        raise errors.ConfigError(
            f"{found.directory} leaves the shared leaves of {', '.join(left_out)} out; create a new model to average them"
        )


def _without(members: Mapping[str, Any], name: str) -> dict[str, Any]:
    return {other: member for other, member in members.items() if other != name}


def _was_removed(model: models.Model, name: str) -> bool:
    """Whether the last operation took this expert out."""
    done = history.settled(history.read(model.directory), model.tree_digest)
    return bool(done) and done[-1].operation == "remove" and done[-1].what.get("name") == name


def admit(
    anchor: store.Artefact,
    given: Sequence[store.Artefact],
    present: Mapping[str, store.Artefact],
    top_k: int,
    terms: Terms,
    calibration: Mapping[str, Any] | None = None,
) -> Report:
    """Checks new bundles against an anchor and the experts that are there: manifests, then routers, then carried leaves.

    Args:
      anchor: the model's.
      given: what is to be let in.
      present: experts that stay.
      top_k: of the model that comes out.
      terms: on which it is let in.
      calibration: of the experts that stay: routers are probed as they are used.

    Raises:
      FlexjaxError: a row of the report is refused; if that is known from the manifests, no tensor is opened.
    """
    rows = compatibility.report(anchor, given, top_k, terms.policy, terms.trust, len(present))
    if all(row.verdict != compatibility.REFUSED for row in rows):
        used = models.calibrated(present, calibration or {})
        try:
            for bundle in given:
                store.check_files(bundle)
            everybody = {**used, **{bundle.manifest["name"]: bundle for bundle in given}}
            rows += compatibility.routers(list(everybody.values()))
            rows += [row for bundle in given for row in compatibility.drift(anchor, bundle)]
            rows += _claims(anchor, everybody)
        except errors.IntegrityError as error:  # the report says so too
            rows.append(compatibility.Row("", "content", "as stated", "damaged or hostile", compatibility.REFUSED, str(error)))
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
