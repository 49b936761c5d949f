"""What a hostile owner can do: rewrite manifests and tensors so that every digest is right."""

import math

import numpy as np

from flexjax import tree
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import slices, store


def forge(directory, change):
    """Rewrites a manifest by `change(manifest)`, with a valid seal."""
    manifest = manifest_lib.read(directory, manifest_lib.kind(directory))
    change(manifest)
    reseal(directory, manifest)


def reseal(directory, manifest):
    """Writes a manifest as it is, with the right digest, whatever it says."""
    sealed = {**manifest, "digest": manifest_lib.digest_of(manifest)}
    (directory / manifest_lib.FILE).write_bytes(tree.canonical_json(sealed) + b"\n")


def implant(directory, path, change, honest_size=True):
    """Rewrites a tensor by `change(values)`, with digests that fit; so does its stated size, if it can be said."""
    manifest = manifest_lib.read(directory, manifest_lib.kind(directory))
    artefact = store.Artefact(directory, manifest, "forged")
    entry, magnitude = manifest["tensors"][path], slices.Magnitude()
    values = np.array(artefact.tensor(path))
    changed = change(values)
    values = values if changed is None else changed.astype(values.dtype)
    rows = artefact.slice_bytes(path) // (values.nbytes // len(values))
    for index in range(len(entry["slices"])):
        part = values[index * rows : (index + 1) * rows]
        data = part.tobytes().ljust(artefact.slice_bytes(path), b"\0")
        artefact.slice_path(path, index).write_bytes(data)
        entry["slices"][index] = tree.sha256(data)
        with np.errstate(all="ignore"):
            magnitude.add(part)
    if honest_size and math.isfinite(magnitude.max) and math.isfinite(magnitude.rms):
        entry |= {"max": magnitude.max, "rms": slices.rounded(magnitude.rms)}
    reseal(directory, manifest)
