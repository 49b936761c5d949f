"""Every byte of a model, an anchor or a bundle against its manifest, and who vouches for it."""

from typing import Any

from etils import epath

from flexjax.experts import manifest as manifest_lib
from flexjax.experts import models, store
from flexjax.governance import card, signatures

PART = "made by this model"  # averaged leaves, which nobody signs


def open_any(directory: epath.PathLike) -> tuple[models.Model | None, list[store.Artefact]]:
    """Opens what a directory holds: the model, None if it is none, and the artefacts that it is made of."""
    kind = manifest_lib.kind(directory)
    if kind == "anchor":
        return None, [store.open_anchor(directory)]
    if kind == "expert":
        return None, [store.open_bundle(directory, None)]
    model = models.open_model(directory)
    return model, model.artefacts


def verify(model: models.Model | None, artefacts: list[store.Artefact], trust: signatures.Trust | None) -> dict[str, Any]:
    """Reads everything that `open_any` opened, printing a line for each part.

    Returns:
      sound; digests and signatures by label; of a model also tree_digest and signature.

    Raises:
      IntegrityError: bytes, files, a card or a signature are not what a manifest says. PolicyError: the trust file does not
      vouch for a part.
    """
    said: dict[str, Any] = {"sound": True, "digests": {}, "signatures": {}}
    for artefact in artefacts:
        artefact.verify()
        manifest, vouched = artefact.manifest, PART
        if manifest["kind"] != "shared":
            card.check(artefact.directory)
            whole = manifest["kind"] == "expert" or model is None
            vouched = vouch(artefact.directory, manifest, trust, always=whole)
        print(f"{artefact.label}: {len(manifest['tensors'])} tensors sound, digest {manifest['digest']}; {vouched}")
        said["digests"][artefact.label], said["signatures"][artefact.label] = manifest["digest"], vouched
    if model is not None:
        models.check_listing(model)
        card.check(model.directory)
        said |= {"tree_digest": model.tree_digest, "signature": vouch(model.directory, model.manifest, trust)}
        print(f"{model.directory}: tree digest {model.tree_digest}; {said['signature']}")
    return said


def vouch(home: epath.Path, manifest: manifest_lib.Manifest, trust: signatures.Trust | None, always: bool = False) -> str:
    """Says who vouches for an artefact; raises as `signatures.check`.

    A trust file decides on a model and on the anchor in it where it names such (`model:*`, `anchor:*`), or revokes this one or
    its key; else, and without `always`, it speaks of experts only.
    """
    found, kind = signatures.check(home, manifest, None), f"{manifest['kind']}:"
    if trust is not None:
        named = any(name.startswith(kind) for holder in trust.keys.values() for name in holder.names)
        if always or named or trust.revoked & {found.key, manifest["digest"]}:
            found = signatures.check(home, manifest, trust)
    return found.text
