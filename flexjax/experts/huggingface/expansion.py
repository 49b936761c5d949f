"""Experts of any size in a format that has one size for all, a layer at a time.

A low-rank expert becomes W_public + a @ b, summed in float32 and rounded to the dtype of W_public. A narrow one is padded with
hidden units that are 0, which add nothing, to the width of the widest.
"""

import dataclasses
from collections.abc import Iterable

import numpy as np

from flexjax.experts import store


@dataclasses.dataclass
class Rounding:
    """What the dtype of the public matrices takes from the products: sums of squares over all layers and matrices."""

    products: float = 0.0
    lost: float = 0.0

    @property
    def share(self) -> float:
        """Lost, relative to the products, as a ratio of Frobenius norms."""
        return (self.lost / self.products) ** 0.5 if self.products else 0.0


def width(config_d_ff: int, bundles: Iterable[store.Artefact]) -> int:
    """Hidden units of the widest expert, `public` among them."""
    return max([config_d_ff, *(bundle.manifest["d_ff"] for bundle in bundles)])


def rank(source: store.Artefact) -> int:
    """0 for an expert that has its own matrices, and for an anchor."""
    return int(source.manifest.get("rank", 0))


def tensors(source: store.Artefact, path: str) -> list[str]:
    """Which tensors an FFN matrix is made of, without the public one."""
    return [f"{path}/a", f"{path}/b"] if rank(source) else [path]


def dtype(anchor: store.Artefact, source: store.Artefact, path: str) -> str:
    """The dtype that an FFN matrix is exported in."""
    holder = anchor if rank(source) else source
    return str(holder.manifest["tensors"][path]["dtype"])


def matrix(
    anchor: store.Artefact,
    source: store.Artefact,
    path: str,
    layer: int,
    shape: tuple[int, ...] | None = None,
    rounding: Rounding | None = None,
) -> np.ndarray:
    """One layer's FFN matrix in the dtype that it is exported in, padded to a shape if one is given; adds to `rounding`."""
    found = _expanded(anchor, source, path, layer, rounding) if rank(source) else source.slice_at(path, layer)[0]
    if shape in (None, found.shape):
        return found
    padded = np.zeros(shape, found.dtype)
    padded[: found.shape[0], : found.shape[1]] = found
    return padded


def _expanded(anchor: store.Artefact, source: store.Artefact, path: str, layer: int, rounding: Rounding | None) -> np.ndarray:
    public = anchor.slice_at(path, layer)[0]
    a, b = (source.slice_at(tensor, layer)[0].astype(np.float32) for tensor in tensors(source, path))
    product = a @ b
    found = (public.astype(np.float32) + product).astype(public.dtype)
    store.check_content(path, found, source.label)
    if rounding is not None:
        difference = found.astype(np.float32)
        difference -= public.astype(np.float32)
        difference -= product
        rounding.products += float(np.linalg.norm(product)) ** 2
        rounding.lost += float(np.linalg.norm(difference)) ** 2
    return found
