"""Full, narrow and low-rank experts in one model, from directories into memory and onto meshes."""

import ml_dtypes
import numpy as np
import pytest

from flexjax import config as config_lib
from flexjax import sharding, tree
from flexjax.experts import loading, models, publishing, surgery
from flexjax.model import placement, transformer
from tests.model import noise

CONFIG = config_lib.ModelConfig(vocab_size=40, d_model=16, num_layers=2, num_heads=4, num_kv_heads=4, head_dim=4, d_ff=24)
BANKS = (
    *transformer.dense_banks(CONFIG),
    config_lib.Bank("r3", ("alpha", "gamma"), 24, rank=3),
    config_lib.Bank("w8", ("beta",), 8),
    config_lib.Bank("w24", ("delta",), 24),
    config_lib.Bank("r5", ("eta",), 24, rank=5),
)
SHARED, EXPERTS = surgery.split(noise.params(transformer.Architecture(CONFIG, BANKS, 2)), BANKS)
MESHES = [{"fsdp": 8}, {"expert": 8}, {"fsdp": 2, "tensor": 2, "expert": 2}]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    home = tmp_path_factory.mktemp("sizes")
    anchor = publishing.write_anchor(
        home / "anchor", CONFIG, None, lambda writer: writer.put_tree({**SHARED, "expert": EXPERTS["public"]}),
        rows="random", training={},
    )  # fmt: skip
    bundles = {}
    for name in ("alpha", "beta", "delta", "eta", "gamma"):
        half = {path: leaf.astype(ml_dtypes.bfloat16) for path, leaf in tree.flatten(EXPERTS[name]["ffn"]).items()}
        expert = {**EXPERTS[name], "ffn": tree.unflatten(half)} if name == "gamma" else EXPERTS[name]
        bundles[name] = publishing.write_bundle(home / name, name, anchor, expert, {})
    return models.write_model(home / "model", anchor, bundles, top_k=2)


def test_sizes_are_known_before_anything_is_read(model):
    assert models.widths(model) == {"public": 24, "alpha": 24, "beta": 8, "delta": 24, "eta": 24, "gamma": 24}
    assert models.ranks(model) == {"alpha": 3, "eta": 5, "gamma": 3}
    architecture, params = models.load(model)
    assert architecture == models.architecture(model, 2) == transformer.Architecture(CONFIG, BANKS, 2)
    shapes = {path: leaf.shape for path, leaf in tree.flatten(params).items()}
    assert shapes == {path: leaf.shape for path, leaf in tree.flatten(transformer.abstract(architecture)).items()}
    np.testing.assert_array_equal(params["experts"]["r5"]["ffn"]["down"]["a"][:, 0], EXPERTS["eta"]["ffn"]["down"]["a"])


def test_public_keeps_its_bank_beside_low_rank_experts(model):
    groups = models.by_width(models.widths(model), models.ranks(model))
    assert groups == {bank.name: bank.experts for bank in BANKS}


@pytest.mark.parametrize("sizes", MESHES, ids=str)
@pytest.mark.parametrize("top_k", [2, 6])
def test_a_model_read_onto_a_mesh_is_the_one_in_memory(model, sizes, top_k, monkeypatch):
    monkeypatch.setattr(loading, "WHOLE_BYTES", 1500)
    mesh = sharding.make_mesh(config_lib.MeshConfig(**sizes))
    architecture, found = models.load(model, top_k, mesh)
    same, params = models.load(model, top_k)
    expected = tree.flatten(placement.place(params, same, mesh))
    assert architecture == same and list(tree.flatten(found)) == list(expected)
    for path, leaf in tree.flatten(found).items():
        assert leaf.sharding == expected[path].sharding, path
        assert np.asarray(leaf).tobytes() == np.asarray(expected[path]).tobytes(), path
    slots = sizes.get("expert", 1) if top_k == 2 else 1
    assert found["experts"]["w8"]["ffn"]["up"].shape[1] == slots
    assert found["experts"]["public"]["ffn"]["up"].shape[1] == 1 and found["experts"]["r3"]["ffn"]["up"]["a"].shape[1] == 2


def test_a_model_spread_by_several_processes_is_the_same(model, monkeypatch):
    """What several processes do, done by one."""
    monkeypatch.setattr(loading, "SMALL_BYTES", 600)
    mesh = sharding.make_mesh(config_lib.MeshConfig(fsdp=2, tensor=2, expert=2))
    _, leaves = loading._plan(model.anchor, model.bundles, 2, mesh, None)
    found = tree.flatten(tree.unflatten(loading._read_together(leaves, mesh)))
    for path, leaf in tree.flatten(models.load(model, 2, mesh)[1]).items():
        assert np.asarray(found[path]).tobytes() == np.asarray(leaf).tobytes(), path
