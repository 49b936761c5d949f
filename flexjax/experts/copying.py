"""Artefacts from one place to another: streamed a few MiB at a time and verified on the way, or moved by the bucket itself.

What a copy holds is what the manifest says, or there is no copy: the manifest comes last. Rows and biases come first, so
that a router that must not be let in is known before the bulk is moved.
"""

import hashlib
from collections.abc import Iterable, Iterator
from concurrent import futures

import numpy as np
from etils import epath

from flexjax import storage, tree, workdir
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import slices, store

WORKERS = 3  # slices on their way at once; each needs one block of memory
SIGNATURE_BYTES = 4096


def copy(artefact: store.Artefact, target: epath.Path, read_content: bool = False, again: bool = False) -> None:
    """Copies an artefact.

    Between two places in buckets the store itself copies, and no byte of a weight comes through this machine; rows and
    biases are read and checked all the same.

    Args:
      artefact: what is copied; what a model put in the place of its tensors is not.
      target: a new directory.
      read_content: read every byte in a bucket too, before the store copies it.
      again: take nothing away that is there: in a bucket, what has the same bytes counts as copied.

    Raises:
      IntegrityError: bytes are not those of the manifest, or what they hold is refused; nothing is published.
      StorageError: a file cannot be read or written.
    """
    home = epath.Path(target) if again else manifest_lib.fresh(target)
    within_buckets = not workdir.is_local(artefact.directory) and not workdir.is_local(home)
    paths = sorted(artefact.manifest["tensors"], key=lambda path: (not path.startswith(store.ROUTER), path))
    for path in paths:
        storage.write(home / "tensors" / path / "zarr.json", [artefact.zarr_metadata(path)])
    with futures.ThreadPoolExecutor(WORKERS) as pool:
        for path in paths:
            read = read_content or not within_buckets or path.startswith(store.ROUTER)
            magnitude = slices.Magnitude()
            jobs = [
                pool.submit(_copy_slice, artefact, path, index, home, read, within_buckets)
                for index in range(len(artefact.manifest["tensors"][path]["slices"]))
            ]
            for part in _results(jobs):
                magnitude.join(part)
            if read:
                artefact.check_magnitude(path, magnitude)
    for name in store.tokenizer_files(artefact.manifest):
        storage.write(home / name, [store.tokenizer_bytes(artefact)])
    signature = artefact.directory / manifest_lib.SIGNATURE
    if storage.exists(signature):
        storage.write(home / signature.name, [storage.read_small(signature, SIGNATURE_BYTES)])
    manifest_lib.write(home, artefact.manifest, generation=0)


def _results(jobs: list[futures.Future[slices.Magnitude]]) -> Iterator[slices.Magnitude]:
    try:
        for job in jobs:
            yield job.result()
    finally:
        for job in jobs:
            job.cancel()


def _copy_slice(
    artefact: store.Artefact, path: str, index: int, home: epath.Path, read: bool, within_buckets: bool
) -> slices.Magnitude:
    """Copies one file; what was read is what is written, hashed and looked at."""
    source, size = artefact.slice_path(path, index), artefact.slice_bytes(path)
    target = home / source.relative_to(artefact.directory)
    magnitude, digest = slices.Magnitude(), hashlib.sha256()
    dtype = np.dtype(artefact.manifest["tensors"][path]["dtype"])
    shape = artefact.manifest["tensors"][path]["shape"]
    left = min(int(np.prod(shape[1:], dtype=np.int64)) * (shape[0] - index * _rows(artefact, path)), size // dtype.itemsize)

    def looked_at(pieces: Iterable[bytes]) -> Iterator[bytes]:
        nonlocal left
        for piece in pieces:
            digest.update(piece)
            values = np.frombuffer(piece, dtype)[:left]  # what fills up the last slice is no part of the tensor
            left -= values.size
            magnitude.add(values)
            if path == f"{store.ROUTER}bias":
                store.check_content(path, values, artefact.label)
            yield piece

    pieces = looked_at(storage.blocks(source, size, artefact.directory)) if read else iter(())
    if within_buckets:
        for _ in pieces:
            pass
    else:
        storage.write(target, pieces)
    if read and digest.hexdigest() != artefact.manifest["tensors"][path]["slices"][index]:
        raise artefact.damaged(path, index)
    if within_buckets:
        storage.copy(source, target, size, artefact.directory)
    return magnitude


def _rows(artefact: store.Artefact, path: str) -> int:
    """Rows in each slice of a tensor."""
    entry = artefact.manifest["tensors"][path]
    return tree.chunk_shape(path, tuple(entry["shape"]), np.dtype(entry["dtype"]).itemsize)[0]
