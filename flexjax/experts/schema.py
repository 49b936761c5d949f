"""Which tensors an anchor or a bundle holds, and of what shape: derived from the model's shapes, never read from a file."""

import dataclasses
import functools
import re
import types
from collections.abc import Mapping
from typing import Any

from flexjax import config as config_lib
from flexjax import errors, tree
from flexjax.experts import provenance, slices
from flexjax.model import transformer

SHARED = re.compile(r"shared(/[a-z0-9_]+){1,8}")  # a shared leaf that a bundle carries
MOST_DIMENSIONS = 4
ENTRY = {"dtype", "shape", "slices", "max", "rms"}  # what a manifest says of a tensor


def shared_shapes(config: config_lib.ModelConfig) -> dict[str, tuple[int, ...]]:
    """Paths and shapes of a model's shared tree."""
    return dict(_shared_shapes(*dataclasses.astuple(config)))


@functools.lru_cache
def _shared_shapes(*fields: Any) -> dict[str, tuple[int, ...]]:
    config = config_lib.ModelConfig(*fields)
    dense = transformer.Architecture(config, transformer.dense_banks(config))
    shapes = {path: leaf.shape for path, leaf in tree.flatten(transformer.abstract(dense)).items()}
    return {path: shape for path, shape in shapes.items() if not path.startswith("experts/")}


def expert_shapes(layers: int, d: int, d_ff: int, biased: bool, rank: int = 0) -> dict[str, tuple[int, ...]]:
    """Paths and shapes of one expert of a model of so many layers and d_model `d`, on disk.

    With a rank, the two factors a [L, ., r] and b [L, r, .] of what it adds to each public matrix.
    """
    shapes: dict[str, tuple[int, ...]] = {"expert/router/row": (layers, d)}
    for name, (inside, outside) in {"gate": (d, d_ff), "up": (d, d_ff), "down": (d_ff, d)}.items():
        if rank:
            shapes |= {f"expert/ffn/{name}/a": (layers, inside, rank), f"expert/ffn/{name}/b": (layers, rank, outside)}
        else:
            shapes[f"expert/ffn/{name}"] = (layers, inside, outside)
    return shapes | ({"expert/router/bias": (layers,)} if biased else {})


def statistics_shapes(config: config_lib.ModelConfig) -> dict[str, tuple[int | None, ...]]:
    """Paths and shapes of what an anchor may hold beside its weights; None is any length."""
    return {
        "statistics/states": (config.num_layers, None, config.d_model),
        "statistics/projection": (None, config.d_model),
    }


def stated_shape(declared: Mapping[str, Any], label: str) -> tuple[int, int]:
    """Layers and d_model as a bundle itself states them, for looking at it without its anchor."""
    try:
        layers, d_model = (int(size) for size in declared["expert/router/row"]["shape"])
    except (KeyError, TypeError, ValueError):
        raise errors.IntegrityError(f"{label}: the manifest has no sound entry of tensor expert/router/row") from None
    if not (0 < layers <= 2**12 and 0 < d_model <= 2**20):
        raise errors.IntegrityError(f"{label}: {layers} layers of width {d_model} are not plausible")
    return layers, d_model


def stated_shared(declared: Mapping[str, Any], label: str) -> dict[str, tuple[None, ...]]:
    """Paths of the shared leaves that a bundle itself states, each of as many dimensions as it says, of any length."""
    found: dict[str, tuple[None, ...]] = {}
    for path, entry in declared.items():
        if SHARED.fullmatch(path):
            shape = entry.get("shape") if isinstance(entry, dict) else None
            if not isinstance(shape, list) or not 0 < len(shape) <= MOST_DIMENSIONS:
                raise errors.IntegrityError(
                    f"{label}: the manifest has no sound entry of tensor {path[:80]}: it must hold a shape of 1 to "
                    f"{MOST_DIMENSIONS} dimensions"
                )
            found[path] = (None,) * len(shape)
    return found


def check(
    declared: Mapping[str, Any],
    label: str,
    expected: Mapping[str, tuple[int, ...]],
    optional: Mapping[str, tuple[int | None, ...]] = types.MappingProxyType({}),
) -> None:
    """Compares the tensors that a manifest declares with our own schema, before any of them is opened.

    Raises:
      IntegrityError: names the tensor that is missing, unexpected, or of another shape, dtype or number of slices.
    """
    for path in sorted(set(declared) - set(expected) - set(optional)):
        raise errors.IntegrityError(f"{label}: unexpected tensor '{path[:80]}'")
    for path in sorted(set(expected) - set(declared)):
        raise errors.IntegrityError(f"{label}: tensor {path} is missing; expected shape {list(expected[path])}")
    for path, entry in sorted(declared.items()):
        _check_entry(f"{label}: tensor {path}", path, entry, {**optional, **expected}[path])


def _check_entry(label: str, path: str, entry: Any, shape: tuple[int | None, ...]) -> None:
    """Checks dtype, shape and slices that a manifest states for one tensor; None in `shape` is any length up to 2**24."""
    if not isinstance(entry, dict) or set(entry) != ENTRY or str(entry["dtype"]) not in slices.ITEMSIZE:
        raise errors.IntegrityError(
            f"{label}: its entry must hold a dtype of {', '.join(slices.ITEMSIZE)}, shape, slices, max and rms"
        )
    for size in ("max", "rms"):
        if not provenance.number(entry[size]) or entry[size] < 0:
            raise errors.IntegrityError(
                f"{label}: its {size} is {str(entry[size])[:20]}, expected a finite number of at least 0"
            )
    stated, digests = entry["shape"], entry["slices"]
    if not (
        isinstance(stated, list)
        and len(stated) == len(shape)
        and all(
            type(size) is int and 0 < size <= 2**24 and wanted in (None, size)
            for size, wanted in zip(stated, shape, strict=True)
        )
    ):
        raise errors.IntegrityError(f"{label} has shape {str(stated)[:80]}, expected {list(shape)}")
    count = slices.slice_count(path, tuple(stated), slices.ITEMSIZE[entry["dtype"]])
    if (
        not isinstance(digests, list)
        or len(digests) != count
        or not all(isinstance(digest, str) and provenance.DIGEST.fullmatch(digest) for digest in digests)
    ):
        raise errors.IntegrityError(f"{label} must have {count} slices, each with its digest")
