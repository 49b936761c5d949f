"""Shared leaves that recipes unfreeze, averaged over experts, as post-training of modular models does (BAR, section 3).

Every expert counts alike: one that left a leaf frozen counts with the anchor's. Bundles keep their own leaves, so that the
average is made anew whenever experts come or go. While an expert is in it, masking that expert is no clean opt-out.
"""

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from flexjax import storage, tree
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import slices, store

ROWS = 1024  # of a leaf, in memory at a time as double precision


def place(home: epath.Path, anchor: str, experts: Mapping[str, str]) -> epath.Path:
    """Where a model keeps the average over these experts (name to digest): named by what it is made of."""
    return home / "shared" / tree.sha256(tree.canonical_json([anchor, dict(experts)]))


def write(home: epath.Path, anchor: store.Artefact, bundles: Mapping[str, store.Artefact]) -> dict[str, Any] | None:
    """Writes the average beside a model's experts, a slice at a time; returns its entry in the model's manifest.

    Returns None if no bundle carries a shared leaf.
    """
    paths = sorted({path for bundle in bundles.values() for path in store.carried(bundle)})
    if not paths:
        return None
    experts = {name: bundle.manifest["digest"] for name, bundle in sorted(bundles.items())}
    directory = place(home, anchor.manifest["digest"], experts)
    if storage.exists(directory / manifest_lib.FILE):  # whole, by an operation that was interrupted
        return {"digest": manifest_lib.read(directory, "shared")["digest"], "experts": experts}
    writer = slices.TensorWriter(manifest_lib.fresh(directory))
    for path in paths:
        entry = anchor.manifest["tensors"][path]
        writer.put(path, entry["dtype"], tuple(entry["shape"]), _means(path, anchor, [bundles[name] for name in experts]))
    manifest = {"kind": "shared", "anchor": anchor.manifest["digest"], "experts": experts, "tensors": writer.entries}
    sealed = manifest_lib.seal(manifest)
    manifest_lib.write(directory, sealed, generation=0)
    return {"digest": sealed["digest"], "experts": experts}


def _means(path: str, anchor: store.Artefact, bundles: list[store.Artefact]) -> Iterator[np.ndarray]:
    """The mean of one leaf over bundles, slice by slice."""
    carriers = [bundle for bundle in bundles if path in store.carried(bundle)]
    rows = 1 if tree.is_stacked(path) else ROWS  # a layer alone is large enough
    pieces = [slices.regroup(bundle.slices_of(f"shared/{path}"), rows) for bundle in carriers]
    for ours in slices.regroup(anchor.slices_of(path), rows):
        total = (len(bundles) - len(carriers)) * ours.astype(np.float64)
        for theirs, bundle in zip(pieces, carriers, strict=True):
            found = next(theirs)
            store.check_content(path, found, bundle.label)
            total += found.astype(np.float64)
        yield (total / len(bundles)).astype(np.float32).astype(ours.dtype)
