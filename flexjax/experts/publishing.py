"""Anchors and bundles, written: tensors first, the manifest last of all."""

from collections.abc import Callable
from typing import Any

from etils import epath

from flexjax import config as config_lib
from flexjax import distributed, errors, storage, tree
from flexjax.data import tokenizer as tokenizer_lib
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import provenance as provenance_lib
from flexjax.experts import slices, store, surgery


def write_anchor(
    directory: epath.PathLike,
    config: config_lib.ModelConfig,
    tokenizer_file: epath.PathLike | None,
    tensors: Callable[[slices.TensorWriter], None],
    *,
    rows: str,
    training: dict[str, Any],
) -> store.Artefact:
    """Writes an anchor: `tensors(writer)` puts embed/, layers/, head/, expert/ (the public one) and statistics/.

    An anchor imported from a folder that has no tokenizer has none either (`tokenizer_file` None).
    """
    home = _begin(directory)
    tokenizer = None
    if tokenizer_file is not None:
        source = epath.Path(tokenizer_file)
        data = tokenizer_lib.read(source)
        name = f"tokenizer{source.suffix}"
        if name not in store.TOKENIZER_FILES:
            raise errors.ConfigError(f"{source} is no tokenizer; give a .model or .json file")
        if distributed.is_main():
            storage.write(home / name, [data])
        tokenizer = {"file": name, "digest": tree.sha256(data)}
    writer = slices.TensorWriter(home)
    tensors(writer)
    manifest = {
        "kind": "anchor",
        "model": config_lib.to_dict(config),
        "tokenizer": tokenizer,
        "rows": rows,
        "tensors": writer.entries,
        "training": training,
    }
    _commit(home, manifest)
    return store.open_anchor(home)


def _begin(directory: epath.PathLike) -> epath.Path:
    """The directory that all processes write together: process 0 its files, all of them the same manifest in memory."""
    home = manifest_lib.fresh(directory) if distributed.is_main() else epath.Path(directory)
    distributed.barrier("artefact")
    return home


def _commit(home: epath.Path, manifest: manifest_lib.Manifest) -> None:
    if distributed.is_main():
        manifest_lib.write(home, manifest_lib.seal(manifest), generation=0)
    distributed.barrier("artefact")


def write_bundle(
    directory: epath.PathLike,
    name: str,
    anchor: store.Artefact,
    expert: tree.Tree,
    training: dict[str, Any],
    provenance: provenance_lib.Provenance = provenance_lib.Provenance(),
    shared: tree.Tree | None = None,
) -> store.Artefact:
    """Writes one expert: its FFN, router row and effective bias (never above 0), and the shared leaves that it unfroze."""

    def put(writer: slices.TensorWriter) -> None:
        carried = {"expert": expert} | ({"shared": shared} if shared else {})
        writer.put_tree(carried, lambda path, rows: store.check_content(path, rows, f"expert '{name}'"))

    width, rank = surgery.width(expert), surgery.rank(expert)
    try:
        return stream_bundle(directory, name, anchor, width, put, training, rank=rank, provenance=provenance)
    except errors.IntegrityError:
        if distributed.is_main() and not storage.exists(epath.Path(directory) / manifest_lib.FILE):
            storage.delete(epath.Path(directory))  # what was begun
        raise


def stream_bundle(
    directory: epath.PathLike,
    name: str,
    anchor: store.Artefact,
    d_ff: int,
    tensors: Callable[[slices.TensorWriter], None],
    training: dict[str, Any],
    *,
    rank: int = 0,
    provenance: provenance_lib.Provenance = provenance_lib.Provenance(),
) -> store.Artefact:
    """Writes one expert slice by slice: `tensors(writer)` puts expert/ and shared/, whose content the caller has checked."""
    manifest_lib.check_name(name)
    home = _begin(directory)
    writer = slices.TensorWriter(home)
    tensors(writer)
    manifest = {
        "kind": "expert",
        "name": name,
        **manifest_lib.lineage(anchor.manifest),
        "d_ff": d_ff,
        "rank": rank,
        "tensors": writer.entries,
        "training": training,
        **provenance.fields(),
    }
    _commit(home, manifest)
    return store.open_bundle(home, store.config_of(anchor))
