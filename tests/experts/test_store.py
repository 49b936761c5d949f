"""Directories: bytes come back as they went in, and nothing changed, cut, added or swapped goes unseen (G4)."""

import dataclasses
import itertools
import os
import random
import shutil

import ml_dtypes
import numpy as np
import pytest
import tensorstore

from flexjax import config as config_lib
from flexjax import errors, storage, tree
from flexjax.data import tokenizer as tokenizer_lib
from flexjax.experts import copying, models, publishing, slices, store, surgery
from flexjax.experts import manifest as manifest_lib
from flexjax.governance import merging
from flexjax.model import transformer
from tests.experts import forging
from tests.model import noise

CONFIG = config_lib.ModelConfig(vocab_size=11, d_model=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=6)
BANKS = (
    *transformer.dense_banks(CONFIG),
    config_lib.Bank("w3", ("beta",), 3),
    config_lib.Bank("w6", ("alpha", "gamma"), 6),
)
PARAMS = noise.params(transformer.Architecture(CONFIG, BANKS, 2))
SHARED, EXPERTS = surgery.split(PARAMS, BANKS)
STATES = np.random.default_rng(1).normal(size=(2, 5, 8)).astype(ml_dtypes.bfloat16)


def write_anchor(directory, tokenizer="tokenizer.model"):
    source = directory.parent / f"source-{tokenizer}"
    source.write_bytes(b"any bytes")
    return publishing.write_anchor(
        directory, CONFIG, source,
        lambda writer: writer.put_tree({**SHARED, "expert": EXPERTS["public"], "statistics": {"states": STATES}}),
        rows="random", training={"steps": 3},
    )  # fmt: skip


def artefacts(home):
    anchor = write_anchor(home / "anchor")
    bundles = {
        name: publishing.write_bundle(home / name, name, anchor, EXPERTS[name], {}) for name in ("alpha", "beta", "gamma")
    }
    return anchor, bundles


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("store")
    anchor, bundles = artefacts(home)
    models.write_model(home / "model", anchor, bundles, top_k=2)
    return home


@pytest.fixture
def copy(home, tmp_path):
    """A private copy of everything."""
    return shutil.copytree(home, tmp_path / "copy")


def equal(a, b):
    a, b = tree.flatten(a), tree.flatten(b)
    return list(a) == list(b) and all(a[p].dtype == b[p].dtype and a[p].tobytes() == b[p].tobytes() for p in a)


def verify(directory):
    """What `merge verify` does."""
    kind = manifest_lib.kind(directory)
    if kind == "anchor":
        return store.open_anchor(directory).verify()
    if kind == "expert":
        return store.open_bundle(directory, CONFIG).verify()
    return models.verify(models.open_model(directory))


def test_everything_comes_back_bit_for_bit(home):
    anchor = store.open_anchor(home / "anchor")
    assert equal(anchor.shared(), SHARED) and equal(anchor.tensors("expert"), EXPERTS["public"])
    assert equal(anchor.tensors("statistics"), {"states": STATES})
    assert store.config_of(anchor) == CONFIG and anchor.manifest["training"] == {"steps": 3}
    bundle = store.open_bundle(home / "beta", CONFIG)
    assert equal(bundle.tensors("expert"), EXPERTS["beta"]) and bundle.manifest["d_ff"] == 3
    architecture, params = models.load(models.open_model(home / "model"))
    assert (architecture.banks, architecture.top_k) == (surgery.join(SHARED, EXPERTS)[1], 2)
    assert equal(params, surgery.join(SHARED, EXPERTS)[0])
    architecture, params = models.load_anchor(anchor)
    assert architecture.experts == ("public",) and equal(params, surgery.join(SHARED, {"public": EXPERTS["public"]})[0])
    for name in ("anchor", "alpha", "beta", "gamma", "model"):
        verify(home / name)


@pytest.mark.parametrize("name", ["anchor", "beta"])
def test_any_zarr_reader_opens_the_tensors(home, name):
    artefact = store.open_anchor(home / name) if name == "anchor" else store.open_bundle(home / name, CONFIG)
    for path in artefact.manifest["tensors"]:
        spec = {"driver": "zarr3", "kvstore": {"driver": "file", "path": str(home / name / "tensors" / path)}}
        found = tensorstore.open(spec, open=True).result().read().result()
        assert found.dtype == artefact.tensor(path).dtype and found.tobytes() == artefact.tensor(path).tobytes(), path


def test_tensors_are_cut_and_joined_whatever_the_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr(tree, "CHUNK_BYTES", 3 * 8 * 4)
    values = np.arange(11 * 8, dtype=np.float32).reshape(11, 8)
    entries = []
    for number, cuts in enumerate([(), (1, 2, 10), (3, 6, 9), (4,)]):
        writer = slices.TensorWriter(tmp_path / str(number))
        writer.put("embed/embedding", "float32", (11, 8), iter(np.split(values, cuts)))
        entries.append(writer.entries["embed/embedding"])
        artefact = store.Artefact(tmp_path / str(number), {"tensors": writer.entries}, "test")
        np.testing.assert_array_equal(artefact.tensor("embed/embedding"), values)
    assert all(entry == entries[0] for entry in entries) and len(entries[0]["slices"]) == 4
    with pytest.raises(errors.IntegrityError, match="slices came"):
        slices.TensorWriter(tmp_path / "short").put("embed/embedding", "float32", (11, 8), [values[:5]])


def test_digest_of_a_model_knows_no_order_and_no_history(home, tmp_path):
    anchor = store.open_anchor(home / "anchor")
    bundles = {name: store.open_bundle(home / name, CONFIG) for name in ("alpha", "beta", "gamma")}
    digests = {
        models.write_model(tmp_path / "".join(order), anchor, {name: bundles[name] for name in order}, 2).tree_digest
        for order in itertools.permutations(bundles)
    }
    assert digests == {models.open_model(home / "model").tree_digest}
    without = models.write_model(tmp_path / "without", anchor, {n: bundles[n] for n in ("alpha", "gamma")}, 2).tree_digest
    model = merging.remove(tmp_path / "alphabetagamma", "beta")
    assert model.tree_digest == without and without not in digests
    assert sorted(os.listdir(tmp_path / "alphabetagamma" / "experts")) == sorted(
        bundles[name].manifest["digest"] for name in ("alpha", "gamma")
    )
    verify(tmp_path / "alphabetagamma")
    other_top_k = models.write_model(tmp_path / "top", anchor, {n: bundles[n] for n in ("alpha", "gamma")}, 1)
    assert other_top_k.tree_digest != without


def test_writing_the_same_bytes_gives_the_same_digests(home, tmp_path):
    anchor, bundles = artefacts(tmp_path)
    assert anchor.manifest == store.open_anchor(home / "anchor").manifest
    assert bundles["beta"].manifest == store.open_bundle(home / "beta", CONFIG).manifest


# Faults. Each function damages a directory, and returns what the refusal must name.


def files_of(directory):
    return sorted(path for path in directory.rglob("*") if path.is_file())


def named(path):
    """A slice is named by its tensor, any other file by itself."""
    parts = path.parts
    if "tensors" in parts and "c" in parts:
        return "/".join(parts[parts.index("tensors") + 1 : parts.index("c")])
    return path.name


def flip(directory, dice):
    path = dice.choice(files_of(directory))
    data = bytearray(path.read_bytes())
    data[dice.randrange(len(data))] ^= 1 << dice.randrange(8)
    path.write_bytes(data)
    return named(path)


def cut(directory, dice):
    path = dice.choice(files_of(directory))
    data = path.read_bytes()
    path.write_bytes(data[: dice.choice([0, len(data) - 1, dice.randrange(len(data))])])
    return named(path)


def lengthen(directory, dice):
    path = dice.choice(files_of(directory))
    path.write_bytes(path.read_bytes() + b"\n")
    return named(path)


def delete(directory, dice):
    path = dice.choice(files_of(directory))
    path.unlink()
    return named(path)


def add(directory, dice):
    parent = dice.choice([directory, *(path for path in directory.rglob("*") if path.is_dir())])
    (parent / "extra.bin").write_bytes(b"x")
    return "extra.bin"


def link(directory, dice):
    path = dice.choice(files_of(directory))
    elsewhere = directory.parent / "elsewhere"
    shutil.copy(path, elsewhere)
    path.unlink()
    path.symlink_to(elsewhere)
    return named(path)


def replace_by_directory(directory, dice):
    path = dice.choice(files_of(directory))
    path.unlink()
    path.mkdir()
    return named(path)


def swap(directory, dice):
    while True:
        a, b = dice.sample([path for path in files_of(directory) if "c" in path.parts], 2)
        first, second = a.read_bytes(), b.read_bytes()
        if first != second:
            a.write_bytes(second)
            b.write_bytes(first)
            return (named(a), named(b))


FAULTS = [flip, cut, lengthen, delete, add, link, replace_by_directory, swap]


def rounds(home, count, seed):
    """Damages, expects a refusal that names the damage, and restores, `count` times; returns what went unseen."""
    unseen = []
    for number in range(count):
        dice = random.Random(f"{seed}-{number}")
        directory, fault = home / dice.choice(["anchor", "alpha", "model"]), FAULTS[number % len(FAULTS)]
        before = {path: path.read_bytes() for path in files_of(directory)}
        names = fault(directory, dice)
        try:
            verify(directory)
            unseen.append((number, fault.__name__, names))
        except (errors.IntegrityError, errors.StorageError) as refusal:
            if not any(name in str(refusal) for name in ([names] if isinstance(names, str) else names)):
                unseen.append((number, fault.__name__, names, str(refusal)))
        for path in list(directory.rglob("*")):
            if path.is_dir() and path in before:
                path.rmdir()
            elif path.is_symlink() or (path.is_file() and path not in before):
                path.unlink()
        for path, data in before.items():
            if not path.exists() or path.read_bytes() != data:
                path.write_bytes(data)
    verify(directory)
    return unseen


def test_damage_is_seen_and_named(copy):
    assert rounds(copy, 64, "default") == []


@pytest.mark.reliability
def test_a_thousand_damages_are_seen_and_named(copy):
    assert rounds(copy, 1000, "g4") == []


def test_a_damaged_expert_is_named_and_not_loaded(copy):
    digest = store.open_bundle(copy / "beta", CONFIG).manifest["digest"]
    path = copy / "model" / "experts" / digest / "tensors" / "expert" / "ffn" / "up" / "c" / "1" / "0" / "0"
    path.write_bytes(path.read_bytes()[::-1])
    model = models.open_model(copy / "model")
    with pytest.raises(errors.IntegrityError, match=r"expert 'beta'.*tensor expert/ffn/up, slice 1"):
        models.load(model)
    with pytest.raises(errors.IntegrityError, match="expert/ffn/up"):
        models.write_model(copy / "again", model.anchor, model.bundles, 2)
    assert not (copy / "again" / manifest_lib.FILE).exists()


def entry(manifest, path):
    return manifest["tensors"][path]


STRUCTURAL = {
    "giant shape": (lambda m: entry(m, "expert/ffn/up").update(shape=[2, 2**40, 6]), "expert/ffn/up has shape"),
    "other shape": (lambda m: entry(m, "expert/ffn/up").update(shape=[2, 6, 8]), "expert/ffn/up has shape"),
    "float shape": (lambda m: entry(m, "expert/ffn/up").update(shape=[2.0, 8, 6]), "expert/ffn/up has shape"),
    "shape of another type": (lambda m: entry(m, "expert/ffn/up").update(shape="286"), "expert/ffn/up has shape"),
    "negative shape": (lambda m: entry(m, "expert/ffn/up").update(shape=[-2, 8, 6]), "expert/ffn/up has shape"),
    "object dtype": (lambda m: entry(m, "expert/ffn/up").update(dtype="object"), "dtype of float32"),
    "dtype of another type": (lambda m: entry(m, "expert/ffn/up").update(dtype=["float32"]), "dtype of float32"),
    "too few slices": (lambda m: entry(m, "expert/ffn/up").update(slices=["0" * 64]), "must have 2 slices"),
    "too many slices": (lambda m: entry(m, "expert/ffn/up").update(slices=["0" * 64] * 9), "must have 2 slices"),
    "slices of another type": (lambda m: entry(m, "expert/ffn/up").update(slices=2), "must have 2 slices"),
    "digests of another type": (lambda m: entry(m, "expert/ffn/up").update(slices=[1, 2]), "must have 2 slices"),
    "entry of another type": (lambda m: m["tensors"].update({"expert/ffn/up": []}), "must hold a dtype"),
    "missing tensor": (lambda m: m["tensors"].pop("expert/ffn/up"), "expert/ffn/up is missing"),
    "shared tensor": (lambda m: m["tensors"].update({"embed/embedding": {}}), "unexpected tensor 'embed/embedding'"),
    "path out": (lambda m: m["tensors"].update({"../../x": {}}), r"unexpected tensor '\.\./\.\./x'"),
    "giant width": (lambda m: m.update(d_ff=2**30), "d_ff is 1073741824"),
    "width of another type": (lambda m: m.update(d_ff="6"), "'d_ff' is of type str"),
    "name of another type": (lambda m: m.update(name=None), "'name' is of type NoneType"),
}


@pytest.mark.parametrize("case", STRUCTURAL)
def test_hostile_bundles_are_refused_before_a_tensor_is_opened(copy, case, monkeypatch):
    change, message = STRUCTURAL[case]
    forging.forge(copy / "alpha", change)
    monkeypatch.setattr(store.Artefact, "slice_at", lambda *_: pytest.fail("a tensor was opened"))
    with pytest.raises(errors.IntegrityError, match=message):
        store.open_bundle(copy / "alpha", CONFIG)


@pytest.mark.parametrize("name", ["../evil", "Alpha", "public", "\u0430lpha"])
def test_hostile_names_are_refused(copy, name):
    forging.forge(copy / "alpha", lambda m: m.update(name=name))
    with pytest.raises(errors.ConfigError, match="expert name"):
        store.open_bundle(copy / "alpha", CONFIG)


ANCHORS = {
    "tokenizer elsewhere": (lambda m: m["tokenizer"].update(file="../../secret"), "the tokenizer must be one of"),
    "tokenizer of another type": (lambda m: m.update(tokenizer="tokenizer.model"), "the tokenizer must be one of"),
    "tokenizer without digest": (lambda m: m["tokenizer"].pop("digest"), "the tokenizer must be one of"),
    "giant statistics": (lambda m: entry(m, "statistics/states").update(shape=[2, 2**40, 8]), "statistics/states has shape"),
    "object statistics": (lambda m: entry(m, "statistics/states").update(dtype="object"), "dtype of float32"),
    "giant model": (lambda m: m["model"].update(d_model=2**30), "model.d_model"),
    "unknown model field": (lambda m: m["model"].update(code="import os"), "exactly the fields"),
    "routers that never forget": (lambda m: m["model"].update(router_memory=1.0), "model.router_memory is 1.0"),
    "other model": (lambda m: m["model"].update(num_layers=3), "has shape"),
}


@pytest.mark.parametrize("case", ANCHORS)
def test_hostile_anchors_are_refused_before_a_tensor_is_opened(copy, case, monkeypatch):
    change, message = ANCHORS[case]
    forging.forge(copy / "anchor", change)
    monkeypatch.setattr(store.Artefact, "slice_at", lambda *_: pytest.fail("a tensor was opened"))
    with pytest.raises(errors.IntegrityError, match=message):
        store.open_anchor(copy / "anchor")


def test_a_router_memory_is_part_of_the_anchor_and_anchors_without_one_do_not_speak_of_it(copy):
    assert "router_memory" not in store.open_anchor(copy / "anchor").manifest["model"]
    forging.forge(copy / "anchor", lambda m: m["model"].update(router_memory=0.98))
    assert store.config_of(store.open_anchor(copy / "anchor")) == dataclasses.replace(CONFIG, router_memory=0.98)


def test_models_whose_parts_do_not_belong_together_are_refused(copy):
    beta = manifest_lib.read(copy / "beta", "expert")["digest"]
    alpha = manifest_lib.read(copy / "alpha", "expert")["digest"]
    cases = {
        "is not the expert 'beta'": lambda m: m["experts"].update(beta=alpha),
        "is no SHA-256": lambda m: m["experts"].update(beta="../../beta"),
        "the model names": lambda m: m.update(anchor=beta),
        "top_k is 5": lambda m: m.update(top_k=5),
    }
    for number, (message, change) in enumerate(cases.items()):
        model = shutil.copytree(copy / "model", copy / f"model{number}")
        forging.forge(model, change)
        with pytest.raises(errors.IntegrityError, match=message):
            models.open_model(model)
    stranger = {**store.open_anchor(copy / "anchor").manifest, "digest": "e" * 64}
    strange_anchor = dataclasses.replace(store.open_anchor(copy / "anchor"), manifest=stranger)
    foreign = publishing.write_bundle(copy / "foreign", "beta", strange_anchor, EXPERTS["beta"], {})
    shutil.copytree(foreign.directory, copy / "model" / "experts" / foreign.manifest["digest"])
    forging.forge(copy / "model", lambda m: m["experts"].update(beta=foreign.manifest["digest"]))
    with pytest.raises(errors.IntegrityError, match="was trained on anchor eeeeeeeeeeee"):
        models.open_model(copy / "model")


@pytest.mark.parametrize(("path", "value", "message"), [
    ("router/bias", 0.1, "positive bias"), ("router/bias", np.nan, "NaN or infinity"), ("ffn/up", np.inf, "NaN or infinity"),
    ("router/row", -np.inf, "NaN or infinity"),
])  # fmt: skip
def test_bad_numbers_are_refused_when_written_and_when_read(home, tmp_path, path, value, message):
    bad = tree.map_with_path(lambda _, leaf: leaf.copy(), EXPERTS["alpha"])
    tree.flatten(bad)[path].reshape(-1)[-1] = value
    anchor = store.open_anchor(home / "anchor")
    with pytest.raises(errors.IntegrityError, match=message):
        publishing.write_bundle(tmp_path / "checked", "alpha", anchor, bad, {})
    assert not (tmp_path / "checked").exists()
    sneaky = publishing.write_bundle(tmp_path / "bad", "alpha", anchor, EXPERTS["alpha"], {})
    forging.implant(sneaky.directory, f"expert/{path}", lambda values: tree.flatten(bad)[path])
    sneaky = store.open_bundle(sneaky.directory, CONFIG)
    with pytest.raises(errors.IntegrityError, match=message):
        sneaky.verify()
    with pytest.raises(errors.IntegrityError, match=message):
        models.write_model(tmp_path / "model", anchor, {"alpha": sneaky}, 2)
    assert not (tmp_path / "model" / manifest_lib.FILE).exists()


def test_directories_that_are_not_ours_are_left_alone(tmp_path):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("precious")
    with pytest.raises(errors.StorageError, match="not empty and not ours"):
        write_anchor(tmp_path / "home")
    assert (tmp_path / "home" / "thesis.tex").read_text() == "precious"
    write_anchor(tmp_path / "anchor")
    with pytest.raises(errors.StorageError, match="finished artefact"):
        write_anchor(tmp_path / "anchor")
    half = tmp_path / "half"
    half.mkdir()
    (half / manifest_lib.PARTIAL).write_bytes(b"")
    (half / "tensors").mkdir()
    write_anchor(half).verify()


def test_tokenizers_get_their_fixed_name_and_are_checked(copy):
    for suffix, name in ((".json", "tokenizer.json"), (".model", "tokenizer.model")):
        anchor = write_anchor(copy / f"new{suffix}", f"olmo{suffix}")
        assert store.tokenizer_path(anchor).name == name
        anchor.verify()
    with pytest.raises(errors.ConfigError, match=r"no tokenizer; give a \.model or \.json"):
        write_anchor(copy / "text", "words.txt")
    anchor = store.open_anchor(copy / "anchor")
    (copy / "anchor" / "tokenizer.model").write_bytes(b"other")
    for read in (store.tokenizer_path, lambda a: copying.copy(a, copy / "target"), store.Artefact.verify):
        with pytest.raises(errors.IntegrityError, match=r"tokenizer\.model is not the tokenizer"):
            read(anchor)


def test_the_tokenizer_is_made_of_the_bytes_that_were_verified(tmp_path, monkeypatch):
    tokenizer_lib.train(["some words, and some more words\n"] * 9, 300, tmp_path / "own.model")
    anchor = publishing.write_anchor(
        tmp_path / "anchor", CONFIG, tmp_path / "own.model",
        lambda writer: writer.put_tree({**SHARED, "expert": EXPERTS["public"]}), rows="mean", training={},
    )  # fmt: skip
    read_small = storage.read_small

    def swapped_after(path, *arguments):
        data = read_small(path, *arguments)
        path.write_bytes(b"swapped")
        return data

    monkeypatch.setattr(storage, "read_small", swapped_after)
    assert store.tokenizer(anchor).digest == anchor.manifest["tokenizer"]["digest"]
    with pytest.raises(errors.IntegrityError, match=r"tokenizer\.model is not the tokenizer"):
        store.tokenizer(anchor)


CARRIED = {
    "no object": ([], "no sound entry of tensor shared/head/kernel"),
    "no shape": ({"dtype": "float32"}, "no sound entry of tensor shared/head/kernel"),
    "many dimensions": ({"shape": [1] * 9}, "no sound entry of tensor shared/head/kernel"),
    "no slices": ({"dtype": "float32", "shape": [8, 11]}, "must hold a dtype of"),
    "giant shape": ({"dtype": "float32", "shape": [2**40], "slices": [], "max": 0, "rms": 0}, "shared/head/kernel has shape"),
    "few slices": ({"dtype": "float32", "shape": [8, 11], "slices": [], "max": 0, "rms": 0}, "must have 1 slices"),
}


@pytest.mark.parametrize("case", CARRIED)
def test_shared_leaves_are_checked_without_an_anchor_too(copy, case):
    stated, message = CARRIED[case]
    forging.forge(copy / "alpha", lambda m: m["tensors"].update({"shared/head/kernel": stated}))
    with pytest.raises(errors.IntegrityError, match=message):
        store.open_bundle(copy / "alpha", None)


def test_shared_leaves_of_any_shape_are_sound_without_an_anchor(copy):
    forging.forge(copy / "alpha", lambda m: m["tensors"].update({"shared/layers/x": m["tensors"]["expert/ffn/up"]}))
    assert store.carried(store.open_bundle(copy / "alpha", None)) == ["layers/x"]
    forging.forge(copy / "beta", lambda m: m["tensors"].update({"shared/../../x": m["tensors"]["expert/ffn/up"]}))
    with pytest.raises(errors.IntegrityError, match="unexpected tensor 'shared/"):
        store.open_bundle(copy / "beta", None)


QUANTILES = {
    "one": [0.5],
    "descending": [0.9, 0.5, 0.1],
    "twice": [0.1, 0.5, 0.5],
    "without the median": [0.1, 0.9],
    "beyond 1": [0.5, 1.5],
    "none": [],
}


@pytest.mark.parametrize("case", QUANTILES)
def test_quantiles_that_nobody_can_interpolate_are_refused(copy, case):
    quantiles = QUANTILES[case]
    forging.forge(copy / "alpha", lambda m: m.update(margins={"quantiles": quantiles, "values": [[0.0] * len(quantiles)] * 2}))
    with pytest.raises(errors.IntegrityError, match=r"ascending quantiles, 0\.5 among them"):
        store.open_bundle(copy / "alpha", CONFIG)


def test_two_quantiles_are_enough(copy):
    forging.forge(copy / "alpha", lambda m: m.update(margins={"quantiles": [0.5, 1], "values": [[0.0, 1.0]] * 2}))
    assert store.open_bundle(copy / "alpha", CONFIG).manifest["margins"]["quantiles"] == [0.5, 1]


def test_anchors_without_a_tokenizer(tmp_path):
    anchor = publishing.write_anchor(
        tmp_path / "bare", CONFIG, None, lambda w: w.put_tree({**SHARED, "expert": EXPERTS["public"]}), rows="mean", training={}
    )
    anchor.verify()
    with pytest.raises(errors.ConfigError, match="has no tokenizer"):
        store.tokenizer_path(anchor)
