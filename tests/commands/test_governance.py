"""The coordinator's day through the command line, on trained experts: every verb of `flexjax.merge` once."""

import json
import shutil

import pytest

from flexjax.experts import models, store
from tests.commands.conftest import snapshot
from tests.experts import forging

CONFIG, DATA, INTEGRITY, POLICY, STORAGE = 2, 3, 4, 5, 6


@pytest.fixture
def model(merged, tmp_path):
    return shutil.copytree(merged, tmp_path / "model")


@pytest.fixture
def run(commands):
    """Runs a verb that must succeed; returns what --json says."""

    def call(*arguments):
        result = commands.merge(*map(str, arguments), "--json")
        assert result.code == 0, result.err
        return json.loads(result.out.splitlines()[-1])

    return call


def text(corpus, domain="public", split="validation"):
    return corpus / domain / f"{split}.jsonl"


def test_dry_run_is_a_report(commands, house, anchor, code_expert, tmp_path):
    parts = [f"--anchor={anchor}", f"--expert={house / 'expert'}", f"--expert={code_expert}"]
    result = commands.merge("create", f"--model={tmp_path / 'new'}", *parts, "--dry_run", "--json")
    assert result.code == 0, result.err
    report = json.loads(result.out.splitlines()[-1])["report"]
    assert {row["field"] for row in report if row["expert"] == "math"} >= {
        "anchor", "tokenizer", "vocabulary", "shapes", "dtypes", "size", "licence", "privacy", "signature", "row norm", "bias",
        "nearest row",
    }  # fmt: skip
    assert "NO differential privacy" in result.out and "router health" in result.out
    assert not (tmp_path / "new").exists()


def test_a_refused_report_is_printed(refuse, commands, house, anchor, tmp_path):
    forged = shutil.copytree(house / "expert", tmp_path / "expert")
    forging.forge(forged, lambda manifest: manifest.update(anchor="0" * 64))
    create = ["create", f"--model={tmp_path / 'new'}", f"--anchor={anchor}", f"--expert={forged}", "--json"]
    refuse(commands.merge, create, INTEGRITY, "'math'", "anchor expected")
    said = json.loads(commands.merge(*create).out.splitlines()[-1])
    assert "anchor" in said["refused"] and any(row["verdict"] == "refused" for row in said["report"])


def test_in_out_and_back(run, refuse, commands, model, house, code_expert, tmp_path):
    start = run("show", f"--model={model}")["model"]["digest"]
    smaller = run("remove", f"--model={model}", "--name=code")["tree_digest"]
    refuse(commands.merge, ["add", f"--model={model}", f"--expert={house / 'expert'}"], CONFIG, "'math'", "use replace")
    refuse(commands.merge, ["revert", f"--model={model}"], POLICY, "'code'", "bytes are gone", "--expert=DIR")
    assert run("revert", f"--model={model}", f"--expert={code_expert}")["tree_digest"] == start
    assert run("remove", f"--model={model}", "--name=code")["tree_digest"] == smaller
    assert run("add", f"--model={model}", f"--expert={code_expert}", "--top_k=3")["tree_digest"] == start
    assert run("replace", f"--model={model}", f"--expert={code_expert}")["tree_digest"] == start
    rows = run("log", f"--model={model}")["history"]
    assert [row["operation"] for row in rows] == ["remove", "revert", "remove", "add", "replace"]
    found = run("diff", f"--model={model}", f"--other={house / 'model'}")
    assert list(found["removed"]) == ["code"] and found["added"] == {}
    refuse(commands.merge, ["replace", f"--model={model}"], CONFIG, "--expert=DIR")
    refuse(commands.merge, ["diff", f"--model={model}"], CONFIG, "--other=DIR")


def test_signed_by_whom(run, refuse, commands, house, anchor, code_expert, tmp_path):
    math, code = (shutil.copytree(source, tmp_path / source.parent.name) for source in (house / "expert", code_expert))
    for bundle in (math, code):
        forging.forge(bundle, lambda manifest: manifest.update(owner="Clinic A"))
    key = run("keygen", f"--key={tmp_path / 'key'}")["key"]
    refuse(commands.merge, ["keygen", f"--key={tmp_path / 'key'}"], STORAGE, "never overwritten")
    run("sign", f"--model={math}", f"--key={tmp_path / 'key'}")
    trust = tmp_path / "trust.json"
    trust.write_text(json.dumps({"keys": {key: {"owner": "Clinic A", "names": ["math"]}}}))
    create = ["create", f"--model={tmp_path / 'new'}", f"--anchor={anchor}", f"--expert={math}"]
    refuse(commands.merge, [*create, f"--expert={code}", f"--trusted_keys={trust}"], POLICY, "'code'", "unsigned")
    run("sign", f"--model={code}", f"--key={tmp_path / 'key'}")
    refuse(commands.merge, [*create, f"--expert={code}", f"--trusted_keys={trust}"], POLICY, "'code'", "may not sign")
    run(*create, f"--trusted_keys={trust}")
    said = run("verify", f"--model={tmp_path / 'new'}", f"--trusted_keys={trust}")
    assert any("trusted" in text or key in text for text in said["signatures"].values()), said
    assert run("verify", f"--model={house / 'model'}")["signature"].startswith("unsigned")
    holder = {"owner": "Clinic A", "names": ["math", "model:*"]}
    trust.write_text(json.dumps({"keys": {key: holder}}))
    verify = ["verify", f"--model={tmp_path / 'new'}", f"--trusted_keys={trust}"]
    refuse(commands.merge, verify, POLICY, "model", "unsigned")
    run("sign", f"--model={tmp_path / 'new'}", f"--key={tmp_path / 'key'}")
    assert "signed by Clinic A" in run(*verify)["signature"]
    anchored = holder | {"names": ["math", "model:*", "anchor:*"]}
    trust.write_text(json.dumps({"keys": {key: anchored}}))
    refuse(commands.merge, verify, POLICY, "anchor", "unsigned")
    digest = json.loads((tmp_path / "new" / "manifest.json").read_bytes())["digest"]
    trust.write_text(json.dumps({"keys": {key: holder | {"names": ["math"]}}, "revoked": [digest]}))
    refuse(commands.merge, verify, POLICY, digest, "revoked")
    trust.write_text(json.dumps({"keys": {key: holder | {"names": ["math"]}}}))
    refuse(commands.merge, ["verify", f"--model={house / 'expert'}", f"--trusted_keys={trust}"], POLICY, "'math'", "unsigned")
    run("card", f"--model={tmp_path / 'new'}")
    assert "math" in (tmp_path / "new" / "README.md").read_text()
    (tmp_path / "new" / "README.md").write_text("typed by hand")
    refuse(commands.merge, ["verify", f"--model={tmp_path / 'new'}"], INTEGRITY, "README.md", "merge card")


def test_opted_out_and_certified(run, refuse, commands, model, house, tmp_path):
    run("card", f"--model={model}")
    refuse(commands.merge, ["certify", f"--model={model}", "--removed=code"], POLICY, "'code'", "still in")
    run("remove", f"--model={model}", "--name=code")
    assert "code" not in (model / "README.md").read_text().split("## ")[1]
    run("keygen", f"--key={tmp_path / 'key'}")
    certify = ["certify", f"--model={model}", "--removed=code", f"--expert={house / 'expert'}", f"--key={tmp_path / 'key'}"]
    made = run(*certify)
    assert json.loads((tmp_path / "model.without-code.json").read_bytes())["claims"] == made["claims"]
    assert made["signature"] and made["claims"]["masked, the expert cannot matter"]["logits_bit_equal"]
    proof = f"--certificate={tmp_path / 'model.without-code.json'}"
    assert run("verify", proof, f"--model={model}")["certificate"]["key"] == made["signature"]["key"]
    refuse(commands.merge, ["verify", proof, f"--model={house.parent / 'math' / 'model'}x"], STORAGE, "does not exist")
    refuse(commands.merge, ["certify", f"--model={model}", "--removed=nobody"], POLICY, "'nobody'")


def test_calibrated_and_back(run, refuse, commands, model, corpus):
    start = run("show", f"--model={model}")["model"]["digest"]
    calibrate = ["calibrate", f"--model={model}", f"--data={text(corpus, split='train')}"]
    refuse(commands.merge, ["calibrate", f"--model={model}"], CONFIG, "--data=PATH")
    refuse(commands.merge, [*calibrate, "--share=2"], CONFIG, "share")
    refuse(commands.merge, ["calibrate", f"--model={model}", "--data=missing.jsonl"], DATA, "missing.jsonl")
    before = snapshot(model)
    said = run(*calibrate, "--dry_run", f"--validation=math={text(corpus, 'math')},code={text(corpus, 'code')}")
    assert snapshot(model) == before and set(said["confusion"]) == {"math", "code"}
    alone = run(*calibrate, "--share=0.2")
    found = models.open_model(model)
    assert set(found.manifest["calibration"]) == {"math", "code"}
    assert found.bundles["math"].manifest["digest"] == run("show", f"--model={model}")["model"]["experts"]["math"]
    assert max(alone["fits"]["math"]["after"]) <= 0.2 + 1e-4
    assert run("verify", f"--model={model}")["sound"]
    before = snapshot(model)
    run("calibrate", f"--model={model}", "--revert", "--dry_run")
    assert snapshot(model) == before
    one = json.dumps(found.manifest["calibration"]["math"])
    run("remove", f"--model={model}", "--name=code")
    assert json.dumps(models.open_model(model).manifest["calibration"]["math"]) == one
    run("calibrate", f"--model={model}", "--revert")
    assert models.open_model(model).manifest["calibration"] == {} and start


def test_jointly_calibrated_is_tied(run, refuse, commands, model, corpus):
    run("calibrate", f"--model={model}", f"--data={text(corpus, split='train')}", "--jointly")
    refuse(commands.merge, ["remove", f"--model={model}", "--name=code"], POLICY, "fitted jointly with 'code'", "--revert")
    run("calibrate", f"--model={model}", "--revert")
    run("remove", f"--model={model}", "--name=code")


@pytest.mark.parametrize(("size", "expected"), [("--rank=4", {"rank": 4, "d_ff": 64}), ("--width=16", {"rank": 0, "d_ff": 16})])
def test_compressed(run, refuse, commands, house, anchor, corpus, merged, tmp_path, size, expected):
    compress = ["compress", f"--anchor={anchor}", f"--expert={house / 'expert'}", f"--out={tmp_path / 'small'}"]
    refuse(commands.merge, compress, CONFIG, "rank", "width")
    refuse(commands.merge, [*compress, "--rank=1000"], CONFIG, "rank")
    report = run(*compress, size, f"--validation=math={text(corpus, 'math')}")
    small = store.open_bundle(tmp_path / "small", store.config_of(store.open_anchor(anchor)))
    assert {key: small.manifest[key] for key in expected} == expected
    assert report["bytes"]["after"] < report["bytes"]["before"]
    assert {"before", "after"} <= set(report["evaluation"])
    model = shutil.copytree(merged, tmp_path / "model")
    run("replace", f"--model={model}", f"--expert={tmp_path / 'small'}")
    assert run("verify", f"--model={model}")["sound"]
    result = commands.evaluate(f"--model={model}", f"--data=math={text(corpus, 'math')}")
    assert result.code == 0, result.err


def test_the_health_of_routers(run, refuse, commands, model, tmp_path):
    assert run("verify", f"--model={model}", "--router")["router"]["findings"] == []
    refuse(commands.merge, ["verify", f"--model={model / 'anchor'}", "--router"], CONFIG, "merged model")
