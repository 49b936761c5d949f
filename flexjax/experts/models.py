"""Merged models on disk: an anchor and experts by name, under one manifest.

    MODEL/    manifest.json  anchor/  experts/<digest>/

What the manifest does not name does not exist: it is replaced atomically, and whatever it no longer names is deleted after.
"""

import dataclasses
from collections.abc import Mapping

from etils import epath
from jax.sharding import Mesh

from flexjax import config as config_lib
from flexjax import errors, sharding, tree
from flexjax.experts import loading, store, surgery
from flexjax.experts import manifest as manifest_lib
from flexjax.model import router, transformer


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
    if mesh is not None:
        standard = public_apart or sharding.size(mesh, "expert") == 1
        return loading.load(model.anchor, model.bundles, k, mesh, None if standard else by_width(widths(model)))
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


def architecture(model: Model, top_k: int) -> transformer.Architecture:
    """What the parameters of a model mean in the standard banks, before they are read."""
    sizes = widths(model)
    banks = tuple(
        config_lib.Bank(bank, names, sizes[names[0]], biased=bank != config_lib.PUBLIC)
        for bank, names in surgery.group(sizes).items()
    )
    return surgery.architecture(store.config_of(model.anchor), banks, top_k)


def by_width(widths: Mapping[str, int]) -> dict[str, tuple[str, ...]]:
    """Banks for experts that live apart: one per width, `public` among the others of its own, so that few slots stay empty.

    Args:
      widths: hidden units by expert.
    """
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


def load_any(
    directory: epath.PathLike, top_k: int | None = None, mesh: Mesh | None = None
) -> tuple[store.Artefact, transformer.Architecture, tree.Tree]:
    """Reads a merged model or an anchor, as `load` does; returns (its anchor, what the parameters mean, the parameters)."""
    if manifest_lib.kind(directory) == "anchor":
        anchor = store.open_anchor(directory)
        return anchor, *load_anchor(anchor, mesh)
    model = open_model(directory)
    return model.anchor, *load(model, top_k, mesh)
