"""A model read onto a mesh is the model that was read into memory and laid there."""

import dataclasses
import json
import os
import pathlib
import shutil
import socket
import subprocess
import sys
import time

import jax
import ml_dtypes
import numpy as np
import pytest

from flexjax import config as config_lib
from flexjax import errors, sharding, storage, tree
from flexjax.experts import loading, models, publishing, store, surgery
from flexjax.model import placement, transformer
from tests.experts import loading_child
from tests.model import noise

CONFIG = config_lib.ModelConfig(vocab_size=40, d_model=16, num_layers=3, num_heads=4, num_kv_heads=4, head_dim=4, d_ff=16)
BANKS = (
    *transformer.dense_banks(CONFIG),
    config_lib.Bank("w16", ("alpha", "gamma"), 16),
    config_lib.Bank("w8", ("beta", "delta"), 8),
)
SHARED, EXPERTS = surgery.split(noise.params(transformer.Architecture(CONFIG, BANKS, 2)), BANKS)
BY_WIDTH = {"w16": ("public", "alpha", "gamma"), "w8": ("beta", "delta")}
IN_HALF = {"beta", "delta", "gamma"}  # one bank of bfloat16, one that mixes
MESHES = {
    "data 8": {"data": 8},
    "fsdp 8": {"fsdp": 8},
    "data 2 tensor 4": {"data": 2, "tensor": 4},
    "expert 8": {"expert": 8},
    "data 4 expert 2": {"data": 4, "expert": 2},
    "fsdp 2 tensor 2 expert 2": {"fsdp": 2, "tensor": 2, "expert": 2},
}
SOME = ["fsdp 8", "data 4 expert 2", "fsdp 2 tensor 2 expert 2"]


def mesh_of(name):
    return sharding.make_mesh(config_lib.MeshConfig(**MESHES[name]))


@pytest.fixture(scope="module", autouse=True)
def small_files():
    """Files, pieces and parts of a few rows, as a large model has them."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree, "CHUNK_BYTES", 600)
        patch.setattr(loading, "PIECE_BYTES", 600)
        yield


@pytest.fixture(scope="module")
def home(tmp_path_factory, small_files):
    home = tmp_path_factory.mktemp("loading")
    anchor = publishing.write_anchor(
        home / "anchor", CONFIG, None, lambda writer: writer.put_tree({**SHARED, "expert": EXPERTS["public"]}),
        rows="random", training={},
    )  # fmt: skip
    bundles = {}
    for name in ("alpha", "beta", "delta", "gamma"):
        expert = EXPERTS[name]
        if name in IN_HALF:
            expert = {**expert, "ffn": {key: leaf.astype(ml_dtypes.bfloat16) for key, leaf in expert["ffn"].items()}}
        bundles[name] = publishing.write_bundle(home / name, name, anchor, expert, {})
    models.write_model(home / "model", anchor, bundles, top_k=2)
    return home


def check_equal(found, expected):
    found, expected = tree.flatten(found), tree.flatten(expected)
    assert list(found) == list(expected)
    for path, leaf in expected.items():
        assert found[path].sharding == leaf.sharding, path
        assert (found[path].dtype, found[path].shape) == (leaf.dtype, leaf.shape), path
        assert np.asarray(found[path]).tobytes() == np.asarray(leaf).tobytes(), path


def laid(model, mesh, top_k=None, groups=None):
    """The whole model in memory, then on the mesh."""
    architecture, params = models.load(model, top_k)
    shared, experts = surgery.split(params, architecture.banks)
    params, banks = surgery.join(shared, experts, groups)
    architecture = transformer.Architecture(CONFIG, banks, architecture.top_k)
    return architecture, placement.place(params, architecture, mesh)


@pytest.mark.parametrize(("mesh", "in_parts"), [*((mesh, False) for mesh in MESHES), *((mesh, True) for mesh in SOME)])
def test_one_process(home, mesh, in_parts, monkeypatch):
    if in_parts:
        monkeypatch.setattr(loading, "WHOLE_BYTES", 1500)
    model, mesh = models.open_model(home / "model"), mesh_of(mesh)
    groups = BY_WIDTH if mesh.shape["expert"] > 1 else None
    for top_k in (2, 5):  # sparse and dense
        architecture, params = models.load(model, top_k, mesh)
        expected, placed = laid(model, mesh, top_k, groups)
        assert architecture == expected
        check_equal(params, placed)


def test_public_apart(home):
    mesh, model = mesh_of("expert 8"), models.open_model(home / "model")
    architecture, params = models.load(model, mesh=mesh, public_apart=True)
    assert architecture.banks == BANKS
    assert params["experts"]["public"]["ffn"]["gate"].shape[1] == 8  # one expert and seven empty slots
    check_equal(params, laid(model, mesh)[1])


def test_anchor(home):
    mesh = mesh_of("fsdp 2 tensor 2 expert 2")
    architecture, params = models.load_any(models.open_any(home / "anchor"), mesh=mesh)
    dense, whole = models.load_anchor(store.open_anchor(home / "anchor"))
    assert architecture == dense
    check_equal(params, placement.place(whole, dense, mesh))


def test_public_lives_with_those_of_its_width():
    assert models.by_width({"b": 4, "public": 4, "a": 2}) == {"w4": ("public", "b"), "w2": ("a",)}
    assert models.by_width({"b": 4, "public": 8, "a": 2}) == {"public": ("public",), "w2": ("a",), "w4": ("b",)}


@pytest.mark.parametrize("mesh", [*SOME, *(pytest.param(m, marks=pytest.mark.slow) for m in MESHES if m not in SOME)])
def test_through_the_devices(home, mesh, monkeypatch):
    """What several processes do, done by one."""
    monkeypatch.setattr(loading, "SMALL_BYTES", 600)
    model, mesh = models.open_model(home / "model"), mesh_of(mesh)
    _, leaves = loading._plan(model.anchor, model.bundles, 2, mesh, BY_WIDTH)
    check_equal(tree.unflatten(loading._read_together(leaves, mesh)), laid(model, mesh, 2, BY_WIDTH)[1])


def test_processes_compare_what_takes_the_place_of_tensors_too(home, monkeypatch):
    """A calibrated bias or an averaged leaf is in no digest of an artefact."""

    class Compared(Exception):
        pass

    def exchange(name, value):
        seen.append(value)
        raise Compared

    seen, model, mesh = [], models.open_model(home / "model"), mesh_of("fsdp 8")
    monkeypatch.setattr(jax, "process_index", lambda: 7)  # so that the devices seem to be another's
    monkeypatch.setattr(loading.distributed, "exchange", exchange)
    path, other = "expert/router/bias", store.open_anchor(home / "anchor")
    bias = model.bundles["alpha"].tensor(path)
    averaged = [dataclasses.replace(other, manifest={**other.manifest, "digest": digest}) for digest in ("1" * 64, "2" * 64)]
    for instead in ({}, {path: bias - 1}, {path: bias - 2}, {path: bias - 1}):
        bundles = {**model.bundles, "alpha": dataclasses.replace(model.bundles["alpha"], instead=instead)}
        with pytest.raises(Compared):
            loading.load(model.anchor, bundles, 2, mesh)
    for leaf in averaged:
        with pytest.raises(Compared):
            loading.load(dataclasses.replace(model.anchor, instead={"head/kernel": leaf}), model.bundles, 2, mesh)
    assert seen[1] == seen[3] and len(set(seen)) == 5


@pytest.mark.parametrize("processes", [1, 3, 4, 13])
def test_shares_are_even(home, processes):
    """However many read, every slot or row is read once, and nobody has more than one piece of a leaf more than others."""
    model = models.open_model(home / "model")
    _, leaves = loading._plan(model.anchor, model.bundles, 2, mesh_of("expert 8"), BY_WIDTH)
    turn, total = 0, np.zeros(processes, np.int64)
    for leaf in leaves:
        pieces = leaf.pieces(processes)
        rounds = loading._deal(pieces, processes, turn)
        assert sorted((p for hand in rounds for p in hand if p), key=pieces.index) == pieces
        whole = np.full((leaf.shape[0], len(leaf.owners)) if leaf.banked else leaf.shape[:1], -1)
        for hand in rounds:
            for process, piece in enumerate(hand):
                if piece is not None:
                    leaf.write(piece, np.full(piece.count, process), whole)
        counts = np.bincount(whole.ravel(), minlength=processes)  # fails if a place is still -1
        assert counts.max() - counts.min() <= pieces[0].count
        total += counts * leaf.row_bytes
        turn += len(pieces)
    assert total.max() <= 1.3 * total.mean()


@pytest.mark.parametrize("expert", ["public", "beta"])
@pytest.mark.parametrize("way", ["alone", "small", "large"])
def test_a_flipped_byte_is_refused_by_name(home, tmp_path, expert, way, monkeypatch):
    model = models.open_model(shutil.copytree(home / "model", tmp_path / "model"))
    directory = model.anchor.directory if expert == "public" else model.bundles[expert].directory
    file = directory / "tensors/expert/ffn/up/c/1/0/0"
    data = bytearray(file.read_bytes())
    data[5] ^= 1
    file.write_bytes(data)
    mesh = mesh_of("expert 8")
    with pytest.raises(errors.IntegrityError, match=f"{file}: bytes differ"):
        if way == "alone":
            models.load(model, mesh=mesh)
        else:
            monkeypatch.setattr(loading, "SMALL_BYTES", 2**20 if way == "small" else 100)
            _, leaves = loading._plan(model.anchor, model.bundles, 2, mesh, BY_WIDTH)
            loading._read_together([leaf for leaf in leaves if leaf.path.startswith("experts/")], mesh)


def test_what_an_owner_may_not_publish_is_refused(home, tmp_path):
    """The content of bundles is checked as by reading into memory: here a bias above 0 under a digest of its own."""
    model = models.open_model(shutil.copytree(home / "model", tmp_path / "model"))
    bundle = model.bundles["alpha"]
    bias = np.array([0.5], np.float32)
    (bundle.directory / "tensors/expert/router/bias/c/0").write_bytes(bias.tobytes())
    bundle.manifest["tensors"]["expert/router/bias"]["slices"][0] = tree.sha256(bias.tobytes())
    with pytest.raises(errors.IntegrityError, match="holds a positive bias"):
        models.load(model, mesh=mesh_of("fsdp 8"))


def test_an_unreadable_disk_is_told(home, monkeypatch):
    def broken(path, size, root):
        raise OSError(5, "Input/output error", str(path))

    model, mesh = models.open_model(home / "model"), mesh_of("fsdp 8")
    _, leaves = loading._plan(model.anchor, model.bundles, 2, mesh, None)
    monkeypatch.setattr(storage, "read", broken)
    with pytest.raises(errors.StorageError, match=r"cannot read .*/c/0.*: Input/output error; check the storage"):
        loading._read_together(leaves, mesh)


def start(count, devices, *arguments):
    """So many processes with so many devices each; all of them are over when this returns."""
    with socket.socket() as found:
        found.bind(("127.0.0.1", 0))
        port = found.getsockname()[1]
    environment = os.environ | {"XLA_FLAGS": f"--xla_force_host_platform_device_count={devices}", "JAX_PLATFORMS": "cpu"}
    command = [sys.executable, "-W", "ignore", "-m", "tests.experts.loading_child", *arguments]
    joined = [[f"127.0.0.1:{port}", str(count), str(index)] if count > 1 else [] for index in range(count)]
    running = [
        subprocess.Popen([*command, *more], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        for more in joined
    ]
    try:
        return [(process.communicate(timeout=240), process.returncode) for process in running]
    finally:
        for process in running:
            process.kill()


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Some 450 MB of noise, in files as they are."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tree, "CHUNK_BYTES", 2**26)
        return loading_child.write(tmp_path_factory.mktemp("large") / "model")


@pytest.mark.slow
@pytest.mark.parametrize("sizes", [{"fsdp": 8}, {"data": 2, "expert": 4}, {"tensor": 2, "expert": 4}])
def test_four_processes_read_a_quarter_each(large, sizes):
    """Also compares every byte on every device with what was drawn."""
    files = pathlib.Path(large.directory).glob("**/tensors/**/c/**/*")
    total = sum(file.stat().st_size for file in files if file.is_file()) / 1e6
    rows = []
    for processes, way in ((1, "shared"), (4, "shared"), (4, "whole")):
        ended = start(processes, 8 // processes, str(large.directory), json.dumps(sizes), way)
        assert [code for _, code in ended] == [0] * processes, ended
        found = [json.loads(out.splitlines()[-1]) for (out, _), _ in ended]
        rows.append((processes, way, {key: max(facts[key] for facts in found) for key in found[0]}))
        if way == "shared":
            assert max(facts["read"] for facts in found) <= 1.3 * total / processes + 1
            assert sum(facts["read"] for facts in found) == pytest.approx(total, rel=0.01)
    print(f"\n{sizes}, {total:.0f} MB\nprocesses  way     read MB  held MB  RSS before  RSS peak  seconds")
    for processes, way, worst in rows:
        read, held, before, peak, seconds = (worst[key] for key in ("read", "held", "before", "peak", "seconds"))
        print(f"{processes:9}  {way:6}  {read:7.0f}  {held:7}  {before:10}  {peak:8}  {seconds:7}")
    assert rows[1][2]["peak"] < rows[2][2]["peak"] - 0.5 * total


@pytest.mark.slow
def test_four_processes_meet_a_damaged_file_together(large, tmp_path):
    model = shutil.copytree(large.directory, tmp_path / "model")
    (file,) = model.glob(f"experts/{large.bundles['b'].manifest['digest']}/tensors/expert/ffn/down/c/4/0/0")
    data = bytearray(file.read_bytes())
    data[1000] ^= 4
    file.write_bytes(data)
    began = time.monotonic()
    ended = start(4, 2, str(model), '{"fsdp": 8}', "shared")
    print(f"\nover after {time.monotonic() - began:.0f} s")
    for (_, err), code in ended:
        assert code == errors.IntegrityError.exit_code, err
        assert [line for line in err.splitlines() if line.startswith("error: ")] == [
            f"error: {file}: bytes differ from the manifest of expert 'b' in {file.parents[7]} "
            "(tensor expert/ffn/down, slice 4); restore the file"
        ]
