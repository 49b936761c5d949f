"""Both directions against transformers itself, which runs in `.venv-torch` as a subprocess (`pytest -m live`)."""

import json
import os
import pathlib
import subprocess

import numpy as np
import pytest

from flexjax.data import tokenizer as tokenizer_lib
from flexjax.experts import models, store
from flexjax.experts.huggingface import exporting, importing
from tests.experts import test_huggingface as made
from tests.parity import folders

pytestmark = pytest.mark.live

ROOT = pathlib.Path(__file__).parents[2]
PYTHON = ROOT / ".venv-torch" / "bin" / "python"
BUILT = [*folders.CASES, "moe7_mha_fused"]
LOADING = ("missing_keys", "unexpected_keys", "mismatched_keys")


def reference(*arguments: object) -> None:
    assert PYTHON.exists(), f"{PYTHON} is missing; create it with python3.11, torch and transformers (.ci/run does)"
    environment = {key: value for key, value in os.environ.items() if not key.startswith("PYTHON")}
    environment |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "OMP_NUM_THREADS": "1"}
    command = [PYTHON, ROOT / "tests" / "parity" / "reference.py", *arguments]
    done = subprocess.run([*map(str, command)], env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-4000:]


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    """Folders and archives as transformers writes them now."""
    home = tmp_path_factory.mktemp("built")
    reference("build", home)
    return home


@pytest.fixture(scope="module")
def loaded(built, tmp_path_factory):
    """Our exports of everything, and what transformers says of them: {name: (ours, facts, loading information)}."""
    home = tmp_path_factory.mktemp("exported")
    sources = {}
    for name in BUILT:
        importing.import_folder(built / name, home / f"{name}_ours")
        sources[name] = home / f"{name}_ours", None
    sources["trained"] = made.make_model(home / "trained"), None
    sources["anchor"] = home / "trained" / "model" / "anchor", None
    sources["mixed"] = made.make_mixed(home / "mixed", widest=40), None
    sources["folded"] = made.make_model(home / "biased", bias=-3.0), "fold"
    for name, (source, bias) in sources.items():
        exporting.export_folder(source, home / name / "hf", bias)
    reference("check", home / "report", *(home / name / "hf" for name in sources))
    infos = json.loads((home / "report.json").read_text())
    with np.load(home / "report.npz") as archive:
        arrays = dict(archive)
    found = {}
    for index, (name, (source, _)) in enumerate(sources.items()):
        facts = {key.split("/")[1]: value for key, value in arrays.items() if key.startswith(f"{index}/")}
        found[name] = source, facts, infos[str(home / name / "hf")]
    return found


@pytest.mark.parametrize("name", folders.CASES)
def test_goldens_are_what_transformers_says_now(name, built):
    golden = folders.golden(name)
    with np.load(built / f"{name}.npz") as archive:
        assert set(archive) == set(golden)
        for key in golden:
            if key.startswith(("logits/", "without/")):
                assert folders.relative_error(golden[key], archive[key]) < folders.TOLERANCE, f"{key}: {folders.RENEW}"
            elif key.startswith("state/"):
                np.testing.assert_array_equal(golden[key], archive[key], err_msg=f"{key}: {folders.RENEW}")


@pytest.mark.parametrize("name", BUILT)
def test_imported_folders_compute_what_transformers_computes(name, built, loaded):
    with np.load(built / f"{name.removesuffix('_fused')}.npz") as archive:
        facts = dict(archive)
    ours = loaded[name][0]
    model = models.open_model(ours) if (ours / "anchor").exists() else None
    names = ["public", *(sorted(model.bundles) if model else [])]
    for what, error in folders.check_case(facts, ours, names).items():
        assert error < folders.TOLERANCE, f"{name} {what}: relative error {error:.1e}"


@pytest.mark.parametrize("name", [*BUILT, "trained", "anchor", "mixed", "folded"])
def test_exported_folders_load_whole_and_compute_what_we_compute(name, loaded):
    ours, facts, info = loaded[name]
    assert {key: info["loading"][key] for key in LOADING} == {key: [] for key in LOADING}
    architecture, params = folders.load(ours)
    assert info["class"] == ("FlexOlmoForCausalLM" if (ours / "anchor").exists() else "Olmo2ForCausalLM")
    if name == "folded":
        back = ours.parent / "back"
        importing.import_folder(ours.parents[1] / "folded" / "hf", back)
        architecture, params = folders.load(back)
    whole = np.concatenate([facts["tokens"][: folders.PROMPT], facts["continuation"]])
    rows = folders.logits(architecture, params, [facts["tokens"], whole], architecture.top_k)
    error = folders.relative_error(rows[0], facts["logits"])
    assert error < folders.TOLERANCE, f"{name}: relative error {error:.1e}"
    assert folders.check_greedy(rows[1], folders.PROMPT, facts["continuation"], facts["margins"]) > 16


def test_the_tokenizer_and_its_end_of_text_come_along(loaded):
    ours, _, info = loaded["trained"]
    tokenizer = tokenizer_lib.load(store.tokenizer_path(models.open_model(ours).anchor))
    assert info["tokenizer"] == {"ids": tokenizer.encode("two  rivers, 42 boats").tolist(), "eos": "<|endoftext|>"}
    assert info["special"] == [None, tokenizer.eos_id, None]


def test_bytes_survive_transformers_in_bfloat16(built, tmp_path):
    """What transformers loads and saves again in bfloat16 is still the same model to us."""
    importing.import_folder(built / "moe2_mha", tmp_path / "ours")
    exporting.export_folder(tmp_path / "ours", tmp_path / "hf")
    reference("resave", tmp_path / "hf", tmp_path / "half")
    report = importing.import_folder(tmp_path / "half", tmp_path / "again")
    exporting.export_folder(tmp_path / "again", tmp_path / "back")
    made.assert_same(made.read_all(tmp_path / "back"), made.read_all(tmp_path / "half"))
    assert report["experts"] == ["public", "e01"]
    first = {key: value.astype(np.float32) for key, value in made.read_all(tmp_path / "back").items()}
    made.assert_same(first, made.read_all(tmp_path / "hf"))  # the weights are exact in bfloat16
