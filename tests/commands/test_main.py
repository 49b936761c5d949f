"""`flexjax.main` with bad input: one clear line, the right exit code, nothing lost."""

import gzip
import shutil

import numpy as np
import pytest

from flexjax import config as config_lib
from flexjax import workdir
from flexjax.data import tokenizer as tokenizer_lib
from tests.commands.conftest import MATH, SECRET, snapshot, write_jsonl

CONFIG, DATA, INTEGRITY, POLICY, STORAGE = 2, 3, 4, 5, 6


@pytest.fixture
def job(tiny, anchor, tmp_path):
    """Arguments of an expert run beside the finished anchor, in a new workdir."""
    return [MATH, *tiny, f"--config.anchor.path={anchor}", f"--workdir={tmp_path / 'run'}"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], ["--config is missing", "--config=configs/math_expert.py"]),
        (["--config="], ["no such file"]),
        (["--config=configs/missing.py"], ["configs/missing.py", "no such file"]),
        (["--config=configs/missing.py", "--config.train.steps=3"], ["configs/missing.py", "no such file"]),
        (["--config", "configs/missing.py"], ["configs/missing.py", "no such file"]),
        (["--config=configs"], ["configs", "no such file"]),
        ([f"{MATH}:huge"], ["unknown variant 'huge'", "quickstart, mini, 7b"]),
        ([f"{MATH}:mini"], ["{root}", "set data.root"]),
        ([f"{MATH}:7b"], ["{root}", "set data.root"]),
        ([MATH, "--config.train.steps=many"], ["config.train.steps", "'many'", "int"]),
        ([MATH, "--config.train.steps=4.5"], ["config.train.steps", "'4.5'", "int"]),
        ([MATH, "--config.train.steps="], ["config.train.steps", "''", "int"]),
        ([MATH, "--config.train.steps"], ["--config.train.steps"]),
        ([MATH, "--config.train.steps=0"], ["config.train.steps is 0", "at least 1"]),
        ([MATH, "--config.data.prefetch=-1"], ["config.data.prefetch is -1", "at least 0"]),
        ([MATH, "--config.train.learning_rate=nan"], ["config.train.learning_rate is nan", "finite"]),
        ([MATH, "--config.train.learning_rate=inf"], ["config.train.learning_rate is inf", "finite"]),
        ([MATH, "--config.model.tied_head=perhaps"], ["config.model.tied_head", "'perhaps'", "bool"]),
        ([MATH, "--config.evaluation.domains=(1,2)"], ["config.evaluation.domains is (1, 2)", "tuple of strings"]),
        ([MATH, "--config.train=4"], ["config.train is a group", "config.train.trainable"]),
        ([MATH, "--config.train.step=4"], ["config.train.step does not exist", "did you mean config.train.steps?"]),
        ([MATH, "--config.trai.steps=4"], ["did you mean config.train?"]),
        ([MATH, "--config.expert.colour=red"], ["config.expert has name, kind, d_ff, rank, public_fraction, row_documents"]),
        ([MATH, "--config.train.steps.x=4"], ["config.train.steps is a value"]),
        ([MATH, "--config.phase=sleep"], ["config.phase is 'sleep'", "public, expert, joint, router"]),
        ([MATH, "--confg.train.steps=4"], ["unknown flag --confg.train.steps", "did you mean --config.train.steps?"]),
        ([MATH, "--wrkdir=x"], ["unknown flag --wrkdir", "did you mean --workdir?"]),
        ([MATH, "--nonsense"], ["unknown flag --nonsense", "--help"]),
        ([MATH, "--workdir"], ["--workdir", "--help"]),
        ([MATH, "--json=maybe"], ["--json=maybe"]),
        ([MATH, "extra"], ["unexpected argument 'extra'"]),
        ([MATH, "--config.mesh.fsdp=3"], ["mesh data any x fsdp 3", "1 devices", "multiply to 1"]),
        ([MATH, "--config.mesh.fsdp=0"], ["mesh.data and mesh.fsdp are 0", "one axis only"]),
        ([MATH, "--config.mesh.frozen=split"], ["mesh.frozen is 'split'", "sharded, replicated"]),
        ([MATH, "--coordinator=here"], ["--num_processes", "--process_id"]),
        ([MATH, "--distributed"], ["--coordinator"]),
        (["--config=configs/router_tuning.py"], ["--config.mixture.model_path=DIR"]),
        (["--config=configs/joint_moe.py", "--config.mixture.experts=()"], ["config.mixture.experts", "at least one"]),
        (["--config=configs/joint_moe.py", "--config.mixture.experts=('a','a')"], ["config.mixture.experts", "each once"]),
        (["--config=configs/joint_moe.py", "--config.mixture.experts=('public',)"], ["'public' is reserved"]),
        *(
            ([MATH, f"--config.expert.name={name}"], [f"expert name {name!r}", "a-z, 0-9"])
            for name in ("", "../x", "/etc/passwd", ".", "Math", "a b", "a..b", "math\n", "x" * 64, "mäth")
        ),
        ([MATH, "--config.expert.name=public"], ["'public' is reserved", "choose another"]),
    ],
    ids=lambda value: " ".join(value)[:60].replace("\n", "\\n") or "nothing",
)
def test_flags_and_fields(refuse, commands, arguments, says, tmp_path):
    where = [] if any("--workdir" in argument for argument in arguments) else [f"--workdir={tmp_path / 'run'}"]
    refuse(commands.main, where + arguments, CONFIG, *says)
    assert not (tmp_path / "run" / "data").exists(), "work began before the arguments were checked"


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("def get_config(:", "SyntaxError"),
        ("import surely_not_installed", "surely_not_installed"),
        ("def other(): pass", "get_config"),
        ("def get_config(): pass", "Config"),
        ("def get_config(): return 5", "Config"),
        ("def get_config(): return open('/surely/missing')", "Config"),
        ("def get_config(): raise ValueError('boom')", "boom"),
        ("from flexjax import config\ndef get_config():\n c = config.Config(); c.train.steps = '10'; return c", "train.steps"),
        (
            "from flexjax import config\ndef get_config():\n c = config.Config(); c.train = None; return c",
            "config.train is None",
        ),
    ],
)
def test_broken_config_files(refuse, commands, content, says, tmp_path):
    file = tmp_path / "job.py"
    file.write_text(content)
    refuse(commands.main, [f"--config={file}", f"--workdir={tmp_path / 'run'}"], CONFIG, says)


def with_line(line):
    return b'{"text": "fine"}\n{"text": "SECRET"}\n' + line


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("train.jsonl", b"", ["the file is empty"]),
        ("train.jsonl", with_line(b'{"text": "SECRET'), [":3", "broken JSON"]),
        ("train.jsonl", with_line(b'{"text": "\xff SECRET"}'), [":3", "invalid UTF-8 at byte 10"]),
        ("train.jsonl", with_line(b'{"words": "SECRET"}'), [":3", "no field 'text'"]),
        ("train.jsonl", with_line(b'["SECRET"]'), [":3", "got list"]),
        ("train.jsonl", with_line(b'{"text": "SECRET", "text": ""}'), [":3", "twice"]),
        ("train.jsonl", with_line(b'{"text": "\\ud800 SECRET"}'), [":3", "surrogate"]),
        ("train.jsonl", with_line(b"[" * 100_000), [":3", "nesting"]),
        ("train.jsonl", with_line(b'{"text": "' + b"SECRET " * 200_000 + b'"}'), [":3", "longer than data.max_document_mb"]),
        ("train.jsonl.gz", gzip.compress(with_line(b""))[:-9], ["gzip", "cut or corrupt"]),
        ("train.jsonl.gz", b"SECRET", ["gzip", "cut or corrupt"]),
        ("train.txt", b"SECRET", []),
    ],
    ids=range(12),
)
def test_bad_text(refuse, commands, job, name, content, says, tmp_path):
    file = tmp_path / "text" / "math" / name
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    arguments = [*job, f"--config.data.train_files={tmp_path}/text/{{domain}}/train.*", "--config.data.max_document_mb=1"]
    refuse(commands.main, arguments, CONFIG if name.endswith("txt") else DATA, file, *says)


@pytest.mark.parametrize(
    ("name", "ids", "says"),
    [
        ("x.bin", np.array([1, 2, 900, 3], "<u2"), ["token 2 has id 900", "the vocabulary has 320"]),
        ("x.npy", np.array([[1, 2]], "<u2"), ["flat"]),
        ("x.bin", np.array([5], "u1"), ["cut"]),
        ("x.bin", np.array([], "<u2"), ["no tokens"]),
    ],
)
def test_bad_tokens(refuse, commands, job, name, ids, says, tmp_path):
    file = tmp_path / name
    np.save(file, ids) if name.endswith("npy") else ids.tofile(file)
    refuse(commands.main, [*job, f"--config.data.train_files={file}"], DATA, file, *says)


def test_missing_text(refuse, commands, job, tmp_path, corpus):
    refuse(commands.main, [*job, f"--config.data.root={tmp_path}/none"], DATA, f"{tmp_path}/none", "data.root")
    refuse(commands.main, [*job, "--config.data.train_files=,"], CONFIG, "empty part")
    refuse(commands.main, [*job, "--config.data.text_field=body"], DATA, corpus / "math" / "train.jsonl", ":1", "'body'")
    says = refuse(commands.main, [*job, "--config.evaluation.domains=('physics',)"], DATA, "physics/validation.jsonl")
    assert "train.jsonl" not in says
    assert not (tmp_path / "run" / "checkpoints").exists(), "trained for nothing: the validation text is missing"


def test_too_few_documents_for_a_row(refuse, commands, job):
    refuse(commands.main, [*job, "--config.expert.row_documents=3"], CONFIG, "row_documents=3", "at least 1000")
    refuse(commands.main, [*job, "--config.expert.row_documents=99999"], DATA, "'math' has 1010 documents", "99999")


def test_values_that_do_not_go_together(refuse, commands, job, tiny, tmp_path):
    refuse(commands.main, [*job, "--config.train.accumulation=3"], CONFIG, "train.accumulation=3", "train.batch_size=4")
    refuse(commands.main, [*job, "--config.expert.d_ff=65"], CONFIG, "expert.d_ff=65", "64")
    refuse(commands.main, [*job, "--config.expert.public_fraction=1"], CONFIG, "expert.public_fraction=1")
    refuse(commands.main, [*job, "--config.train.trainable=["], CONFIG, "'['", "regular expression")
    refuse(commands.main, [*job, "--config.train.trainable=nothing"], CONFIG, "'nothing' matches no parameter")
    refuse(commands.main, [*job, "--config.train.trainable=.*"], CONFIG, "experts/public/ffn/down", "no bundle carries")
    alone = [MATH, *tiny, f"--workdir={tmp_path / 'alone'}"]
    refuse(commands.main, [*alone, "--config.model.num_heads=3"], CONFIG, "model.num_heads=3")
    refuse(commands.main, [*alone, "--config.model.vocab_size=10"], CONFIG, "10 pieces", "model.vocab_size")
    refuse(commands.main, [*alone, "--config.anchor.rows=tarot"], CONFIG, "'tarot'", "logistic, mean, text, random")


def test_another_tokenizer_than_the_anchors(refuse, commands, job, tmp_path):
    other = tmp_path / "other.model"
    tokenizer_lib.train(["other words of another text 123"] * 50, 290, other)
    refuse(commands.main, [*job, f"--config.data.tokenizer={other}"], CONFIG, other, "not the anchor's tokenizer")
    refuse(commands.main, [*job, "--config.data.tokenizer=missing.model"], CONFIG, "missing.model", "no such tokenizer")


def damaged(anchor, home, damage):
    shutil.copytree(anchor, home)
    file = next(path for path in sorted(home.rglob("c/0/0/0")) if "layers" in str(path))
    if damage == "flipped":
        content = bytearray(file.read_bytes())
        content[37] ^= 8
        file.write_bytes(content)
    elif damage == "cut":
        file.write_bytes(file.read_bytes()[:-1])
    elif damage == "deleted":
        file.unlink()
    elif damage == "manifest":
        file = home / "manifest.json"
        file.write_bytes(file.read_bytes().replace(b'"rows":"logistic"', b'"rows":"mean"'))
    elif damage == "tokenizer":
        file = home / "tokenizer.model"
        file.write_bytes(file.read_bytes() + b"\0")
    return file


@pytest.mark.parametrize("damage", ["flipped", "cut", "deleted", "manifest", "tokenizer"])
def test_damaged_anchor(refuse, commands, job, anchor, damage, tmp_path):
    file = damaged(anchor, tmp_path / "anchor", damage)
    refuse(commands.main, [*job, f"--config.anchor.path={tmp_path / 'anchor'}"], INTEGRITY, file)
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_no_anchor(refuse, commands, job, house):
    refuse(commands.main, [*job, "--config.anchor.path=missing"], STORAGE, "missing", "does not exist")
    refuse(
        commands.main, [*job, f"--config.anchor.path={house}"], STORAGE, house, f"did you mean {house / 'public' / 'anchor'}?"
    )
    refuse(commands.main, [*job, f"--config.anchor.path={house / 'expert'}"], INTEGRITY, "'expert'", "expected 'anchor'")
    router = ["--config=configs/router_tuning.py", f"--config.mixture.model_path={house / 'expert'}", job[-1]]
    refuse(commands.main, router, INTEGRITY, "'expert'", "expected 'model'")


def test_workdir_that_cannot_be_written(refuse, commands, job, tmp_path):
    file = tmp_path / "file"
    file.write_text("precious")
    for place in (file, file / "below", "/proc/below"):
        refuse(commands.main, [*job, f"--workdir={place}"], STORAGE, place, "--workdir")
    refuse(commands.main, [*job, "--config.data.cache_dir=/proc/below"], STORAGE, "/proc/below")
    assert file.read_text() == "precious"


@pytest.mark.parametrize("max_bytes", [1_000, 40_000])
def test_full_disk(refuse, commands, job, max_bytes):
    refuse(commands.main, job, STORAGE, "File too large", max_bytes=max_bytes)


def test_buckets(refuse, commands, job):
    refuse(commands.main, [*job, "--workdir=gs://bucket/run"], CONFIG, "gs://bucket/run", "no local directory")
    refuse(
        commands.main,
        [*job, "--config.anchor.path=gs://bucket/anchor"],
        STORAGE,
        "credentials for Cloud Storage",
        "gcloud auth",
    )
    refuse(commands.main, [*job, "--config.anchor.path=hdfs2://bucket/anchor"], STORAGE, "hdfs2://", "local path")


def test_busy_workdir(refuse, commands, tiny, house):
    with workdir.lock(workdir.create(house)):
        says = refuse(commands.main, [MATH, *tiny, f"--workdir={house}"], STORAGE, house, "in use by process", "--workdir")
    assert "since" in says


@pytest.mark.parametrize(
    "change", ["model.d_model=64", "data.seq_len=8", "expert.name=code", "train.batch_size=8", "seed=1", "anchor.rows=mean"]
)
def test_finished_run_is_not_another_run(refuse, commands, tiny, house, change):
    path, value = change.split("=")
    refuse(commands.main, [MATH, *tiny, f"--workdir={house}", f"--config.{change}"], CONFIG, f"{path}: ", f"-> {value}")


def test_schedule_of_a_finished_run(refuse, commands, tiny, house):
    again = [MATH, *tiny, f"--workdir={house}", "--config.train.steps=5"]
    refuse(commands.main, again, CONFIG, "train.steps: 4 -> 5", "--allow_schedule_change")


def test_mistake_can_be_mended_in_the_same_workdir(refuse, commands, job):
    """What failed before anything was saved does not bind the workdir."""
    refuse(commands.main, [*job, "--config.data.text_field=body"], DATA, "'body'")
    refuse(commands.main, [*job, "--config.expert.row_documents=99999"], DATA, "99999")


def test_quarantine_names_no_text(refuse, commands, job, tmp_path):
    lines = [f"text {i}" for i in range(2000)]
    file = write_jsonl(tmp_path / "math.jsonl", lines)
    file.write_bytes(file.read_bytes() + b'{"text": "SECRET"\n' * 3)
    arguments = [*job, f"--config.data.train_files={file}", "--config.data.bad_documents=quarantine"]
    refuse(commands.main, arguments, DATA, "3 of 2003 documents are bad", "math.jsonl:2001")


def test_saved_config_is_the_resolved_one(house):
    saved = workdir.read_json(workdir.create(house) / "config.json")
    assert set(saved) == set(config_lib.to_dict(config_lib.Config()))
    assert saved["train.trainable"] == "experts/math/.*"
    assert saved["evaluation.domains"] == ["public", "math"]
    assert saved["train.steps"] == 4
    assert SECRET not in str(saved)
    assert "manifest.json" in snapshot(house / "model")
