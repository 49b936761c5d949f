"""Anchors and bundles on disk or in a bucket.

    ANCHOR/   manifest.json  tokenizer.*  tensors/{embed,layers,head,expert,statistics}/...
    BUNDLE/   manifest.json               tensors/expert/{ffn,router}/...  [tensors/shared/...]

What a manifest does not name does not exist, but for a signature and a card (`manifest.BESIDE`). Bytes are hashed as they
are read: what was verified is what is used.
"""

import dataclasses
from collections.abc import Iterator, Mapping
from typing import Union

import numpy as np
from etils import epath

from flexjax import config as config_lib
from flexjax import errors, storage, tree
from flexjax.data import tokenizer as tokenizer_lib
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import schema, slices

TOKENIZER_FILES = (tokenizer_lib.SENTENCEPIECE_FILE, tokenizer_lib.HUGGING_FACE_FILE)
ROUTER = "expert/router/"


@dataclasses.dataclass
class Artefact:
    """An anchor, a bundle or averaged leaves whose manifest has been checked; tensors are read, and verified, on demand.

    Attributes:
      directory, manifest, label: where it lies, what it says of itself, and how messages name it.
      instead: tensors that others take the place of when they are read: what a model has calibrated or averaged. An array
        of the whole tensor, or the artefact that holds one of the same path.
    """

    directory: epath.Path
    manifest: manifest_lib.Manifest
    label: str
    instead: Mapping[str, Union[np.ndarray, "Artefact"]] = dataclasses.field(default_factory=dict)

    def slice_at(self, path: str, index: int) -> np.ndarray:
        """Reads one slice of a tensor (a layer, or a block of rows), verifying it against the manifest."""
        other = self.instead.get(path)
        if isinstance(other, Artefact):
            return other.slice_at(path, index)
        dtype, shape, chunk = self._layout(path)
        if other is not None:
            return other[index * chunk[0] : (index + 1) * chunk[0]]
        file = self.slice_path(path, index)
        data = storage.read(file, self.slice_bytes(path), self.directory)
        if tree.sha256(data) != self.manifest["tensors"][path]["slices"][index]:
            raise self.damaged(path, index)
        return np.frombuffer(data, dtype).reshape(chunk)[: shape[0] - index * chunk[0]]

    def slice_path(self, path: str, index: int) -> epath.Path:
        """The file of one slice."""
        return self.directory / "tensors" / path / slices.slice_file(index, len(self.manifest["tensors"][path]["shape"]))

    def slice_bytes(self, path: str) -> int:
        """Size of each of a tensor's files; the last is filled up."""
        dtype, _, chunk = self._layout(path)
        return int(np.prod(chunk, dtype=np.int64)) * dtype.itemsize

    def _layout(self, path: str) -> tuple[np.dtype, tuple[int, ...], tuple[int, ...]]:
        entry = self.manifest["tensors"][path]
        dtype, shape = np.dtype(entry["dtype"]), tuple(entry["shape"])
        return dtype, shape, tree.chunk_shape(path, shape, dtype.itemsize)

    def damaged(self, path: str, index: int) -> errors.IntegrityError:
        """What to raise for a slice whose bytes are not those of the manifest."""
        file = self.slice_path(path, index)
        return errors.IntegrityError(
            f"{file}: bytes differ from the manifest of {self.label} (tensor {path}, slice {index}); restore the file"
        )

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

    def files(self) -> set[str]:
        """Names of all files that the manifest accounts for, itself included."""
        named = {manifest_lib.FILE, *tokenizer_files(self.manifest)}
        for path, entry in self.manifest["tensors"].items():
            count, rank = len(entry["slices"]), len(entry["shape"])
            named |= {f"tensors/{path}/{file}" for file in ("zarr.json", *(slices.slice_file(i, rank) for i in range(count)))}
        return named

    @property
    def nbytes(self) -> int:
        """Bytes of all tensors."""
        return sum(self.slice_bytes(path) * len(entry["slices"]) for path, entry in self.manifest["tensors"].items())

    def verify(self) -> None:
        """Reads every byte, and refuses files that the manifest does not name."""
        for path in self.manifest["tensors"]:
            magnitude = slices.Magnitude()
            for rows in self.slices_of(path):
                check_content(path, rows, self.label)
                magnitude.add(rows)
            self.check_magnitude(path, magnitude)
            metadata = self.zarr_metadata(path)
            if storage.read(self.directory / "tensors" / path / "zarr.json", len(metadata), self.directory) != metadata:
                raise errors.IntegrityError(f"{self.directory}/tensors/{path}/zarr.json does not describe the tensor; refused")
        if tokenizer_files(self.manifest):
            tokenizer_bytes(self)
        check_listing(self.directory, storage.files(self.directory), self.files(), self.label)

    def zarr_metadata(self, path: str) -> bytes:
        """What the `zarr.json` of a tensor must hold."""
        dtype, shape, chunk = self._layout(path)
        return slices.zarr_metadata(dtype.name, shape, chunk)

    def check_magnitude(self, path: str, found: slices.Magnitude) -> None:
        """Raises IntegrityError if a tensor, read whole, is not finite, or not as large as its manifest states."""
        stated = self.manifest["tensors"][path]
        if not np.isfinite(found.max):
            raise errors.IntegrityError(f"{self.label}: tensor {path} holds NaN or infinity; ask its owner for a sound bundle")
        if found.max != stated["max"] or abs(found.rms - stated["rms"]) > 1e-3 * found.rms:
            raise errors.IntegrityError(
                f"{self.label}: tensor {path} has max {found.max:.6g} and rms {found.rms:.6g}, "
                f"its manifest states {stated['max']:.6g} and {stated['rms']:.6g}; refused"
            )
        if found.subnormal > MOST_SUBNORMAL * found.count:
            raise errors.IntegrityError(
                f"{self.label}: tensor {path} holds {found.subnormal} subnormal numbers of {found.count}; "
                "training leaves none behind, and they slow a processor down a hundredfold; refused"
            )


MOST_SUBNORMAL = 1e-3


def check_content(path: str, rows: np.ndarray, label: str) -> None:
    """Raises IntegrityError if a slice holds NaN or infinity, or a bias above 0."""
    values = rows.astype(np.float32)
    if not np.isfinite(values).all():
        raise errors.IntegrityError(f"{label}: tensor {path} holds NaN or infinity; ask its owner for a sound bundle")
    if path.endswith("router/bias") and (values > 0).any():
        raise errors.IntegrityError(f"{label}: tensor {path} holds a positive bias; a bias may only lower an expert's claim")


def check_listing(directory: epath.Path, found: Mapping[str, storage.Entry], named: set[str], label: str) -> None:
    """Raises IntegrityError for the first file that a manifest does not name, or that it names and is not there."""
    for file in sorted(set(found) - named - set(manifest_lib.BESIDE)):
        raise errors.IntegrityError(f"{directory / file} is not named by the manifest of {label}; remove it")
    for file in sorted(named - set(found)):
        raise errors.IntegrityError(f"{directory / file} is missing; restore the file or fetch the directory again")


def check_files(artefact: Artefact) -> None:
    """Raises IntegrityError if a directory holds other files than its manifest names, or one of another size or kind."""
    found = storage.files(artefact.directory)
    check_listing(artefact.directory, found, artefact.files(), artefact.label)
    for path, entry in artefact.manifest["tensors"].items():
        for index in range(len(entry["slices"])):
            file = artefact.slice_path(path, index)
            size = found[str(file.relative_to(artefact.directory))].size
            if size != artefact.slice_bytes(path):
                raise errors.IntegrityError(
                    f"{file} has {size} bytes or is no regular file, expected {artefact.slice_bytes(path)}; fetch it again"
                )


def tokenizer_files(manifest: manifest_lib.Manifest) -> set[str]:
    """The name of an anchor's tokenizer file, if it has one."""
    return {manifest["tokenizer"]["file"]} if manifest["kind"] == "anchor" and manifest["tokenizer"] else set()


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
    """The anchor's tokenizer file, after its digest was compared; raises as `tokenizer_bytes`."""
    tokenizer_bytes(anchor)
    return anchor.directory / anchor.manifest["tokenizer"]["file"]


def tokenizer_bytes(anchor: Artefact) -> bytes:
    """The bytes of the anchor's tokenizer file.

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
    data = storage.read_small(path, tokenizer_lib.MAX_BYTES)
    if tree.sha256(data) != entry["digest"]:
        raise errors.IntegrityError(f"{path} is not the tokenizer that the anchor was trained with; restore it")
    return data


def tokenizer(anchor: Artefact) -> tokenizer_lib.Tokenizer:
    """The anchor's tokenizer, of the very bytes that were verified; raises as `tokenizer_bytes` and `data.tokenizer.load`."""
    content = tokenizer_bytes(anchor)
    return tokenizer_lib.parse(content, str(anchor.directory / anchor.manifest["tokenizer"]["file"]))


def _check_tokenizer_entry(anchor: Artefact) -> None:
    """Checks what a manifest says of the tokenizer: a fixed name, so that it cannot lead out of the directory."""
    entry = anchor.manifest["tokenizer"]
    sound = isinstance(entry, dict) and set(entry) == {"file", "digest"} and entry["file"] in TOKENIZER_FILES
    if entry is not None and not sound:
        raise errors.IntegrityError(f"{anchor.label}: the tokenizer must be one of {', '.join(TOKENIZER_FILES)} and its digest")


def open_bundle(directory: epath.PathLike, config: config_lib.ModelConfig | None) -> Artefact:
    """Opens a bundle and checks its manifest against the shapes of an anchor (None: its own); no tensor is read."""
    home = epath.Path(directory)
    manifest = manifest_lib.read(home, "expert")
    bundle = Artefact(home, manifest, f"expert '{manifest_lib.check_name(manifest['name'])}' in {home}")
    check_bundle(bundle, config)
    return bundle


def check_bundle(bundle: Artefact, config: config_lib.ModelConfig | None) -> None:
    """Checks the manifest that a bundle was opened with against the shapes of an anchor (None: its own)."""
    manifest = bundle.manifest
    d_ff, rank = manifest["d_ff"], manifest["rank"]
    widest = 2**20 if config is None else config.d_ff * 8
    if not 0 < d_ff <= widest:
        raise errors.IntegrityError(f"{bundle.label}: d_ff is {str(d_ff)[:20]}, expected a width of 1 to {widest}")
    layers, d_model = (
        schema.stated_shape(manifest["tensors"], bundle.label) if config is None else (config.num_layers, config.d_model)
    )
    if not 0 <= rank <= min(d_model, d_ff) or (rank and config is not None and d_ff != config.d_ff):
        raise errors.IntegrityError(f"{bundle.label}: rank {str(rank)[:20]} with d_ff {d_ff} is none that an expert can have")
    margins = manifest["margins"]
    if margins is not None and len(margins["values"]) != layers:
        raise errors.IntegrityError(f"{bundle.label}: margins of {len(margins['values'])} layers, the model has {layers}")
    expected = schema.expert_shapes(layers, d_model, d_ff, biased=True, rank=rank)
    shapes: Mapping[str, tuple[int | None, ...]]
    if config is None:
        shapes = schema.stated_shared(manifest["tensors"], bundle.label)
    else:
        shapes = {f"shared/{path}": shape for path, shape in schema.shared_shapes(config).items()}
    schema.check(manifest["tensors"], bundle.label, expected, shapes)


def carried(bundle: Artefact) -> list[str]:
    """Paths of the shared leaves that a bundle carries because its training unfroze them, as the anchor names them."""
    return sorted(path.removeprefix("shared/") for path in bundle.manifest["tensors"] if path.startswith("shared/"))
