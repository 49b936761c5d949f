"""Calibration: the model itself shows the share that was asked for, and nobody else's expert has a say in it."""

import dataclasses
import json
import math

import jax
import numpy as np
import pytest
from etils import epath

from flexjax import config as config_lib
from flexjax import errors, tree
from flexjax.experts import models, slices, store, surgery
from flexjax.governance import calibration, layerwise, margins
from flexjax.model import transformer
from tests.model import noise
from tests.train import tiny

CONFIG = config_lib.ModelConfig(vocab_size=304, d_model=16, num_layers=3, num_heads=2, num_kv_heads=1, head_dim=8, d_ff=12)
BANKS = (
    *transformer.dense_banks(CONFIG),
    config_lib.Bank("w12", ("alpha", "gamma"), 12),
    config_lib.Bank("w8", ("beta",), 8),
)
PARAMS = noise.params(transformer.Architecture(CONFIG, BANKS, 2), std=0.4)
SHARED, EXPERTS = surgery.split(PARAMS, BANKS)
OWN = {name: EXPERTS[name]["router"]["bias"] for name in ("alpha", "beta", "gamma")}


def artefact(directory, tensors, **manifest):
    """An artefact of these tensors; what nobody asks of its manifest is left out."""
    writer = slices.TensorWriter(directory)
    writer.put_tree(tensors)
    return store.Artefact(epath.Path(directory), {"tensors": writer.entries, **manifest}, str(manifest.get("name", "anchor")))


def expert(directory, name, leaves, **manifest):
    d_ff = leaves["ffn"]["down"].shape[1] if not isinstance(leaves["ffn"]["down"], dict) else CONFIG.d_ff
    stated = {"kind": "expert", "name": name, "d_ff": d_ff, "rank": 0, "margins": None, "digest": name, **manifest}
    return artefact(directory / name, {"expert": leaves}, **stated)


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    return tmp_path_factory.mktemp("calibration")


@pytest.fixture(scope="module")
def anchor(home):
    model = dataclasses.asdict(CONFIG)
    return artefact(home / "anchor", {**SHARED, "expert": EXPERTS["public"]}, kind="anchor", digest="anchor", model=model)


@pytest.fixture(scope="module")
def bundles(home):
    return {name: expert(home, name, EXPERTS[name]) for name in ("alpha", "beta", "gamma")}


@pytest.fixture(scope="module")
def text():
    return layerwise.sample(tiny.Letters(seed=3, documents=60), seq_len=16, count=1600)


@pytest.fixture(scope="module")
def alpha(anchor, bundles, text):
    return calibration.alone(anchor, bundles["alpha"], text, 0.2)


def logits(biases, text, config=CONFIG):
    """Logits [L, S, E] of the model that holds exactly these experts with these biases, by the model's own forward pass."""
    experts = {"public": EXPERTS["public"]}
    for name, bias in biases.items():
        experts[name] = {**EXPERTS[name], "router": {**EXPERTS[name]["router"], "bias": np.asarray(bias, np.float32)}}
    params, banks = surgery.join(SHARED, experts)
    architecture = surgery.architecture(config, banks, len(experts))

    def forward(params):
        return transformer.forward(params, text.tokens, architecture, segments=text.segments, keep_states=True).states

    kept = jax.jit(forward, compiler_options=tiny.QUICK)(params)
    states = np.asarray(kept, np.float64)[:, text.counted]
    rows = np.stack([experts[name]["router"]["row"] for name in architecture.experts], axis=1)
    stacked = np.stack([experts[name]["router"].get("bias", np.zeros(3)) for name in architecture.experts], axis=1)
    return np.einsum("LSD,LED->LSE", states, rows.astype(np.float64)) + stacked[:, None]


def shares(biases, text):
    """Mean probabilities [L, E] of the same."""
    weights = np.exp(logits(biases, text))
    return (weights / weights.sum(axis=2, keepdims=True)).mean(axis=1)


def with_margins(bundle, values):
    stated = None if values is None else {"quantiles": [0.1, 0.5, 0.9], "values": values}
    return dataclasses.replace(bundle, manifest={**bundle.manifest, "margins": stated})


def test_routers_with_a_memory_are_shown_layer_by_layer_what_they_read(home, bundles, text):
    config = dataclasses.replace(CONFIG, router_memory=0.9)
    tensors = {**SHARED, "expert": EXPERTS["public"]}
    anchor = artefact(home / "remembers", tensors, kind="anchor", digest="remembers", model=config_lib.to_dict(config))
    biases = np.stack([np.zeros(3), *OWN.values()], axis=1)
    shown = []

    def choose(layer, without_biases):
        shown.append(without_biases + biases[layer])
        return biases[layer]

    layerwise.descend(anchor, bundles, layerwise.architecture(anchor, bundles, 4), text, choose)
    np.testing.assert_allclose(np.stack(shown), logits(OWN, text, config), rtol=1e-3, atol=1e-4)


def test_the_model_shows_the_share_that_was_asked_for(alpha, text):
    assert alpha.bias.dtype == np.float32 and alpha.bias.shape == (3,) and (alpha.bias < 0).all()
    np.testing.assert_allclose(shares({"alpha": alpha.bias}, text)[:, 1], 0.2, atol=1e-5)
    np.testing.assert_allclose(alpha.after, 0.2, atol=1e-6)
    assert alpha.reached.all() and not alpha.held.any() and alpha.in_domain is None


def test_each_bias_is_the_root_of_its_layer(alpha, text):
    found = logits({"alpha": alpha.bias}, text)
    for layer in range(3):
        margin = found[layer, :, 1] - found[layer, :, 0]
        below, above = ((1 / (1 + np.exp(-(margin + step)))).mean() for step in (-1e-4, 1e-4))
        assert below < 0.2 < above


def test_before_is_what_the_own_bias_gives_on_the_same_states(alpha, text):
    found = logits({"alpha": alpha.bias}, text)
    margin = found[..., 1] - found[..., 0] + (alpha.own - alpha.bias).astype(np.float64)[:, None]
    np.testing.assert_allclose(alpha.before, (1 / (1 + np.exp(-margin))).mean(axis=1), atol=1e-5)
    np.testing.assert_array_equal(alpha.own, OWN["alpha"])


def test_no_other_expert_has_a_say(anchor, bundles, home, text, alpha):
    again = calibration.alone(anchor, bundles["alpha"], text, 0.2)
    assert again.bias.tobytes() == alpha.bias.tobytes()
    expert(home, "delta", EXPERTS["gamma"])  # a newcomer, in the same place
    calibration.jointly(anchor, bundles, text, 0.3)
    assert calibration.alone(anchor, bundles["alpha"], text, 0.2).bias.tobytes() == alpha.bias.tobytes()
    assert calibration.jointly(anchor, {"alpha": bundles["alpha"]}, text, 0.2)["alpha"].bias.tobytes() == alpha.bias.tobytes()


def test_more_share_is_more_bias(anchor, bundles, text, alpha):
    fits = [calibration.alone(anchor, bundles["alpha"], text, share).bias[0] for share in (0.05, 0.1)]
    assert fits[0] < fits[1] < alpha.bias[0] < 0


def test_a_target_out_of_reach_is_said(anchor, bundles, text):
    fit = calibration.alone(anchor, bundles["beta"], text, 0.97)
    assert (fit.bias == 0).all() and not fit.reached.any() and (fit.after < 0.97).all() and not fit.held.any()
    np.testing.assert_allclose(fit.after, shares({"beta": np.zeros(3)}, text)[:, 1], atol=1e-5)
    assert "below the target 97.0% even with bias 0 in layers [0, 1, 2]" in calibration.table({"beta": fit})
    entry = calibration.entry(fit, 0.97, text.digest, [])
    assert [math.copysign(1, bias) for bias in entry["bias"]] == [1, 1, 1]


@pytest.mark.parametrize("top_k", [None, 2])
def test_a_joint_fit_gives_each_its_part(anchor, bundles, text, top_k):
    fits = calibration.jointly(anchor, bundles, text, 0.3, top_k=top_k)
    assert list(fits) == ["alpha", "beta", "gamma"] and all(fit.reached.all() for fit in fits.values())
    np.testing.assert_allclose([fit.after for fit in fits.values()], 0.1, atol=1e-6)
    if top_k is None:
        found = shares({name: fit.bias for name, fit in fits.items()}, text)
        np.testing.assert_allclose(found[:, 1:], 0.1, atol=1e-5)
        np.testing.assert_allclose(found[:, 0], 0.7, atol=3e-5)
        backwards = calibration.jointly(anchor, dict(reversed(bundles.items())), text, 0.3)
        assert all(backwards[name].bias.tobytes() == fit.bias.tobytes() for name, fit in fits.items())


def test_a_joint_target_out_of_reach_leaves_that_expert_at_0(anchor, bundles, text, home):
    down = tree.map_with_path(lambda path, leaf: leaf, EXPERTS["beta"])
    down["router"] = {**down["router"], "row": EXPERTS["public"]["router"]["row"]}  # half at most, whatever the token
    fits = calibration.jointly(anchor, {**bundles, "even": expert(home, "even", down)}, text, 0.9)
    for layer in range(3):
        total = 1 - sum(fit.after[layer] for fit in fits.values())
        np.testing.assert_allclose(fits["even"].after[layer] / total, np.exp(fits["even"].bias[layer]), rtol=1e-5)
    assert not fits["even"].reached.any() and (fits["even"].bias == 0).all()


def test_a_low_rank_expert_is_fitted_as_its_expansion(anchor, bundles, home, text, alpha):
    random, public = np.random.default_rng(4), EXPERTS["public"]["ffn"]
    ffn, whole = {}, {}
    for name, matrix in public.items():
        a, b = (random.normal(size=(3, *size)).astype(np.float32) for size in ((matrix.shape[1], 2), (2, matrix.shape[2])))
        ffn[name], whole[name] = {"a": a, "b": b}, matrix + a @ b
    router = EXPERTS["alpha"]["router"]
    bundle = expert(home, "low", {"ffn": ffn, "router": router}, rank=2)
    low = calibration.alone(anchor, bundle, text, 0.2)
    full = calibration.alone(anchor, expert(home, "whole", {"ffn": whole, "router": router}), text, 0.2)
    np.testing.assert_allclose(low.bias, full.bias, atol=1e-4)
    assert low.reached.all() and (low.bias[1:] != alpha.bias[1:]).all()
    fits = calibration.jointly(anchor, {"low": bundle, "beta": bundles["beta"]}, text, 0.2)
    assert all(fit.reached.all() for fit in fits.values())


def test_weights_pass_through_memory_a_layer_at_a_time(anchor, bundles, text, monkeypatch):
    read, slice_at = [], store.Artefact.slice_at

    def record(self, path, index):
        read.append((path, index))
        return slice_at(self, path, index)

    monkeypatch.setattr(store.Artefact, "slice_at", record)
    calibration.alone(anchor, bundles["beta"], text, 0.2)
    weights = [(path, index) for path, index in read if "/ffn/" in path]
    assert len(weights) == 2 * 3 * 2  # public and beta, three matrices; no router reads what the last layer's would make
    layers = [index for path, index in read if path.startswith(("layers/", "expert/ffn/"))]
    assert layers == sorted(layers)


def test_windows_are_spread_over_the_text():
    source = tiny.Letters(seed=1, documents=50)
    found = layerwise.sample(source, seq_len=16, count=640)
    assert found.tokens.shape == (40, 16) and (found.tokens[:, 0] == source.eos_id).all()
    stream = source.read(0, source.num_tokens)
    places = {stream[start : start + 15].tobytes(): start for start in range(0, len(stream), 15)}
    starts = [places[row[1:].tobytes()] for row in found.tokens[:-1]]
    assert starts[0] == 0 and max(np.diff(starts)) <= 2 * 15 * -(-len(stream) // 15) / 40
    assert found.segments[0, 0] == 1 and (np.diff(found.segments, axis=1) == (found.tokens[:, 1:] == 1)).all()
    assert (found.counted == (found.tokens != 1)).all()
    assert found.digest == layerwise.sample(source, seq_len=16, count=640).digest
    assert found.digest != layerwise.sample(source, seq_len=16, count=624).digest
    everything = layerwise.sample(source, seq_len=16, count=10**6)
    assert everything.counted.sum() == (stream != 1).sum()


def test_what_cannot_be_calibrated_is_refused(anchor, bundles, text):
    for share in (0.0, 1.0, -0.1):
        with pytest.raises(errors.ConfigError, match="between 0 and 1"):
            calibration.alone(anchor, bundles["alpha"], text, share)
    with pytest.raises(errors.ConfigError, match="none but public"):
        calibration.jointly(anchor, {}, text)
    with pytest.raises(errors.ConfigError, match="one window"):
        layerwise.sample(tiny.Letters(documents=60), seq_len=16, count=8)
    with pytest.raises(errors.DataError, match="tokens of public text"):
        layerwise.sample(tiny.Letters(documents=2), seq_len=16)
    with pytest.raises(errors.DataError, match="use its tokenizer"):
        calibration.alone(anchor, bundles["alpha"], layerwise.sample(tiny.Letters(documents=60, vocab=400), seq_len=16))


def test_a_bundle_that_holds_nan_is_refused(anchor, home, text):
    leaves = tree.map_with_path(lambda path, leaf: leaf * np.nan if path.endswith("up") else leaf, EXPERTS["beta"])
    with pytest.raises(errors.IntegrityError, match="expert/ffn/up holds NaN"):
        calibration.alone(anchor, expert(home, "broken", leaves), text, 0.2)


def test_margins_hold_a_bias_where_the_median_token_is_split_evenly(anchor, bundles, text, alpha):
    gap = alpha.own - alpha.bias  # a median margin of this is split evenly at the bias that the target needs
    medians = [float(gap[0]) - 0.5, float(gap[1]) + 5.0, -abs(float(alpha.own[2])) - 1.0]  # needs more, needs less, not its own
    bundle = with_margins(bundles["alpha"], [[median - 1, median, median + 1] for median in medians])
    fit = calibration.alone(anchor, bundle, text, 0.2)
    assert fit.held.tolist() == [True, False, False] and fit.reached.tolist() == [False, True, True]
    np.testing.assert_allclose(fit.bias[0], alpha.own[0] - medians[0], rtol=1e-6)
    assert fit.after[0] > 0.2 and "kept above the target 20.0% by its margins in layers [0]" in calibration.table(
        {"alpha": fit}
    )
    free = calibration.alone(anchor, bundle, text, 0.2, ignore_margins=True)
    assert free.bias.tobytes() == alpha.bias.tobytes() and not free.held.any() and free.in_domain is not None


def test_the_share_of_the_own_text_follows_from_the_quantiles(bundles):
    own, bias = OWN["alpha"], OWN["alpha"] - np.float32(1)
    constant = with_margins(bundles["alpha"], [[2.0] * 3] * 3)
    before, after = margins.shares(constant, own, bias)
    np.testing.assert_allclose(before, 1 / (1 + math.exp(-2)), rtol=1e-6)
    np.testing.assert_allclose(after, 1 / (1 + math.exp(-1)), rtol=1e-6)
    uniform = with_margins(bundles["alpha"], [[-0.8, 0.0, 0.8]] * 3)  # spread evenly from -1 to 1
    np.testing.assert_allclose(margins.shares(uniform, own, bias)[0], 0.5, atol=1e-6)
    assert margins.shares(bundles["alpha"], own, bias) is None


@pytest.mark.parametrize("kind", ["bundle", "pair"])
def test_margins_are_those_of_the_owners_tokens(anchor, bundles, home, kind):
    flat = {**EXPERTS["beta"], "router": {**EXPERTS["beta"]["router"], "row": EXPERTS["public"]["router"]["row"]}}
    bundle = expert(home, f"flat-{kind}", flat)
    params, banks = surgery.join(SHARED, {"public": EXPERTS["public"], "flat": flat})
    pair = (surgery.architecture(CONFIG, banks, 2), params)
    source = tiny.Letters(documents=1000, length=16)
    found = margins.measure(anchor, bundle if kind == "bundle" else pair, source, seq_len=16, count=1000)
    assert found["quantiles"] == [0.1, 0.5, 0.9] and json.loads(json.dumps(found)) == found
    for layer, values in enumerate(found["values"]):
        np.testing.assert_allclose(values, OWN["beta"][layer], atol=0.0051)  # the rows are equal: the bias is what is left
    with pytest.raises(errors.ConfigError, match="at least 1000"):
        margins.measure(anchor, bundle, source, seq_len=16, documents=999)


def test_margins_are_ordered_and_follow_the_row(anchor, bundles):
    source = tiny.Letters(documents=1000, length=16)
    found = margins.measure(anchor, bundles["alpha"], source, seq_len=16, count=1000)
    assert all(low < middle < high for low, middle, high in found["values"])
    sample = layerwise.sample(source, seq_len=16, count=16_000)
    margin = logits({"alpha": OWN["alpha"]}, sample)
    margin = margin[..., 1] - margin[..., 0]
    np.testing.assert_allclose(found["values"], np.quantile(margin, [0.1, 0.5, 0.9], axis=1).T, atol=0.25 * margin.std())


def test_an_entry_is_exact_in_float32(alpha, text):
    entry = calibration.entry(alpha, 0.2, text.digest, ["gamma", "alpha", "beta"])
    assert set(entry) == {"bias", "share", "text", "with"} and entry["with"] == ["beta", "gamma"]
    restored = json.loads(tree.canonical_json(entry))
    assert np.array(restored["bias"], np.float32).tobytes() == alpha.bias.tobytes()
    assert all(float(np.float32(bias)) == bias for bias in restored["bias"]) and entry["text"] == text.digest
    assert json.loads(json.dumps(alpha.to_dict()))["mean"]["after"] == pytest.approx(0.2, abs=1e-6)


def test_confusion_shows_what_calibration_costs_and_gains():
    params, banks = surgery.join(SHARED, {name: EXPERTS[name] for name in ("public", "beta")})
    architecture = surgery.architecture(CONFIG, banks, 2)
    texts = {"one": tiny.Letters(seed=5, documents=4), "two": tiny.Letters(seed=6, documents=4)}
    silent = {"beta": np.full(3, -60, np.float32)}
    found = calibration.confusion(architecture, params, silent, texts, seq_len=16, batch_size=4)
    assert list(found) == ["one", "two"]
    for row in found.values():
        assert sum(row["own"]["shares"].values()) == pytest.approx(1) and row["own"]["shares"]["beta"] > 0.05
        assert row["calibrated"]["shares"]["public"] == pytest.approx(1)
        assert row["calibrated"]["bits_per_byte"] == pytest.approx(row["anchor"], rel=1e-4)
        assert row["own"]["bits_per_byte"] != pytest.approx(row["anchor"], rel=1e-3)
    lines = calibration.confusion_table(found).splitlines()
    assert len(lines) == 5 and lines[0].split()[-2:] == ["public", "beta"]


def test_biases_are_replaced_by_name():
    changed = calibration.with_biases(PARAMS, BANKS, {"gamma": np.full(3, -7, np.float32)})
    before, after = tree.flatten(PARAMS), tree.flatten(changed)
    assert [path for path in before if not np.array_equal(before[path], after[path])] == ["experts/w12/router/bias"]
    np.testing.assert_array_equal(after["experts/w12/router/bias"][:, 1], -7)
    np.testing.assert_array_equal(after["experts/w12/router/bias"][:, 0], OWN["alpha"])
    for name in ("delta", "public"):
        with pytest.raises(errors.PolicyError, match=f"no expert '{name}' with a bias"):
            calibration.with_biases(PARAMS, BANKS, {name: np.zeros(3, np.float32)})


def test_a_model_is_fitted_as_it_is_used(anchor, bundles, text):
    """Jointly with its own top_k; on averaged leaves nobody is fitted alone."""
    manifest = {"top_k": 2, "calibration": {}, "shared": None}
    model = models.Model(anchor.directory, manifest, anchor, dict(bundles))
    fits, tied = calibration.of_model(model, text, 0.3, together=True)
    expected = calibration.jointly(anchor, bundles, text, 0.3, top_k=2)
    assert tied == ["alpha", "beta", "gamma"]
    for name, fit in expected.items():
        np.testing.assert_array_equal(fits[name].bias, fit.bias)
    plain, nobody = calibration.of_model(model, text, 0.3)
    assert nobody == []
    averaged = dataclasses.replace(anchor, label="averaged")
    averaged = dataclasses.replace(
        averaged, manifest={"tensors": {"embed/embedding": anchor.manifest["tensors"]["embed/embedding"]}},
        instead={"embed/embedding": -anchor.tensor("embed/embedding")},
    )  # fmt: skip
    shared = {"digest": "", "experts": dict.fromkeys(bundles, "")}
    model = dataclasses.replace(model, manifest={**manifest, "shared": shared}, shared=averaged)
    moved, everybody = calibration.of_model(model, text, 0.3)
    assert everybody == ["alpha", "beta", "gamma"]
    assert (moved["alpha"].bias != plain["alpha"].bias).any()
