"""Smaller experts out of larger ones, one matrix of one layer at a time.

- Rank: W = W_public + a @ b, where a @ b is the best approximation of W - W_public by a matrix of that rank (Eckart and
  Young). An expert that has a rank already is cut without being expanded, in a small part of the time, and loses nothing by
  the detour: the best rank 64 of the best rank 256 is the best rank 64.
- Width: the hidden units of largest |gate| |up| |down| in each layer stay, as in `surgery.narrow`, bit for bit.

The router row, its bias and everything else of a bundle stay as they are. What was measured on the larger expert (evaluation,
margins) is not claimed for the smaller one.
"""

import contextlib
import dataclasses
import functools
import math
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from typing import IO, Any

import numpy as np
from etils import epath

from flexjax import config as config_lib
from flexjax import errors, sharding, storage
from flexjax.data import tokens
from flexjax.eval import bits_per_byte
from flexjax.experts import loading, provenance, publishing, slices, store
from flexjax.experts import manifest as manifest_lib
from flexjax.governance import truncation

FFN = ("gate", "up", "down")
DEFAULT_SEQ_LEN = 1024


def compress(
    anchor: store.Artefact,
    bundle: store.Artefact,
    target: epath.PathLike,
    rank: int | None = None,
    width: int | None = None,
) -> dict[str, Any]:
    """Writes a smaller, unsigned form of an expert to a new directory; returns a report that JSON can hold.

    Args:
      anchor: the one that the expert was trained on.
      bundle: the expert, opened against the anchor's shapes; it stays as it is.
      target: new or empty directory.
      rank: of the low-rank form; from 1 to min(d_model, d_ff), and to the rank that it has.
      width: hidden units of the narrower form, from 1 to what it has.

    Raises:
      ConfigError: not one of rank and width, or a size that this expert cannot shrink to. IntegrityError: bytes are not
      those of a manifest, not finite, or the expert belongs to another anchor. StorageError: a file cannot be read or written.
    """
    manifest = bundle.manifest
    if manifest["anchor"] != anchor.manifest["digest"]:
        raise errors.IntegrityError(f"{bundle.label} was trained on anchor {manifest['anchor'][:12]}, not on {anchor.label}")
    by = _check(anchor, bundle, rank, width)
    losses = {kind: truncation.Loss() for kind in FFN}
    stated = dataclasses.replace(
        provenance.of(manifest), evaluation={}, margins=None, parent={"digest": manifest["digest"], "by": f"compress {by}"}
    )

    def put(writer: slices.TensorWriter) -> None:
        if rank is not None:
            for kind, loss in losses.items():
                _put_factors(writer, anchor, bundle, kind, rank, loss)
        else:
            _put_columns(writer, bundle, int(width or 0), losses)
        for path, entry in manifest["tensors"].items():
            if not path.startswith("expert/ffn/"):
                pieces = map(functools.partial(_read, bundle, path), range(len(entry["slices"])))
                writer.put(path, entry["dtype"], tuple(entry["shape"]), pieces)

    with _begun(epath.Path(target)):
        name, d_ff, facts = manifest["name"], width or manifest["d_ff"], manifest["training"]
        small = publishing.stream_bundle(target, name, anchor, d_ff, put, facts, rank=rank or 0, provenance=stated)
    relative_to = "the difference to the public matrix" if rank is not None else "the matrix"
    return _report(bundle, small, by, relative_to, losses)


@contextlib.contextmanager
def _begun(target: epath.Path) -> Iterator[None]:
    """A directory that is emptied of what was begun, unless somebody else has finished an artefact there meanwhile."""
    manifest_lib.check_free(target)  # what is there is never deleted
    try:
        yield
    except errors.FlexjaxError:
        files = storage.files(target)  # in a bucket, only these generations are deleted
        if not storage.exists(target / manifest_lib.FILE):
            storage.delete(target, files)
        raise


def _report(
    bundle: store.Artefact, small: store.Artefact, by: str, relative_to: str, losses: Mapping[str, truncation.Loss]
) -> dict[str, Any]:
    return {
        "name": bundle.manifest["name"],
        "by": by,
        "source": bundle.manifest["digest"],
        "digest": small.manifest["digest"],
        "size": {"before": _size(bundle), "after": _size(small)},
        "bytes": {"before": bundle.nbytes, "after": small.nbytes},
        "parameters": {"before": _parameters(bundle), "after": _parameters(small)},
        "relative_to": relative_to,
        "matrices": {kind: loss.summary() for kind, loss in losses.items()},
    }


def _check(anchor: store.Artefact, bundle: store.Artefact, rank: int | None, width: int | None) -> str:
    """Raises ConfigError for a size that the expert cannot shrink to; returns the size in words."""
    name, d_ff, held = bundle.manifest["name"], bundle.manifest["d_ff"], bundle.manifest["rank"]
    if (rank is None) == (width is None):
        raise errors.ConfigError("compress needs one size of the smaller expert: give either --rank or --width")
    config = store.config_of(anchor)
    if width is not None:
        if held:
            raise errors.ConfigError(f"--width={width}: expert '{name}' is of rank {held}, it has no width; give --rank")
        if type(width) is not int or not 1 <= width <= d_ff:
            raise errors.ConfigError(f"--width={width} must lie between 1 and the {d_ff} hidden units of expert '{name}'")
        return f"width {width}"
    if not held and d_ff != config.d_ff:
        raise errors.ConfigError(
            f"--rank={rank}: expert '{name}' has {d_ff} hidden units and public {config.d_ff}, so there is no "
            "difference of the two; give --width"
        )
    most = held or min(config.d_model, config.d_ff)
    if type(rank) is not int or not 1 <= rank <= most:
        what = f"the rank {held} of expert '{name}'" if held else f"{most}, the rank of its matrices"
        raise errors.ConfigError(f"--rank={rank} must lie between 1 and {what}")
    return f"rank {rank}"


def _size(bundle: store.Artefact) -> str:
    rank = bundle.manifest["rank"]
    return f"rank {rank}" if rank else f"width {bundle.manifest['d_ff']}"


def _parameters(bundle: store.Artefact) -> int:
    return sum(math.prod(entry["shape"]) for entry in bundle.manifest["tensors"].values())


def _read(source: store.Artefact, path: str, index: int) -> np.ndarray:
    """One slice, checked, in its own dtype."""
    rows = source.slice_at(path, index)
    store.check_content(path, rows, source.label)
    return rows


def _put_factors(
    writer: slices.TensorWriter, anchor: store.Artefact, bundle: store.Artefact, kind: str, rank: int, loss: truncation.Loss
) -> None:
    """Writes a and b of one kind of matrix; while the layers of a are written, those of b wait in a temporary file."""
    layers, path, held = store.config_of(anchor).num_layers, f"expert/ffn/{kind}", bundle.manifest["rank"]
    entries = [bundle.manifest["tensors"][path + part] for part in (("/a", "/b") if held else ("", ""))]
    (rows, columns), dtypes = (entries[0]["shape"][1], entries[1]["shape"][2]), [entry["dtype"] for entry in entries]
    with _temporary_file() as waiting:

        def lefts() -> Iterator[np.ndarray]:
            for layer in range(layers):
                if held:
                    a, b = _recut(bundle, path, layer, rank, dtypes, loss)
                else:
                    a, b = _cut(anchor, bundle, path, layer, rank, dtypes, loss)
                waiting.write(b.tobytes())
                yield a[None]

        writer.put(f"{path}/a", dtypes[0], (layers, rows, rank), lefts())
        waiting.seek(0)
        size = rank * columns * np.dtype(dtypes[1]).itemsize
        rights = (np.frombuffer(waiting.read(size), dtypes[1]).reshape(1, rank, columns) for _ in range(layers))
        writer.put(f"{path}/b", dtypes[1], (layers, rank, columns), rights)


@contextlib.contextmanager
def _temporary_file() -> Iterator[IO[bytes]]:
    try:
        with tempfile.TemporaryFile() as file:
            yield file
    except OSError as error:
        raise errors.StorageError(
            f"cannot write a temporary file in {tempfile.gettempdir()}: {error.strerror or error}; free space or set TMPDIR"
        ) from None


def _cut(
    anchor: store.Artefact,
    bundle: store.Artefact,
    path: str,
    layer: int,
    rank: int,
    dtypes: Sequence[str],
    loss: truncation.Loss,
) -> tuple[np.ndarray, np.ndarray]:
    """Factors of what a full expert adds to the public matrix."""
    delta = _read(bundle, path, layer)[0].astype(np.float32)
    delta -= _read(anchor, path, layer)[0].astype(np.float32)
    store.check_content(path, delta, bundle.label)
    a, b = (factor.astype(dtype) for factor, dtype in zip(truncation.truncate(delta, rank), dtypes, strict=True))
    loss.add(*truncation.squares(delta, a, b))
    return a, b


def _recut(
    bundle: store.Artefact, path: str, layer: int, rank: int, dtypes: Sequence[str], loss: truncation.Loss
) -> tuple[np.ndarray, np.ndarray]:
    """Factors of lower rank of the product that an expert holds."""
    left, right = (_read(bundle, f"{path}/{part}", layer)[0].astype(np.float64) for part in "ab")
    found = truncation.truncate_product(left, right, rank)
    a, b = (factor.astype(dtype) for factor, dtype in zip(found, dtypes, strict=True))
    rest = np.hstack([left, -a.astype(np.float64)]), np.vstack([right, b.astype(np.float64)])
    loss.add(truncation.square(left, right), max(0.0, truncation.square(*rest)))
    return a, b


def _put_columns(
    writer: slices.TensorWriter, bundle: store.Artefact, width: int, losses: Mapping[str, truncation.Loss]
) -> None:
    """Writes the strongest hidden units: which they are is found in one pass, and a second one copies them."""
    layers = bundle.manifest["tensors"]["expert/ffn/gate"]["shape"][0]
    kept = [_strongest(bundle, layer, width) for layer in range(layers)]
    for kind, loss in losses.items():
        path, axis = f"expert/ffn/{kind}", 1 if kind == "down" else 2
        entry = bundle.manifest["tensors"][path]
        shape = [*entry["shape"]]
        shape[axis] = width

        def chosen(path: str = path, axis: int = axis, loss: truncation.Loss = loss) -> Iterator[np.ndarray]:
            for layer in range(layers):
                whole = _read(bundle, path, layer)
                part = np.take(whole, kept[layer], axis=axis)
                squares = [float(np.square(values.astype(np.float32)).sum(dtype=np.float64)) for values in (whole, part)]
                loss.add(squares[0], max(0.0, squares[0] - squares[1]))
                yield part

        writer.put(path, entry["dtype"], tuple(shape), chosen())


def _strongest(bundle: store.Artefact, layer: int, width: int) -> np.ndarray:
    """Indices of the hidden units that stay in a layer, ascending; ties as `surgery.narrow` breaks them."""
    strength: Any = np.float32(1)
    for kind in FFN:
        values = _read(bundle, f"expert/ffn/{kind}", layer).astype(np.float32)
        strength = strength * np.linalg.norm(values, axis=2 if kind == "down" else 1)
    return np.sort(np.argsort(-strength[0], kind="stable")[:width])


def score(
    anchor: store.Artefact,
    bundle: store.Artefact,
    texts: Mapping[str, Sequence[epath.Path]],
    *,
    seq_len: int | None = None,
    batch_size: int = 16,
    max_bytes: int = 0,
    data: config_lib.DataConfig | None = None,
) -> dict[str, dict[str, float]]:
    """Bits per byte of texts, as a manifest's `evaluation` holds them: of the expert beside public, and of the anchor alone.

    An expert that carries shared leaves is scored with them in the place of the anchor's; the anchor is then read again.

    Args:
      anchor, bundle: the pair that is scored; call it with the larger and with the smaller expert.
      texts: files by domain.
      seq_len: window in tokens; None: what the anchor was trained with.
      batch_size: windows at once.
      max_bytes: of each text; 0: all.
      data: how the files are read; None: the defaults.

    Raises:
      ConfigError: the anchor has no tokenizer. DataError: a text cannot be read. IntegrityError: bytes are not those of a
      manifest.
    """
    name, config = bundle.manifest["name"], store.config_of(anchor)
    tokenizer = store.tokenizer(anchor)
    window = seq_len or anchor.manifest["training"].get("seq_len", DEFAULT_SEQ_LEN)
    theirs = dataclasses.replace(anchor, instead=_carried(bundle))
    settings = data or config_lib.DataConfig()
    scorer = None
    found: dict[str, dict[str, float]] = {domain: {} for domain in texts}
    with tempfile.TemporaryDirectory() as cache:
        sources = {
            domain: tokens.tokenize(list(paths), tokenizer, settings, config.vocab_size, epath.Path(cache) / str(number))
            for number, (domain, paths) in enumerate(texts.items())
        }
        for what, holder, names in (("bits_per_byte", theirs, None), ("anchor", anchor, [config_lib.PUBLIC])):
            if scorer is None or theirs.instead:
                scorer = None  # one model in memory at a time
                architecture, params = loading.load(holder, {name: bundle}, 2, sharding.one_device())
                scorer = bits_per_byte.Scorer(architecture, params, window, batch_size)
                del params
            for domain, source in sources.items():
                found[domain][what] = scorer.score(source, max_bytes, names).bits_per_byte
    return found


def _carried(bundle: store.Artefact) -> dict[str, np.ndarray]:
    """The shared leaves of a bundle, as the anchor names them."""
    leaves = {path: bundle.tensor(f"shared/{path}") for path in store.carried(bundle)}
    for path, leaf in leaves.items():
        store.check_content(path, leaf, bundle.label)
    return leaves


def table(report: Mapping[str, Any]) -> str:
    """The report of `compress` for people, with `evaluation` {"before", "after"} if what `score` found was added to it."""
    size, nbytes, parameters = report["size"], report["bytes"], report["parameters"]
    lines = [
        f"expert '{report['name']}': {size['before']} -> {size['after']}, {nbytes['before'] / 1e6:.3f} -> "
        f"{nbytes['after'] / 1e6:.3f} MB, {parameters['before']} -> {parameters['after']} parameters"
    ]
    if nbytes["after"] >= nbytes["before"]:
        lines.append("this size saves nothing; choose a smaller one")
    lines.append(f"{'matrix':<8} {'error':>10} {'worst':>10} {'in layer':>9} {'kept':>9}   relative to {report['relative_to']}")
    for kind, row in report["matrices"].items():
        lines.append(f"{kind:<8} {row['error']:>10.3e} {row['worst']:>10.3e} {row['worst_layer']:>9} {row['energy']:>9.4%}")
    evaluation = report.get("evaluation", {"before": {}})
    for domain, before in evaluation["before"].items():
        after = evaluation["after"][domain]
        lines.append(
            f"{domain}: {before['bits_per_byte']:.4f} -> {after['bits_per_byte']:.4f} bits per byte, "
            f"{before['anchor']:.4f} without the expert"
        )
    return "\n".join(lines)
