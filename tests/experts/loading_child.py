"""One of several processes that read a merged model onto their devices; it prints what that took, and compares the bytes.

python -m tests.experts.loading_child MODEL MESH WAY [COORDINATOR COUNT INDEX]
"""

import json
import pathlib
import re
import sys
import time

import jax
import numpy as np

from flexjax import config as config_lib
from flexjax import distributed, errors, sharding, storage, tree
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import models, publishing, schema
from flexjax.model import placement

CONFIG = config_lib.ModelConfig(vocab_size=4096, d_model=512, num_layers=6, num_heads=8, num_kv_heads=8, head_dim=64, d_ff=2048)
WIDTHS = {"public": 2048, "a": 2048, "b": 2048, "c": 2048, "d": 2048, "narrow": 1024}


def noise(owner, path, index, shape):
    """The values of one slice: of a layer, or of all rows."""
    seed = int(tree.sha256(f"{owner} {path} {index}".encode())[:8], 16)
    values = np.random.default_rng(seed).standard_normal(shape, np.float32)
    return -np.abs(values) if path.endswith("bias") else values


def tensor(owner, path, shape):
    if not tree.is_stacked(path):
        yield noise(owner, path, 0, shape)
    else:
        yield from (noise(owner, path, layer, (1, *shape[1:])) for layer in range(shape[0]))


def write(directory):
    """A merged model of noise, without having it in memory."""

    def put(owner, shapes):
        return lambda writer: [writer.put(path, "float32", shape, tensor(owner, path, shape)) for path, shape in shapes.items()]

    def of_expert(name):
        return schema.expert_shapes(CONFIG.num_layers, CONFIG.d_model, WIDTHS[name], biased=name != "public")

    home = manifest_lib.fresh(directory)
    shapes = schema.shared_shapes(CONFIG) | of_expert("public")
    anchor = publishing.write_anchor(home / "anchor", CONFIG, None, put("public", shapes), rows="random", training={})
    bundles = {}
    for name in sorted(set(WIDTHS) - {"public"}):
        part = home / "experts" / name
        bundle = publishing.stream_bundle(part, name, anchor, WIDTHS[name], put(name, of_expert(name)), {})
        part.rename(home / "experts" / bundle.manifest["digest"])
        bundles[name] = bundle
    manifest_lib.write(home, models.describe(anchor, bundles, 2), generation=0)
    return models.open_model(home)


def expected(path, index, shape, banks):
    """What a leaf holds at an index, layer by layer; slots without an expert are 0."""
    starts = [part.start or 0 for part in index]
    stops = [size if part.stop is None else part.stop for part, size in zip(index, shape, strict=True)]
    if not path.startswith("experts/"):
        rows = list(tensor("public", path, shape))
        return np.concatenate(rows)[index]
    _, bank, rest = path.split("/", 2)
    names = {found.name: found.experts for found in banks}[bank]
    values = np.zeros([stop - start for start, stop in zip(starts, stops, strict=True)], np.float32)
    for slot, name in enumerate(names[starts[1] : stops[1]], 0):
        if rest.endswith("bias") and name == "public":
            continue
        for layer in range(starts[0], stops[0]):
            row = noise(name, f"expert/{rest}", layer, (1, *shape[2:]))
            values[layer - starts[0], slot] = row[0][index[2:]]
    return values


def memory(field):
    """MB by /proc/self/status."""
    return int(re.search(rf"{field}:\s+(\d+)", pathlib.Path("/proc/self/status").read_text())[1]) / 1024


def measured(model, mesh, way):
    """The model on the mesh, and what that took: seconds, MB read from files, MB of memory before and at most."""
    read = [0]

    def counted(path, size, root=None, original=storage.read):
        data = original(path, size, root)
        read[0] += len(data)
        return data

    storage.read = counted
    distributed.barrier("begin")
    pathlib.Path("/proc/self/clear_refs").write_text("5")  # the peak begins here
    before, began = memory("VmRSS"), time.monotonic()
    if way == "shared":
        architecture, params = models.load(model, mesh=mesh)
    else:
        architecture, params = models.load(model)
        params = placement.place(params, architecture, mesh)
    jax.block_until_ready(params)
    seconds = time.monotonic() - began
    held = sum(s.data.nbytes for leaf in jax.tree.leaves(params) for s in leaf.addressable_shards)
    return architecture, params, {
        "seconds": round(seconds, 1),
        "read": round(read[0] / 1e6, 1),
        "before": round(before),
        "peak": round(memory("VmHWM")),
        "held": round(held / 1e6),
    }  # fmt: skip


def run(directory, sizes, way):
    model = models.open_model(directory)
    mesh = sharding.make_mesh(config_lib.MeshConfig(**json.loads(sizes)))
    architecture, params, facts = measured(model, mesh, way)
    print(json.dumps(facts | {"index": distributed.index()}), flush=True)
    for path, leaf in tree.flatten(params).items():
        for shard in leaf.addressable_shards:
            if shard.replica_id == 0:
                values = expected(path, shard.index, leaf.shape, architecture.banks)
                assert np.array_equal(np.asarray(shard.data), values), (path, shard.index)


def main(directory, sizes, way, coordinator="", count="0", index="-1"):
    code = 0
    try:
        distributed.start(coordinator, int(count), int(index), timeout=60)
        run(directory, sizes, way)
    except errors.FlexjaxError as error:
        code = error.exit_code
        print(f"error: {error}", file=sys.stderr)
    except BaseException:
        distributed.finish(1)
        raise
    distributed.finish(code)
    sys.exit(code)


if __name__ == "__main__":
    main(*sys.argv[1:])
