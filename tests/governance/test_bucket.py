"""The same surgery in a bucket: the store copies, conditions commit, and whoever loses a race loses nothing."""

import random

import pytest
from etils import epath

from flexjax import errors, storage
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import models, store
from flexjax.governance import history, merging
from tests.governance import parts
from tests.storage import server

pytest.importorskip("google.cloud.storage")


@pytest.fixture(scope="module")
def local(tmp_path_factory):
    home = tmp_path_factory.mktemp("bucket")
    parts.write_all(home)
    return home


@pytest.fixture
def home(local, bucket, gcs):
    """Anchor and bundles in the bucket."""
    for file in sorted(path for path in local.rglob("*") if path.is_file()):
        gcs.put(f"parts/{file.relative_to(local)}", file.read_bytes())
    return epath.Path(f"gs://{server.BUCKET}/parts")


def create(target, home, names, **terms):
    return merging.create(target, home / "anchor", [home / name for name in names], 2, merging.Terms(**terms))


def weights(gcs):
    """Names of objects that hold FFN weights, below the merged model."""
    return {name for name in gcs.objects() if name.startswith("models/") and "/ffn/" in name}


def test_the_store_copies_and_no_weight_comes_through_here(home, bucket, gcs, local, tmp_path):
    before, start = storage.traffic(), gcs.counters()
    model = create(bucket / "model", home, ("alpha", "beta"))
    moved = storage.traffic()
    small = 200_000  # manifests, rows, biases, zarr.json: of tensors, rows and biases only
    assert moved.down - before.down < small and moved.up - before.up < small
    ours = create(tmp_path / "model", local, ("alpha", "beta"))
    assert model.tree_digest == ours.tree_digest
    models.verify(model)
    copied = gcs.counters()["rewrite"]["requests"] - start.get("rewrite", {}).get("requests", 0)
    ffn = len([name for name in gcs.objects() if name.startswith("models/model/") and "/c/" in name and "/router/" not in name])
    assert copied >= ffn > 0
    after = [merging.add(bucket / "model", [home / "gamma"]), merging.remove(bucket / "model", "beta")]
    also = [merging.add(tmp_path / "model", [local / "gamma"]), merging.remove(tmp_path / "model", "beta")]
    assert [found.tree_digest for found in after] == [found.tree_digest for found in also]
    beta = store.open_bundle(local / "beta", parts.CONFIG).manifest["digest"]
    assert not any(beta in name for name in gcs.objects() if name.startswith("models/model/"))
    models.verify(after[-1])
    assert [row["operation"] for row in history.log(bucket / "model", after[-1].tree_digest)] == ["create", "add", "remove"]


def test_bytes_can_be_read_before_the_store_copies_them(home, bucket, gcs, local):
    flipped = bytearray(gcs.get("parts/beta/tensors/expert/ffn/up/c/1/0/0"))
    flipped[5] ^= 4
    gcs.put("parts/beta/tensors/expert/ffn/up/c/1/0/0", bytes(flipped))
    with pytest.raises(errors.IntegrityError, match="expert/ffn/up, slice 1"):
        create(bucket / "read", home, ("alpha", "beta"), read_content=True)
    assert not storage.exists(bucket / "read" / manifest_lib.FILE)
    model = create(bucket / "trusting", home, ("alpha", "beta"))
    with pytest.raises(errors.IntegrityError, match="expert/ffn/up, slice 1"):
        models.verify(model)
    with pytest.raises(errors.IntegrityError, match="expert/ffn/up, slice 1"):
        models.load(model)


def test_rows_are_always_read(home, bucket, gcs, local):
    name = "parts/beta/tensors/expert/router/row/c/1/0"
    gcs.put(name, gcs.get(name)[::-1])
    with pytest.raises(errors.IntegrityError, match="expert/router/row"):
        create(bucket / "model", home, ("alpha", "beta"))
    assert not weights(gcs)


def test_from_a_disk_into_a_bucket_and_back(local, bucket, tmp_path):
    model = create(bucket / "model", local, ("alpha", "delta"))
    models.verify(model)
    back = merging.remove(bucket / "model", "delta", tmp_path / "back")
    assert back.tree_digest == create(tmp_path / "alone", local, ("alpha",)).tree_digest


def test_an_addition_that_was_cut_off_can_be_repeated(home, bucket, gcs, monkeypatch):
    create(bucket / "model", home, ("alpha", "beta"))

    def cut(*_):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(history, "record", cut)
        with pytest.raises(KeyboardInterrupt):
            merging.add(bucket / "model", [home / "gamma"])
    models.verify(merging.add(bucket / "model", [home / "gamma"]))
    models.verify(merging.replace(bucket / "model", home / "gamma"))


def test_who_loses_a_race_loses_nothing(home, bucket, gcs, monkeypatch):
    create(bucket / "model", home, ("alpha", "beta"))
    original = history.record

    def meanwhile(model, entry):
        found = original(model, entry)
        monkeypatch.setattr(history, "record", original)
        merging.remove(bucket / "model", "alpha")
        return found

    monkeypatch.setattr(history, "record", meanwhile)
    with pytest.raises(errors.StorageError, match=r"manifest.json"):
        merging.add(bucket / "model", [home / "gamma"])
    found = models.open_model(bucket / "model")
    assert sorted(found.bundles) == ["beta"]
    assert sorted(merging.add(bucket / "model", [home / "gamma"]).bundles) == ["beta", "gamma"]
    models.verify(models.open_model(bucket / "model"))


@pytest.mark.parametrize("seed", range(4))
def test_faults_leave_the_old_model_or_the_new_one(home, bucket, gcs, seed):
    """G16: 503, 429, short and corrupt bodies, lost answers: identical bytes, or one error that names the object."""
    old = create(bucket / "model", home, ("alpha", "beta")).tree_digest
    new = create(bucket / "expected", home, ("alpha", "beta", "gamma")).tree_digest
    dice, failed = random.Random(seed), 0
    for attempt in range(20):
        gcs.fail(rate=dice.choice([0.05, 0.2, 0.5]), seed=seed * 100 + attempt, kinds=None, seconds=0.1)
        try:
            found = merging.add(bucket / "model", [home / "gamma"])
        except errors.FlexjaxError as error:
            failed += 1
            assert "gs://" in str(error)
            if "has an expert 'gamma'" in str(error):
                found = models.open_model(bucket / "model")
            else:
                continue
        finally:
            gcs.fail()
        assert found.tree_digest == new
        break
    gcs.fail()
    found = models.open_model(bucket / "model")
    assert found.tree_digest in (old, new)
    if found.tree_digest == old:
        found = merging.add(bucket / "model", [home / "gamma"])
    assert found.tree_digest == new
    merging.remove(bucket / "model", "gamma")  # sweeps what was left over
    found = merging.add(bucket / "model", [home / "gamma"])
    models.verify(found)
