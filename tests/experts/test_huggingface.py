"""Import and export of Hugging Face folders as inverses, and every broken folder as one clear line."""

import dataclasses
import itertools
import json
import os
import pathlib
import subprocess
import sys

import jax
import ml_dtypes
import numpy as np
import pytest
import tokenizers
from etils import epath
from safetensors.numpy import load_file, save_file

from flexjax import config as config_lib
from flexjax import errors, tree
from flexjax.experts import manifest as manifest_lib
from flexjax.experts import models, publishing, store, surgery
from flexjax.experts.huggingface import biasless, expansion, exporting, importing
from flexjax.experts.huggingface import config as huggingface_config
from flexjax.experts.huggingface import safetensors_io as io
from flexjax.model import transformer
from tests.parity import folders

ROOT = pathlib.Path(__file__).parents[2]
CONFIG = config_lib.ModelConfig(
    vocab_size=300, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=24, init_std=0.2
)


def read_all(folder: pathlib.Path) -> dict[str, np.ndarray]:
    return {name: value for file in sorted(folder.glob("*.safetensors")) for name, value in load_file(file).items()}


def assert_same(one: dict[str, np.ndarray], two: dict[str, np.ndarray]) -> None:
    assert one.keys() == two.keys()
    for name in one:
        assert one[name].dtype == two[name].dtype and one[name].shape == two[name].shape, name
        assert one[name].tobytes() == two[name].tobytes(), name


def draw_expert(d_ff: int, seed: int, bias: float | None) -> tree.Tree:
    config = config_lib.ModelConfig(**{**vars(CONFIG), "d_ff": d_ff})
    params = transformer.init(transformer.Architecture(config, transformer.dense_banks(config)), seed)
    ffn = {name: np.asarray(leaf[:, 0]) for name, leaf in params["experts"]["public"]["ffn"].items()}
    row = np.random.default_rng(seed).normal(size=(CONFIG.num_layers, CONFIG.d_model)).astype(np.float32)
    router = {"row": row} if bias is None else {"row": row, "bias": np.full(CONFIG.num_layers, bias, np.float32)}
    return {"ffn": ffn, "router": router}


def write_tokenizer(directory: pathlib.Path) -> pathlib.Path:
    """A byte-level `tokenizer.json` of 257 pieces; the last one is the end of text."""
    alphabet = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    model = tokenizers.Tokenizer(tokenizers.models.BPE({piece: i for i, piece in enumerate(alphabet)}, []))
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    model.add_special_tokens(["<|endoftext|>"])
    directory.mkdir(parents=True, exist_ok=True)
    model.save(str(directory / "tokenizer.json"))
    return directory / "tokenizer.json"


def make_model(
    home: pathlib.Path, bias: float = 0.0, tokenizer: bool = True, states: bool = True, d_ff: int = CONFIG.d_ff
) -> pathlib.Path:
    """A model of public, aa and zz as training writes it: trained anchor with public states, biased experts."""
    dense = transformer.Architecture(CONFIG, transformer.dense_banks(CONFIG))
    params = jax.tree.map(np.asarray, transformer.init(dense, 0))
    params["embed"]["embedding"] = params["embed"]["embedding"] + np.float32(1)  # so that the states have a common part
    tokens = np.random.default_rng(1).integers(CONFIG.vocab_size, size=(4, 128))
    seen = transformer.forward(params, jax.numpy.asarray(tokens, np.int32), dense, keep_states=True).states
    shared = {key: params[key] for key in ("embed", "layers", "head")}

    def put(writer):
        writer.put_tree({**shared, "expert": draw_expert(CONFIG.d_ff, 0, None)})
        if states:
            writer.put_tree({"statistics": {"states": np.asarray(seen).reshape(CONFIG.num_layers, -1, CONFIG.d_model)}})

    file = write_tokenizer(home / "tokenizer") if tokenizer else None
    anchor = publishing.write_anchor(home / "parts" / "anchor", CONFIG, file, put, rows="logistic", training={})
    bundles = {
        name: publishing.write_bundle(home / "parts" / name, name, anchor, draw_expert(width, seed, bias), {})
        for seed, (name, width) in enumerate({"zz": CONFIG.d_ff, "aa": d_ff}.items(), 1)
    }
    models.write_model(home / "model", anchor, bundles, 2)
    return home / "model"


def make_mixed(home: pathlib.Path, widest: int = CONFIG.d_ff, dtype: str = "float32", bias: float = 0.0) -> pathlib.Path:
    """A model of public and experts of all sizes: of its width or wider, narrower, of rank 4 and of rank 1."""
    dense = transformer.Architecture(CONFIG, transformer.dense_banks(CONFIG))
    params = jax.tree.map(np.asarray, transformer.init(dense, 0))
    params = {key: params[key] for key in ("embed", "layers", "head")}

    def put(writer):
        public = draw_expert(CONFIG.d_ff, 0, None)
        weights = jax.tree.map(lambda leaf: leaf.astype(dtype), {**params, "expert": {"ffn": public["ffn"]}})
        writer.put_tree(tree.combine(weights, {"expert": {"router": public["router"]}}))

    anchor = publishing.write_anchor(home / "parts" / "anchor", CONFIG, None, put, rows="logistic", training={})
    experts = {"full": draw_expert(widest, 1, bias), "narrow": draw_expert(16, 2, bias)}
    experts |= {name: draw_low_rank(rank, 10 + rank, bias) for name, rank in {"low": 4, "tiny": 1}.items()}
    bundles = {}
    for name, expert in experts.items():
        if name in ("full", "narrow"):
            expert["ffn"] = {kind: leaf.astype(dtype) for kind, leaf in expert["ffn"].items()}
        bundles[name] = publishing.write_bundle(home / "parts" / name, name, anchor, expert, {})
    models.write_model(home / "model", anchor, bundles, 2)
    return home / "model"


def draw_low_rank(rank: int, seed: int, bias: float) -> tree.Tree:
    rng = np.random.default_rng(seed)
    ffn = {}
    for kind, (rows, columns) in {"gate": (32, 24), "up": (32, 24), "down": (24, 32)}.items():
        a, b = (rng.normal(size=(CONFIG.num_layers, *size)) for size in ((rows, rank), (rank, columns)))
        ffn[kind] = {"a": (a * rows**-0.5).astype(np.float32), "b": (b * rank**-0.5).astype(np.float32)}
    return {**draw_expert(CONFIG.d_ff, seed, bias), "ffn": ffn}


@pytest.mark.parametrize("shards", [1, 4])
@pytest.mark.parametrize("name", folders.CASES)
def test_export_of_an_import_is_the_same_folder(name, shards, tmp_path):
    source = folders.write_golden(tmp_path / "hf", name, shards)
    importing.import_folder(source, tmp_path / "ours")
    report = exporting.export_folder(tmp_path / "ours", tmp_path / "back")
    back = read_all(tmp_path / "back")
    if name.startswith("moe1"):  # one expert is a dense model: its router says nothing and is listed
        back = {key.replace(".mlp.", ".mlp.experts.0."): value for key, value in back.items()}
        assert report["left_out"] == ["expert/router/row"]
        assert_same(back, {key: value for key, value in read_all(source).items() if not key.endswith("mlp.gate.weight")})
    else:
        assert_same(back, read_all(source))
        mine, theirs = (json.loads((folder / "config.json").read_text()) for folder in (tmp_path / "back", source))
        known = {key: value for key, value in theirs.items() if key in mine}
        assert {key: mine[key] for key in known} == known
    assert (tmp_path / "back" / "generation_config.json").exists()


@pytest.mark.parametrize("name", ["dense_mha", "moe5_gqa_tied"])
def test_import_of_an_export_has_the_same_digest_in_bfloat16_and_in_shards(name, tmp_path, monkeypatch):
    facts = folders.golden(name)
    state = {key: value.astype(ml_dtypes.bfloat16) for key, value in folders.state_of(facts).items()}
    config = {**json.loads(str(facts["config"])), "dtype": "bfloat16", "eos_token_id": 7}
    first = importing.import_folder(folders.write(tmp_path / "hf", config, state), tmp_path / "ours")
    monkeypatch.setattr(io, "SHARD_BYTES", 10_000)
    report = exporting.export_folder(tmp_path / "ours", tmp_path / "back")
    assert len(report["files"]) > 3 and max(f.stat().st_size for f in (tmp_path / "back").glob("*.safetensors")) < 12_000
    index = json.loads((tmp_path / "back" / io.INDEX).read_text())
    assert index["metadata"]["total_size"] == report["bytes"] == sum(value.nbytes for value in state.values())
    assert_same(read_all(tmp_path / "back"), state)
    assert json.loads((tmp_path / "back" / "generation_config.json").read_text()) == {"eos_token_id": 7}
    again = importing.import_folder(tmp_path / "back", tmp_path / "again")
    assert again["digest"] == first["digest"]


def test_a_trained_model_comes_back_bit_for_bit(tmp_path):
    source = make_model(tmp_path)
    report = exporting.export_folder(source, tmp_path / "hf")
    assert report["experts"] == ["public", "aa", "zz"]
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["num_experts"], config["num_experts_per_tok"], config["eos_token_id"]) == (3, 2, 256)
    assert json.loads((tmp_path / "hf" / "tokenizer_config.json").read_text())["eos_token"] == "<|endoftext|>"
    importing.import_folder(tmp_path / "hf", tmp_path / "back", report["experts"])
    before, after = models.open_model(source), models.open_model(tmp_path / "back")
    assert set(before.bundles) == set(after.bundles)
    for one, two in [(before.anchor, after.anchor), *((before.bundles[n], after.bundles[n]) for n in before.bundles)]:
        kept = {path: entry for path, entry in one.manifest["tensors"].items() if not path.startswith("statistics/")}
        assert two.manifest["tensors"] == kept
        two.verify()
    assert store.tokenizer_path(after.anchor).read_bytes() == store.tokenizer_path(before.anchor).read_bytes()


def test_a_sole_public_expert_and_top_k_beyond_the_experts(tmp_path):
    whole = models.open_model(make_model(tmp_path))
    models.write_model(tmp_path / "sole", whole.anchor, {}, 1)
    exporting.export_folder(tmp_path / "sole", tmp_path / "hf")
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert config["architectures"] == ["FlexOlmoForCausalLM"] and config["num_experts"] == 1
    described = huggingface_config.Description(CONFIG, 3, 5, {})
    assert huggingface_config.contents(described, "float32")["config.json"]["num_experts_per_tok"] == 3


def test_names(tmp_path):
    source = folders.write_golden(tmp_path / "hf", "moe5_gqa_tied")
    names = ["public", "math", "code", "news", "arts"]
    assert importing.import_folder(source, tmp_path / "named", names)["experts"] == names
    model = models.open_model(tmp_path / "named")
    state = read_all(source)
    np.testing.assert_array_equal(
        model.bundles["code"].tensor("expert/ffn/down")[1], state["model.layers.1.mlp.experts.2.down_proj.weight"].T
    )
    np.testing.assert_array_equal(
        model.bundles["code"].tensor("expert/router/row")[1], state["model.layers.1.mlp.gate.weight"][2]
    )
    report = importing.import_folder(source, tmp_path / "numbered")
    assert report["experts"] == ["public", "e01", "e02", "e03", "e04"] and report["top_k"] == 2
    for wrong in (names[:-1], [*names[:-1], "math"], names[::-1], [*names[:-1], "../x"]):
        with pytest.raises(errors.ConfigError):
            importing.import_folder(source, tmp_path / "wrong", wrong)
    assert not (tmp_path / "wrong").exists()


def change_config(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        config |= changes
        (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v != "absent"}))

    return change


def change_state(edit):
    def change(folder):
        state = read_all(folder)
        edit(state)
        save_file({name: np.ascontiguousarray(value) for name, value in state.items()}, folder / "model.safetensors")

    return change


def cut(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-10])


UP = "model.layers.1.mlp.experts.3.up_proj.weight"
FAULTS = {
    "no config": (lambda f: (f / "config.json").unlink(), errors.StorageError, "config.json"),
    "broken config": (lambda f: (f / "config.json").write_text('{"architectures": ['), errors.IntegrityError, "config.json"),
    "config is a list": (lambda f: (f / "config.json").write_text("[]"), errors.IntegrityError, "not an object"),
    "repeated key": (lambda f: (f / "config.json").write_text('{"a": 1, "a": 2}'), errors.IntegrityError, "twice"),
    "other architecture": (change_config(architectures=["LlamaForCausalLM"]), errors.ConfigError, "LlamaForCausalLM"),
    "no architecture": (change_config(architectures="absent"), errors.ConfigError, "architectures"),
    "no size": (change_config(hidden_size="absent"), errors.IntegrityError, "hidden_size"),
    "odd size": (change_config(num_experts=2.5), errors.IntegrityError, "num_experts"),
    "giant": (change_config(num_hidden_layers=10**9), errors.IntegrityError, "num_hidden_layers"),
    "too many active": (change_config(num_experts_per_tok=6), errors.ConfigError, "num_experts_per_tok"),
    "activation": (change_config(hidden_act="gelu"), errors.ConfigError, "hidden_act"),
    "attention bias": (change_config(attention_bias=True), errors.ConfigError, "attention_bias"),
    "quantised": (change_config(quantization_config={"bits": 4}), errors.ConfigError, "quantization_config"),
    "long context": (change_config(rope_scaling={"type": "linear", "factor": 2}), errors.ConfigError, "rope_scaling"),
    "rope": (change_config(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4}), errors.ConfigError, "rope_parameters"),
    "token id": (change_config(eos_token_id="</s>"), errors.IntegrityError, "eos_token_id"),
    "heads": (change_config(num_key_value_heads=3), errors.ConfigError, "num_kv_heads"),
    "missing tensor": (change_state(lambda s: s.pop(UP)), errors.IntegrityError, f"{UP} is missing"),
    "extra tensor": (change_state(lambda s: s.update(bias=np.zeros(3))), errors.IntegrityError, "bias"),
    "extra head of a tied model": (
        change_state(lambda s: s.update({"lm_head.weight": s["model.embed_tokens.weight"].copy()})),
        errors.IntegrityError,
        "lm_head.weight is unexpected",
    ),
    "wrong shape": (change_state(lambda s: s.update({UP: s[UP].T})), errors.IntegrityError, UP),
    "other dtype": (change_state(lambda s: s.update({UP: s[UP].astype(np.float16)})), errors.IntegrityError, UP),
    "integers": (change_state(lambda s: s.update({UP: s[UP].astype(np.int8)})), errors.IntegrityError, UP),
    "not finite": (change_state(lambda s: s[UP].fill(np.nan)), errors.IntegrityError, UP),
    "truncated": (cut, errors.IntegrityError, "model.safetensors"),
    "empty file": (lambda f: (f / "model.safetensors").write_bytes(b""), errors.IntegrityError, "model.safetensors"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), errors.StorageError, "model.safetensors"),
    "stray shard": (lambda f: save_file({}, f / "model-00001-of-00002.safetensors"), errors.IntegrityError, "00001"),
}  # fmt: skip


@pytest.mark.parametrize("fault", FAULTS)
def test_a_broken_folder_is_one_line_and_leaves_nothing(fault, tmp_path):
    source = folders.write_golden(tmp_path / "hf", "moe5_gqa_tied")
    change, kind, hint = FAULTS[fault]
    change(source)
    with pytest.raises(kind) as caught:
        importing.import_folder(source, tmp_path / "ours")
    assert type(caught.value) is kind and hint in str(caught.value) and "\n" not in str(caught.value)
    assert not (tmp_path / "ours").exists()


SHARDED_FAULTS = {
    "missing shard": (lambda f, index: (f / "model-00002-of-00003.safetensors").unlink(), "00002"),
    "moved tensor": (lambda f, index: index["weight_map"].update({UP: "model-00002-of-00003.safetensors"}), UP),
    "unlisted tensor": (lambda f, index: index["weight_map"].pop(UP), UP),
    "path in the index": (lambda f, index: index["weight_map"].update({UP: "../other.safetensors"}), "weight_map"),
    "no map": (lambda f, index: index.pop("weight_map"), "weight_map"),
}


@pytest.mark.parametrize("fault", SHARDED_FAULTS)
def test_a_broken_index_is_one_line(fault, tmp_path):
    source = folders.write_golden(tmp_path / "hf", "moe5_gqa_tied", shards=3)
    index = json.loads((source / io.INDEX).read_text())
    assert "00001" in index["weight_map"][UP]  # so that "moved" moves it
    change, hint = SHARDED_FAULTS[fault]
    change(source, index)
    (source / io.INDEX).write_text(json.dumps(index))
    with pytest.raises(errors.IntegrityError) as caught:
        importing.import_folder(source, tmp_path / "ours")
    assert hint in str(caught.value) and not (tmp_path / "ours").exists()


def test_a_file_cut_or_changed_anywhere_in_its_header_never_crashes(tmp_path):
    file = epath.Path(tmp_path / "model.safetensors")
    save_file({"a": np.ones((2, 3), np.float32), "b": np.ones(4, np.float16)}, file)
    whole = file.read_bytes()
    for size in range(len(whole)):
        file.write_bytes(whole[:size])
        with pytest.raises(errors.IntegrityError):
            io.read_header(file)
    header = 8 + int.from_bytes(whole[:8], "little")
    for place in range(header):
        for value in (0, 34, 45, 57, 123, 255):
            file.write_bytes(whole[:place] + bytes([value]) + whole[place + 1 :])
            try:
                assert sum(int(np.prod(t.shape)) for t in io.read_header(file).values()) == 10
            except errors.IntegrityError as error:
                assert "\n" not in str(error)


def test_a_tensor_larger_than_a_pass_is_transposed_in_blocks():
    matrix = np.random.default_rng(0).normal(size=(300, 70)).astype(ml_dtypes.bfloat16)
    pieces = np.split(matrix, [100, 101, 250])
    blocks = list(io.transposed(lambda: pieces, 70, 300, 32))
    assert [block.shape for block in blocks] == [(32, 300), (32, 300), (6, 300)]
    assert np.concatenate(blocks).tobytes() == matrix.T.tobytes()


def test_an_export_that_fails_leaves_nothing(tmp_path):
    source = make_model(tmp_path)
    victim = sorted((source / "experts").glob("*/tensors/expert/ffn/down/c/1/0/0"))[-1]
    data = bytearray(victim.read_bytes())
    data[5] ^= 1
    victim.write_bytes(data)
    with pytest.raises(errors.IntegrityError, match="expert/ffn/down"):
        exporting.export_folder(source, tmp_path / "hf")
    assert not (tmp_path / "hf").exists()


def test_a_directory_with_content_is_never_touched(tmp_path):
    source = folders.write_golden(tmp_path / "hf", "dense_mha")
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("dear")
    importing.import_folder(source, tmp_path / "ours")
    for convert, origin in ((importing.import_folder, source), (exporting.export_folder, tmp_path / "ours")):
        with pytest.raises(errors.StorageError, match="not empty"):
            convert(origin, tmp_path / "home")
    assert (tmp_path / "home" / "letter.txt").read_text() == "dear"


PATHS = {"expert/ffn/gate": "gate_proj", "expert/ffn/up": "up_proj", "expert/ffn/down": "down_proj"}


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("widest", [24, 40])
def test_experts_of_all_sizes_become_full_ones_of_one_width(widest, dtype, tmp_path):
    source = make_mixed(tmp_path, widest, dtype)
    report = exporting.export_folder(source, tmp_path / "hf")
    assert (report["experts"], report["width"]) == (["public", "full", "low", "narrow", "tiny"], widest)
    padded = dict.fromkeys(("low", "public", "tiny"), 24) if widest > 24 else {}
    assert report["padded"] == {"narrow": 16, **padded}
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    assert (config["intermediate_size"], config["num_experts"]) == (widest, 5)
    state, model = read_all(tmp_path / "hf"), models.open_model(source)
    assert report["bytes"] == sum(value.nbytes for value in state.values())
    lost = {name: [0.0, 0.0] for name in ("low", "tiny")}
    for e, name in enumerate(report["experts"]):
        for path, (layer, theirs) in itertools.product(PATHS, enumerate(("0", "1"))):
            found = state[f"model.layers.{theirs}.mlp.experts.{e}.{PATHS[path]}.weight"].T
            expected = model.anchor.tensor(path)[layer]
            if name in ("full", "narrow"):
                expected = model.bundles[name].tensor(path)[layer]
            elif name != "public":
                a, b = (model.bundles[name].tensor(f"{path}/{part}")[layer].astype(np.float64) for part in "ab")
                exact = expected.astype(np.float64) + a @ b
                inside = found[: exact.shape[0], : exact.shape[1]].astype(np.float64)
                lost[name][0] += np.square(inside - exact).sum()
                lost[name][1] += np.square(a @ b).sum()
                np.testing.assert_allclose(inside, exact, rtol=2**-8 if dtype == "bfloat16" else 1e-5, atol=1e-6)
                expected = inside.astype(found.dtype)
            assert found.dtype == dtype
            units = expected.shape[0 if path == "expert/ffn/down" else 1]
            rest = found[units:] if path == "expert/ffn/down" else found[:, units:]
            assert rest.size == (widest - units) * CONFIG.d_model and not rest.astype(np.float32).any()
            assert found[: expected.shape[0], : expected.shape[1]].tobytes() == expected.tobytes()
    for name, rank in {"low": 4, "tiny": 1}.items():
        told = report["expanded"][name]
        assert (told["rank"], told["dtype"]) == (rank, dtype)
        share = (lost[name][0] / lost[name][1]) ** 0.5
        assert told["rounding"] == pytest.approx(share, rel=0.01, abs=1e-7) and share < (0.01 if dtype == "bfloat16" else 1e-6)


@pytest.mark.parametrize("widest, dtype, top_k", [(24, "float32", 2), (40, "float32", 2), (24, "bfloat16", 5)])
def test_a_mixed_model_computes_the_same_once_its_experts_are_full(widest, dtype, top_k, tmp_path):
    source = make_mixed(tmp_path, widest, dtype)
    exporting.export_folder(source, tmp_path / "hf")
    report = importing.import_folder(tmp_path / "hf", tmp_path / "back", ["public", "full", "low", "narrow", "tiny"])
    back = models.open_model(tmp_path / "back")
    assert {bundle.manifest["rank"] for bundle in back.bundles.values()} == {0}
    assert {bundle.manifest["d_ff"] for bundle in back.bundles.values()} == {store.config_of(back.anchor).d_ff} == {widest}
    tokens = np.random.default_rng(5).integers(CONFIG.vocab_size, size=40)
    choices = [report["experts"], ["public", "low", "tiny"], ["public", "narrow"], ["full", "low"]]
    mixed, full = (
        folders.logits(*models.load(models.open_model(home)), [tokens] * len(choices), top_k, choices)
        for home in (source, tmp_path / "back")
    )
    tolerance = 1e-5 if dtype == "float32" else 2e-2  # that of the expanded matrices is 2**-9
    for ours, theirs in zip(mixed, full, strict=True):
        assert folders.relative_error(ours, theirs) < tolerance


def test_a_product_that_overflows_is_refused(tmp_path):
    model = models.open_model(make_mixed(tmp_path))
    factors = {
        "expert/ffn/up/a": np.full((2, 32, 4), 1e30, np.float32),
        "expert/ffn/up/b": np.full((2, 4, 24), 1e30, np.float32),
    }
    huge = dataclasses.replace(model.bundles["low"], instead=factors)
    with np.errstate(all="ignore"), pytest.raises(errors.IntegrityError, match=r"'low' .* expert/ffn/up holds NaN or infinity"):
        expansion.matrix(model.anchor, huge, "expert/ffn/up", 1)


def test_the_streamed_forward_of_a_mixed_model_is_the_forward(tmp_path):
    source = make_mixed(tmp_path, 40, bias=-0.5)
    model = models.open_model(source)
    tokens = np.random.default_rng(3).integers(CONFIG.vocab_size, size=40)
    routers = biasless.routers_of(model.anchor, model.bundles)
    ours = biasless.stream(model.anchor, model.bundles, [routers], 2, tokens)
    architecture, params = models.load(model)
    np.testing.assert_allclose(ours[0], folders.logits(architecture, params, [tokens], 2)[0], atol=2e-4, rtol=0)


def redescribed(model: models.Model, **stated) -> None:
    """Writes another manifest of the same parts."""
    manifest_lib.write(model.directory, models.describe(model.anchor, model.bundles, 2, **stated))


def test_a_calibrated_bias_is_the_one_that_counts(tmp_path):
    source = make_model(tmp_path, bias=-3.0)
    entry = {"share": 0.1, "text": "0" * 64, "with": []}
    biases = {"aa": {"bias": [-0.25, -0.5], **entry}, "zz": {"bias": [0.0, 0.0], **entry}}
    redescribed(models.open_model(source), calibration=biases)
    with pytest.raises(errors.ConfigError, match="experts aa have a router bias"):
        exporting.export_folder(source, tmp_path / "refused")
    report = exporting.export_folder(source, tmp_path / "fold", "fold")["bias"]
    assert report["calibrated"] == ["aa", "zz"]
    model = models.open_model(source)
    rows = biasless.routers_of(model.anchor, model.bundles).rows
    folded = [read_all(tmp_path / "fold")[f"model.layers.{layer}.mlp.gate.weight"] for layer in (0, 1)]
    for layer, bias in enumerate((-0.25, -0.5)):
        added = (folded[layer] - rows[layer]) / np.float32(bias)
        assert not added[2].any()
        claims = model.anchor.tensor("statistics/states")[layer] @ added[1]
        assert abs(claims.mean() - 1) < 0.05
    redescribed(model, calibration={name: {"bias": [0.0, 0.0], **entry} for name in ("aa", "zz")})
    assert "bias" not in exporting.export_folder(source, tmp_path / "free")


def test_shared_leaves_are_those_that_the_model_uses(tmp_path):
    whole = models.open_model(make_model(tmp_path))
    anchor = whole.anchor
    norm = anchor.tensor("head/norm")
    expert = whole.bundles["aa"].tensors("expert")
    bundle = publishing.write_bundle(
        tmp_path / "own", "aa", anchor, expert, {}, shared={"head": {"norm": norm + np.float32(2)}}
    )
    model = models.write_model(tmp_path / "merged", anchor, {"aa": bundle}, 2)
    report = exporting.export_folder(model.directory, tmp_path / "averaged")
    np.testing.assert_array_equal(read_all(tmp_path / "averaged")["model.norm.weight"], norm + np.float32(2))
    assert "aa/shared/head/norm" in report["left_out"]
    redescribed(model, shared=None)
    exporting.export_folder(model.directory, tmp_path / "plain")
    np.testing.assert_array_equal(read_all(tmp_path / "plain")["model.norm.weight"], norm)


@pytest.mark.parametrize("states", [True, False])
def test_folding_a_bias_changes_less_than_dropping_it(states, tmp_path):
    source = make_model(tmp_path, bias=-3.0, states=states)
    with pytest.raises(errors.ConfigError, match="experts aa, zz have a router bias") as caught:
        exporting.export_folder(source, tmp_path / "refused")
    assert "--bias=fold" in str(caught.value) and not (tmp_path / "refused").exists()
    fold = exporting.export_folder(source, tmp_path / "fold", "fold")["bias"]
    drop = exporting.export_folder(source, tmp_path / "drop", "drop")["bias"]
    assert fold["fitted_on"] == ("the anchor's public states" if states else "the sample")
    assert fold["mean_logit_difference"] < 0.5 * drop["mean_logit_difference"]
    assert fold["bits_per_byte_before"] == drop["bits_per_byte_before"] > 0
    model = models.open_model(source)
    rows = biasless.routers_of(model.anchor, model.bundles).rows
    exported = read_all(tmp_path / "drop")["model.layers.0.mlp.gate.weight"]
    np.testing.assert_array_equal(exported, rows[0])
    folded = read_all(tmp_path / "fold")["model.layers.0.mlp.gate.weight"]
    np.testing.assert_array_equal(folded[0], rows[0, 0])
    np.testing.assert_allclose(folded[1] - rows[0, 1], folded[2] - rows[0, 2], atol=1e-5)
    if states:
        v = (folded[1] - rows[0, 1]) / np.float32(-3)
        claims = model.anchor.tensor("statistics/states")[0] @ v
        assert abs(claims.mean() - 1) < 0.02 and abs(np.sqrt(np.mean((claims - 1) ** 2)) - fold["residual"][0]) < 1e-3


def test_routers_with_a_memory_have_no_place_and_their_anchor_has(tmp_path, monkeypatch):
    monkeypatch.setattr(sys.modules[__name__], "CONFIG", dataclasses.replace(CONFIG, router_memory=0.9))
    model = make_model(tmp_path)
    with pytest.raises(errors.ConfigError, match="its routers have a memory"):
        exporting.export_folder(model, tmp_path / "folder", bias="fold")
    assert not (tmp_path / "folder").exists()
    assert exporting.export_folder(model / "anchor", tmp_path / "anchor")["kind"] == "anchor"


def test_the_streamed_forward_is_the_forward(tmp_path):
    source = make_model(tmp_path, bias=-0.5)
    model = models.open_model(source)
    tokens = np.random.default_rng(3).integers(CONFIG.vocab_size, size=40)
    routers = biasless.routers_of(model.anchor, model.bundles)
    ours = biasless.stream(model.anchor, model.bundles, [routers, routers.dropped()], 2, tokens)
    architecture, params = models.load(model)
    np.testing.assert_allclose(ours[0], folders.logits(architecture, params, [tokens], 2)[0], atol=2e-4, rtol=0)
    for bank in architecture.banks[1:]:
        params["experts"][bank.name]["router"]["bias"] = np.zeros((CONFIG.num_layers, len(bank.experts)), np.float32)
    np.testing.assert_allclose(ours[1], folders.logits(architecture, params, [tokens], 2)[0], atol=2e-4, rtol=0)
    anchor, params = models.load_anchor(model.anchor)
    public = biasless.stream(model.anchor, {}, [None], 1, tokens)
    np.testing.assert_allclose(public[0], folders.logits(anchor, params, [tokens], 1)[0], atol=2e-4, rtol=0)
    assert surgery.group({"public": 24}) == {"public": ("public",)}


def test_without_a_tokenizer_the_comparison_takes_random_tokens(tmp_path):
    source = make_model(tmp_path, bias=-1.0, tokenizer=False)
    report = exporting.export_folder(source, tmp_path / "hf", "drop")["bias"]
    assert "bits_per_token_after" in report and "bits_per_byte_after" not in report
    with pytest.raises(errors.ConfigError, match="no tokenizer"):
        store.tokenizer_path(models.open_model(source).anchor)
    (tmp_path / "text").write_text("some text")
    with pytest.raises(errors.ConfigError, match="this anchor has none"):
        exporting.export_folder(source, tmp_path / "no", "drop", tmp_path / "text")


@pytest.mark.parametrize("content", [b"", b"\xff\xfe\xfa", None])
def test_a_sample_that_is_no_text_is_a_data_error(content, tmp_path):
    source = make_model(tmp_path, bias=-1.0)
    if content is not None:
        (tmp_path / "text").write_bytes(content)
    with pytest.raises(errors.DataError):
        exporting.export_folder(source, tmp_path / "no", "drop", tmp_path / "text")
    assert not (tmp_path / "no").exists()


def test_the_command_line(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "XLA_FLAGS": ""}

    def convert(*arguments):
        command = [sys.executable, "-m", "flexjax.convert", *map(str, arguments)]
        return subprocess.run(command, env=environment, capture_output=True, text=True, check=False)

    source = make_model(tmp_path, bias=-1.0)
    (tmp_path / "text").write_text("Boats on a slow river. " * 20)
    refused = convert("export", f"--from={source}", f"--to={tmp_path / 'hf'}")
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1 and "--bias=fold" in refused.stderr
    done = convert(
        "export", f"--from={source}", f"--to={tmp_path / 'hf'}", "--bias=fold", f"--sample={tmp_path / 'text'}", "--json"
    )
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout.splitlines()[-1])["bias"]["tokens"] > 200
    mixed = convert("export", f"--from={make_mixed(tmp_path / 'mixed')}", f"--to={tmp_path / 'mixed_hf'}")
    assert "expert 'low' of rank 4 is expanded to width 24; rounding to float32 changes what it adds by 0.00%" in mixed.stdout
    assert mixed.returncode == 0 and "padded with zeros to width 24: narrow (16)" in mixed.stdout, mixed.stderr
    done = convert("import", f"--from={tmp_path / 'hf'}", f"--to={tmp_path / 'ours'}", "--names=public,aa,zz")
    assert done.returncode == 0 and "(public, aa, zz)" in done.stdout, done.stderr
