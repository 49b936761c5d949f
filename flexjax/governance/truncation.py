"""The best approximation of a matrix by one of low rank, as two factors of equal norms, and what an approximation loses.

Singular vectors come from the eigenvectors of the smaller Gram matrix, in float64, a block of columns at a time: what that
loses lies below the resolution of float32, in which the factors are returned. A matrix of 4096 x 11008 needs some 1 GB.
"""

import dataclasses
import math

import numpy as np

BLOCK = 1024  # columns that are taken to float64 at a time


@dataclasses.dataclass
class Loss:
    """What became of one kind of matrix: sums of squares, one number for each layer.

    Attributes:
      whole: of what is approximated: W - W_public for a rank, W for a width.
      missing: of what the result, as it is stored, lacks of it.
    """

    whole: list[float] = dataclasses.field(default_factory=list)
    missing: list[float] = dataclasses.field(default_factory=list)

    def add(self, whole: float, missing: float) -> None:
        """The next layer."""
        self.whole.append(whole)
        self.missing.append(missing)

    def summary(self) -> dict[str, float]:
        """Relative Frobenius error, mean and worst over layers, and the share of all squares that was kept."""
        pairs = zip(self.whole, self.missing, strict=True)
        found = [math.sqrt(missing / whole) if whole else 0.0 for whole, missing in pairs]
        kept = 1 - sum(self.missing) / sum(self.whole) if any(self.whole) else 1.0
        return {
            "error": float(np.mean(found)),
            "worst": max(found),
            "worst_layer": int(np.argmax(found)),
            "energy": kept,
        }


def truncate(matrix: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """The best approximation a @ b of a matrix [M, N] (float32) of a rank: a [M, r] and b [r, N], float32, of equal norms.

    With the singular value decomposition U S V^T, a is U sqrt(S) and b is sqrt(S) V^T; a column that would be negative in
    its largest entry changes its sign together with its row of b.
    """
    if matrix.shape[0] > matrix.shape[1]:
        b, a = truncate(matrix.T, rank)
        return _signed(a.T, b.T)
    blocks = [slice(first, first + BLOCK) for first in range(0, matrix.shape[1], BLOCK)]
    gram = np.zeros((len(matrix), len(matrix)))
    for block in blocks:
        part = matrix[:, block].astype(np.float64)
        gram += part @ part.T
    left = np.ascontiguousarray(np.linalg.eigh(gram).eigenvectors[:, : -rank - 1 : -1])
    del gram
    right, squares = np.empty((rank, matrix.shape[1]), np.float32), np.zeros(rank)
    for block in blocks:
        part = left.T @ matrix[:, block].astype(np.float64)
        right[:, block] = part
        squares += np.square(part).sum(axis=1)
    root = squares**0.25  # of the singular values
    scale = np.divide(1, root, out=np.zeros_like(root), where=root > 0)
    return _signed((left * root).astype(np.float32), right * scale[:, None].astype(np.float32))


def truncate_product(left: np.ndarray, right: np.ndarray, rank: int) -> tuple[np.ndarray, np.ndarray]:
    """As `truncate`, of the product left [M, s] @ right [s, N] (float64), which is never formed."""
    (q, r), (p, t) = np.linalg.qr(left), np.linalg.qr(right.T)
    u, singular, v = np.linalg.svd(r @ t.T)
    root = np.sqrt(singular[:rank])
    return _signed((q @ (u[:, :rank] * root)), (root[:, None] * v[:rank]) @ p.T)


def _signed(a: np.ndarray, b: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    largest = a[np.abs(a).argmax(axis=0), np.arange(a.shape[1])]
    sign = np.where(largest < 0, -1, 1).astype(a.dtype)
    return a * sign, b * sign[:, None]


def squares(matrix: np.ndarray, a: np.ndarray, b: np.ndarray) -> tuple[float, float]:
    """Sums of squares of a matrix, and of what a @ b lacks of it."""
    whole = missing = 0.0
    left = a.astype(np.float64)
    for first in range(0, matrix.shape[1], BLOCK):
        part = matrix[:, first : first + BLOCK].astype(np.float64)
        whole += float(np.square(part).sum())
        part -= left @ b[:, first : first + BLOCK].astype(np.float64)
        missing += float(np.square(part).sum())
    return whole, missing


def square(left: np.ndarray, right: np.ndarray) -> float:
    """Sum of squares of a product."""
    return float(((left.T @ left) * (right @ right.T)).sum())
