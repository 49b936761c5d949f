"""Surgery on directories: what comes out depends on what went in, never on order, history or interruptions."""

import contextlib
import itertools
import os
import random
import shutil

import numpy as np
import pytest

from flexjax import errors, storage, tree, workdir
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import models, store, surgery
from flexjax.governance import history, merging, signatures
from tests.commands.conftest import snapshot
from tests.experts import forging
from tests.governance import parts


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = tmp_path_factory.mktemp("merging")
    parts.write_all(home)
    return home


def create(target, home, names, top_k=2, **terms):
    return merging.create(target, home / "anchor", [home / name for name in names], top_k, merging.Terms(**terms))


def equal(a, b):
    a, b = tree.flatten(a), tree.flatten(b)
    return list(a) == list(b) and all(np.asarray(a[p]).tobytes() == np.asarray(b[p]).tobytes() for p in a)


def test_order_does_not_matter(home, tmp_path):
    digests = set()
    for number, order in enumerate(itertools.permutations(parts.NAMES[:3])):
        digests.add(create(tmp_path / str(number), home, order).tree_digest)
    assert len(digests) == 1


@pytest.mark.parametrize("seed", range(6))
def test_any_way_to_the_same_experts_gives_the_same_model(home, tmp_path, seed):
    """Adding, removing and replacing in random order ends where creating at once does, byte for byte."""
    dice = random.Random(seed)
    present = set(dice.sample(parts.NAMES, 2))
    model = create(tmp_path / "model", home, sorted(present))
    for _ in range(8):
        absent = sorted(set(parts.NAMES) - present)
        if absent and dice.random() < 0.5:
            new = dice.sample(absent, dice.randint(1, len(absent)))
            model = merging.add(tmp_path / "model", [home / name for name in new])
            present |= set(new)
        elif len(present) > 1:
            gone = dice.choice(sorted(present))
            model = merging.remove(tmp_path / "model", gone)
            present.remove(gone)
        else:
            model = merging.replace(tmp_path / "model", home / next(iter(present)))
    once = create(tmp_path / "once", home, sorted(present), top_k=model.manifest["top_k"])
    assert model.tree_digest == once.tree_digest
    assert snapshot(tmp_path / "model") == snapshot(tmp_path / "once")
    models.verify(model)


def test_remove_is_the_inverse_of_merging(home, tmp_path):
    """G2: every subset of 5 experts of mixed sizes without each of its members: 80 of 80, parameters bit for bit."""
    everything = {name: parts.EXPERTS[name] for name in ("public", *parts.NAMES)}
    cases = 0
    for size in range(1, 6):
        for names in itertools.combinations(parts.NAMES, size):
            params, banks = surgery.join(parts.SHARED, {n: everything[n] for n in ("public", *names)})
            for name in names:
                left, found = surgery.remove(params, banks, name)
                never, expected = surgery.join(parts.SHARED, {n: everything[n] for n in ("public", *names) if n != name})
                assert found == expected and equal(left, never)
                cases += 1
    assert cases == 80


def test_an_operation_touches_its_expert_and_the_manifest_only(home, tmp_path):
    create(tmp_path / "model", home, parts.NAMES[:4])
    for operation, name in ((merging.add, "gamma"), (merging.remove, "gamma"), (merging.replace, "beta")):
        times = {path: os.stat(path).st_mtime_ns for path in (tmp_path / "model").rglob("*") if path.is_file()}
        argument = {merging.add: [home / name], merging.replace: home / name}.get(operation, name)
        operation(tmp_path / "model", argument)
        changed = {
            path for path in (tmp_path / "model").rglob("*") if path.is_file() and times.get(path) != os.stat(path).st_mtime_ns
        }
        digest = store.open_bundle(home / name, parts.CONFIG).manifest["digest"]
        assert all(p.name in (manifest_lib.FILE, ".lock") or digest in p.parts for p in changed), changed


def test_dry_run_writes_nothing(home, tmp_path):
    seen = []
    assert create(tmp_path / "model", home, parts.NAMES, dry_run=True, announce=seen.append) is None
    assert not (tmp_path / "model").exists() and len(seen) == 1
    create(tmp_path / "model", home, parts.NAMES[:2])
    before = snapshot(tmp_path)
    terms = merging.Terms(dry_run=True)
    assert merging.add(tmp_path / "model", [home / "gamma"], terms=terms) is None
    assert merging.replace(tmp_path / "model", home / "beta", terms=terms) is None
    assert merging.remove(tmp_path / "model", "beta", dry_run=True) is None
    assert snapshot(tmp_path) == before


def test_the_report_says_what_and_why(home, tmp_path):
    rows = []
    parts.write_bundle(
        tmp_path / "beta",
        "beta",
        store.open_anchor(home / "anchor"),
        data={"licence": "MIT"},
        privacy={"dp": "dp-sgd", "epsilon": 2.0, "delta": 1e-5},
    )
    merging.create(
        tmp_path / "model", home / "anchor", [home / "alpha", tmp_path / "beta", home / "delta"], 4,
        merging.Terms(announce=rows.extend, dry_run=True),
    )  # fmt: skip
    found = {(row.expert, row.field): row for row in rows}
    assert found["alpha", "licence"].verdict == "note" and found["beta", "licence"].found == "MIT"
    assert "NO differential privacy" in found["alpha", "privacy"].found and "epsilon 2.0" in found["beta", "privacy"].found
    assert found["alpha", "size"].found.startswith("full") and found["beta", "size"].found.startswith("width 3")
    assert found["delta", "size"].found.startswith("rank 2")
    assert found["alpha", "signature"].found == "unsigned" and found["", "top_k"].verdict == "ok"
    for field in ("anchor", "config", "tokenizer", "vocabulary", "shapes", "dtypes", "magnitude", "shared", "row norm", "bias"):
        assert found["beta", field].verdict == "ok", found["beta", field]
    assert {("alpha", "nearest row"), ("delta", "nearest row")} <= set(found)
    assert all(row.advice for row in rows if row.verdict != "ok")


def test_add_and_replace_refuse(home, tmp_path):
    model = tmp_path / "model"
    create(model, home, ("alpha", "beta"))
    anchor = store.open_anchor(home / "anchor")
    parts.write_bundle(tmp_path / "newer", "beta", anchor, version=3)
    before = snapshot(tmp_path)
    with pytest.raises(errors.ConfigError, match="has an expert 'alpha'; use replace"):
        merging.add(model, [home / "alpha"])
    with pytest.raises(errors.PolicyError, match=r"no expert 'gamma'.*it has alpha, beta"):
        merging.replace(model, home / "gamma")
    with pytest.raises(errors.ConfigError, match="given twice"):
        merging.add(model, [home / "gamma", home / "gamma"])
    with pytest.raises(errors.ConfigError, match="top_k expected 1 to 4, found 5"):
        merging.add(model, [home / "gamma"], top_k=5)
    assert snapshot(tmp_path) == before
    merging.replace(model, tmp_path / "newer")
    with pytest.raises(errors.PolicyError, match=r"version expected 3 or later, found 1.*--allow_older"):
        merging.replace(model, home / "beta")
    assert merging.replace(model, home / "beta", allow_older=True).bundles["beta"].manifest["version"] == 1


def test_history_and_revert(home, tmp_path):
    model = tmp_path / "model"
    digests = [create(model, home, ("alpha", "beta")).tree_digest]
    digests.append(merging.add(model, [home / "gamma"]).tree_digest)
    digests.append(merging.remove(model, "beta").tree_digest)
    rows = history.log(model, digests[-1])
    assert [(row["operation"], row["name"], row["state"]) for row in rows] == [
        ("create", "", "done"), ("add", "gamma", "done"), ("remove", "beta", "done")
    ]  # fmt: skip
    assert [row["after"] for row in rows] == digests
    gone = store.open_bundle(home / "beta", parts.CONFIG).manifest["digest"]
    with pytest.raises(errors.PolicyError, match=f"'beta' with digest {gone}.*bytes are gone"):
        merging.revert(model, [])
    parts.write_bundle(tmp_path / "other", "beta", store.open_anchor(home / "anchor"), version=2)
    with pytest.raises(errors.PolicyError, match=f"'beta' with digest {gone}"):
        merging.revert(model, [tmp_path / "other"])
    assert merging.revert(model, [home / "beta"]).tree_digest == digests[1]
    merging.remove(model, "gamma")
    assert merging.revert(model, [home / "gamma"]).tree_digest == digests[1]
    models.verify(models.open_model(model))


def test_out_leaves_the_model_alone(home, tmp_path):
    create(tmp_path / "model", home, ("alpha", "beta"))
    before = snapshot(tmp_path / "model")
    smaller = merging.remove(tmp_path / "model", "beta", tmp_path / "smaller")
    assert snapshot(tmp_path / "model") == before
    assert smaller.tree_digest == create(tmp_path / "alone", home, ("alpha",)).tree_digest


# Interruptions: any prefix of the file operations of an operation leaves the old model or the new one.


class Cut(Exception):
    """The process is gone."""


def cut_after(patch, count):
    """Lets so many writes and deletions of files happen, and no more; returns a list that counts them."""
    done = []

    def limited(original):
        def call(*arguments, **options):
            if len(done) == count:
                raise Cut
            done.append(original)
            return original(*arguments, **options)

        return call

    for name in ("write", "replace", "delete"):
        patch.setattr(storage, name, limited(getattr(storage, name)))
    patch.setattr(workdir, "write", limited(workdir.write))
    return done


def test_a_removal_that_was_cut_off_is_finished_by_the_same_command(home, tmp_path):
    """What opted out is gone from the disk, whatever was left of it."""
    model = tmp_path / "model"
    create(model, home, ("alpha", "beta"))
    digest = models.open_model(model).manifest["experts"]["beta"]
    merging.remove(model, "beta")
    for left in (lambda place: shutil.copytree(home / "beta", place), lambda place: (place / "tensors").mkdir(parents=True)):
        left(model / "experts" / digest)
        (model / "experts" / ".DS_Store").write_bytes(b"x")
        merging.remove(model, "beta")
        assert [path.name for path in (model / "experts").iterdir()] == list(
            models.open_model(model).manifest["experts"].values()
        )
    with pytest.raises(errors.PolicyError, match="no expert 'gamma'"):
        merging.remove(model, "gamma")


def test_a_revert_gives_the_model_before(home, tmp_path):
    """Averages too, and only what left may be brought."""
    anchor = store.open_anchor(home / "anchor")
    parts.write_bundle(tmp_path / "beta", "beta", anchor, parts.moved(1))
    given = [home / "alpha", tmp_path / "beta"]
    before = merging.create(tmp_path / "model", home / "anchor", given, 2, merging.Terms("average")).tree_digest
    merging.remove(tmp_path / "model", "beta")
    with pytest.raises(errors.ConfigError, match="has not to come back"):
        merging.revert(tmp_path / "model", [tmp_path / "beta", home / "gamma"], merging.Terms("average"))
    assert merging.revert(tmp_path / "model", [tmp_path / "beta"], merging.Terms("average")).tree_digest == before


def test_one_policy_for_all_experts_of_a_model(home, tmp_path):
    anchor = store.open_anchor(home / "anchor")
    for seed, name in enumerate(("beta", "gamma")):
        parts.write_bundle(tmp_path / name, name, anchor, parts.moved(seed))
    given = [home / "alpha", tmp_path / "beta"]
    merging.create(tmp_path / "averaged", home / "anchor", given, 2, merging.Terms("average"))
    merging.create(tmp_path / "plain", home / "anchor", given, 2, merging.Terms("report"))
    with pytest.raises(errors.ConfigError, match="averages shared leaves"):
        merging.add(tmp_path / "averaged", [tmp_path / "gamma"], terms=merging.Terms("report"))
    with pytest.raises(errors.ConfigError, match="leaves the shared leaves of beta out"):
        merging.add(tmp_path / "plain", [tmp_path / "gamma"], terms=merging.Terms("average"))


def test_a_signature_of_another_state_is_withdrawn(home, tmp_path):
    create(tmp_path / "model", home, ("alpha", "beta"))
    signatures.generate_key(tmp_path / "key")
    signatures.sign(tmp_path / "model", tmp_path / "key")
    merging.remove(tmp_path / "model", "beta")
    assert not (tmp_path / "model" / manifest_lib.SIGNATURE).exists()
    models.verify(models.open_model(tmp_path / "model"))


def test_the_anchor_is_vouched_for_where_a_trust_file_names_anchors(home, tmp_path):
    anchor = shutil.copytree(home / "anchor", tmp_path / "anchor")
    parts.write_bundle(tmp_path / "alpha", "alpha", store.open_anchor(anchor), owner="A")
    key = signatures.generate_key(tmp_path / "key")
    signatures.sign(tmp_path / "alpha", tmp_path / "key")
    trust = signatures.Trust({key: signatures.Holder("A", ("alpha", "anchor:*"))}, frozenset(), {})
    with pytest.raises(errors.PolicyError, match=f"anchor {anchor} is unsigned"):
        merging.create(tmp_path / "model", anchor, [tmp_path / "alpha"], 2, merging.Terms(trust=trust))
    signatures.sign(anchor, tmp_path / "key")
    merging.create(tmp_path / "model", anchor, [tmp_path / "alpha"], 2, merging.Terms(trust=trust))


@pytest.mark.parametrize("operation", ["create", "add", "replace", "remove"])
def test_an_interruption_leaves_the_old_model_or_the_new_one(home, tmp_path, operation, monkeypatch):
    monkeypatch.setattr(workdir, "sync_below", lambda directory: None)  # a hundred models need not outlive a power cut
    model, copy = tmp_path / "start" / "model", tmp_path / "run" / "model"
    parts.write_bundle(tmp_path / "newer", "beta", store.open_anchor(home / "anchor"), version=2)
    if operation == "create":
        model.parent.mkdir()
    else:
        create(model, home, ("alpha", "beta"))
    old = models.open_model(model).tree_digest if operation != "create" else None

    def run():
        if operation == "create":
            return create(copy, home, ("alpha", "beta"))
        if operation == "add":
            return merging.add(copy, [home / "gamma"])
        return merging.replace(copy, tmp_path / "newer") if operation == "replace" else merging.remove(copy, "beta")

    def attempt(count):
        shutil.rmtree(copy.parent, ignore_errors=True)
        shutil.copytree(model.parent, copy.parent)
        with pytest.MonkeyPatch.context() as patch:
            done = cut_after(patch, count)
            with contextlib.suppress(Cut):
                run()
            return len(done)

    total = attempt(-1)
    new, files = models.open_model(copy).tree_digest, snapshot(copy)
    dice = random.Random(operation)
    for count in sorted({0, 1, *dice.sample(range(total), min(total, 8)), *range(total - 4, total)}):
        attempt(count)
        committed = (copy / manifest_lib.FILE).exists()
        assert committed or operation == "create"
        if committed:
            found = models.open_model(copy)
            assert found.tree_digest in (old, new)
            for artefact in found.artefacts:
                artefact.verify()
        if not committed or found.tree_digest == old:
            run()
        else:  # the same command, or any other, finishes
            with contextlib.suppress(errors.ConfigError):
                run()
        assert snapshot(copy) == files, f"{operation} cut after {count} of {total} files"
        assert history.log(copy, new)[-1]["state"] == "done"


def test_shared_leaves(home, tmp_path):
    """What a bundle carries is refused, left out, or averaged; averages are made anew, so that who leaves is gone."""
    anchor = store.open_anchor(home / "anchor")
    moved = {name: parts.moved(seed) for seed, name in enumerate(("alpha", "beta"))}
    for name, shared in moved.items():
        parts.write_bundle(tmp_path / name, name, anchor, shared)
    given = [tmp_path / "alpha", tmp_path / "beta", home / "gamma"]
    with pytest.raises(errors.PolicyError, match=r"'alpha': shared expected none.*--anchor_policy=report"):
        merging.create(tmp_path / "strict", home / "anchor", given, 2)
    rows = []
    plain = merging.create(tmp_path / "plain", home / "anchor", given, 2, merging.Terms("report", announce=rows.extend))
    assert plain.manifest["shared"] is None and equal(models.load(plain)[1]["embed"], parts.SHARED["embed"])
    assert {row.field for row in rows if row.expert == "alpha"} >= {"drift embed/embedding", "drift head/kernel"}
    model = merging.create(tmp_path / "model", home / "anchor", given, 2, merging.Terms("average"))
    assert sorted(model.manifest["shared"]["experts"]) == ["alpha", "beta", "gamma"]
    models.verify(model)
    for path in ("embed/embedding", "head/kernel"):
        own = tree.flatten(parts.SHARED)[path]
        mean = (tree.flatten(moved["alpha"])[path] + tree.flatten(moved["beta"])[path] + own) / 3
        np.testing.assert_allclose(tree.flatten(models.load(model)[1])[path], mean, rtol=1e-6, atol=1e-7)
    assert equal(models.load(model)[1]["layers"], parts.SHARED["layers"])
    smaller = merging.remove(tmp_path / "model", "beta")
    assert "beta" not in smaller.manifest["shared"]["experts"]
    never = merging.create(tmp_path / "never", home / "anchor", [given[0], given[2]], 2, merging.Terms("average"))
    assert smaller.tree_digest == never.tree_digest and snapshot(tmp_path / "model") == snapshot(tmp_path / "never")
    assert merging.remove(tmp_path / "model", "alpha").manifest["shared"] is None


def test_a_calibrated_bias_is_used_and_the_owners_own_is_kept(home, tmp_path):
    create(tmp_path / "model", home, ("alpha", "beta"))
    entry = {"bias": [-3.0, -0.5], "share": 0.1, "text": "0" * 64, "with": []}
    model = merging.calibrate(tmp_path / "model", {"beta": entry})
    architecture, params = models.load(model)
    (bank,) = [bank for bank in architecture.banks if "beta" in bank.experts]
    np.testing.assert_array_equal(params["experts"][bank.name]["router"]["bias"][:, 0], np.float32([-3.0, -0.5]))
    assert equal(model.bundles["beta"].tensors("expert"), parts.EXPERTS["beta"])
    models.verify(model)
    assert merging.remove(tmp_path / "model", "beta").manifest["calibration"] == {}
    merging.add(tmp_path / "model", [home / "beta"])
    tied = {"alpha": {**entry, "with": ["beta"]}, "beta": {**entry, "with": ["alpha"]}}
    merging.calibrate(tmp_path / "model", tied)
    for operation in (
        lambda: merging.remove(tmp_path / "model", "beta"),
        lambda: merging.replace(tmp_path / "model", home / "beta"),
    ):
        with pytest.raises(errors.PolicyError, match=r"biases of alpha were fitted jointly with 'beta'.*--revert"):
            operation()
    again = merging.calibrate(tmp_path / "model", {})
    assert again.tree_digest == create(tmp_path / "plain", home, ("alpha", "beta")).tree_digest


@pytest.mark.parametrize(
    "entry",
    [
        {"bias": [0.1, 0.0], "share": 0.1, "text": "0" * 64, "with": []},
        {"bias": [-1.0], "share": 0.1, "text": "0" * 64, "with": []},
        {"bias": [-1.0, "x"], "share": 0.1, "text": "0" * 64, "with": []},
        {"bias": [-1.0, -1.0], "share": 0.1, "text": "else", "with": []},
        {"bias": [-1.0, -1.0], "share": 0.1, "with": []},
    ],
)
def test_hostile_calibrations_are_refused(home, tmp_path, entry):
    create(tmp_path / "model", home, ("alpha", "beta"))
    forging.forge(tmp_path / "model", lambda manifest: manifest.update(calibration={"beta": entry}))
    with pytest.raises(errors.IntegrityError, match="beta"):
        models.open_model(tmp_path / "model")
