"""Models from disk onto a mesh: each slice is read and verified by one process, which holds a few of them at a time."""

import collections
import contextlib
import dataclasses
import functools
import itertools
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from concurrent import futures
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from flexjax import config as config_lib
from flexjax import distributed, errors, sharding, tree
from flexjax.experts import delivery, store, surgery
from flexjax.model import placement, transformer

READERS = 4  # threads; so many pieces, and the one in use, are in memory
PIECE_BYTES = 2**24
WHOLE_BYTES = 2**28  # what a process assembles in its memory before it lays it on its own devices
SMALL_BYTES = 2**22  # leaves of no more are sent to all processes together: nothing is compiled for them
Groups = Mapping[str, Sequence[str]]


def load(
    anchor: store.Artefact, bundles: Mapping[str, store.Artefact], top_k: int, mesh: Mesh, groups: Groups | None = None
) -> tuple[transformer.Architecture, tree.Tree]:
    """Reads an anchor and bundles onto a mesh: what `placement.place` makes of their union by `surgery.join`.

    Over the devices of several processes all of them call it alike. Each reads about an equal share of the bytes, and what
    one of them finds wrong is raised by all.

    Args:
      anchor, bundles: what is joined; without bundles, a dense model.
      top_k: experts per token.
      mesh: devices of this process alone, or of all processes.
      groups: bank name to expert names; None: the standard banks.

    Raises:
      IntegrityError: bytes are not what a manifest states, or the processes see different manifests.
      StorageError: a file cannot be read.
    """
    architecture, leaves = _plan(anchor, bundles, top_k, mesh, groups)
    if all(device.process_index == jax.process_index() for device in mesh.devices.flat):
        return architecture, tree.unflatten(_read_alone(leaves))
    named = {name: _identity(artefact) for name, artefact in {config_lib.PUBLIC: anchor, **bundles}.items()}
    digest = tree.sha256(tree.canonical_json(named))
    if any(other != digest for other in distributed.exchange("manifests", digest)):
        raise errors.IntegrityError(f"{anchor.label}: the processes see different manifests; give all of them the same files")
    return architecture, tree.unflatten(_read_together(leaves, mesh))


def _identity(artefact: store.Artefact) -> list[Any]:
    """Digests of an artefact and of what its tensors are replaced by: biases as calibrated, leaves as averaged."""
    instead = {
        path: other.manifest["digest"]
        if isinstance(other, store.Artefact)
        else [other.dtype.name, list(other.shape), tree.sha256(np.ascontiguousarray(other).tobytes())]
        for path, other in artefact.instead.items()
    }
    return [artefact.manifest["digest"], instead]


@dataclasses.dataclass(frozen=True)
class _Piece:
    """Consecutive rows of a leaf: slots in one layer of a bank; of any other leaf its own rows, `layer` being 0."""

    layer: int
    first: int
    count: int


NOTHING = _Piece(0, 0, 0)


@dataclasses.dataclass
class _Leaf:
    """A leaf to be filled, and the artefacts that hold it: one, or for a bank one for each slot (None: zeros)."""

    path: str
    shape: tuple[int, ...]
    dtype: np.dtype
    where: NamedSharding
    tensor: str
    owners: list[store.Artefact | None]
    banked: bool

    @property
    def nbytes(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def row_shape(self) -> tuple[int, ...]:
        return self.shape[1 + self.banked :]

    @property
    def row_bytes(self) -> int:
        return int(np.prod(self.row_shape, dtype=np.int64)) * self.dtype.itemsize

    @property
    def file_rows(self) -> int:
        """Rows in one file."""
        return 1 if self.banked else tree.chunk_shape(self.path, self.shape, self.dtype.itemsize)[0]

    def pieces(self, readers: int) -> list[_Piece]:
        """All that is to be read: pieces of some 16 MiB or one file, and four for each reader if there are files enough."""
        layers, rows = (self.shape[0], len(self.owners)) if self.banked else (1, self.shape[0])
        most = min(rows, PIECE_BYTES // self.row_bytes, -(-layers * rows // (4 * readers)))
        size = max(1, most // self.file_rows) * self.file_rows
        return [_Piece(layer, first, min(size, rows - first)) for layer in range(layers) for first in range(0, rows, size)]

    def read(self, piece: _Piece) -> np.ndarray:
        """Reads and verifies the rows of a piece, [count, ...]."""
        stop = piece.first + piece.count
        if self.banked:
            rows = [self._slice(owner, piece.layer) for owner in self.owners[piece.first : stop]]
        else:
            files = range(piece.first // self.file_rows, -(-stop // self.file_rows))
            rows = [self._slice(self.owners[0], file) for file in files]
        return rows[0] if len(rows) == 1 else np.concatenate(rows)

    def write(self, piece: _Piece, rows: np.ndarray, part: np.ndarray, start: int = 0) -> None:
        """Puts the rows of a piece into an array of the leaf, or of its layers or rows from `start` on."""
        target = part[piece.layer - start, piece.first :] if self.banked else part[piece.first - start :]
        target[: piece.count] = rows

    def _slice(self, owner: store.Artefact | None, index: int) -> np.ndarray:
        if owner is None:
            return np.zeros((1, *self.row_shape), self.dtype)
        rows = owner.slice_at(self.tensor, index)
        if owner.manifest["kind"] == "expert":
            store.check_content(self.tensor, rows, owner.label)
        return rows.astype(self.dtype, copy=False)


def _plan(
    anchor: store.Artefact, bundles: Mapping[str, store.Artefact], top_k: int, mesh: Mesh, groups: Groups | None
) -> tuple[transformer.Architecture, list[_Leaf]]:
    """What the parameters mean, and for each leaf its place on the mesh and on disk."""
    holders = {config_lib.PUBLIC: anchor, **bundles}
    banks: tuple[config_lib.Bank, ...] = ()

    def join(shared: tree.Tree, experts: dict[str, tree.Tree]) -> tree.Tree:
        nonlocal banks
        params, banks = surgery.join(shared, experts, groups)
        return params

    shared = {part: _shapes(anchor, part) for part in ("embed", "layers", "head")}
    with jax.numpy_dtype_promotion("standard"):  # as NumPy stacks experts that were published in different dtypes
        shapes = jax.eval_shape(join, shared, {name: _shapes(holder, "expert") for name, holder in holders.items()})
    architecture = surgery.architecture(store.config_of(anchor), banks, top_k)
    sharding.check(transformer.splits(architecture), mesh)
    shapes = jax.eval_shape(lambda params: placement.pad(params, architecture, mesh), shapes)
    places = tree.flatten(sharding.of_state(shapes, transformer.logical_axes(architecture), mesh))
    members = {bank.name: bank.experts for bank in banks}
    leaves = []
    for path, leaf in tree.flatten(shapes).items():
        tensor, found = path, [anchor]
        if banked := path.startswith("experts/"):
            _, bank, rest = path.split("/", 2)
            tensor, found = f"expert/{rest}", [holders[name] for name in members[bank]]
        owners = [holder if tensor in holder.manifest["tensors"] else None for holder in found]
        leaves.append(_Leaf(path, leaf.shape, np.dtype(leaf.dtype), places[path], tensor, owners, banked))
    return architecture, leaves


def _shapes(artefact: store.Artefact, part: str) -> tree.Tree:
    """The tensors below a path as shapes and dtypes."""
    entries = {path: entry for path, entry in artefact.manifest["tensors"].items() if path.startswith(f"{part}/")}
    shapes = {path: jax.ShapeDtypeStruct(tuple(e["shape"]), np.dtype(e["dtype"])) for path, e in entries.items()}
    return tree.unflatten({path.removeprefix(f"{part}/"): shape for path, shape in shapes.items()})


def _ahead[T](jobs: Iterable[Callable[[], T]]) -> Generator[T]:
    """The results of jobs in their order; threads are at work on the next few."""
    waiting: collections.deque[futures.Future[T]] = collections.deque()
    with futures.ThreadPoolExecutor(READERS) as pool:
        for job in jobs:
            waiting.append(pool.submit(job))
            if len(waiting) > READERS:
                yield waiting.popleft().result()
        while waiting:
            yield waiting.popleft().result()


def _read_alone(leaves: list[_Leaf]) -> dict[str, jax.Array]:
    """Fills leaves whose devices all belong to this process: small ones at once, others some layers or rows at a time."""
    plans = [(leaf, leaf.pieces(readers=1)) for leaf in leaves]
    read = _ahead(functools.partial(leaf.read, piece) for leaf, pieces in plans for piece in pieces)
    return {leaf.path: _assemble(leaf, pieces, read) for leaf, pieces in plans}


def _assemble(leaf: _Leaf, pieces: list[_Piece], read: Iterator[np.ndarray]) -> jax.Array:
    """One leaf from its pieces, which `read` gives in order."""
    step = _step(leaf, pieces[0])

    def part(start: int) -> jax.Array:
        rows = np.zeros((min(step, leaf.shape[0] - start), *leaf.shape[1:]), leaf.dtype)
        for piece in pieces:
            if start <= (piece.layer if leaf.banked else piece.first) < start + step:
                leaf.write(piece, next(read), rows, start)
        return sharding.put(rows, leaf.where)

    if step >= leaf.shape[0]:
        return part(0)
    array = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.where)
    for start in range(0, leaf.shape[0], step):
        array = jax.block_until_ready(_insert(array, part(start), start))  # or parts would pile up before slow devices
    return array


def _step(leaf: _Leaf, piece: _Piece) -> int:
    """How many layers of a bank, or rows of another leaf, are assembled at once; rows that the mesh splits, all."""
    if leaf.nbytes <= WHOLE_BYTES or (leaf.where.spec and leaf.where.spec[0]):
        return leaf.shape[0]
    least = 1 if leaf.banked else piece.count
    return max(1, WHOLE_BYTES * leaf.shape[0] // (least * leaf.nbytes)) * least


@functools.partial(jax.jit, donate_argnums=0)
def _insert(leaf: jax.Array, part: jax.Array, start: int) -> jax.Array:
    return jax.lax.dynamic_update_slice_in_dim(leaf, part, start, axis=0)


def _read_together(leaves: list[_Leaf], mesh: Mesh) -> dict[str, jax.Array]:
    """Fills leaves over the devices of several processes."""
    small = [leaf for leaf in leaves if leaf.nbytes <= SMALL_BYTES]
    large = [leaf for leaf in leaves if leaf.nbytes > SMALL_BYTES]
    with distributed.lost_peers_are_preemption():
        return _read_small(small, mesh) | _read_large(large, mesh)


def _read_small(leaves: list[_Leaf], mesh: Mesh) -> dict[str, jax.Array]:
    """Each process reads some pieces and is sent those of all; then it lays whole leaves on its devices."""
    processes, me = jax.process_count(), jax.process_index()
    pieces = [(leaf, piece) for leaf in leaves for piece in leaf.pieces(processes)]
    shares = [pieces[process::processes] for process in range(processes)]
    read = list(_ahead(functools.partial(_attempt, leaf, piece) for leaf, piece in shares[me]))
    _raise_together(next((error for _, error in read if error), None))
    mine = b"".join(rows.tobytes() for rows, _ in read if rows is not None)
    length = max(sum(leaf.row_bytes * piece.count for leaf, piece in share) for share in shares)
    route = delivery.Route(mesh, PartitionSpec(), (processes, length), rows=1, layered=False)
    blocks = route.cut(np.frombuffer(mine.ljust(length, b"\0"), np.uint8)[None], np.dtype(np.uint8))
    everybody = jnp.zeros(route.shape, np.uint8, device=sharding.sharding(mesh, ()))
    targets = np.array([(0, process, 1) for process in range(processes)], np.int32)
    sent = np.asarray(route.deliver(everybody, blocks, targets).addressable_data(0))
    whole = {leaf.path: np.zeros(leaf.shape, leaf.dtype) for leaf in leaves}
    for share, rest in zip(shares, sent, strict=True):
        for leaf, piece in share:
            rows, rest = np.split(rest, [leaf.row_bytes * piece.count])
            leaf.write(piece, rows.view(leaf.dtype).reshape(piece.count, *leaf.row_shape), whole[leaf.path])
    return {leaf.path: sharding.put(whole[leaf.path], leaf.where) for leaf in leaves}


def _read_large(leaves: list[_Leaf], mesh: Mesh) -> dict[str, jax.Array]:
    """In rounds of one piece for each process."""
    processes, turn, plans = jax.process_count(), 0, []
    for leaf in leaves:
        pieces = leaf.pieces(processes)
        route = delivery.Route(mesh, leaf.where.spec, leaf.shape, pieces[0].count, leaf.banked)
        plans.append((leaf, route, _deal(pieces, processes, turn)))
        turn = (turn + len(pieces)) % processes  # else the first would read more of every leaf
    me = jax.process_index()
    jobs = (functools.partial(_prepare, leaf, route, hand[me]) for leaf, route, rounds in plans for hand in rounds)
    filled = {}
    with contextlib.closing(_ahead(jobs)) as prepared:
        for leaf, route, rounds in plans:
            array, failure = jnp.zeros(leaf.shape, leaf.dtype, device=leaf.where), None
            for hand in rounds:
                blocks, error = next(prepared)
                failure = failure or error
                targets = np.array([dataclasses.astuple(piece or NOTHING) for piece in hand], np.int32)
                array = jax.block_until_ready(route.deliver(array, blocks, targets))
            _raise_together(failure)
            filled[leaf.path] = array
    return filled


def _deal(pieces: list[_Piece], processes: int, turn: int) -> list[list[_Piece | None]]:
    """Rounds of at most one piece for each process; process `turn` gets the first."""
    missing = -len(pieces) % processes
    rounds = itertools.batched([*pieces, *[None] * missing], processes)
    return [[batch[(process - turn) % processes] for process in range(processes)] for batch in rounds]


def _prepare(leaf: _Leaf, route: delivery.Route, piece: _Piece | None) -> tuple[np.ndarray, errors.FlexjaxError | None]:
    """A piece as it is sent: zeros if it cannot be read, since the others wait for something."""
    rows, error = (None, None) if piece is None else _attempt(leaf, piece)
    return route.cut(rows, leaf.dtype), error


def _attempt(leaf: _Leaf, piece: _Piece) -> tuple[np.ndarray | None, errors.FlexjaxError | None]:
    """The rows of a piece, or what is wrong with them."""
    try:
        return leaf.read(piece), None
    except errors.FlexjaxError as error:
        return None, error
    except OSError as error:
        reason = f"{error.filename or leaf.path}: {error.strerror or error}"
        return None, errors.StorageError(f"cannot read {reason}; check the storage")


def _raise_together(failure: errors.FlexjaxError | None) -> None:
    """Raises in all processes what the first of them met, if any."""
    for met in distributed.exchange("loading", None if failure is None else [type(failure).__name__, str(failure)]):
        if met is not None:
            name, text = met
            raise getattr(errors, name)(text)
