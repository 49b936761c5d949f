"""The safetensors format, streamed: tensors larger than memory are read and written as pieces of rows.

    8 bytes: length of the header, little-endian | header: JSON {name: {dtype, shape, data_offsets}} | raw row-major bytes

The format's own library reads and writes whole tensors (an embedding alone may be 1.6 GB) and maps files into memory.
A folder holds `model.safetensors`, or shards with `model.safetensors.index.json`, which maps names to shards.
"""

import contextlib
import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np
from etils import epath

from flexjax import errors, tree

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
NUMPY_NAME = {"F32": "float32", "BF16": "bfloat16", "F16": "float16"}
FORMAT_NAME = {name: code for code, name in NUMPY_NAME.items()}
MAX_HEADER = 100_000_000  # the library's own limit
PIECE_BYTES = 64 * 2**20
BLOCK_BYTES = 256 * 2**20  # of a matrix larger than memory that are transposed at a time
SHARD_BYTES = 10**9


@dataclasses.dataclass(frozen=True)
class Stored:
    """A tensor in a file; seen as a matrix, all axes but the last are rows and a vector is one row."""

    name: str
    file: epath.Path
    dtype: str
    shape: tuple[int, ...]
    offset: int

    def rows(self, start: int, stop: int) -> Iterator[np.ndarray]:
        """Yields rows start to stop of the matrix, some 64 MiB at a time."""
        kind, columns = np.dtype(self.dtype), self.shape[-1]
        step = max(1, PIECE_BYTES // (columns * kind.itemsize))
        try:
            with self.file.open("rb") as stream:
                stream.seek(self.offset + start * columns * kind.itemsize)
                for first in range(start, stop, step):
                    count = min(step, stop - first)
                    data = stream.read(count * columns * kind.itemsize)
                    if len(data) != count * columns * kind.itemsize:
                        raise errors.IntegrityError(f"{self.file} ends within tensor {self.name}; fetch the file again")
                    yield np.frombuffer(data, kind.newbyteorder("<")).reshape(count, columns)
        except OSError as error:
            raise errors.StorageError(f"cannot read {self.file}: {error.strerror or error}") from None


@dataclasses.dataclass(frozen=True)
class Planned:
    """A tensor to be written; `pieces()` yields its elements in row-major order, in arrays of any size."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    pieces: Callable[[], Iterable[np.ndarray]]

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * np.dtype(self.dtype).itemsize


def parse_json(data: bytes, where: epath.PathLike) -> dict[str, Any]:
    """Parses a JSON object without repeated keys; raises IntegrityError."""
    try:
        value = tree.strict_json(data)
        if not isinstance(value, dict):
            raise ValueError("not an object")
    except (ValueError, RecursionError) as error:
        raise errors.IntegrityError(f"{where} is broken: {str(error)[:80]}; fetch the file again") from None
    return value


def read_json(file: epath.Path) -> dict[str, Any]:
    """Reads a small JSON file; raises StorageError if it cannot be read, IntegrityError if it is broken."""
    try:
        return parse_json(file.read_bytes(), file)
    except OSError as error:
        raise errors.StorageError(f"cannot read {file}: {error.strerror or error}") from None


def read_header(file: epath.Path) -> dict[str, Stored]:
    """The tensors of one file; its length must be exactly what the header declares.

    Raises:
      StorageError: the file cannot be read. IntegrityError: it is truncated, broken or of an unknown dtype.
    """
    try:
        size = file.stat().length
        with file.open("rb") as stream:
            length = int.from_bytes(stream.read(8), "little")
            if size < 8 or not 2 <= length <= min(size - 8, MAX_HEADER):
                raise errors.IntegrityError(f"{file} is truncated or no safetensors file; fetch the file again")
            header = parse_json(stream.read(length), file)
    except OSError as error:
        raise errors.StorageError(f"cannot read {file}: {error.strerror or error}") from None
    header.pop("__metadata__", None)
    spans, found = [], {}
    for name, entry in header.items():
        try:
            shape, (begin, end) = tuple(entry["shape"]), entry["data_offsets"]
            if not shape or not all(type(value) is int and value >= 0 for value in (*shape, begin, end)):
                raise ValueError
            dtype = str(entry["dtype"])
        except (KeyError, TypeError, ValueError):
            raise errors.IntegrityError(f"{file}: the entry of tensor {name[:80]} is broken; fetch the file again") from None
        if dtype not in NUMPY_NAME:
            raise errors.IntegrityError(f"{file}: tensor {name[:80]} is of dtype {dtype[:10]}, expected F32, BF16 or F16")
        if end - begin != int(np.prod(shape, dtype=object)) * np.dtype(NUMPY_NAME[dtype]).itemsize:
            raise errors.IntegrityError(f"{file}: tensor {name[:80]} of shape {list(shape)} cannot have {end - begin} bytes")
        spans.append((begin, end))
        found[name] = Stored(name, file, NUMPY_NAME[dtype], shape, 8 + length + begin)
    reached = 0
    for begin, end in sorted(spans):
        if begin != reached:
            raise errors.IntegrityError(f"{file}: its tensors overlap or leave holes; fetch the file again")
        reached = end
    if 8 + length + reached != size:
        raise errors.IntegrityError(f"{file} has {size} bytes, its header declares {8 + length + reached}; fetch it again")
    return found


def read_folder(directory: epath.Path) -> dict[str, Stored]:
    """All tensors of a folder by name; every file, every tensor and every line of the index must be accounted for.

    Raises:
      StorageError: there are no weights. IntegrityError: a shard is missing, broken, or not what the index says.
    """
    present = {entry.name for entry in directory.iterdir() if entry.name.endswith(".safetensors")}
    index = directory / INDEX
    if not index.exists():
        if not present:
            raise errors.StorageError(f"{directory} holds neither {SINGLE} nor {INDEX}; give a folder with safetensors weights")
        for name in sorted(present - {SINGLE}):
            raise errors.IntegrityError(f"{directory / name} is named by no {INDEX}; restore the index or remove the file")
        return read_header(directory / SINGLE)
    where = read_json(index).get("weight_map")
    if not isinstance(where, dict) or not all(isinstance(name, str) and "/" not in name for name in where.values()):
        raise errors.IntegrityError(f"{index}: weight_map must map tensor names to file names; fetch the file again")
    shards = set(where.values())
    for name in sorted(shards ^ present):
        problem = "is missing" if name in shards else f"is not named by {INDEX}"
        raise errors.IntegrityError(f"{directory / name[:80]} {problem}; fetch the folder again")
    found: dict[str, Stored] = {}
    for name in sorted(shards):
        held = read_header(directory / name)
        declared = {tensor for tensor, shard in where.items() if shard == name}
        for tensor in sorted(declared ^ set(held)):
            problem = "is not in it" if tensor in declared else "is in it, but the index does not say so"
            raise errors.IntegrityError(f"{directory / name}: tensor {tensor[:80]} {problem}; fetch the folder again")
        found |= held
    return found


def write_folder(directory: epath.Path, tensors: Sequence[Planned]) -> list[str]:
    """Writes tensors, in files of at most SHARD_BYTES (a larger tensor has its own), and the index if they are several."""
    shards: list[list[Planned]] = [[]]
    for tensor in tensors:
        if shards[-1] and sum(t.nbytes for t in shards[-1]) + tensor.nbytes > SHARD_BYTES:
            shards.append([])
        shards[-1].append(tensor)
    total = len(shards)
    names = [SINGLE] if total == 1 else [f"model-{i + 1:05d}-of-{total:05d}.safetensors" for i in range(total)]
    for name, shard in zip(names, shards, strict=True):
        write_file(directory / name, shard)
    if total > 1:
        where = {tensor.name: name for name, shard in zip(names, shards, strict=True) for tensor in shard}
        size = sum(tensor.nbytes for tensor in tensors)
        index = {"metadata": {"total_size": size}, "weight_map": dict(sorted(where.items()))}
        (directory / INDEX).write_text(json.dumps(index, indent=2) + "\n")
    return names


def write_file(file: epath.Path, tensors: Iterable[Planned]) -> None:
    """Writes one file, piece by piece; wider dtypes first, so that every tensor is aligned."""
    ordered = sorted(tensors, key=lambda tensor: (-np.dtype(tensor.dtype).itemsize, tensor.name))
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in ordered:
        span = [offset, offset + tensor.nbytes]
        header[tensor.name] = {"dtype": FORMAT_NAME[tensor.dtype], "shape": list(tensor.shape), "data_offsets": span}
        offset = span[1]
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    try:
        with file.open("wb") as stream:
            stream.write(len(encoded).to_bytes(8, "little") + encoded)
            for tensor in ordered:
                written = 0
                for piece in tensor.pieces():
                    piece = np.ascontiguousarray(piece, np.dtype(tensor.dtype).newbyteorder("<"))
                    stream.write(piece.reshape(-1).view(np.uint8).data)
                    written += piece.nbytes
                if written != tensor.nbytes:
                    raise errors.IntegrityError(
                        f"tensor {tensor.name}: {written} bytes came, shape {list(tensor.shape)} needs {tensor.nbytes}"
                    )
    except OSError as error:
        raise errors.StorageError(f"cannot write {file}: {error.strerror or error}; check space and permissions") from None


def transposed(read: Callable[[], Iterable[np.ndarray]], columns: int, rows: int, at_once: int) -> Iterator[np.ndarray]:
    """Transposes a matrix [rows, columns] that is larger than memory: yields its columns as rows, `at_once` of them a time.

    Args:
      read: starts a pass over consecutive pieces of rows; one pass is made for each block of columns.
      columns, rows: shape of the result.
      at_once: columns per pass.
    """
    for first in range(0, columns, at_once):
        block: np.ndarray | None = None
        reached = 0
        for piece in read():
            wanted = piece[:, first : first + at_once]
            if block is None:
                block = np.empty((wanted.shape[1], rows), piece.dtype)
            _transpose(wanted, block[:, reached : reached + len(piece)])
            reached += len(piece)
        if block is None or reached != rows:
            raise errors.IntegrityError(f"{reached} rows came of a matrix to be transposed, expected {rows}")
        yield block


def _transpose(source: np.ndarray, target: np.ndarray) -> None:
    """target = source.T, bit for bit, in tiles that fit the cache: several times as fast as one strided copy."""
    bits = f"u{source.dtype.itemsize}"
    source, target = source.view(bits), target.view(bits)
    for column in range(0, source.shape[1], 64):
        for row in range(0, source.shape[0], 256):
            target[column : column + 64, row : row + 256] = source[row : row + 256, column : column + 64].T


@contextlib.contextmanager
def fresh_folder(directory: epath.PathLike) -> Iterator[epath.Path]:
    """A new or empty directory; if writing fails, nothing is left in it."""
    home = epath.Path(directory)
    try:
        if home.exists() and (not home.is_dir() or any(home.iterdir())):
            raise errors.StorageError(f"{home} exists and is not empty; choose another directory or remove it")
        home.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise errors.StorageError(f"cannot write {home}: {error.strerror or error}; check space and permissions") from None
    try:
        yield home
    except BaseException:
        with contextlib.suppress(OSError):
            home.rmtree()
        raise
