"""The health gate: passes what training makes, and names each thing that it never makes."""

import dataclasses
import json
import tracemalloc

import numpy as np
import pytest
from etils import epath

from flexjax import config as config_lib
from flexjax import errors
from flexjax.experts import domains, slices, store
from flexjax.governance import health

LAYERS, STATES, WIDTH = 4, 1500, 24
NAMES = ("code", "law", "math")


def cloud(seed, count=STATES):
    """States of a domain: a direction of its own on top of what all text shares."""
    random = np.random.default_rng(seed)
    shared = np.random.default_rng(0).standard_normal((LAYERS, 1, WIDTH))
    return shared + 0.35 * random.standard_normal((LAYERS, 1, WIDTH)) + random.standard_normal((LAYERS, count, WIDTH))


PUBLIC = np.concatenate([cloud(seed, STATES // 3) for seed in (1, 2, 3)], axis=1).astype(np.float32)
TEXT = {name: cloud(10 + seed).astype(np.float32) for seed, name in enumerate(NAMES)}
ROWS = {name: domains.logistic_rows(text, PUBLIC) for name, text in TEXT.items()}
BIAS = np.full(LAYERS, -0.1, np.float32)


def artefact(directory, tensors, **manifest):
    writer = slices.TensorWriter(directory)
    for path, values in tensors.items():
        writer.put(path, values.dtype.name, values.shape, iter(values[:, None]))
    manifest = {"tensors": writer.entries, **manifest}
    return store.Artefact(epath.Path(directory), manifest, f"{manifest['kind']} {manifest.get('name', '')}")


@pytest.fixture
def anchor(tmp_path):
    zero = np.zeros((LAYERS, WIDTH), np.float32)
    return artefact(tmp_path / "anchor", {"expert/router/row": zero, "statistics/states": PUBLIC}, kind="anchor")


@pytest.fixture
def bundle(tmp_path):
    def make(name, row=None, bias=BIAS, margins=None):
        tensors = {"expert/router/row": ROWS[name] if row is None else row, "expert/router/bias": bias}
        tensors = {path: values.astype(np.float32) for path, values in tensors.items()}
        return artefact(
            tmp_path / f"{len(list(tmp_path.iterdir()))}-{name}", tensors, kind="expert", name=name, margins=margins
        )

    return make


@pytest.fixture
def honest(bundle):
    return {name: bundle(name) for name in NAMES}


def kinds(report):
    return {(finding.kind, finding.expert) for finding in report.findings}


def test_honest_experts_pass_in_any_company(anchor, honest):
    for names in (NAMES, NAMES[:2], *([name] for name in NAMES)):
        report = health.probe(anchor, {name: honest[name] for name in names})
        health.check(report)
        assert report.findings == () and health.table(report).splitlines()[-1] == "healthy"


def test_what_is_measured_is_what_the_router_does(anchor, honest):
    report = health.probe(anchor, honest)
    assert report.experts == NAMES
    chosen = PUBLIC[:, np.linspace(0, STATES - 1, health.MOST_STATES).round().astype(int)]
    logits = np.einsum("LSD,ELD->LSE", chosen.astype(np.float64), np.stack([ROWS[name] for name in NAMES])) - 0.1
    weights = np.concatenate([np.ones((LAYERS, health.MOST_STATES, 1)), np.exp(logits.astype(np.float64))], axis=2)
    p = weights / weights.sum(axis=2, keepdims=True)
    np.testing.assert_allclose(report.share, p[..., 1:].mean(axis=1), rtol=1e-5)
    beside = 1 / (1 + np.exp(-logits.astype(np.float64)))
    np.testing.assert_allclose(report.beside, beside.mean(axis=1), rtol=1e-5)
    np.testing.assert_allclose(report.most, beside.max(axis=1), rtol=1e-5)
    np.testing.assert_allclose(report.entropy, -(p * np.log(p)).sum(axis=2).mean(axis=1) / np.log(4), rtol=1e-5)
    np.testing.assert_allclose(report.spread, logits.std(axis=1), rtol=1e-5)
    np.testing.assert_allclose(report.reading, report.spread)  # the public row is 0
    norms = {name: np.linalg.norm(row, axis=1) for name, row in ROWS.items()}
    np.testing.assert_allclose(report.norm[:, 0], norms["code"] / ((norms["law"] + norms["math"]) / 2), rtol=1e-5)
    cosine = (ROWS["code"] * ROWS["math"]).sum(axis=1) / norms["code"] / norms["math"]
    np.testing.assert_allclose(report.cosine[:, 0, 2], cosine, rtol=1e-5)
    np.testing.assert_array_equal(report.bias, np.full((LAYERS, 3), BIAS[0]))
    assert np.isnan(report.own_text).all()


def test_a_public_row_is_the_reference(tmp_path, bundle):
    """Adding one vector to all rows changes nothing, as in a softmax."""
    offset = np.random.default_rng(7).standard_normal((LAYERS, WIDTH)).astype(np.float32)
    tensors = {"statistics/states": PUBLIC}
    plain = artefact(tmp_path / "plain", {**tensors, "expert/router/row": np.zeros_like(offset)}, kind="anchor")
    moved = artefact(tmp_path / "moved", {**tensors, "expert/router/row": offset}, kind="anchor")
    before = health.probe(plain, {"math": bundle("math")})
    after = health.probe(moved, {"math": bundle("math", ROWS["math"] + offset)})
    for part in ("share", "beside", "most", "entropy", "spread"):
        np.testing.assert_allclose(getattr(after, part), getattr(before, part), rtol=1e-4)


def test_a_row_of_0_is_blind_beside_any_public_row(tmp_path, bundle):
    tensors = {"statistics/states": PUBLIC, "expert/router/row": ROWS["law"]}
    anchor = artefact(tmp_path / "anchor", tensors, kind="anchor")
    assert health.probe(anchor, {"math": bundle("math")}).findings == ()
    for row in (0 * ROWS["law"], ROWS["law"]):  # reads nothing; reads nothing that public does not
        assert kinds(health.probe(anchor, {"math": bundle("math", row=row)})) == {("blind row", "math")}


MEAN = PUBLIC.mean(axis=1) / np.linalg.norm(PUBLIC.mean(axis=1), axis=1, keepdims=True)
BAD = {
    "row times 30": ({"row": 30 * ROWS["math"]}, "loud row", True),
    "public direction": ({"row": 5 * MEAN}, "hijack", True),
    "public direction, loud": ({"row": 100 * MEAN}, "collapse", True),
    "bias of -50": ({"bias": BIAS - 50}, "silent", True),
    "bias of -20": ({"bias": BIAS - 20}, "silent", True),
    "no row": ({"row": 0 * MEAN}, "blind row", True),
    "row nearly 0": ({"row": 1e-3 * MEAN}, "blind row", True),
    "row of another": ({"row": ROWS["code"]}, "twins", False),
}


@pytest.mark.parametrize("what", BAD)
@pytest.mark.parametrize("company", ["alone", "pair", "three"])
def test_bad_experts_are_named(anchor, honest, bundle, tmp_path, what, company):
    change, kind, alone = BAD[what]
    bad = {"math": bundle("math", **change)}
    others = {"alone": [], "pair": ["code"], "three": ["code", "law"]}[company]
    report = health.probe(anchor, {**{name: honest[name] for name in others}, **bad})
    expected = "code" if kind == "twins" else "math"
    if company == "alone" and not alone:
        assert not report.findings
        return
    assert (kind, expected) in kinds(report), health.table(report)
    assert {name for _, name in kinds(report)} <= {expected, "public"}, "an honest expert is blamed"
    with pytest.raises(errors.IntegrityError, match=r"router health, .*(remove it|keep one|look at)"):
        health.check(report)


def test_a_long_row_stands_out_among_three(anchor, honest, bundle):
    report = health.probe(anchor, {**honest, "math": bundle("math", row=10 * ROWS["math"])})
    assert ("norm", "math") in kinds(report) and {name for _, name in kinds(report)} == {"math"}


def test_one_hijacked_layer_is_named(anchor, honest, bundle):
    row = ROWS["math"].copy()
    row[2] = 20 * MEAN[2]
    report = health.probe(anchor, {**honest, "math": bundle("math", row=row)})
    (finding,) = [finding for finding in report.findings if finding.kind == "hijack"]
    assert (finding.expert, finding.layer) == ("math", 2) and finding.value > finding.threshold
    with pytest.raises(errors.IntegrityError, match=r"expert 'math' in layer 2: .* expected at most"):
        health.check(report)


def test_two_hijackers_do_not_hide_behind_each_other(anchor, honest, bundle):
    rows = [5 * MEAN + np.random.default_rng(seed).standard_normal(MEAN.shape) for seed in (1, 2)]
    report = health.probe(
        anchor, {"code": honest["code"], **{name: bundle(name, row=r) for name, r in zip(("law", "math"), rows, strict=True)}}
    )
    assert kinds(report) == {("hijack", "law"), ("hijack", "math")} and (report.share.mean(axis=0) < 0.8).all()


def test_all_rows_equal_or_all_silent(anchor, bundle):
    same = health.probe(anchor, {name: bundle(name, row=ROWS["law"]) for name in NAMES})
    assert kinds(same) == {("twins", "code"), ("twins", "law")}
    silent = health.probe(anchor, {name: bundle(name, bias=BIAS - 50) for name in NAMES})
    assert kinds(silent) == {("one choice", "public"), *(("silent", name) for name in NAMES)}
    zero = health.probe(anchor, {name: bundle(name, row=0 * ROWS[name]) for name in NAMES})
    assert kinds(zero) == {("blind row", name) for name in NAMES}


def test_an_expert_that_speaks_on_its_own_text_is_not_silent(anchor, bundle):
    """Public text alone cannot tell an expert of a far domain from one that is switched off: its margins can."""
    row, bias = 0.2 * ROWS["math"], BIAS - 9
    assert kinds(health.probe(anchor, {"math": bundle("math", row, bias)})) >= {("silent", "math")}
    stated = {"quantiles": [0.1, 0.5, 0.9], "values": [[-1.0, 0.5, 2.0]] * LAYERS}
    spoken = health.probe(anchor, {"math": bundle("math", row, bias, stated)})
    assert kinds(spoken) == set()
    np.testing.assert_allclose(spoken.own_text, 1 / (1 + np.exp(-2)), rtol=1e-6)
    low = {"quantiles": [0.1, 0.5, 0.9], "values": [[-30.0, -20.0, -12.0]] * LAYERS}
    assert ("silent", "math") in kinds(health.probe(anchor, {"math": bundle("math", row, bias, low)}))


def test_margins_count_from_the_bias_that_the_bundle_holds(anchor, bundle):
    stated = {"quantiles": [0.1, 0.5, 0.9], "values": [[-1.0, 0.5, 2.0]] * LAYERS}
    raw = bundle("math", margins=stated)
    calibrated = dataclasses.replace(raw, instead={"expert/router/bias": BIAS - 30})
    report = health.probe(anchor, {"math": calibrated})
    np.testing.assert_allclose(report.bias[:, 0], BIAS - 30)
    np.testing.assert_allclose(report.own_text, 1 / (1 + np.exp(-(2 - 30))), rtol=1e-5)
    assert ("silent", "math") in kinds(report)


def test_an_anchor_without_states_says_how_to_add_them(tmp_path, honest):
    zero = np.zeros((LAYERS, WIDTH), np.float32)
    bare = artefact(tmp_path / "bare", {"expert/router/row": zero}, kind="anchor")
    with pytest.raises(errors.ConfigError, match=r"add them: --config=configs/public.py --config.anchor.path="):
        health.probe(bare, honest)
    assert health.probe(bare, honest, states=PUBLIC).findings == ()
    with pytest.raises(errors.ConfigError, match="none but public"):
        health.probe(bare, {}, states=PUBLIC)


def test_some_states_of_one_layer_at_a_time_are_in_memory(tmp_path, honest):
    count = 40_000
    states = np.tile(PUBLIC, (1, -(-count // STATES), 1))[:, :count]
    zero = np.zeros((LAYERS, WIDTH), np.float32)
    large = artefact(tmp_path / "large", {"expert/router/row": zero, "statistics/states": states}, kind="anchor")
    tracemalloc.start()
    report = health.probe(large, honest)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * states[0].nbytes and report.findings == ()


def test_no_weights_are_read(anchor, honest, monkeypatch):
    read, slice_at = set(), store.Artefact.slice_at

    def record(self, path, index):
        read.add(path)
        return slice_at(self, path, index)

    monkeypatch.setattr(store.Artefact, "slice_at", record)
    health.probe(anchor, honest)
    assert read == {"expert/router/row", "expert/router/bias", "statistics/states"}


def test_rows_that_are_not_finite_are_refused(anchor, bundle):
    with pytest.raises(errors.IntegrityError, match="row holds NaN"):
        health.probe(anchor, {"math": bundle("math", row=ROWS["math"] * np.nan)})
    with pytest.raises(errors.IntegrityError, match="positive bias"):
        health.probe(anchor, {"math": bundle("math", bias=BIAS + 1)})


def test_reports_are_json_and_repeat(anchor, honest):
    report = health.probe(anchor, honest)
    stated = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert stated["experts"] == list(NAMES) and stated["own_text"] == [[None] * 3] * LAYERS and stated["findings"] == []
    again = health.probe(anchor, dict(reversed(honest.items())))
    assert json.dumps(again.to_dict()) == json.dumps(report.to_dict())
    assert [line.split()[0] for line in health.table(report).splitlines()] == ["expert", *NAMES, "entropy", "healthy"]
    assert config_lib.PUBLIC not in report.experts
