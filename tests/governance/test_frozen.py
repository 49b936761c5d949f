"""The anchor stays frozen (G8): training changes no leaf of it, and a bundle carries what was trained and nothing else."""

import pytest

from flexjax import tree
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import schema, store
from tests.commands import conftest as session

anchor, commands, corpus, house, tiny = session.anchor, session.commands, session.corpus, session.house, session.tiny
UNFROZEN = ("embed/embedding", "head/kernel", "head/norm")


def leaves(directory):
    """{leaf: digest of its bytes as they lie there}, whatever the manifest says."""
    opened = store.open_anchor(directory)
    return {path: tree.sha256(opened.tensor(path).tobytes()) for path in opened.manifest["tensors"]}


@pytest.fixture(scope="module")
def unfrozen(commands, tiny, anchor, tmp_path_factory):
    """A run beside the same anchor that trains embeddings and head too: its bundle, and the anchor before and after."""
    directory = tmp_path_factory.mktemp("unfrozen") / "math"
    before = leaves(anchor), session.snapshot(anchor)
    trainable = "experts/{expert}/.*|embed/.*|head/.*"
    result = commands.main(
        session.MATH, *tiny, f"--config.anchor.path={anchor}", f"--config.train.trainable={trainable}",
        "--config.evaluation.domains=()", f"--workdir={directory}",
    )  # fmt: skip
    assert result.code == 0, result.err
    return directory, before, (leaves(anchor), session.snapshot(anchor))


def partition(anchor, bundle):
    """Names and shapes that the bundle of one full expert must have."""
    config = store.config_of(store.open_anchor(anchor))
    stated = manifest_lib.read(bundle, "expert")
    return schema.expert_shapes(config.num_layers, config.d_model, stated["d_ff"], biased=True), stated["tensors"]


def test_training_an_expert_leaves_the_anchor_alone(house, anchor):
    """The manifest was sealed before the expert was trained, and every byte still fits; so does the copy in the model."""
    store.open_anchor(anchor).verify()
    assert leaves(anchor) == leaves(house / "model" / "anchor")
    assert manifest_lib.read(house / "expert", "expert")["anchor"] == manifest_lib.read(anchor, "anchor")["digest"]


def test_a_bundle_carries_the_expert_and_nothing_else(house, anchor):
    shapes, tensors = partition(anchor, house / "expert")
    assert {path: tuple(entry["shape"]) for path, entry in tensors.items()} == shapes
    bundle = store.open_bundle(house / "expert", None)
    assert {
        str(path.relative_to(house / "expert")) for path in (house / "expert").rglob("*") if path.is_file()
    } == bundle.files()
    public = store.open_anchor(anchor).tensors("expert")
    for path, leaf in tree.flatten(public).items():
        assert leaf.tobytes() != bundle.tensor(f"expert/{path}").tobytes(), f"{path} was not trained"


def test_unfreezing_shared_leaves_leaves_the_anchor_alone(unfrozen):
    _, before, after = unfrozen
    assert after == before and len(before[0]) > 10


def test_unfrozen_leaves_are_carried_and_nothing_else(unfrozen, anchor):
    directory, _, _ = unfrozen
    shapes, tensors = partition(anchor, directory / "expert")
    assert set(tensors) == set(shapes) | {f"shared/{path}" for path in UNFROZEN}
    bundle, ours = store.open_bundle(directory / "expert", None), store.open_anchor(anchor)
    assert store.carried(bundle) == sorted(UNFROZEN)
    for path in UNFROZEN:
        assert bundle.tensor(f"shared/{path}").shape == ours.tensor(path).shape
        assert bundle.tensor(f"shared/{path}").tobytes() != ours.tensor(path).tobytes(), f"{path} was not trained"


def test_the_anchor_in_a_model_is_the_anchor_whatever_a_bundle_carries(commands, unfrozen, anchor, tmp_path):
    directory, (digests, _), _ = unfrozen
    create = ["create", f"--anchor={anchor}", f"--expert={directory / 'expert'}"]
    refused = commands.merge(*create, f"--model={tmp_path / 'strict'}")
    assert refused.code == 5 and "head/kernel" in refused.err and not (tmp_path / "strict" / "manifest.json").exists()
    for policy in ("report", "average"):
        done = commands.merge(*create, f"--model={tmp_path / policy}", f"--anchor_policy={policy}")
        assert done.code == 0, done.err
        assert leaves(tmp_path / policy / "anchor") == digests
