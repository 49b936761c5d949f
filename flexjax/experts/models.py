"""Merged models on disk: an anchor and experts by name, under one manifest.

    MODEL/    manifest.json  anchor/  experts/<digest>/  [shared/<key>/]

What the manifest does not name does not exist: it is replaced atomically, and whatever it no longer names is deleted after.
Bundles are held as their owners made them. What the model itself adds, calibrated biases and averaged shared leaves, stands
in its manifest and beside them, so that taking it back is to drop it (`effective`).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
from etils import epath
from jax.sharding import Mesh

from flexjax import config as config_lib
from flexjax import errors, sharding, storage, tree
from flexjax.experts import averaging, copying, loading, provenance, schema, store, surgery
from flexjax.experts import manifest as manifest_lib
from flexjax.model import router, transformer


@dataclasses.dataclass
class Model:
    """A merged model on disk: the anchor, bundles by name as their owners made them, and averaged shared leaves if any."""

    directory: epath.Path
    manifest: manifest_lib.Manifest
    anchor: store.Artefact
    bundles: dict[str, store.Artefact]
    shared: store.Artefact | None = None

    @property
    def tree_digest(self) -> str:
        """Covers the anchor, every expert and top_k; independent of time, host, order and history."""
        return self.manifest["digest"]

    @property
    def artefacts(self) -> list[store.Artefact]:
        """Everything that it is made of, in canonical order."""
        named = [self.bundles[name] for name in sorted(self.bundles)]
        return [self.anchor, *named] + ([] if self.shared is None else [self.shared])


def describe(
    anchor: store.Artefact,
    bundles: Mapping[str, store.Artefact],
    top_k: int,
    calibration: Mapping[str, Any] | None = None,
    shared: Mapping[str, Any] | None = None,
) -> manifest_lib.Manifest:
    """The sealed manifest of a model of these parts."""
    manifest = {
        "kind": "model",
        "anchor": anchor.manifest["digest"],
        "experts": {name: bundle.manifest["digest"] for name, bundle in bundles.items()},
        "top_k": top_k,
        "calibration": dict(calibration or {}),
        "shared": None if shared is None else dict(shared),
    }
    return manifest_lib.seal(manifest)


def write_model(
    directory: epath.PathLike,
    anchor: store.Artefact,
    bundles: dict[str, store.Artefact],
    top_k: int,
    averaged: bool = True,
) -> Model:
    """Copies an anchor and bundles into a new model directory, verifying every byte, and commits with the manifest.

    The plain act, for parts of one's own; `governance.merging` is for parts of others. Shared leaves that bundles carry are
    averaged, or left out.
    """
    home = manifest_lib.fresh(directory)
    copying.copy(anchor, home / "anchor")
    for bundle in bundles.values():
        copying.copy(bundle, home / "experts" / bundle.manifest["digest"])
    shared = averaging.write(home, anchor, bundles) if averaged else None
    manifest_lib.write(home, describe(anchor, bundles, top_k, shared=shared), generation=0)
    return open_model(home)


def open_model(directory: epath.PathLike) -> Model:
    """Opens a merged model: all manifests and schemas are checked, tensors when they are read."""
    home = epath.Path(directory)
    manifest = manifest_lib.read(home, "model")
    anchor = store.open_anchor(home / "anchor")
    if anchor.manifest["digest"] != manifest["anchor"]:
        raise errors.IntegrityError(
            f"{home}/anchor has digest {anchor.manifest['digest'][:12]}, the model names {str(manifest['anchor'])[:12]}"
        )
    config = store.config_of(anchor)
    bundles = {}
    for name, digest in manifest["experts"].items():
        _check_digest(digest, f"{home}: the digest of expert '{name[:63]}'")
        bundle = store.open_bundle(home / "experts" / digest, config)
        if bundle.manifest["digest"] != digest or bundle.manifest["name"] != name:
            raise errors.IntegrityError(f"{bundle.label} is not the expert '{name}' that {home} names; restore it")
        if bundle.manifest["anchor"] != manifest["anchor"]:
            raise errors.IntegrityError(f"{bundle.label} was trained on anchor {bundle.manifest['anchor'][:12]}, not this one")
        bundles[name] = bundle
    if not 1 <= manifest["top_k"] <= len(bundles) + 1:
        raise errors.IntegrityError(f"{home}: top_k is {str(manifest['top_k'])[:20]}, expected 1 to {len(bundles) + 1}")
    for name, entry in manifest["calibration"].items():
        _check_calibration(name, entry, manifest["experts"], config.num_layers, home)
    shared = None if manifest["shared"] is None else _open_shared(home, manifest, config)
    return Model(home, manifest, anchor, bundles, shared)


def _check_digest(digest: Any, what: str) -> None:
    if not isinstance(digest, str) or provenance.DIGEST.fullmatch(digest) is None:
        raise errors.IntegrityError(f"{what} is no SHA-256")


def _check_calibration(name: str, entry: Any, experts: Mapping[str, Any], layers: int, home: epath.Path) -> None:
    """Refuses a calibrated bias that is none: of an unknown expert, positive, or not one number for each layer."""
    fits = (
        name in experts
        and isinstance(entry, dict)
        and set(entry) == {"bias", "share", "text", "with"}
        and isinstance(entry["bias"], list)
        and len(entry["bias"]) == layers
        and all(provenance.number(bias) and -1e4 <= bias <= 0 for bias in entry["bias"])
        and provenance.number(entry["share"])
        and isinstance(entry["with"], list)
    )
    if not fits:
        raise errors.IntegrityError(
            f"{home}: the calibration of '{name[:63]}' must hold share, text, with, and one bias of at most 0 for each of "
            f"{layers} layers of an expert of this model; calibrate again"
        )
    _check_digest(entry["text"], f"{home}: the digest of the text that '{name}' was calibrated on")


def _open_shared(home: epath.Path, manifest: manifest_lib.Manifest, config: config_lib.ModelConfig) -> store.Artefact:
    """The averaged leaves that a model names."""
    entry = manifest["shared"]
    if set(entry) != {"digest", "experts"} or entry["experts"] != manifest["experts"]:
        raise errors.IntegrityError(f"{home}: field 'shared' must hold digest and experts, exactly the model's")
    directory = averaging.place(home, manifest["anchor"], entry["experts"])
    shared = store.Artefact(directory, manifest_lib.read(directory, "shared"), f"averaged leaves in {directory}")
    named = (shared.manifest["digest"], shared.manifest["anchor"], shared.manifest["experts"])
    if named != (entry["digest"], manifest["anchor"], entry["experts"]):
        raise errors.IntegrityError(f"{shared.label} are not those that {home} names; restore them")
    schema.check(shared.manifest["tensors"], shared.label, {}, dict(schema.shared_shapes(config)))
    return shared


def effective(model: Model) -> Model:
    """The same model with its parts as they are used: biases as calibrated, shared leaves as averaged."""
    anchor, bundles = model.anchor, model.bundles
    if model.shared is not None:
        anchor = dataclasses.replace(anchor, instead={path: model.shared for path in model.shared.manifest["tensors"]})
    return dataclasses.replace(model, anchor=anchor, bundles=calibrated(bundles, model.manifest["calibration"]))


def calibrated(bundles: Mapping[str, store.Artefact], calibration: Mapping[str, Any]) -> dict[str, store.Artefact]:
    """Bundles with the biases that a model's calibration gives some of them."""
    found = dict(bundles)
    for name, entry in calibration.items():
        bias = np.array(entry["bias"], found[name].manifest["tensors"]["expert/router/bias"]["dtype"])
        found[name] = dataclasses.replace(found[name], instead={"expert/router/bias": bias})
    return found


def load(
    model: Model, top_k: int | None = None, mesh: Mesh | None = None, *, public_apart: bool = False
) -> tuple[transformer.Architecture, tree.Tree]:
    """Reads a merged model, as float32 or the published dtype.

    Args:
      model: an open one.
      top_k: experts per token; None: as it was merged.
      mesh: where it is laid, each process reading its share (`loading.load`); None: NumPy arrays, in the standard banks.
      public_apart: keep the standard banks on a mesh that splits experts too, where else `public` joins those of its width.
    """
    k = model.manifest["top_k"] if top_k is None else top_k
    model = effective(model)
    if mesh is not None:
        standard = public_apart or sharding.size(mesh, "expert") == 1
        return loading.load(model.anchor, model.bundles, k, mesh, None if standard else by_width(widths(model), ranks(model)))
    experts = {config_lib.PUBLIC: model.anchor.tensors("expert")}
    for name, bundle in model.bundles.items():
        experts[name] = bundle.tensors("expert")
        for path, leaf in tree.flatten(experts[name]).items():
            store.check_content(path, leaf, bundle.label)
    params, banks = surgery.join(model.anchor.shared(), experts)
    return surgery.architecture(store.config_of(model.anchor), banks, k), params


def widths(model: Model) -> dict[str, int]:
    """Hidden units of each expert, `public` among them."""
    public = {config_lib.PUBLIC: store.config_of(model.anchor).d_ff}
    return public | {name: bundle.manifest["d_ff"] for name, bundle in model.bundles.items()}


def ranks(model: Model) -> dict[str, int]:
    """The rank of each low-rank expert."""
    return {name: bundle.manifest["rank"] for name, bundle in model.bundles.items() if bundle.manifest["rank"]}


def architecture(model: Model, top_k: int) -> transformer.Architecture:
    """What the parameters of a model mean in the standard banks, before they are read."""
    wide, low = widths(model), ranks(model)
    banks = tuple(
        config_lib.Bank(bank, names, wide[names[0]], bank != config_lib.PUBLIC, low.get(names[0], 0))
        for bank, names in surgery.group(wide, low).items()
    )
    return surgery.architecture(store.config_of(model.anchor), banks, top_k)


def by_width(widths: Mapping[str, int], ranks: Mapping[str, int] = surgery.ALL_FULL) -> dict[str, tuple[str, ...]]:
    """Banks for experts that live apart: one per width, `public` among the others of its own, so that few slots stay empty.

    Beside low-rank experts, which live together with it, `public` has its own bank.

    Args:
      widths: hidden units by expert.
      ranks: of the low-rank experts among them.
    """
    if ranks:
        return surgery.group(widths, ranks)
    found: dict[int, list[str]] = {}
    for name in router.canonical_order(widths):
        found.setdefault(widths[name], []).append(name)
    return {config_lib.PUBLIC if names == [config_lib.PUBLIC] else f"w{d_ff}": tuple(names) for d_ff, names in found.items()}


def load_anchor(anchor: store.Artefact, mesh: Mesh | None = None) -> tuple[transformer.Architecture, tree.Tree]:
    """Reads an anchor as a dense model; `mesh` as for `load`."""
    if mesh is not None:
        return loading.load(anchor, {}, 1, mesh)
    params, banks = surgery.join(anchor.shared(), {config_lib.PUBLIC: anchor.tensors("expert")})
    return surgery.architecture(store.config_of(anchor), banks, 1), params


def check_listing(model: Model) -> None:
    """Raises IntegrityError if a model's directory holds what its manifest does not name, or lacks what it names."""
    named = {manifest_lib.FILE, manifest_lib.LOCK}
    for artefact in model.artefacts:
        below = artefact.directory.relative_to(model.directory)
        named |= {f"{below}/{file}" for file in (*artefact.files(), *manifest_lib.BESIDE)}
    found = storage.files(model.directory)
    optional = {name for name in named if name.endswith((*manifest_lib.BESIDE, manifest_lib.LOCK))} - set(found)
    store.check_listing(model.directory, found, named - optional, f"model {model.directory}")


def verify(model: Model) -> None:
    """Reads every byte of a model against its manifests, and refuses what they do not name."""
    for artefact in model.artefacts:
        artefact.verify()
    check_listing(model)


def open_any(directory: epath.PathLike) -> Model:
    """Opens a merged model, or an anchor as a model of `public` alone."""
    if manifest_lib.kind(directory) != "anchor":
        return open_model(directory)
    anchor = store.open_anchor(directory)
    return Model(anchor.directory, anchor.manifest, anchor, {})


def load_any(model: Model, top_k: int | None = None, mesh: Mesh | None = None) -> tuple[transformer.Architecture, tree.Tree]:
    """Reads what `open_any` opened, as `load` does."""
    return load(model, top_k, mesh) if model.manifest["kind"] == "model" else load_anchor(model.anchor, mesh)
