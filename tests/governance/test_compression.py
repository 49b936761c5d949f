"""Smaller experts: the best ones of their size, honest about what they lost, and never larger than what they came from."""

import dataclasses
import json
import pathlib
import shutil
import subprocess
import sys
import tracemalloc

import hypothesis
import hypothesis.strategies as st
import ml_dtypes  # noqa: F401  registers bfloat16 with NumPy
import numpy as np
import pytest
from etils import epath

from flexjax import config as config_lib
from flexjax import errors, tree
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import provenance, publishing, schema, store, surgery
from flexjax.governance import compression, truncation
from tests.experts import test_huggingface as made

L, D, F = 3, 12, 20
CONFIG = config_lib.ModelConfig(
    vocab_size=30, d_model=D, num_layers=L, num_heads=2, num_kv_heads=1, head_dim=6, d_ff=F, init_std=0.2
)
SHAPES = {"gate": (D, F), "up": (D, F), "down": (F, D)}
STATED = provenance.Provenance(
    owner="a clinic",
    version=3,
    data={"licence": "CC-BY-4.0", "documents": 1200},
    evaluation={"math": {"bits_per_byte": 1.5, "anchor": 2.0}},
    privacy={"dp": "none"},
    margins={"quantiles": [0.1, 0.5, 0.9], "values": [[0.0, 1.0, 2.0]] * L},
)
ROOT = pathlib.Path(__file__).parents[2]


def draw_ffn(seed: int, d_ff: int = F, scale: float = 1.0, config: config_lib.ModelConfig = CONFIG) -> dict[str, np.ndarray]:
    rng, layers, d = np.random.default_rng(seed), config.num_layers, config.d_model
    shapes = {"gate": (layers, d, d_ff), "up": (layers, d, d_ff), "down": (layers, d_ff, d)}
    return {kind: (scale * rng.normal(size=shape)).astype(np.float32) for kind, shape in shapes.items()}


def draw_router(seed: int, layers: int = L, d: int = D) -> dict[str, np.ndarray]:
    row = np.random.default_rng(seed).normal(size=(layers, d)).astype(np.float32)
    return {"row": row, "bias": np.full(layers, -0.5, np.float32)}


def make_anchor(
    home: pathlib.Path, ffn: dict[str, np.ndarray] | None = None, config: config_lib.ModelConfig = CONFIG
) -> store.Artefact:
    """An anchor whose shared leaves are drawn; compression never reads them."""
    rng = np.random.default_rng(0)
    shared = {path: rng.normal(size=shape).astype(np.float32) for path, shape in schema.shared_shapes(config).items()}
    row = np.zeros((config.num_layers, config.d_model), np.float32)

    def put(writer):
        writer.put_tree(tree.unflatten(shared))
        writer.put_tree(
            {"expert": {"ffn": draw_ffn(0, config.d_ff, config=config) if ffn is None else ffn, "router": {"row": row}}}
        )

    return publishing.write_anchor(home / "anchor", config, None, put, rows="logistic", training={})


def make_bundle(home: pathlib.Path, anchor: store.Artefact, ffn: dict, name: str = "math", **options) -> store.Artefact:
    expert = {"ffn": ffn, "router": draw_router(7)}
    facts = {"steps": 10, "tokens": 100}
    publishing.write_bundle(home / name, name, anchor, expert, facts, options.pop("provenance", STATED), **options)
    return store.open_bundle(home / name, store.config_of(anchor))


def factors(bundle: store.Artefact, kind: str) -> tuple[np.ndarray, np.ndarray]:
    a, b = (bundle.tensor(f"expert/ffn/{kind}/{part}") for part in "ab")
    return a.astype(np.float64), b.astype(np.float64)


def singular_values(matrix: np.ndarray) -> np.ndarray:
    return np.linalg.svd(matrix.astype(np.float64), compute_uv=False)


@pytest.fixture(scope="module")
def pair(tmp_path_factory):
    home = tmp_path_factory.mktemp("pair")
    anchor = make_anchor(home)
    added = draw_ffn(1, scale=0.1)
    ffn = {kind: leaf + added[kind] for kind, leaf in draw_ffn(0).items()}
    return anchor, make_bundle(home, anchor, ffn)


@pytest.mark.parametrize("rank", [1, 5, 11])
def test_the_error_is_that_of_the_truncated_svd(rank, pair, tmp_path):
    anchor, bundle = pair
    report = compression.compress(anchor, bundle, tmp_path / "small", rank=rank)
    small = store.open_bundle(tmp_path / "small", CONFIG)
    small.verify()
    assert (small.manifest["rank"], small.manifest["d_ff"]) == (rank, F)
    for kind in SHAPES:
        path = f"expert/ffn/{kind}"
        delta = bundle.tensor(path).astype(np.float64) - anchor.tensor(path)
        a, b = factors(small, kind)
        found = np.linalg.norm(delta - a @ b, axis=(1, 2))
        singular = np.stack([singular_values(layer) for layer in delta])
        best = np.sqrt(np.square(singular[:, rank:]).sum(axis=1))
        np.testing.assert_allclose(found, best, rtol=1e-6)
        np.testing.assert_allclose(np.linalg.norm(a, axis=1), np.linalg.norm(b, axis=2), rtol=1e-5)
        np.testing.assert_allclose(np.linalg.norm(a, axis=1) ** 2, singular[:, :rank], rtol=1e-5)
        relative = found / np.linalg.norm(delta, axis=(1, 2))
        said = report["matrices"][kind]
        assert said["error"] == pytest.approx(relative.mean(), rel=1e-5)
        assert (said["worst"], said["worst_layer"]) == (pytest.approx(relative.max(), rel=1e-5), int(relative.argmax()))
        kept = np.square(singular[:, :rank]).sum() / np.square(singular).sum()
        assert said["energy"] == pytest.approx(kept, abs=1e-6)


def test_full_rank_is_the_expert(pair, tmp_path):
    anchor, bundle = pair
    report = compression.compress(anchor, bundle, tmp_path / "small", rank=min(D, F))
    small = store.open_bundle(tmp_path / "small", CONFIG)
    for kind in SHAPES:
        a, b = factors(small, kind)
        whole = bundle.tensor(f"expert/ffn/{kind}")
        error = np.linalg.norm(anchor.tensor(f"expert/ffn/{kind}") + a @ b - whole) / np.linalg.norm(whole)
        assert error < 1e-5 and report["matrices"][kind]["worst"] < 1e-5
    assert "saves nothing" in compression.table(report)


@hypothesis.given(
    st.integers(1, 24), st.integers(1, 24), st.integers(0, 24), st.integers(0, 2**32), st.sampled_from([0.0, 1.0, 3.0])
)
@hypothesis.settings(deadline=None, max_examples=150)
def test_truncation_is_optimal_balanced_and_signed(rows, columns, true_rank, seed, decay):
    rng = np.random.default_rng(seed)
    inner = min(true_rank, rows, columns)
    weights = (1.0 + np.arange(inner)) ** -decay
    left, right = rng.normal(size=(rows, inner)) * weights, rng.normal(size=(inner, columns))
    matrix = (left @ right).astype(np.float32)
    singular = singular_values(matrix)
    for rank in {1, (1 + min(rows, columns)) // 2, min(rows, columns)}:
        a, b = truncation.truncate(matrix, rank)
        assert a.shape == (rows, rank) and b.shape == (rank, columns) and a.dtype == b.dtype == np.float32
        whole, missing = truncation.squares(matrix, a, b)
        best, size = np.sqrt(np.square(singular[rank:]).sum()), np.sqrt(whole)
        assert np.sqrt(missing) <= best * (1 + 1e-6) + 2e-7 * size
        np.testing.assert_allclose(np.linalg.norm(a, axis=0), np.linalg.norm(b, axis=1), rtol=1e-4, atol=1e-12)
        assert (a.max(axis=0) >= -a.min(axis=0)).all()
        again = truncation.truncate(matrix.copy(), rank)
        assert a.tobytes() == again[0].tobytes() and b.tobytes() == again[1].tobytes()
        if inner:
            c, d = truncation.truncate_product(left, right, min(rank, inner))
            lost = np.linalg.norm(left @ right - c @ d)
            assert lost <= best * (1 + 1e-6) + 1e-6 * size
            rest = truncation.square(np.hstack([left, -c]), np.vstack([right, d]))
            assert abs(np.sqrt(max(0.0, rest)) - lost) < 1e-6 * size + 1e-12


def test_a_matrix_of_several_blocks_of_columns():
    matrix = np.random.default_rng(0).normal(size=(9, 2 * truncation.BLOCK + 5)).astype(np.float32)
    for m in (matrix, matrix.T):
        a, b = truncation.truncate(m, 4)
        whole, missing = truncation.squares(m, a, b)
        singular = singular_values(m)
        assert (whole, missing) == pytest.approx((np.square(singular).sum(), np.square(singular[4:]).sum()), rel=1e-6)


def test_a_lower_rank_by_way_of_a_higher_one_is_the_same(pair, tmp_path):
    anchor, bundle = pair
    compression.compress(anchor, bundle, tmp_path / "eight", rank=8)
    middle = store.open_bundle(tmp_path / "eight", CONFIG)
    by_way = compression.compress(anchor, middle, tmp_path / "three", rank=3)
    compression.compress(anchor, bundle, tmp_path / "direct", rank=3)
    ours, direct = (store.open_bundle(tmp_path / name, CONFIG) for name in ("three", "direct"))
    for kind in SHAPES:
        (a, b), (c, d) = factors(ours, kind), factors(direct, kind)
        np.testing.assert_allclose(a @ b, c @ d, atol=1e-5)
        held, lost = np.matmul(*factors(middle, kind)), np.matmul(*factors(middle, kind)) - a @ b
        relative = np.linalg.norm(lost, axis=(1, 2)) / np.linalg.norm(held, axis=(1, 2))
        assert by_way["matrices"][kind]["error"] == pytest.approx(relative.mean(), rel=1e-5)
    assert by_way["size"] == {"before": "rank 8", "after": "rank 3"}
    assert ours.manifest["parent"] == {"digest": middle.manifest["digest"], "by": "compress rank 3"}


@pytest.mark.parametrize("width", [1, 7, 19])
def test_width_keeps_what_narrow_keeps(width, pair, tmp_path):
    anchor, bundle = pair
    report = compression.compress(anchor, bundle, tmp_path / "small", width=width)
    small = store.open_bundle(tmp_path / "small", CONFIG)
    small.verify()
    whole = bundle.tensors("expert")
    expected = surgery.narrow(whole, width)
    for kind in SHAPES:
        found = small.tensor(f"expert/ffn/{kind}")
        np.testing.assert_array_equal(found, expected["ffn"][kind])
        squares = [np.square(leaf.astype(np.float64)).sum(axis=(1, 2)) for leaf in (whole["ffn"][kind], found)]
        assert report["matrices"][kind]["error"] == pytest.approx(np.sqrt(1 - squares[1] / squares[0]).mean(), rel=1e-4)
    assert (small.manifest["rank"], small.manifest["d_ff"]) == (0, width)


def test_the_same_width_and_the_same_rank_change_nothing(pair, tmp_path):
    anchor, bundle = pair
    report = compression.compress(anchor, bundle, tmp_path / "wide", width=F)
    wide = store.open_bundle(tmp_path / "wide", CONFIG)
    assert wide.manifest["tensors"] == bundle.manifest["tensors"] and wide.manifest["digest"] != bundle.manifest["digest"]
    assert all(row["worst"] == 0 and row["energy"] == 1 for row in report["matrices"].values())
    compression.compress(anchor, bundle, tmp_path / "low", rank=4)
    low = store.open_bundle(tmp_path / "low", CONFIG)
    report = compression.compress(anchor, low, tmp_path / "again", rank=4)
    again = store.open_bundle(tmp_path / "again", CONFIG)
    for kind in SHAPES:
        np.testing.assert_allclose(np.matmul(*factors(again, kind)), np.matmul(*factors(low, kind)), atol=1e-6)
        assert report["matrices"][kind]["worst"] < 1e-6


def test_a_width_beyond_that_of_public_becomes_narrower_too(pair, tmp_path):
    anchor, _ = pair
    wide = make_bundle(tmp_path, anchor, draw_ffn(3, 31))
    compression.compress(anchor, wide, tmp_path / "small", width=24)
    expected = surgery.narrow(wide.tensors("expert"), 24)["ffn"]["up"]
    np.testing.assert_array_equal(store.open_bundle(tmp_path / "small", CONFIG).tensor("expert/ffn/up"), expected)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_the_dtype_stays(dtype, pair, tmp_path):
    anchor, _ = pair
    ffn = {kind: (leaf + draw_ffn(1, scale=0.1)[kind]).astype(dtype) for kind, leaf in draw_ffn(0).items()}
    bundle = make_bundle(tmp_path, anchor, ffn)
    report = compression.compress(anchor, bundle, tmp_path / "low", rank=4)
    low = store.open_bundle(tmp_path / "low", CONFIG)
    compression.compress(anchor, bundle, tmp_path / "narrow", width=9)
    narrow = store.open_bundle(tmp_path / "narrow", CONFIG)
    for kind, leaf in ffn.items():
        assert {low.manifest["tensors"][f"expert/ffn/{kind}/{part}"]["dtype"] for part in "ab"} == {dtype}
        delta = leaf.astype(np.float64) - anchor.tensor(f"expert/ffn/{kind}")
        a, b = factors(low, kind)
        relative = np.linalg.norm(delta - a @ b, axis=(1, 2)) / np.linalg.norm(delta, axis=(1, 2))
        assert report["matrices"][kind]["error"] == pytest.approx(relative.mean(), rel=1e-5)  # rounding included
        found = narrow.tensor(f"expert/ffn/{kind}")
        assert found.dtype == dtype
        units = np.moveaxis(leaf, 1 if kind == "down" else 2, 1)
        mine = np.moveaxis(found, 1 if kind == "down" else 2, 1)
        for layer in range(L):
            held = {unit.tobytes() for unit in units[layer]}
            assert {unit.tobytes() for unit in mine[layer]} <= held


def test_an_expert_that_adds_nothing(tmp_path):
    anchor = make_anchor(tmp_path)
    bundle = make_bundle(tmp_path, anchor, draw_ffn(0))
    report = compression.compress(anchor, bundle, tmp_path / "small", rank=2)
    small = store.open_bundle(tmp_path / "small", CONFIG)
    assert all(not np.any(factors(small, kind)[0]) and not np.any(factors(small, kind)[1]) for kind in SHAPES)
    assert all((row["error"], row["energy"]) == (0, 1) for row in report["matrices"].values())


def test_what_the_owner_states_stays_and_what_was_measured_goes(pair, tmp_path):
    anchor, bundle = pair
    (bundle.directory / manifest_lib.SIGNATURE).write_text("{}")
    report = compression.compress(anchor, bundle, tmp_path / "small", rank=5)
    small = store.open_bundle(tmp_path / "small", CONFIG)
    expected = dataclasses.replace(
        STATED, evaluation={}, margins=None, parent={"digest": bundle.manifest["digest"], "by": "compress rank 5"}
    )
    assert provenance.of(small.manifest) == expected
    for field in ("name", "anchor", "config", "tokenizer", "training"):
        assert small.manifest[field] == bundle.manifest[field]
    for path in ("expert/router/row", "expert/router/bias"):
        assert small.manifest["tensors"][path] == bundle.manifest["tensors"][path]
    assert not (small.directory / manifest_lib.SIGNATURE).exists()
    assert report["digest"] == small.manifest["digest"] and report["source"] == bundle.manifest["digest"]
    rest = L * D + L
    assert report["parameters"] == {"before": 3 * L * D * F + rest, "after": 3 * L * 5 * (D + F) + rest}
    assert report["bytes"] == {name: 4 * count for name, count in report["parameters"].items()}
    text = compression.table(json.loads(json.dumps(report)))
    assert "width 20 -> rank 5" in text and text.count("\n") == 4 and "saves nothing" not in text


def test_shared_leaves_that_a_bundle_carries_come_along(pair, tmp_path):
    anchor, _ = pair
    shared = {"head": {"kernel": anchor.tensor("head/kernel") + np.float32(1)}}
    bundle = make_bundle(tmp_path, anchor, draw_ffn(2), shared=shared)
    for name, size in {"low": {"rank": 3}, "narrow": {"width": 5}}.items():
        compression.compress(anchor, bundle, tmp_path / name, **size)
        small = store.open_bundle(tmp_path / name, CONFIG)
        assert small.manifest["tensors"]["shared/head/kernel"] == bundle.manifest["tensors"]["shared/head/kernel"]


def test_the_same_expert_gives_the_same_digest(pair, tmp_path):
    anchor, bundle = pair
    reports = [compression.compress(anchor, bundle, tmp_path / str(i), rank=6) for i in range(2)]
    assert reports[0] == reports[1]


SIZES = {
    "none": ({}, "either --rank or --width"),
    "both": ({"rank": 2, "width": 3}, "either --rank or --width"),
    "rank 0": ({"rank": 0}, "--rank=0 must lie between 1 and 12"),
    "negative rank": ({"rank": -1}, "--rank=-1"),
    "rank above the matrix": ({"rank": 13}, "between 1 and 12"),
    "giant rank": ({"rank": 10**30}, "between 1 and 12"),
    "half a rank": ({"rank": 2.5}, "--rank=2.5"),
    "true": ({"rank": True}, "--rank=True"),
    "word": ({"rank": "64"}, "--rank=64"),
    "width 0": ({"width": 0}, "--width=0 must lie between 1 and the 20"),
    "wider": ({"width": 21}, "between 1 and the 20"),
    "negative width": ({"width": -3}, "--width=-3"),
    "width as a float": ({"width": 4.0}, "--width=4.0"),
    "width as a bool": ({"width": True}, "--width=True"),
}


@pytest.mark.parametrize("case", SIZES)
def test_sizes_that_are_none_are_one_line(case, pair, tmp_path):
    size, hint = SIZES[case]
    with pytest.raises(errors.ConfigError) as caught:
        compression.compress(*pair, tmp_path / "small", **size)
    assert hint in str(caught.value) and "\n" not in str(caught.value) and not (tmp_path / "small").exists()


def test_an_expert_only_becomes_smaller(pair, tmp_path):
    anchor, bundle = pair
    compression.compress(anchor, bundle, tmp_path / "low", rank=4)
    compression.compress(anchor, bundle, tmp_path / "narrow", width=9)
    low, narrow = (store.open_bundle(tmp_path / name, CONFIG) for name in ("low", "narrow"))
    refused = [
        (low, {"rank": 5}, "the rank 4 of expert 'math'"),
        (low, {"width": 9}, "give --rank"),
        (narrow, {"width": 10}, "the 9 hidden units"),
        (narrow, {"rank": 2}, "give --width"),
    ]
    for source, size, hint in refused:
        with pytest.raises(errors.ConfigError, match=hint):
            compression.compress(anchor, source, tmp_path / "refused", **size)
    assert not (tmp_path / "refused").exists()


def test_another_anchor_is_refused(pair, tmp_path):
    other = make_anchor(tmp_path, draw_ffn(9))
    with pytest.raises(errors.IntegrityError, match="was trained on anchor"):
        compression.compress(other, pair[1], tmp_path / "small", rank=2)
    assert not (tmp_path / "small").exists()


@pytest.mark.parametrize("size", [{"rank": 2}, {"width": 5}])
def test_a_flipped_bit_is_named_and_nothing_is_published(size, tmp_path):
    anchor = make_anchor(tmp_path)
    bundle = make_bundle(tmp_path, anchor, draw_ffn(1))
    victim = bundle.slice_path("expert/ffn/down", L - 1)
    data = bytearray(victim.read_bytes())
    data[3] ^= 4
    victim.write_bytes(bytes(data))
    with pytest.raises(errors.IntegrityError, match="expert/ffn/down, slice 2"):
        compression.compress(anchor, bundle, tmp_path / "small", **size)
    assert not (tmp_path / "small").exists()


def test_a_difference_that_overflows_is_refused(pair, tmp_path):
    """Numbers that no writer of ours would publish, as a forged manifest may vouch for them."""
    huge = {"expert/ffn/up": np.full((L, D, F), 3e38, np.float32)}
    anchor = dataclasses.replace(pair[0], instead={path: -leaf for path, leaf in huge.items()})
    bundle = dataclasses.replace(pair[1], instead=huge)
    with np.errstate(over="ignore"), pytest.raises(errors.IntegrityError, match="expert/ffn/up holds NaN or infinity"):
        compression.compress(anchor, bundle, tmp_path / "small", rank=2)
    assert not (tmp_path / "small").exists()


def test_what_is_there_is_never_touched(pair, tmp_path):
    anchor, bundle = pair
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    for target in (tmp_path / "home", bundle.directory, anchor.directory):
        with pytest.raises(errors.StorageError):
            compression.compress(anchor, bundle, target, rank=2)
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"
    bundle.verify()


@pytest.mark.parametrize("size", [{"rank": 8}, {"width": 200}])
def test_memory_does_not_grow_with_the_number_of_layers(size, tmp_path):
    peaks = []
    for layers in (2, 10):
        config = dataclasses.replace(CONFIG, num_layers=layers, d_model=96, d_ff=400)
        home = tmp_path / str(layers)
        anchor = make_anchor(home, config=config)
        bundle = publishing.write_bundle(
            home / "math", "math", anchor, {"ffn": draw_ffn(1, 400, config=config), "router": draw_router(0, layers, 96)}, {}
        )
        tracemalloc.start()
        compression.compress(anchor, bundle, home / "small", **size)
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    matrix = 96 * 400 * 4
    assert peaks[1] < peaks[0] + matrix  # the whole expert has 24 matrices more
    assert peaks[0] < 12 * matrix


def test_bits_per_byte_before_and_after(tmp_path):
    model = made.make_model(tmp_path, bias=-0.1)
    anchor = store.open_anchor(model / "anchor")
    bundle = store.open_bundle(tmp_path / "parts" / "zz", made.CONFIG)
    file = epath.Path(tmp_path / "text.jsonl")
    file.write_text(json.dumps({"text": "two rivers, 42 boats. " * 20}) + "\n")
    report = compression.compress(anchor, bundle, tmp_path / "small", rank=made.CONFIG.d_ff)
    small = store.open_bundle(tmp_path / "small", made.CONFIG)
    before, after = (compression.score(anchor, each, {"rivers": [file]}, seq_len=32, batch_size=8) for each in (bundle, small))
    assert after["rivers"] == pytest.approx(before["rivers"], rel=1e-5)
    assert provenance.STATEMENTS["evaluation"](before)
    text = compression.table({**report, "evaluation": {"before": before, "after": after}})
    whole, alone = (f"{before['rivers'][key]:.4f}" for key in ("bits_per_byte", "anchor"))
    assert text.endswith(f"rivers: {whole} -> {after['rivers']['bits_per_byte']:.4f} bits per byte, {alone} without the expert")
    assert abs(before["rivers"]["anchor"] - before["rivers"]["bits_per_byte"]) > 1e-3


def test_carried_leaves_are_scored_with_their_expert_and_the_anchor_without(tmp_path):
    model = made.make_model(tmp_path, bias=-0.1)
    anchor = store.open_anchor(model / "anchor")
    plain = store.open_bundle(tmp_path / "parts" / "zz", made.CONFIG)
    leaf = anchor.tensor("head/kernel")
    shared = {"head": {"kernel": leaf + np.random.default_rng(0).normal(size=leaf.shape).astype(np.float32)}}
    carrying = publishing.write_bundle(
        tmp_path / "c", "zz", anchor, plain.tensors("expert"), {}, provenance.Provenance(), shared
    )
    file = epath.Path(tmp_path / "text.jsonl")
    file.write_text(json.dumps({"text": "two rivers, 42 boats. " * 20}) + "\n")
    texts = {"rivers": [file]}
    without, found = (compression.score(anchor, each, texts, seq_len=32, batch_size=8) for each in (plain, carrying))
    assert found["rivers"]["anchor"] == without["rivers"]["anchor"]
    assert abs(found["rivers"]["bits_per_byte"] - without["rivers"]["bits_per_byte"]) > 1e-2


def test_what_somebody_else_finished_meanwhile_stays(pair, tmp_path, monkeypatch):
    anchor, bundle = pair
    target = tmp_path / "small"

    def overtaken(*arguments, **options):
        shutil.copytree(bundle.directory, target)
        raise errors.StorageError("somebody else was faster")

    monkeypatch.setattr(publishing, "stream_bundle", overtaken)
    with pytest.raises(errors.StorageError, match="faster"):
        compression.compress(anchor, bundle, target, rank=2)
    store.open_bundle(target, CONFIG).verify()


MEASURE = """
import resource, sys
from flexjax.experts import store
from flexjax.governance import compression
anchor = store.open_anchor(sys.argv[1])
bundle = store.open_bundle(sys.argv[2], store.config_of(anchor))
compression.compress(anchor, bundle, sys.argv[3], **{sys.argv[4]: int(sys.argv[5])})
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)
"""


@pytest.mark.slow
@pytest.mark.parametrize("size, d, limit", [(("rank", 256), 2048, 1e9), (("width", 5504), 4096, 1e9)])
def test_memory_is_that_of_one_matrix_of_one_layer(size, d, limit, tmp_path):
    f = 11008
    config = dataclasses.replace(CONFIG, num_layers=1, d_model=d, d_ff=f, num_heads=32, num_kv_heads=32, head_dim=d // 32)
    rng = np.random.default_rng(0)

    def put(writer, scale=1.0):
        for kind, shape in {"gate": (d, f), "up": (d, f), "down": (f, d)}.items():
            leaf = (rng.standard_normal((1, *shape), np.float32) * np.float32(scale)).astype("bfloat16")
            writer.put(f"expert/ffn/{kind}", "bfloat16", leaf.shape, [leaf])

    def put_anchor(writer):
        for path, shape in schema.shared_shapes(config).items():
            writer.put(path, "bfloat16", shape, [np.zeros(shape, "bfloat16")])
        put(writer)
        writer.put("expert/router/row", "float32", (1, d), [np.zeros((1, d), np.float32)])

    def put_expert(writer):
        put(writer, 1.1)
        writer.put_tree({"expert": {"router": draw_router(0, 1, d)}})

    anchor = publishing.write_anchor(tmp_path / "anchor", config, None, put_anchor, rows="logistic", training={})
    publishing.stream_bundle(tmp_path / "math", "math", anchor, f, put_expert, {})
    arguments = [tmp_path / "anchor", tmp_path / "math", tmp_path / "small", *size]
    done = subprocess.run(
        [sys.executable, "-c", MEASURE, *map(str, arguments)], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    assert float(done.stdout) < limit
