"""Anchors and bundles on disk.

    ANCHOR/   manifest.json  tokenizer.*  tensors/{embed,layers,head,expert,statistics}/...
    BUNDLE/   manifest.json               tensors/expert/{ffn,router}/...

What a manifest does not name does not exist. Bytes are hashed as they are read: what was verified is what is used.
"""

import dataclasses
import os
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
from etils import epath

from flexjax import config as config_lib
from flexjax import distributed, errors, tree
from flexjax.data import tokenizer as tokenizer_lib
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import schema, slices, surgery

TOKENIZER_FILES = (tokenizer_lib.SENTENCEPIECE_FILE, tokenizer_lib.HUGGING_FACE_FILE)
TOKENIZER_BYTES = 2**28


@dataclasses.dataclass
class Artefact:
    """An anchor or a bundle whose manifest has been checked; tensors are read, and verified, on demand."""

    directory: epath.Path
    manifest: manifest_lib.Manifest
    label: str

    def slice_at(self, path: str, index: int) -> np.ndarray:
        """Reads one slice of a tensor (a layer, or a block of rows), verifying it against the manifest."""
        entry = self.manifest["tensors"][path]
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        chunk = tree.chunk_shape(path, shape, dtype.itemsize)
        size = int(np.prod(chunk, dtype=np.int64)) * dtype.itemsize
        file = self.directory / "tensors" / path / slices.slice_file(index, len(shape))
        data = slices.read_file(file, size)
        if tree.sha256(data) != entry["slices"][index]:
            raise errors.IntegrityError(
                f"{file}: bytes differ from the manifest of {self.label} (tensor {path}, slice {index}); restore the file"
            )
        return np.frombuffer(data, dtype).reshape(chunk)[: shape[0] - index * chunk[0]]

    def slices_of(self, path: str) -> Iterator[np.ndarray]:
        """Reads one tensor slice by slice, verifying each against the manifest."""
        for index in range(len(self.manifest["tensors"][path]["slices"])):
            yield self.slice_at(path, index)

    def tensor(self, path: str) -> np.ndarray:
        """Reads one tensor whole."""
        return np.concatenate(list(self.slices_of(path)))

    def tensors(self, prefix: str) -> tree.Tree:
        """Reads all tensors below a path; the paths of the result are relative to it."""
        names = [path for path in self.manifest["tensors"] if path.startswith(prefix + "/")]
        return tree.unflatten({path.removeprefix(prefix + "/"): self.tensor(path) for path in names})

    def shared(self) -> tree.Tree:
        """The shared tree {embed, layers, head} of an anchor."""
        return {part: self.tensors(part) for part in ("embed", "layers", "head")}

    def verify(self) -> None:
        """Reads every byte, and refuses files that the manifest does not name."""
        expected = {manifest_lib.FILE, *_extra_files(self.manifest)}
        for path, entry in self.manifest["tensors"].items():
            expected.add(f"tensors/{path}/zarr.json")
            expected |= {f"tensors/{path}/{slices.slice_file(i, len(entry['shape']))}" for i in range(len(entry["slices"]))}
            for rows in self.slices_of(path):
                check_content(path, rows, self.label)
            dtype, shape = entry["dtype"], tuple(entry["shape"])
            metadata = slices.zarr_metadata(dtype, shape, tree.chunk_shape(path, shape, slices.ITEMSIZE[dtype]))
            if slices.read_file(self.directory / "tensors" / path / "zarr.json", len(metadata)) != metadata:
                raise errors.IntegrityError(f"{self.directory}/tensors/{path}/zarr.json does not describe the tensor; refused")
        if _extra_files(self.manifest):
            tokenizer_path(self)
        for file in sorted(_listing(self.directory) - expected):
            raise errors.IntegrityError(f"{self.directory / file} is not named by the manifest of {self.label}; remove it")


def check_content(path: str, rows: np.ndarray, label: str) -> None:
    """Raises IntegrityError if a slice holds NaN or infinity, or a bias above 0."""
    values = rows.astype(np.float32)
    if not np.isfinite(values).all():
        raise errors.IntegrityError(f"{label}: tensor {path} holds NaN or infinity; ask its owner for a sound bundle")
    if path.endswith("router/bias") and (values > 0).any():
        raise errors.IntegrityError(f"{label}: tensor {path} holds a positive bias; a bias may only lower an expert's claim")


def _extra_files(manifest: manifest_lib.Manifest) -> set[str]:
    return {manifest["tokenizer"]["file"]} if manifest["kind"] == "anchor" and manifest["tokenizer"] else set()


def _listing(directory: epath.Path) -> set[str]:
    files = set()
    for entry in directory.iterdir():
        nested = entry.is_dir() and not os.path.islink(entry)
        files |= {f"{entry.name}/{below}" for below in _listing(entry)} if nested else {entry.name}
    return files


def write_anchor(
    directory: epath.PathLike,
    config: config_lib.ModelConfig,
    tokenizer_file: epath.PathLike | None,
    tensors: Callable[[slices.TensorWriter], None],
    *,
    rows: str,
    training: dict[str, Any],
) -> Artefact:
    """Writes an anchor: `tensors(writer)` puts embed/, layers/, head/, expert/ (the public one) and statistics/.

    An anchor imported from a folder that has no tokenizer has none either (`tokenizer_file` None).
    """
    home = _begin(directory)
    tokenizer = None
    if tokenizer_file is not None:
        source = epath.Path(tokenizer_file)
        data = source.read_bytes()
        name = f"tokenizer{source.suffix}"
        if name not in TOKENIZER_FILES:
            raise errors.ConfigError(f"{source} is no tokenizer; give a .model or .json file")
        if distributed.is_main():
            (home / name).write_bytes(data)
        tokenizer = {"file": name, "digest": tree.sha256(data)}
    writer = slices.TensorWriter(home)
    tensors(writer)
    manifest = {
        "kind": "anchor",
        "model": dataclasses.asdict(config),
        "tokenizer": tokenizer,
        "rows": rows,
        "tensors": writer.entries,
        "training": training,
    }
    _commit(home, manifest)
    return open_anchor(home)


def _begin(directory: epath.PathLike) -> epath.Path:
    """The directory that all processes write together: process 0 its files, all of them the same manifest in memory."""
    home = fresh(directory) if distributed.is_main() else epath.Path(directory)
    distributed.barrier("artefact")
    return home


def _commit(home: epath.Path, manifest: manifest_lib.Manifest) -> None:
    if distributed.is_main():
        manifest_lib.write(home, manifest_lib.seal(manifest))
    distributed.barrier("artefact")


def open_anchor(directory: epath.PathLike) -> Artefact:
    """Opens an anchor: manifest and schema are checked, tensors when they are read."""
    home = epath.Path(directory)
    anchor = Artefact(home, manifest_lib.read(home, "anchor"), f"anchor {home}")
    config = manifest_lib.model_config(anchor.manifest, home / manifest_lib.FILE)
    expected = schema.shared_shapes(config) | schema.expert_shapes(config.num_layers, config.d_model, config.d_ff, biased=False)
    schema.check(anchor.manifest["tensors"], anchor.label, expected, schema.statistics_shapes(config))
    _check_tokenizer_entry(anchor)
    return anchor


def config_of(anchor: Artefact) -> config_lib.ModelConfig:
    """Shapes of an anchor's model."""
    return manifest_lib.model_config(anchor.manifest, anchor.directory / manifest_lib.FILE)


def tokenizer_path(anchor: Artefact) -> epath.Path:
    """The anchor's tokenizer file, after its digest was compared.

    Raises:
      ConfigError: the anchor was imported without one.
      IntegrityError: the file is missing or not the one that the manifest names.
    """
    entry = anchor.manifest["tokenizer"]
    if entry is None:
        raise errors.ConfigError(
            f"{anchor.label} has no tokenizer, since it was imported from a folder without one; "
            "add tokenizer.json to that folder and import it again"
        )
    path = anchor.directory / entry["file"]
    if tree.sha256(slices.read_small(path, TOKENIZER_BYTES)) != entry["digest"]:
        raise errors.IntegrityError(f"{path} is not the tokenizer that the anchor was trained with; restore it")
    return path


def _check_tokenizer_entry(anchor: Artefact) -> None:
    """Checks what a manifest says of the tokenizer: a fixed name, so that it cannot lead out of the directory."""
    entry = anchor.manifest["tokenizer"]
    sound = isinstance(entry, dict) and set(entry) == {"file", "digest"} and entry["file"] in TOKENIZER_FILES
    if entry is not None and not sound:
        raise errors.IntegrityError(f"{anchor.label}: the tokenizer must be one of {', '.join(TOKENIZER_FILES)} and its digest")


def write_bundle(
    directory: epath.PathLike, name: str, anchor: Artefact, expert: tree.Tree, training: dict[str, Any]
) -> Artefact:
    """Writes one expert: its FFN, router row and effective bias (never above 0)."""

    def put(writer: slices.TensorWriter) -> None:
        writer.put_tree({"expert": expert}, lambda path, rows: check_content(path, rows, f"expert '{name}'"))

    try:
        return stream_bundle(directory, name, anchor, surgery.width(expert), put, training)
    except errors.IntegrityError:
        if distributed.is_main():
            epath.Path(directory).rmtree()  # what was begun; it has no manifest
        raise


def stream_bundle(
    directory: epath.PathLike,
    name: str,
    anchor: Artefact,
    d_ff: int,
    tensors: Callable[[slices.TensorWriter], None],
    training: dict[str, Any],
) -> Artefact:
    """Writes one expert slice by slice: `tensors(writer)` puts expert/, whose content the caller has checked."""
    manifest_lib.check_name(name)
    home = _begin(directory)
    writer = slices.TensorWriter(home)
    tensors(writer)
    manifest = {
        "kind": "expert",
        "name": name,
        **manifest_lib.lineage(anchor.manifest),
        "d_ff": d_ff,
        "tensors": writer.entries,
        "training": training,
    }
    _commit(home, manifest)
    return Artefact(home, manifest_lib.read(home, "expert"), f"expert '{name}' in {home}")


def open_bundle(directory: epath.PathLike, config: config_lib.ModelConfig | None) -> Artefact:
    """Opens a bundle and checks its manifest against the shapes of an anchor (None: its own); no tensor is read."""
    home = epath.Path(directory)
    manifest = manifest_lib.read(home, "expert")
    name = manifest["name"]
    if not isinstance(name, str):
        raise errors.IntegrityError(f"{home}: the expert's name must be a string")
    bundle = Artefact(home, manifest, f"expert '{manifest_lib.check_name(name)}' in {home}")
    d_ff = manifest["d_ff"]
    widest = 2**20 if config is None else config.d_ff * 8
    if not isinstance(d_ff, int) or isinstance(d_ff, bool) or not 0 < d_ff <= widest:
        raise errors.IntegrityError(f"{bundle.label}: d_ff is {str(d_ff)[:20]}, expected a width of 1 to {widest}")
    layers, d_model = _stated_shape(bundle) if config is None else (config.num_layers, config.d_model)
    schema.check(manifest["tensors"], bundle.label, schema.expert_shapes(layers, d_model, d_ff, biased=True))
    return bundle


def _stated_shape(bundle: Artefact) -> tuple[int, int]:
    """Layers and d_model as the bundle itself states them, for looking at it without its anchor."""
    try:
        layers, d_model = (int(size) for size in bundle.manifest["tensors"]["expert/router/row"]["shape"])
    except (KeyError, TypeError, ValueError):
        raise errors.IntegrityError(f"{bundle.label}: the manifest has no sound entry of tensor expert/router/row") from None
    if not (0 < layers <= 2**12 and 0 < d_model <= 2**20):
        raise errors.IntegrityError(f"{bundle.label}: {layers} layers of width {d_model} are not plausible")
    return layers, d_model


def copy(artefact: Artefact, target: epath.Path) -> None:
    """Copies an artefact through verified reads; the manifest comes last."""
    home = fresh(target)
    writer = slices.TensorWriter(home)
    for path, entry in artefact.manifest["tensors"].items():
        pieces = artefact.slices_of(path)
        writer.put(path, entry["dtype"], tuple(entry["shape"]), _checked(pieces, path, artefact.label))
    if _extra_files(artefact.manifest):
        source = tokenizer_path(artefact)
        (home / source.name).write_bytes(source.read_bytes())
    manifest_lib.write(home, artefact.manifest)


def _checked(pieces: Iterator[np.ndarray], path: str, label: str) -> Iterator[np.ndarray]:
    for piece in pieces:
        check_content(path, piece, label)
        yield piece


def fresh(directory: epath.PathLike) -> epath.Path:
    """An empty directory to write to, holding the manifest's partial file until the manifest replaces it.

    What an interrupted write left behind is known by that file and swept; anything else is never overwritten.
    """
    home = epath.Path(directory)
    unfinished = home / manifest_lib.PARTIAL
    if (home / manifest_lib.FILE).exists():
        raise errors.StorageError(f"{home} already holds a finished artefact; choose another directory or remove it")
    try:
        if unfinished.exists():
            home.rmtree()
        elif home.exists() and any(home.iterdir()):
            raise errors.StorageError(f"{home} is not empty and not ours; choose another directory")
        home.mkdir(parents=True, exist_ok=True)
        unfinished.write_bytes(b"")
    except OSError as error:
        raise errors.StorageError(f"cannot write {home}: {error.strerror or error}; check space and permissions") from None
    return home
