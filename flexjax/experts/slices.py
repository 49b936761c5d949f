"""Tensors on disk, a slice at a time.

A tensor is a directory of slices: one file per layer (or per block of rows of an unlayered tensor), raw little-endian
row-major bytes, plus a constant `zarr.json`, so that any Zarr v3 reader opens it. Nothing is packed or compressed: a file's
size follows from its shape, its SHA-256 is the slice's digest, and nothing needs more memory than one slice.
"""

import dataclasses
import json
import math
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import ml_dtypes  # registers bfloat16 with NumPy
import numpy as np
from etils import epath

from flexjax import distributed, errors, sharding, storage, tree

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}
BLOCK = 2**18  # numbers that are looked at together: they stay in a core's cache


@dataclasses.dataclass
class Magnitude:
    """How large the numbers of a tensor are: what its manifest states, and everybody who reads it whole can compare.

    Attributes:
      max: largest absolute value; NaN or infinity if there is one.
      squares: sum of squares.
      count: of numbers.
      subnormal: how many of them are subnormal, which honest training does not leave behind in numbers.
    """

    max: float = 0.0
    squares: float = 0.0
    count: int = 0
    subnormal: int = 0

    @property
    def rms(self) -> float:
        """Root mean square."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    @np.errstate(invalid="ignore")
    def add(self, values: np.ndarray) -> None:
        """Looks at numbers of any floating dtype."""
        tiny = float(ml_dtypes.finfo(np.float32).smallest_normal)
        flat = values.reshape(-1)
        for start in range(0, flat.size, BLOCK):
            block = np.abs(flat[start : start + BLOCK].astype(np.float32))
            largest = float(block.max())
            self.max = largest if math.isnan(largest) else max(self.max, largest)
            wide = block if largest < 1e15 else block.astype(np.float64)  # whose squares float32 cannot hold
            self.squares += float(np.dot(wide, wide))
            if small := int(np.count_nonzero(block < tiny)):
                self.subnormal += small - int(block.size - np.count_nonzero(block))
        self.count += flat.size

    def join(self, other: "Magnitude") -> None:
        """Adds what was seen of another part of the tensor."""
        self.max = other.max if math.isnan(other.max) else max(self.max, other.max)
        self.squares += other.squares
        self.count += other.count
        self.subnormal += other.subnormal


class TensorWriter:
    """Writes tensors slice by slice and keeps what the manifest has to say of them.

    With several processes all of them call it alike, since arrays may lie on devices of all; process 0 writes the files.
    """

    def __init__(self, directory: epath.PathLike) -> None:
        self.root = epath.Path(directory) / "tensors"
        self.entries: dict[str, dict[str, Any]] = {}
        self._writes = distributed.is_main()

    def put(self, path: str, dtype: str, shape: tuple[int, ...], slices: Iterable[np.ndarray]) -> None:
        """Writes one tensor from consecutive pieces along its first axis, of any length each.

        Raises:
          IntegrityError: it holds NaN or infinity, or its pieces do not make its shape. StorageError: it cannot be written.
        """
        if not self._writes:
            for _ in slices:
                pass  # only helps to fetch them
            return
        itemsize = ITEMSIZE[dtype]
        chunk = tree.chunk_shape(path, shape, itemsize)
        home = self.root / path
        storage.write(home / "zarr.json", [zarr_metadata(dtype, shape, chunk)])
        digests, magnitude = [], Magnitude()
        for index, rows in enumerate(regroup(slices, chunk[0])):
            rows = np.ascontiguousarray(rows).astype(np.dtype(dtype).newbyteorder("<"), copy=False)
            magnitude.add(rows)
            if not math.isfinite(magnitude.max):
                raise errors.IntegrityError(f"tensor {path} holds NaN or infinity (slice {index}); nothing was published")
            padding = np.zeros((chunk[0] - rows.shape[0], *chunk[1:]), rows.dtype)
            data = (np.concatenate([rows, padding]) if padding.size else rows).tobytes()
            storage.write(home / slice_file(index, len(shape)), [data])
            digests.append(tree.sha256(data))
        if len(digests) != slice_count(path, shape, itemsize):
            raise errors.IntegrityError(f"tensor {path}: {len(digests)} slices came, its shape {shape} needs another number")
        size = {"max": magnitude.max, "rms": rounded(magnitude.rms)}
        self.entries[path] = {"dtype": dtype, "shape": list(shape), "slices": digests, **size}

    def put_tree(self, values: tree.Tree, check: Callable[[str, np.ndarray], None] = lambda path, rows: None) -> None:
        """Writes all leaves of a tree of arrays; `check(path, rows)` may raise before a slice is written."""
        for path, leaf in tree.flatten(values).items():
            self.put(path, leaf.dtype.name, leaf.shape, _checked(path, leaf, check))


def _checked(path: str, leaf: Any, check: Callable[[str, np.ndarray], None]) -> Iterator[np.ndarray]:
    for rows in pieces(path, leaf):
        check(path, rows)
        yield rows


def pieces(path: str, leaf: Any) -> Iterator[np.ndarray]:
    """The slices of a tensor, one at a time; from a mesh, they are fetched one at a time too."""
    rows = tree.chunk_shape(path, leaf.shape, leaf.dtype.itemsize)[0]
    for start in range(0, leaf.shape[0], rows):
        size = min(rows, leaf.shape[0] - start)
        if isinstance(leaf, np.ndarray):
            yield leaf[start : start + size]
        else:
            yield sharding.fetch(jax.lax.dynamic_slice_in_dim(leaf, start, size))


def rounded(value: float) -> float:
    """To six digits, so that the order of summation is not seen."""
    return float(f"{value:.6g}")


def zarr_metadata(dtype: str, shape: tuple[int, ...], chunk: tuple[int, ...]) -> bytes:
    """The `zarr.json` (Zarr v3 core specification) that describes our slices to other readers; we never read it."""
    return json.dumps(
        {
            "zarr_format": 3,
            "node_type": "array",
            "shape": list(shape),
            "data_type": dtype,
            "chunk_grid": {"name": "regular", "configuration": {"chunk_shape": list(chunk)}},
            "chunk_key_encoding": {"name": "default", "configuration": {"separator": "/"}},
            "fill_value": 0.0,
            "codecs": [{"name": "bytes", "configuration": {"endian": "little"}}],
        }
    ).encode()


def slice_count(path: str, shape: tuple[int, ...], itemsize: int) -> int:
    """Number of files that hold a tensor."""
    return -(-shape[0] // tree.chunk_shape(path, shape, itemsize)[0])


def slice_file(index: int, rank: int) -> str:
    """Zarr's name for the slice at this place along the first axis."""
    return "/".join(["c", str(index), *["0"] * (rank - 1)])


def regroup(pieces: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """Cuts or joins consecutive pieces into groups of exactly `rows` rows; the last may be shorter."""
    rest: np.ndarray | None = None
    for piece in pieces:
        rest = piece if rest is None or not rest.shape[0] else np.concatenate([rest, piece])
        while rest.shape[0] >= rows:
            yield rest[:rows]
            rest = rest[rows:]
    if rest is not None and rest.shape[0]:
        yield rest
