"""Merged models on disk: an anchor and experts by name, under one manifest.

    MODEL/    manifest.json  anchor/  experts/<digest>/

What the manifest does not name does not exist: it is replaced atomically, and whatever it no longer names is deleted after.
"""

import dataclasses

from etils import epath

from flexjax import config as config_lib
from flexjax import errors, tree
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import store, surgery
from flexjax.model import transformer


@dataclasses.dataclass
class Model:
    """A merged model on disk: the anchor, and bundles by name."""

    directory: epath.Path
    manifest: manifest_lib.Manifest
    anchor: store.Artefact
    bundles: dict[str, store.Artefact]

    @property
    def tree_digest(self) -> str:
        """Covers the anchor, every expert and top_k; independent of time, host, order and history."""
        return self.manifest["digest"]


def write_model(directory: epath.PathLike, anchor: store.Artefact, bundles: dict[str, store.Artefact], top_k: int) -> Model:
    """Copies an anchor and bundles into a model directory, verifying every byte, and commits with the manifest."""
    home = store.fresh(directory)
    store.copy(anchor, home / "anchor")
    for bundle in bundles.values():
        store.copy(bundle, home / "experts" / bundle.manifest["digest"])
    write_model_manifest(home, anchor, bundles, top_k)
    return open_model(home)


def write_model_manifest(home: epath.Path, anchor: store.Artefact, bundles: dict[str, store.Artefact], top_k: int) -> None:
    """Commits a model: from here on, exactly these experts exist."""
    manifest = {
        "kind": "model",
        "anchor": anchor.manifest["digest"],
        "experts": {name: bundle.manifest["digest"] for name, bundle in bundles.items()},
        "top_k": top_k,
    }
    manifest_lib.write(home, manifest_lib.seal(manifest))


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
        if not isinstance(digest, str) or len(digest) != 64 or not set(digest) <= set("0123456789abcdef"):
            raise errors.IntegrityError(f"{home}: the digest of expert '{name[:63]}' is no SHA-256")
        bundle = store.open_bundle(home / "experts" / digest, config)
        if bundle.manifest["digest"] != digest or bundle.manifest["name"] != name:
            raise errors.IntegrityError(f"{bundle.label} is not the expert '{name}' that {home} names; restore it")
        if bundle.manifest["anchor"] != manifest["anchor"]:
            raise errors.IntegrityError(f"{bundle.label} was trained on anchor {bundle.manifest['anchor'][:12]}, not this one")
        bundles[name] = bundle
    if not isinstance(manifest["top_k"], int) or not 1 <= manifest["top_k"] <= len(bundles) + 1:
        raise errors.IntegrityError(f"{home}: top_k is {str(manifest['top_k'])[:20]}, expected 1 to {len(bundles) + 1}")
    return Model(home, manifest, anchor, bundles)


def load(model: Model, top_k: int | None = None) -> tuple[transformer.Architecture, tree.Tree]:
    """Reads a merged model into memory, as float32 NumPy arrays or the published dtype, in the standard banks."""
    experts = {config_lib.PUBLIC: model.anchor.tensors("expert")}
    for name, bundle in model.bundles.items():
        experts[name] = bundle.tensors("expert")
        for path, leaf in tree.flatten(experts[name]).items():
            store.check_content(path, leaf, bundle.label)
    params, banks = surgery.join(model.anchor.shared(), experts)
    k = model.manifest["top_k"] if top_k is None else top_k
    return surgery.architecture(store.config_of(model.anchor), banks, k), params


def load_anchor(anchor: store.Artefact) -> tuple[transformer.Architecture, tree.Tree]:
    """Reads an anchor into memory as a dense model."""
    params, banks = surgery.join(anchor.shared(), {config_lib.PUBLIC: anchor.tensors("expert")})
    return surgery.architecture(store.config_of(anchor), banks, 1), params


def check_known(model: Model, name: str) -> None:
    """Raises PolicyError if the model has no such expert, ConfigError if it is the anchor's own."""
    if name == config_lib.PUBLIC:
        raise errors.ConfigError("'public' is the anchor's own expert and cannot be removed")
    if name not in model.bundles:
        known = ", ".join(sorted(model.bundles)) or "none but public"
        raise errors.PolicyError(f"no expert '{name}' in {model.directory}; it has {known}")


def remaining_top_k(model: Model) -> int:
    """Experts per token once one expert is gone."""
    return min(model.manifest["top_k"], len(model.bundles))


def remove_expert(model: Model, name: str) -> Model:
    """Takes an expert out of a model in place: the manifest is replaced, then the expert's bytes are deleted."""
    check_known(model, name)
    kept = {other: bundle for other, bundle in model.bundles.items() if other != name}
    write_model_manifest(model.directory, model.anchor, kept, remaining_top_k(model))
    smaller = open_model(model.directory)
    for entry in _unnamed(smaller):
        entry.rmtree()
    return smaller


def check_listing(model: Model) -> None:
    """Raises IntegrityError if a model's directory holds what its manifest does not name."""
    known = {manifest_lib.FILE, "anchor", "experts", ".lock"}
    stray = [entry for entry in model.directory.iterdir() if entry.name not in known] + _unnamed(model)
    for entry in stray:
        raise errors.IntegrityError(f"{entry} is not named by the manifest of {model.directory}; remove it")


def _unnamed(model: Model) -> list[epath.Path]:
    """Directories of experts that the manifest does not name: what an interrupted operation left."""
    kept = {bundle.manifest["digest"] for bundle in model.bundles.values()}
    experts = model.directory / "experts"
    return [entry for entry in experts.iterdir() if entry.name not in kept] if experts.exists() else []


def load_any(directory: epath.PathLike, top_k: int | None = None) -> tuple[store.Artefact, transformer.Architecture, tree.Tree]:
    """Reads a merged model or an anchor into memory; returns (its anchor, what the parameters mean, the parameters)."""
    if manifest_lib.kind(directory) == "anchor":
        anchor = store.open_anchor(directory)
        return anchor, *load_anchor(anchor)
    model = open_model(directory)
    return model.anchor, *load(model, top_k)
