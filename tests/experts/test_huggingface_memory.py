"""Conversion is streamed: peak memory stays below 2 GB for a folder that is larger."""

import json
import os
import pathlib
import subprocess
import sys

import numpy as np
import pytest
from etils import epath

from flexjax.experts import manifest as manifest_lib
from flexjax.experts import models, publishing
from flexjax.experts.huggingface import config as huggingface_config
from flexjax.experts.huggingface import links
from flexjax.experts.huggingface import safetensors_io as io

ROOT = pathlib.Path(__file__).parents[2]
LIMIT = 2_000_000_000
MEASURE = """
import resource, subprocess, sys
code = subprocess.run([sys.executable, "-m", "flexjax.convert", *sys.argv[1:]], stdout=subprocess.DEVNULL).returncode
print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024)
sys.exit(code)
"""


def write_random(folder: epath.Path, config: dict, dtype: str) -> int:
    """Writes a folder of seeded random tensors without holding any of them; returns its bytes."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    described = huggingface_config.read_config(folder)
    block = np.random.default_rng(0).standard_normal(2**22, np.float32).astype(dtype)

    def planned(index: int, link: links.Link) -> io.Planned:
        size = int(np.prod(link.shape))

        def pieces():
            for start in range(0, size, block.size):
                yield np.roll(block, 997 * index + start // block.size)[: size - start]

        return io.Planned(link.name, dtype, link.shape, pieces)

    tensors = [planned(i, link) for i, link in enumerate(links.table(described.model, described.experts))]
    io.write_folder(folder, tensors)
    return sum(tensor.nbytes for tensor in tensors)


def convert(*arguments: str) -> int:
    """Runs the converter in a process of its own; returns its peak resident memory."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": "", "JAX_PLATFORMS": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *arguments], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return int(done.stdout)


def same(left: epath.Path, right: epath.Path) -> bool:
    """Whether two folders hold the same tensors, bit for bit."""
    one, two = io.read_folder(left), io.read_folder(right)
    return one.keys() == two.keys() and all(_equal(one[name], two[name]) for name in one)


def _equal(one: io.Stored, two: io.Stored) -> bool:
    if (one.shape, one.dtype) != (two.shape, two.dtype):
        return False
    count = int(np.prod(one.shape[:-1]))
    pairs = zip(one.rows(0, count), two.rows(0, count), strict=True)
    return all(a.tobytes() == b.tobytes() for a, b in pairs)


def with_bias(source: epath.Path, target: epath.Path) -> None:
    """Moves an imported model to `target` with a bias on every expert."""
    model = models.open_model(source)
    target.mkdir()
    bundles = {}
    for name, bundle in model.bundles.items():
        layers = model.anchor.manifest["model"]["num_layers"]

        def put(writer, bundle=bundle, layers=layers):
            for path, entry in bundle.manifest["tensors"].items():
                pieces = [np.full(layers, -0.5, np.float32)] if path == links.BIAS else bundle.slices_of(path)
                writer.put(path, entry["dtype"], tuple(entry["shape"]), pieces)

        new = publishing.stream_bundle(target / "new", name, model.anchor, bundle.manifest["d_ff"], put, {})
        (target / "experts").mkdir(exist_ok=True)
        new.directory.rename(target / "experts" / new.manifest["digest"])
        bundles[name] = new
    (source / "anchor").rename(target / "anchor")
    manifest_lib.write(target, models.describe(model.anchor, bundles, model.manifest["top_k"]))


@pytest.mark.slow
def test_two_gigabytes_each_way(tmp_path):
    home = epath.Path(tmp_path)
    config = {
        "architectures": ["FlexOlmoForCausalLM"],
        "vocab_size": 100352,
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 1,
        "num_attention_heads": 16,
        "num_experts": 3,
        "num_experts_per_tok": 2,
    }
    assert write_random(home / "hf", config, "float32") > LIMIT
    assert convert("import", f"--from={home / 'hf'}", f"--to={home / 'ours'}") < LIMIT
    assert convert("export", f"--from={home / 'ours'}", f"--to={home / 'back'}") < LIMIT
    assert same(home / "hf", home / "back")
    with_bias(home / "ours", home / "biased")
    assert convert("export", f"--from={home / 'biased'}", f"--to={home / 'folded'}", "--bias=fold") < LIMIT
