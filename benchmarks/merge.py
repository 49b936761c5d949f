"""What merging costs, and what an expert of each size does: one JSON row a line.

python -m benchmarks.merge --directory=DIR [--layers=5] [--experts=4] >> benchmarks/results/merge.jsonl
python -m benchmarks.merge --directory=DIR --sizes >> benchmarks/results/merge.jsonl

The first merges a model in real 7B layer shapes, grows and shrinks it, beside a plain copy and plain hashing. Weights are
seeded random bytes of bfloat16. Every figure is of one run with a cold page cache; DIR needs three times the size of the model.

The second trains a full expert, one of half the width and low-rank ones beside one anchor (d_model 256, d_ff 704, 4 layers,
built-in corpus) by the main job, and times their steps.
"""

import argparse
import hashlib
import json
import multiprocessing
import os
import pathlib
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import ml_dtypes
import numpy as np

from benchmarks import expert_step, measuring
from flexjax import config as config_lib
from flexjax import presets, tree, workdir
from flexjax.experts import publishing, schema, slices, store


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--directory", required=True)
    parser.add_argument("--layers", type=int, default=5)
    parser.add_argument("--experts", type=int, default=4)
    parser.add_argument("--sizes", action="store_true")
    settings = parser.parse_args()
    home = pathlib.Path(settings.directory)
    if settings.sizes:
        sizes(home)
    else:
        surgery(home, settings.layers, settings.experts)


def surgery(home: pathlib.Path, layers: int, experts: int) -> None:
    """One row for each operation."""
    config = config_lib.ModelConfig(
        vocab_size=100_352, d_model=4096, num_layers=layers, num_heads=32, num_kv_heads=32, head_dim=128, d_ff=11_008
    )
    names = [f"e{number:02d}" for number in range(experts)]
    parts, model = home / "parts", home / "model"
    if not parts.exists():  # in a process of its own, whose memory is not taken for that of the commands
        writer = multiprocessing.get_context("spawn").Process(target=write_parts, args=(parts, config, [*names, "new"]))
        writer.start()
        writer.join()
    shutil.rmtree(model, ignore_errors=True)
    machine = measuring.machine()
    given = [f"--expert={parts / name}" for name in names]
    merged = [parts / "anchor", *(parts / name for name in names)]
    size = sum(file.stat().st_size for part in merged for file in part.rglob("*") if file.is_file())
    rows = [
        {"what": "copy", **cold(merged, lambda: copy(merged, home / "copy"))},
        {"what": "sha256", **cold(merged, lambda: hash_all(merged))},
        {"what": "merge create", **cold(merged, lambda: merge("create", model, f"--anchor={parts / 'anchor'}", *given))},
    ]
    baseline = max(rows[0]["seconds"], rows[1]["seconds"])
    for row in rows:
        row |= {"bytes": size, "gb_per_second": size / row["seconds"] / 1e9, "over_slower_baseline": baseline / row["seconds"]}
    small = sum(file.stat().st_size for file in (parts / "new").rglob("*") if file.is_file())
    rows.append(
        {"what": "merge add", "bytes": small, **cold([parts / "new"], lambda: merge("add", model, f"--expert={parts / 'new'}"))}
    )
    rows.append({"what": "merge remove", "bytes": small, **cold([], lambda: merge("remove", model, "--name=new"))})
    rows.append({"what": "merge verify", "bytes": size, **cold([model], lambda: merge("verify", model))})
    for row in rows:
        print(json.dumps(row | {"layers": layers, "experts": experts} | machine), flush=True)
    shutil.rmtree(model)


def write_parts(parts: pathlib.Path, config: config_lib.ModelConfig, names: list[str]) -> None:
    """An anchor and bundles of seeded random bytes whose exponents are those of small weights."""

    def fill(path: str, shape: tuple[int, ...], seed: int) -> Iterator[np.ndarray]:
        rng = np.random.default_rng([seed, int(tree.sha256(path.encode())[:8], 16)])
        rows = tree.chunk_shape(path, shape, 2)[0]
        for start in range(0, shape[0], rows):
            size = (min(rows, shape[0] - start), *shape[1:])
            bits = np.frombuffer(rng.bytes(2 * int(np.prod(size))), np.uint16)
            values = ((bits & 0x81FF) | 0x3C00).view(ml_dtypes.bfloat16).reshape(size)  # magnitudes of 2^-7 to 2^-3
            yield -np.abs(values) if path.endswith("bias") else values

    def put(shapes: dict[str, tuple[int, ...]], seed: int) -> Callable[[slices.TensorWriter], None]:
        def write(writer: slices.TensorWriter) -> None:
            for path, shape in shapes.items():
                writer.put(path, "bfloat16", shape, fill(path, shape, seed))

        return write

    public = schema.expert_shapes(config.num_layers, config.d_model, config.d_ff, biased=False)
    expert = schema.expert_shapes(config.num_layers, config.d_model, config.d_ff, biased=True)
    shared = put(schema.shared_shapes(config) | public, 0)
    anchor = publishing.write_anchor(parts / "anchor", config, None, shared, rows="random", training={})
    for seed, name in enumerate(names, 1):
        publishing.stream_bundle(parts / name, name, anchor, config.d_ff, put(expert, seed), {})


def cold(paths: list[pathlib.Path], call: Callable[[], dict[str, Any]]) -> dict[str, Any]:
    """Seconds of a call that finds nothing of these directories in the page cache, until its own writes are on disk."""
    os.sync()
    for file in (file for path in paths for file in path.rglob("*") if file.is_file()):
        descriptor = os.open(file, os.O_RDONLY)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
    start = time.perf_counter()
    said = call()
    return {"seconds": time.perf_counter() - start, **said}


def copy(paths: list[pathlib.Path], target: pathlib.Path) -> dict[str, Any]:
    """A plain recursive copy, durable as a merge is."""
    shutil.rmtree(target, ignore_errors=True)
    target.mkdir()
    subprocess.run(["cp", "-r", *map(str, paths), str(target)], check=True)
    workdir.sync_below(target)
    shutil.rmtree(target)
    return {}


def hash_all(paths: list[pathlib.Path]) -> dict[str, Any]:
    """SHA-256 of every file, one after another."""
    for file in (file for path in paths for file in path.rglob("*") if file.is_file()):
        digest = hashlib.sha256()
        with file.open("rb") as opened:
            while block := opened.read(workdir.BLOCK_BYTES):
                digest.update(block)
    return {}


def merge(verb: str, model: pathlib.Path, *flags: str) -> dict[str, Any]:
    """The command, and the largest resident memory of its process, which has no children."""
    process = subprocess.Popen(
        [sys.executable, "-m", "flexjax.merge", verb, f"--model={model}", *flags], stdout=subprocess.DEVNULL
    )
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise SystemExit(f"merge {verb} ended with {process.returncode}")
    return {"peak_rss_mb": usage.ru_maxrss / 1e3, "cpu_seconds": usage.ru_utime + usage.ru_stime}


SHAPES = {"d_model": 256, "d_ff": 704, "num_heads": 8, "num_kv_heads": 8, "head_dim": 32}
FORMS = {
    "full": ("full", 0, 0),
    "half width": ("full", 352, 0),
    "rank 256": ("low_rank", 0, 256),
    "rank 64": ("low_rank", 0, 64),
    "rank 16": ("low_rank", 0, 16),
}


def sizes(home: pathlib.Path) -> None:
    """One row for each form of an expert: state, bytes, FLOPs, time and quality."""
    machine = measuring.machine()
    for name, (kind, d_ff, rank) in FORMS.items():
        directory = home / name.replace(" ", "-")
        form = [f"--config.expert.{field}={value}" for field, value in {"kind": kind, "d_ff": d_ff, "rank": rank}.items()]
        shapes = [f"--config.model.{field}={value}" for field, value in SHAPES.items()]
        steps = ["--config.anchor.train.steps=700", "--config.train.steps=250"]
        anchor = home / "full" / "public" / "anchor"
        given = [f"--config.anchor.path={anchor}"] if anchor.exists() else []
        job = [sys.executable, "-m", "flexjax.main", "--config=configs/math_expert.py", f"--workdir={directory}"]
        subprocess.run([*job, *form, *shapes, *steps, *given], check=True, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        bundle = store.open_bundle(directory / "expert", store.config_of(store.open_anchor(anchor)))
        config = presets.base("quickstart")
        config.phase, config.train = "expert", presets.expert_training("quickstart")
        for field, value in SHAPES.items():
            setattr(config.model, field, value)
        config.expert.kind, config.expert.d_ff, config.expert.rank = kind, d_ff, rank
        row: dict[str, Any] = {"what": f"expert, {name}", **expert_step.measure(config), "bundle_bytes": bundle.nbytes}
        for domain, score in bundle.manifest["evaluation"].items():
            row |= {f"{domain} bits per byte": score["bits_per_byte"], f"{domain} anchor": score["anchor"]}
        print(json.dumps(row | machine), flush=True)


if __name__ == "__main__":
    main()
