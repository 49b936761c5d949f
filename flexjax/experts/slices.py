"""Tensors on disk, a slice at a time.

A tensor is a directory of slices: one file per layer (or per block of rows of an unlayered tensor), raw little-endian
row-major bytes, plus a constant `zarr.json`, so that any Zarr v3 reader opens it. Nothing is packed or compressed: a file's
size follows from its shape, its SHA-256 is the slice's digest, and nothing needs more memory than one slice.
"""

import json
import os
import stat
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np
from etils import epath

from flexjax import distributed, errors, sharding, tree, workdir

ITEMSIZE = {"float32": 4, "bfloat16": 2, "float16": 2}


class TensorWriter:
    """Writes tensors slice by slice and keeps what the manifest has to say of them.

    With several processes all of them call it alike, since arrays may lie on devices of all; process 0 writes the files.
    """

    def __init__(self, directory: epath.PathLike) -> None:
        self.root = epath.Path(directory) / "tensors"
        self.entries: dict[str, dict[str, Any]] = {}
        self._writes = distributed.is_main()

    def put(self, path: str, dtype: str, shape: tuple[int, ...], slices: Iterable[np.ndarray]) -> None:
        """Writes one tensor from consecutive pieces along its first axis, of any length each."""
        if not self._writes:
            for _ in slices:
                pass  # only helps to fetch them
            return
        itemsize = ITEMSIZE[dtype]
        chunk = tree.chunk_shape(path, shape, itemsize)
        home = self.root / path
        try:
            home.mkdir(parents=True, exist_ok=True)
            (home / "zarr.json").write_bytes(zarr_metadata(dtype, shape, chunk))
            digests = []
            for index, rows in enumerate(_regroup(slices, chunk[0])):
                rows = np.ascontiguousarray(rows).astype(np.dtype(dtype).newbyteorder("<"), copy=False)
                padding = np.zeros((chunk[0] - rows.shape[0], *chunk[1:]), rows.dtype)
                data = (np.concatenate([rows, padding]) if padding.size else rows).tobytes()
                target = home / slice_file(index, len(shape))
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_bytes(data)
                digests.append(tree.sha256(data))
        except OSError as error:
            raise errors.StorageError(f"cannot write {home}: {error.strerror or error}; check space and permissions") from None
        if len(digests) != slice_count(path, shape, itemsize):
            raise errors.IntegrityError(f"tensor {path}: {len(digests)} slices came, its shape {shape} needs another number")
        self.entries[path] = {"dtype": dtype, "shape": list(shape), "slices": digests}

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


def _regroup(pieces: Iterable[np.ndarray], rows: int) -> Iterator[np.ndarray]:
    """Cuts or joins consecutive pieces into groups of exactly `rows` rows (the last may be shorter)."""
    rest: np.ndarray | None = None
    for piece in pieces:
        rest = piece if rest is None or not rest.shape[0] else np.concatenate([rest, piece])
        while rest.shape[0] >= rows:
            yield rest[:rows]
            rest = rest[rows:]
    if rest is not None and rest.shape[0]:
        yield rest


def read_small(path: epath.Path, limit: int) -> bytes:
    """Reads a regular file whose size is not known beforehand; raises IntegrityError as `read_file`, or above the limit."""
    size = path.stat().length if path.exists() else 0
    if size > limit:
        raise errors.IntegrityError(f"{path} has {size} bytes; no honest one has more than {limit}")
    return read_file(path, size)


def read_file(path: epath.Path, size: int) -> bytes:
    """Reads a file of exactly this size; local symbolic links and special files are refused.

    Raises:
      IntegrityError: the file is missing, of another size, or no regular file.
    """
    if not workdir.is_local(path):
        if not path.exists():
            raise errors.IntegrityError(f"{path} is missing; restore the file or fetch the directory again")
        data = path.read_bytes()
    else:
        try:
            descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
        except FileNotFoundError:
            raise errors.IntegrityError(f"{path} is missing; restore the file or fetch the directory again") from None
        except OSError as error:
            raise errors.IntegrityError(f"{path} is no readable regular file ({error.strerror}); refused") from None
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            os.close(descriptor)
            raise errors.IntegrityError(f"{path} is no regular file; refused")
        with os.fdopen(descriptor, "rb") as file:
            data = file.read(size + 1) if status.st_size == size else b""
            if status.st_size != size:
                raise errors.IntegrityError(f"{path} has {status.st_size} bytes, expected {size}; fetch it again")
    if len(data) != size:
        raise errors.IntegrityError(f"{path} has {len(data)} bytes, expected {size}; fetch it again")
    return data
