"""Differences: experts, tensors, angles and scores, against what NumPy says; only slices that differ are read."""

import dataclasses
import json
import shutil

import ml_dtypes
import numpy as np
import pytest

from flexjax import config as config_lib
from flexjax import errors, tree
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import models, provenance, publishing, store, surgery
from flexjax.governance import differences
from flexjax.model import transformer
from tests.model import noise

CONFIG = config_lib.ModelConfig(vocab_size=11, d_model=8, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=6)
BANKS = (
    *transformer.dense_banks(CONFIG),
    config_lib.Bank("w3", ("beta",), 3),
    config_lib.Bank("w6", ("alpha", "gamma"), 6),
)
SHARED, EXPERTS = surgery.split(noise.params(transformer.Architecture(CONFIG, BANKS, 2)), BANKS)
DICE = np.random.default_rng(7)
FACTORS = {
    name: {"a": DICE.normal(size=(3, first, 2)).astype(np.float32), "b": DICE.normal(size=(3, 2, last)).astype(np.float32)}
    for name, first, last in (("gate", 8, 6), ("up", 8, 6), ("down", 6, 8))
}
LOW_RANK = {"ffn": FACTORS, "router": EXPERTS["alpha"]["router"]}


def write_anchor(directory, scale=1.0):
    source = directory.parent / "tokenizer.model"
    source.write_bytes(b"any bytes")
    shared = {**SHARED, "embed": {"embedding": (scale * SHARED["embed"]["embedding"]).astype(np.float32)}}
    return publishing.write_anchor(
        directory, CONFIG, source,
        lambda writer: writer.put_tree({**shared, "expert": EXPERTS["public"]}),
        rows="random", training={"steps": 3},
    )  # fmt: skip


def changed(expert, **leaves):
    """The expert with some leaves replaced, by path with `.` for `/`."""
    return tree.unflatten(tree.flatten(expert) | {path.replace(".", "/"): leaf for path, leaf in leaves.items()})


@pytest.fixture(scope="module")
def anchor(tmp_path_factory):
    return write_anchor(tmp_path_factory.mktemp("anchor") / "anchor")


@pytest.fixture
def write(anchor, tmp_path):
    def write(directory, expert, name="alpha", training=None, **stated):
        return publishing.write_bundle(
            tmp_path / directory, name, anchor, expert, training or {}, provenance.Provenance(**stated)
        )

    return write


@pytest.fixture
def reads(monkeypatch):
    """What was read, as (tensor, slice)."""
    seen, slice_at = [], store.Artefact.slice_at
    monkeypatch.setattr(store.Artefact, "slice_at", lambda self, *where: (seen.append(where), slice_at(self, *where))[1])
    return seen


def row(found, path):
    return next(row for row in found["tensors"] if row["path"] == path)


def test_the_same_bundle(write, reads, tmp_path):
    write("a", EXPERTS["alpha"])
    shutil.copytree(tmp_path / "a", tmp_path / "b")
    reads.clear()
    found = differences.compare(tmp_path / "a", tmp_path / "b")
    assert found["same"] and found["tensors"] == found["facts"] == found["evaluation"] == [] and found["unchanged"] == 5
    assert "the same, byte for byte" in differences.table(found)
    assert {path for path, _ in reads} <= {differences.BIAS}


def test_tensors_rows_biases_scores_and_facts(write, reads, tmp_path):
    old = EXPERTS["alpha"]
    up, rows = old["ffn"]["up"].copy(), old["router"]["row"].copy()
    up[1] += DICE.normal(size=up[1].shape).astype(np.float32)
    turned = 30.0
    for layer, degrees in enumerate((0.0, turned, 1e-4)):
        other = np.zeros(8)
        other[layer] = 1.0
        other -= rows[layer] * (rows[layer] @ other) / (rows[layer] @ rows[layer])
        other *= np.linalg.norm(rows[layer]) / np.linalg.norm(other)
        rows[layer] = 3 * (np.cos(np.radians(degrees)) * rows[layer] + np.sin(np.radians(degrees)) * other)
    bias = (old["router"]["bias"] - np.float32([0.5, 0.25, 0.0])).astype(np.float32)
    new = changed(old, **{"ffn.up": up, "router.row": rows, "router.bias": bias})
    scores = {"math": {"bits_per_byte": 1.5, "anchor": 2.0}, "code": {"bits_per_byte": 1.0, "anchor": 1.0}}
    write(
        "a", old, training={"steps": 10, "tokens": 100}, evaluation={"math": {"bits_per_byte": 1.75, "anchor": 2.0}}, owner="x"
    )
    write("b", new, training={"steps": 20, "tokens": 100}, evaluation=scores, owner="x", version=2)
    reads.clear()
    found = differences.compare(tmp_path / "a", tmp_path / "b")
    assert json.loads(json.dumps(found, allow_nan=False)) == found and not found["same"]

    change = row(found, "expert/ffn/up")
    assert change["changed"] == [1] and change["slices"] == 3 and change["state"] == "changed"
    np.testing.assert_allclose(
        change["relative"], np.linalg.norm(up - old["ffn"]["up"]) / np.linalg.norm(old["ffn"]["up"]), rtol=1e-5
    )
    np.testing.assert_allclose(change["largest"], np.abs(up - old["ffn"]["up"]).max(), rtol=1e-6)
    assert found["unchanged"] == 2 and {r["path"] for r in found["tensors"]} == {
        "expert/ffn/up",
        differences.ROW,
        differences.BIAS,
    }
    assert {where for where in reads if where[0].startswith("expert/ffn")} == {("expert/ffn/up", 1)}

    angle = found["router"]["angle"]
    assert angle["min"] < 1e-5 and abs(angle["max"] - turned) < 1e-4 and abs(angle["median"] - 1e-4) < 5e-6
    np.testing.assert_allclose([found["router"]["bias"][key] for key in ("min", "median", "max")], [-0.5, -0.25, 0], atol=1e-6)
    assert found["evaluation"] == [
        {"domain": "code", "a": None, "b": 1.0, "change": None},
        {"domain": "math", "a": 1.75, "b": 1.5, "change": -0.25},
    ]
    assert found["facts"] == [{"field": "training/steps", "a": 10, "b": 20}, {"field": "version", "a": 1, "b": 2}]
    table = differences.table(found)
    for part in (
        "training/steps: 10 -> 20",
        "1 of 3 slices changed",
        "turned by",
        "1.75 -> 1.5 (-0.2500)",
        "expert/ffn/up float32",
    ):
        assert part in table, table


def test_the_order_of_the_two_matters(write, tmp_path):
    write("a", EXPERTS["alpha"])
    write("b", changed(EXPERTS["alpha"], **{"ffn.down": 2 * EXPERTS["alpha"]["ffn"]["down"]}))
    there = row(differences.compare(tmp_path / "a", tmp_path / "b"), "expert/ffn/down")
    back = row(differences.compare(tmp_path / "b", tmp_path / "a"), "expert/ffn/down")
    np.testing.assert_allclose([there["relative"], back["relative"]], [1, 0.5], rtol=1e-6)


def test_something_from_nothing(write, tmp_path):
    zero = np.zeros_like(EXPERTS["alpha"]["router"]["row"])
    write("a", changed(EXPERTS["alpha"], **{"router.row": zero}))
    write("b", EXPERTS["alpha"])
    found = differences.compare(tmp_path / "a", tmp_path / "b")
    assert row(found, differences.ROW)["relative"] is None and found["router"]["angle"] is None
    assert "not defined" in differences.table(found) and "router row: not compared" in differences.table(found)


def test_another_dtype_is_compared_by_value(write, tmp_path):
    half = EXPERTS["alpha"]["ffn"]["up"].astype(ml_dtypes.bfloat16)
    write("a", EXPERTS["alpha"])
    write("b", changed(EXPERTS["alpha"], **{"ffn.up": half}))
    found = row(differences.compare(tmp_path / "a", tmp_path / "b"), "expert/ffn/up")
    assert (found["a"], found["b"], found["changed"]) == ("float32[3,8,6]", "bfloat16[3,8,6]", [0, 1, 2])
    expected = half.astype(np.float64) - EXPERTS["alpha"]["ffn"]["up"]
    np.testing.assert_allclose(
        found["relative"], np.linalg.norm(expected) / np.linalg.norm(EXPERTS["alpha"]["ffn"]["up"]), rtol=1e-6
    )
    assert 0 < found["relative"] < 2**-8


def test_other_shapes_are_reported_not_compared(write, reads, tmp_path):
    write("full", EXPERTS["alpha"])
    write("narrow", EXPERTS["beta"])
    write("low", LOW_RANK)
    reads.clear()
    found = differences.compare(tmp_path / "full", tmp_path / "narrow")
    assert row(found, "expert/ffn/gate")["state"] == "other shape" and {"field": "d_ff", "a": 6, "b": 3} in found["facts"]
    assert found["router"]["angle"]["max"] > 1 and found["note"] == "" and "not compared" in differences.table(found)
    found = differences.compare(tmp_path / "full", tmp_path / "low")
    states = {r["path"]: r["state"] for r in found["tensors"]}
    assert states["expert/ffn/gate"] == "only in a" and states["expert/ffn/gate/a"] == "only in b" and found["deltas"] == []
    assert {"field": "rank", "a": 0, "b": 2} in found["facts"]
    assert not [where for where in reads if where[0].startswith("expert/ffn")]


def product(factors):
    return np.einsum("ldr,lrf->ldf", factors["a"].astype(np.float64), factors["b"].astype(np.float64))


def test_factors_are_not_unique(write, tmp_path):
    mixed = {"a": FACTORS["up"]["a"][..., ::-1].copy(), "b": FACTORS["up"]["b"][:, ::-1].copy()}
    gate = {"a": FACTORS["gate"]["a"].copy(), "b": FACTORS["gate"]["b"]}
    gate["a"][2] *= 1.5
    wider = {key: np.concatenate([leaf, leaf], axis=2 if key == "a" else 1) for key, leaf in FACTORS["down"].items()}
    write("a", LOW_RANK)
    write("b", changed(LOW_RANK, **{f"ffn.{m}.{k}": v for m, f in (("up", mixed), ("gate", gate)) for k, v in f.items()}))
    found = differences.compare(tmp_path / "a", tmp_path / "b")
    assert "factors are not unique" in found["note"] and found["note"] in differences.table(found)
    deltas = {delta["path"].split("/")[-1]: delta for delta in found["deltas"]}
    assert row(found, "expert/ffn/up/a")["relative"] > 0.1 and deltas["up"]["relative"] < 1e-7
    assert deltas["gate"]["layers"] == [2] and abs(deltas["gate"]["relative"] - 0.5) < 1e-6
    assert deltas["down"] == {"path": "expert/ffn/down", "state": "compared", "layers": [], "relative": 0.0}

    doubled = {
        "ffn": {m: {k: np.concatenate([v, v], axis=2 if k == "a" else 1) for k, v in f.items()} for m, f in FACTORS.items()},
        "router": LOW_RANK["router"],
    }
    write("c", doubled)  # another rank, and twice the product
    found = differences.compare(tmp_path / "a", tmp_path / "c")
    assert row(found, "expert/ffn/down/a")["state"] == "other shape"
    np.testing.assert_allclose([delta["relative"] for delta in found["deltas"]], 1, rtol=1e-6)
    np.testing.assert_allclose(product(wider), 2 * product(FACTORS["down"]))


def test_damage_and_infinity_are_refused(write, tmp_path):
    write("a", EXPERTS["alpha"])
    bundle = write("b", changed(EXPERTS["alpha"], **{"ffn.up": 2 * EXPERTS["alpha"]["ffn"]["up"]}))
    file = tmp_path / "b" / "tensors" / "expert" / "ffn" / "up" / "c" / "1" / "0" / "0"
    sound = file.read_bytes()
    file.write_bytes(sound[::-1])
    with pytest.raises(errors.IntegrityError, match="tensor expert/ffn/up, slice 1"):
        differences.compare(tmp_path / "a", tmp_path / "b")
    file.write_bytes(np.float32([np.inf]).tobytes() + sound[4:])
    bundle.manifest["tensors"]["expert/ffn/up"]["slices"][1] = tree.sha256(file.read_bytes())
    bundle.manifest["digest"] = manifest_lib.digest_of(bundle.manifest)
    (tmp_path / "b" / manifest_lib.FILE).write_bytes(manifest_lib.encode(bundle.manifest))
    with pytest.raises(errors.IntegrityError, match="expert/ffn/up holds NaN or infinity"):
        differences.compare(tmp_path / "a", tmp_path / "b")


def test_anchors(anchor, reads, tmp_path):
    write_anchor(tmp_path / "other", scale=1.25)
    reads.clear()
    found = differences.compare(anchor.directory, tmp_path / "other")
    assert [(r["path"], r["relative"]) for r in found["tensors"]] == [("embed/embedding", pytest.approx(0.25))]
    assert found["router"]["bias"] is None and {path for path, _ in reads} == {"embed/embedding"}
    assert "embed/embedding" in differences.table(found)


def recalibrate(model, **calibration):
    """Commits a model's manifest with other biases."""
    described = models.describe(model.anchor, model.bundles, model.manifest["top_k"], calibration)
    manifest_lib.write(model.directory, described)


def test_models(anchor, write, tmp_path):
    alpha, beta = write("alpha", EXPERTS["alpha"]), write("beta", EXPERTS["beta"], name="beta")
    gamma = write("gamma", EXPERTS["gamma"], name="gamma")
    half = write("half", changed(EXPERTS["alpha"], **{"ffn.down": EXPERTS["alpha"]["ffn"]["down"] / 2}), version=2)
    a = models.write_model(tmp_path / "a", anchor, {"alpha": alpha, "beta": beta}, 2)
    b = models.write_model(tmp_path / "b", anchor, {"alpha": half, "gamma": gamma, "beta": beta}, 3)
    lower = (EXPERTS["beta"]["router"]["bias"] - 1).astype(np.float32)
    recalibrate(b, beta={"bias": lower.tolist(), "share": 0.1, "text": "0" * 64, "with": []})
    found = differences.compare(tmp_path / "a", tmp_path / "b")
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["added"] == {"gamma": gamma.manifest["digest"]} and found["removed"] == {}
    assert found["facts"] == [{"field": "top_k", "a": 2, "b": 3}] and found["unchanged"] == ["beta"]
    assert row(found["changed"]["alpha"], "expert/ffn/down")["relative"] == pytest.approx(0.5)
    assert found["bias"] == {"beta": {"min": pytest.approx(-1), "median": pytest.approx(-1), "max": pytest.approx(-1)}}
    table = differences.table(found)
    for part in (
        "expert gamma added",
        "expert alpha changed",
        "  expert/ffn/down",
        "beta calibrated otherwise",
        "top_k: 2 -> 3",
    ):
        assert part in table, table
    back = differences.compare(tmp_path / "b", tmp_path / "a")
    assert back["removed"] == {"gamma": gamma.manifest["digest"]} and "expert gamma removed" in differences.table(back)
    assert differences.compare(a.directory, a.directory)["same"]


def test_models_of_other_anchors_and_averages(anchor, write, tmp_path):
    def model(directory, anchor, scale):
        leaf = {"head": {"kernel": (scale * SHARED["head"]["kernel"]).astype(np.float32)}}
        home = tmp_path / f"bundle-{directory}"
        bundle = publishing.write_bundle(home, "alpha", anchor, EXPERTS["alpha"], {}, provenance.Provenance(), leaf)
        return models.write_model(tmp_path / directory, anchor, {"alpha": bundle}, 2).directory

    other = write_anchor(tmp_path / "other", scale=1.25)
    a, b, c = model("a", anchor, 1.0), model("b", other, 1.0), model("c", anchor, 1.5)
    found = differences.compare(a, b)
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert [(r["path"], r["relative"]) for r in found["anchor"]["tensors"]] == [("embed/embedding", pytest.approx(0.25))]
    assert found["shared"]["tensors"] == [] and found["shared"]["unchanged"] == 1 and found["shared"]["router"] is None
    assert "anchor changed\n" in differences.table(found) and "  embed/embedding" in differences.table(found)
    found = differences.compare(a, c)
    assert found["anchor"] is None
    assert [(r["path"], r["relative"]) for r in found["shared"]["tensors"]] == [("head/kernel", pytest.approx(0.5))]
    table = differences.table(found)
    assert "averaged leaves changed\n" in table and "  head/kernel" in table and "anchor changed" not in table
    plain = models.write_model(tmp_path / "plain", anchor, {"alpha": write("plain-alpha", EXPERTS["alpha"])}, 2)
    assert differences.compare(a, plain.directory)["shared"] is None


def test_kinds_are_not_mixed(anchor, write, tmp_path):
    bundle = write("alpha", EXPERTS["alpha"])
    with pytest.raises(errors.ConfigError, match=r"is of kind expert and .* of kind anchor"):
        differences.compare(bundle.directory, anchor.directory)


def test_a_change_is_summed_over_blocks(monkeypatch):
    monkeypatch.setattr(differences.slices, "BLOCK", 5)
    a, b = DICE.normal(size=(2, 3, 17)).astype(np.float32)
    change = differences.Change()
    change.add(a, b)
    difference = b.astype(np.float64) - a
    expected = [np.square(difference).sum(), np.square(a.astype(np.float64)).sum(), np.abs(difference).max()]
    np.testing.assert_allclose(list(dataclasses.astuple(change)), expected, rtol=1e-12)
