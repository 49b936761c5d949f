"""Anchors and merged models to Hugging Face folders, OLMo-2 (dense) and FlexOlmo, tensor by tensor.

The table of `links` is walked, so every tensor of both sides is accounted for once, or the export stops and
names it. Bytes are copied or transposed, never cast, except for router rows into which biases are folded and for low-rank
experts, which are expanded (`expansion`). Biases and shared leaves are exported as the model uses them: calibrated, averaged.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
from etils import epath

from flexjax import config as config_lib
from flexjax import errors
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import models, store
from flexjax.experts.huggingface import biasless, expansion, links
from flexjax.experts.huggingface import config as huggingface_config
from flexjax.experts.huggingface import safetensors_io as io
from flexjax.model import router

TOKENIZER_CONFIG = "tokenizer_config.json"


@dataclasses.dataclass
class _Source:
    """What is exported: an anchor and, in a mixture, the other experts; `calibrated` are those whose bias the model set."""

    anchor: store.Artefact
    bundles: dict[str, store.Artefact]
    top_k: int
    mixture: bool
    calibrated: list[str]

    @property
    def names(self) -> tuple[str, ...]:
        return router.canonical_order([config_lib.PUBLIC, *self.bundles])

    @property
    def config(self) -> config_lib.ModelConfig:
        """Shapes of the export: all experts have the width of the widest."""
        config = store.config_of(self.anchor)
        return dataclasses.replace(config, d_ff=expansion.width(config.d_ff, self.bundles.values()))


def _open(directory: epath.PathLike) -> _Source:
    home = epath.Path(directory)
    if manifest_lib.kind(home) == "anchor":
        return _Source(store.open_anchor(home), {}, 1, mixture=False, calibrated=[])
    model = models.effective(models.open_model(home))
    return _Source(model.anchor, model.bundles, model.manifest["top_k"], True, sorted(model.manifest["calibration"]))


def export_folder(
    source: epath.PathLike, target: epath.PathLike, bias: str | None = None, sample_file: epath.PathLike | None = None
) -> dict[str, Any]:
    """Converts an anchor (to OLMo-2) or a merged model (to FlexOlmo) to a Hugging Face folder; returns a report.

    Args:
      source: directory of an anchor or a model.
      target: new or empty directory; `config.json` is written last of all files.
      bias: what becomes of router biases, which Hugging Face cannot hold: "fold" or "drop"; None refuses them.
      sample_file: text on which the report says what that changes; None: a built-in paragraph.

    Raises:
      ConfigError: biases without `bias`, or routers with a memory. IntegrityError: bytes are not those of a manifest.
      StorageError: a file cannot be read or written.
    """
    if bias not in (None, "fold", "drop"):
        raise errors.ConfigError(f"--bias={bias} must be fold or drop")
    if sample_file is not None and bias is None:
        raise errors.ConfigError("--sample is the text on which --bias=fold or --bias=drop is compared; give that flag too")
    opened = _open(source)
    anchor = opened.anchor
    if opened.mixture and opened.config.router_memory:
        raise errors.ConfigError(
            f"{source}: its routers have a memory (model.router_memory={opened.config.router_memory}), for which Hugging Face "
            "has no place; experts trained beside an anchor without one can be exported"
        )
    routers, report = _routers(opened, bias, sample_file) if opened.mixture else (None, {})
    roundings = {name: expansion.Rounding() for name, bundle in opened.bundles.items() if expansion.rank(bundle)}
    planned, left_out = _plan(opened, routers, roundings)
    with io.fresh_folder(target) as home:
        files = io.write_folder(home, planned)
        training = anchor.manifest["training"]
        window = training.get("seq_len", huggingface_config.DEFAULT_POSITIONS)
        record = {**_token_ids(anchor), "max_position_embeddings": window, **training.get("huggingface", {})}
        described = huggingface_config.Description(
            opened.config, len(opened.names) if opened.mixture else 0, opened.top_k, record
        )
        contents = huggingface_config.contents(described, anchor.manifest["tensors"]["embed/embedding"]["dtype"])
        if anchor.manifest["tokenizer"]:
            contents = {**_copy_tokenizer(anchor, home, record), **contents}
        for name, content in contents.items():  # config.json is the last
            (home / name).write_text(huggingface_config.encode(content))
    return {
        "kind": "model" if opened.mixture else "anchor",
        "experts": list(opened.names),
        "top_k": opened.top_k,
        "tensors": len(planned),
        "bytes": sum(tensor.nbytes for tensor in planned),
        "files": files,
        "left_out": left_out,
        **_sizes(opened, roundings),
        **report,
    }


def _sizes(opened: _Source, roundings: Mapping[str, expansion.Rounding]) -> dict[str, Any]:
    """The one width, whose experts were expanded or padded to it, and what rounding took from what they add."""
    width, public = opened.config.d_ff, store.config_of(opened.anchor).d_ff
    widths = {config_lib.PUBLIC: public} | {name: bundle.manifest["d_ff"] for name, bundle in opened.bundles.items()}
    return {
        "width": width,
        "expanded": {
            name: {
                "rank": expansion.rank(opened.bundles[name]),
                "dtype": expansion.dtype(opened.anchor, opened.bundles[name], links.GATE),
                "rounding": rounding.share,
            }
            for name, rounding in sorted(roundings.items())
        },
        "padded": {name: widths[name] for name in opened.names if widths[name] < width},
    }


def _routers(opened: _Source, bias: str | None, sample_file: epath.PathLike | None) -> tuple[np.ndarray, dict[str, Any]]:
    """The router matrices [L, E, D] in the dtype they are written in, and what taking the biases out changes."""
    anchor, bundles = opened.anchor, opened.bundles
    before = biasless.routers_of(anchor, bundles)
    dtypes = {source.manifest["tensors"][links.ROW]["dtype"] for source in (anchor, *bundles.values())}
    dtype = np.dtype(dtypes.pop() if len(dtypes) == 1 else "float32")
    if not before.biases.any():
        return before.rows.astype(dtype), {}
    if bias is None:
        biased = [name for name, values in zip(opened.names, before.biases.T, strict=True) if values.any()]
        raise errors.ConfigError(
            f"{anchor.directory.parent}: experts {', '.join(biased)} have a router bias, for which Hugging Face has no place; "
            "give --bias=fold (into the rows) or --bias=drop"
        )
    config = store.config_of(anchor)
    tokenizer = store.tokenizer(anchor) if anchor.manifest["tokenizer"] else None
    sample = biasless.sample_tokens(sample_file, tokenizer, config.vocab_size)
    after, fitted = biasless.fold(anchor, before, sample) if bias == "fold" else (before.dropped(), {})
    stored = after.rows.astype(dtype)
    after = dataclasses.replace(after, rows=stored.astype(np.float32))
    return stored, {
        "bias": {
            "method": bias,
            "calibrated": opened.calibrated,
            **fitted,
            **biasless.compare(anchor, bundles, before, after, opened.top_k, sample),
        }
    }


def _plan(
    opened: _Source, routers: np.ndarray | None, roundings: Mapping[str, expansion.Rounding]
) -> tuple[list[io.Planned], list[str]]:
    """What is to be written, and which of our tensors have no counterpart and are meant to have none.

    Raises:
      IntegrityError: a tensor of ours would be lost.
    """
    anchor, planned = opened.anchor, []
    sources = [opened.bundles.get(name, anchor) for name in opened.names]
    used = {(source.label, links.ROW) for source in sources if routers is not None}
    for link in links.table(opened.config, len(sources) if opened.mixture else 0):
        source = sources[link.expert or 0]
        pieces: Callable[[], Iterable[np.ndarray]]
        if link.path in links.FFN:
            dtype = expansion.dtype(anchor, source, link.path)
            pieces = functools.partial(_read_ffn, anchor, source, link, roundings.get(opened.names[link.expert or 0]))
            used |= {(source.label, path) for path in expansion.tensors(source, link.path)}
        elif routers is not None and link.layer is not None and link.path == links.ROW:
            dtype, pieces = routers.dtype.name, functools.partial(iter, [routers[link.layer]])
        else:
            dtype, pieces = source.manifest["tensors"][link.path]["dtype"], functools.partial(_read, source, link)
            used.add((source.label, link.path))
        planned.append(io.Planned(link.name, dtype, link.shape, pieces))
    left_out = []
    for source in sources:
        for path in source.manifest["tensors"]:
            if (source.label, path) in used:
                continue
            if path not in (links.ROW, links.BIAS) and not path.startswith(("statistics/", "shared/")):
                raise errors.IntegrityError(
                    f"{source.label}: tensor {path} has no place in Hugging Face's format; not exported"
                )
            left_out.append(path if source is anchor else f"{source.manifest['name']}/{path}")
    return planned, left_out


def _read_ffn(
    anchor: store.Artefact, source: store.Artefact, link: links.Link, rounding: expansion.Rounding | None
) -> Iterator[np.ndarray]:
    """One layer's FFN matrix, expanded or padded where the expert is smaller."""
    ours = expansion.matrix(anchor, source, link.path, link.layer or 0, link.ours, rounding)
    yield next(io.transposed(lambda: [ours], link.shape[0], link.shape[1], link.shape[0]))


def _read(source: store.Artefact, link: links.Link) -> Iterator[np.ndarray]:
    """The elements of a Hugging Face tensor, from our slices."""
    if link.layer is not None:
        ours = source.slice_at(link.path, link.layer)[0]
        yield next(io.transposed(lambda: [ours], link.shape[0], link.shape[1], link.shape[0])) if link.transposed else ours
    elif link.transposed:
        row_bytes = link.shape[1] * np.dtype(source.manifest["tensors"][link.path]["dtype"]).itemsize
        at_once = max(1, io.BLOCK_BYTES // row_bytes)
        yield from io.transposed(lambda: source.slices_of(link.path), link.shape[0], link.shape[1], at_once)
    else:
        yield from source.slices_of(link.path)


def _token_ids(anchor: store.Artefact) -> dict[str, Any]:
    """Special ids for a model that was not imported: its tokenizer's EOS."""
    if "huggingface" in anchor.manifest["training"] or not anchor.manifest["tokenizer"]:
        return {}
    return {"eos_token_id": store.tokenizer(anchor).eos_id}


def _copy_tokenizer(anchor: store.Artefact, home: epath.Path, record: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """Copies the tokenizer; for a `tokenizer.json`, returns the config by which transformers loads it."""
    path, data = anchor.directory / anchor.manifest["tokenizer"]["file"], store.tokenizer_bytes(anchor)
    (home / path.name).write_bytes(data)
    if path.suffix != ".json":
        return {}
    names = {entry["id"]: entry["content"] for entry in io.parse_json(data, path).get("added_tokens", [])}
    special = {name: record.get(f"{name}_id") for name in ("bos_token", "eos_token", "pad_token")}
    return {
        TOKENIZER_CONFIG: {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "clean_up_tokenization_spaces": False,
            **{name: names[i] for name, i in special.items() if isinstance(i, int) and i in names},
        }
    }
