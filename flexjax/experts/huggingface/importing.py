"""Hugging Face folders, OLMo-2 (dense) and FlexOlmo, to anchors and merged models, tensor by tensor.

The table of `links` is walked, so every tensor of both sides is accounted for once, or the import stops and
names it. Bytes are copied or transposed, never cast.
"""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from etils import epath

from flexjax import config as config_lib
from flexjax import errors, storage, tree, workdir
from flexjax.experts import copying, models, publishing, slices, store
from flexjax.experts import manifest as manifest_lib
from flexjax.experts.huggingface import config as huggingface_config
from flexjax.experts.huggingface import links
from flexjax.experts.huggingface import safetensors_io as io
from flexjax.model import transformer


def import_folder(source: epath.PathLike, target: epath.PathLike, names: Sequence[str] | None = None) -> dict[str, Any]:
    """Converts a Hugging Face folder to an anchor (dense, or a single expert) or to a merged model; returns a report.

    Args:
      source: folder with `config.json` and safetensors weights; its `tokenizer.json` comes along.
      target: new or empty directory.
      names: names of the experts in their order, the first `public`; None: `public`, `e01`, `e02`, ...

    Raises:
      ConfigError: unsupported architecture, or names that do not fit. IntegrityError: weights are not what `config.json`
      says. StorageError: a file cannot be read or written.
    """
    folder = epath.Path(source)
    described = huggingface_config.read_config(folder)
    config = described.model
    transformer.check(transformer.Architecture(config, transformer.dense_banks(config)))
    order = _expert_names(max(1, described.experts), names)
    tensors = io.read_folder(folder)
    places = links.locate(links.table(config, described.experts), tensors, config)
    training = {"huggingface": described.record, "seq_len": described.record["max_position_embeddings"]}
    tokenizer = next((folder / name for name in reversed(store.TOKENIZER_FILES) if (folder / name).exists()), None)
    row = _row(places, 0, config)
    with io.fresh_folder(target) as home:

        def put_anchor(writer: slices.TensorWriter) -> None:
            _put(writer, places, None)
            _put(writer, places, 0)
            writer.put(links.ROW, row.dtype.name, row.shape, [row])

        anchor = publishing.write_anchor(
            home / "anchor" if described.experts > 1 else home,
            config,
            tokenizer,
            put_anchor,
            rows="text" if row.any() else "logistic",
            training=training,
        )
        digest = anchor.manifest["digest"]
        if described.experts > 1:
            bundles = {
                name: _write_expert(home, name, e, anchor, places, config, training) for e, name in enumerate(order) if e
            }
            manifest_lib.write(home, models.describe(anchor, bundles, described.top_k), generation=0)
            digest = models.open_model(home).tree_digest
    return {
        "kind": "model" if described.experts > 1 else "anchor",
        "digest": digest,
        "experts": list(order),
        "top_k": described.top_k,
        "tensors": len(tensors),
        "bytes": sum(int(np.prod(t.shape, dtype=np.int64)) * np.dtype(t.dtype).itemsize for t in tensors.values()),
        "tokenizer": None if tokenizer is None else tokenizer.name,
    }


def _expert_names(experts: int, names: Sequence[str] | None) -> tuple[str, ...]:
    if names is None:
        digits = max(2, len(str(experts - 1)))
        return (config_lib.PUBLIC, *(f"e{e:0{digits}d}" for e in range(1, experts)))
    if len(names) != experts or len(set(names)) != experts or names[0] != config_lib.PUBLIC:
        raise errors.ConfigError(
            f"--names={','.join(names)[:80]} must be {experts} different names, one per expert, the first '{config_lib.PUBLIC}'"
        )
    return (config_lib.PUBLIC, *(manifest_lib.check_name(name) for name in names[1:]))


def _row(places: Mapping[links.Link, links.Place], expert: int, config: config_lib.ModelConfig) -> np.ndarray:
    """One expert's router rows [L, D]; zeros for a dense model."""
    rows: list[np.ndarray] = []
    for link, place in places.items():
        if link.path == links.ROW:
            rows.extend(place.stored.rows(expert, expert + 1))
            store.check_content(link.name, rows[-1], str(place.stored.file))
    return np.concatenate(rows) if rows else np.zeros((config.num_layers, config.d_model), np.float32)


def _put(writer: slices.TensorWriter, places: Mapping[links.Link, links.Place], expert: int | None) -> None:
    """Writes the shared tensors (None) or the FFN of one expert."""
    groups: dict[str, list[links.Link]] = {}
    for link in places:
        if link.expert == expert and link.path != links.ROW:
            groups.setdefault(link.path, []).append(link)
    for path, group in groups.items():
        dtype, ours = places[group[0]].stored.dtype, group[0].ours
        shape = ours if group[0].layer is None else (len(group), *ours)
        writer.put(path, dtype, shape, _pieces(path, group, places, shape))


def _pieces(
    path: str, group: list[links.Link], places: Mapping[links.Link, links.Place], shape: tuple[int, ...]
) -> Iterator[np.ndarray]:
    for link in group:
        place = places[link]
        chunk = tree.chunk_shape(path, shape, np.dtype(place.stored.dtype).itemsize)[0]
        for block in _blocks(link, place, chunk):
            for first in range(0, len(block), chunk):
                piece = block[first : first + chunk]
                store.check_content(link.name, piece, str(place.stored.file))
                yield piece


def _blocks(link: links.Link, place: links.Place, chunk: int) -> Iterator[np.ndarray]:
    """One layer's slice with its layer axis, or an unlayered tensor in blocks of whole chunks."""
    if link.layer is not None:
        if link.transposed:
            whole = next(io.transposed(lambda: place.rows(link), link.shape[1], link.shape[0], link.shape[1]))
        else:
            whole = np.concatenate(list(place.rows(link)))
        yield whole.reshape(1, *link.ours)
    elif link.transposed:
        at_once = chunk * max(1, io.BLOCK_BYTES // tree.CHUNK_BYTES)
        yield from io.transposed(lambda: place.rows(link), link.shape[1], link.shape[0], at_once)
    else:
        for rows in place.rows(link):
            yield rows.reshape(-1, *link.ours[1:])


def _write_expert(
    home: epath.Path,
    name: str,
    expert: int,
    anchor: store.Artefact,
    places: Mapping[links.Link, links.Place],
    config: config_lib.ModelConfig,
    training: dict[str, Any],
) -> store.Artefact:
    row = _row(places, expert, config)

    def put(writer: slices.TensorWriter) -> None:
        _put(writer, places, expert)
        writer.put(links.ROW, row.dtype.name, row.shape, [row])
        writer.put(links.BIAS, "float32", (config.num_layers,), [np.zeros(config.num_layers, np.float32)])

    bundle = publishing.stream_bundle(home / "experts" / "incoming", name, anchor, config.d_ff, put, training)
    final = home / "experts" / bundle.manifest["digest"]
    if not workdir.is_local(home):
        copying.copy(bundle, final)
        storage.delete(bundle.directory)
    else:
        bundle.directory.rename(final)
    return dataclasses.replace(bundle, directory=final)
