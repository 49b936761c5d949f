"""Commands as a user types them, a tiny corpus, and one tiny run whose artefacts every test of this folder uses."""

import hashlib
import json
import random
import types

import pytest

from tests.commands import zygote

SECRET = "SECRET"  # every text of ours holds it, and no message may
WORDS = {"public": "the a of and to in is it was he", "math": "sum int root pi sin cos log lim dx dy"}
WORDS["code"] = WORDS["math"]
DOCUMENTS = {"train": 1010, "validation": 12}
SHAPE = {"vocab_size": 320, "d_model": 32, "num_layers": 2, "num_heads": 2, "num_kv_heads": 2, "head_dim": 16, "d_ff": 64}
TINY = [
    "--config.data.train_files={root}/{domain}/train.jsonl",
    "--config.data.validation_files={root}/{domain}/validation.jsonl",
    "--config.data.seq_len=16",
    "--config.train.steps=4",
    "--config.train.batch_size=4",
    "--config.anchor.train.steps=4",
    "--config.anchor.train.batch_size=4",
    "--config.anchor.statistics_tokens=64",
    "--config.evaluation.max_kilobytes=1",
    "--config.evaluation.batch_size=2",
    *(f"--config.model.{name}={value}" for name, value in SHAPE.items()),
]
MATH = "--config=configs/math_expert.py"
SPOKEN = ("anchor", "corpus", "evaluation", "expert", "joint", "model", "router", "tokenizer", "warning:")


@pytest.fixture(scope="session")
def commands(tmp_path_factory):
    made = {}
    for name in ("main", "merge", "evaluate"):
        made[name] = zygote.Zygote(f"flexjax.{name}", tmp_path_factory.mktemp(name))
    yield types.SimpleNamespace(**made)
    for process in made.values():
        process.close()


@pytest.fixture(scope="session")
def cache(tmp_path_factory):
    """Compiled programs that several processes share."""
    return tmp_path_factory.mktemp("compiled")


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("corpus"), random.Random(0)
    for domain, words in WORDS.items():
        for split, count in DOCUMENTS.items():
            texts = [f"{i} {SECRET} {' '.join(rng.choices(words.split(), k=6))}" for i in range(count)]
            write_jsonl(root / domain / f"{split}.jsonl", texts)
    return root


def write_jsonl(path, texts, end="\n"):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes("".join(json.dumps({"text": text}) + end for text in texts).encode())
    return path


@pytest.fixture(scope="session")
def tiny(corpus):
    return [*TINY, f"--config.data.root={corpus}"]


@pytest.fixture(scope="session")
def house(commands, tiny, tmp_path_factory):
    """A finished run of the math expert: public/anchor, expert, model."""
    directory = tmp_path_factory.mktemp("house") / "math"
    result = commands.main(MATH, *tiny, f"--workdir={directory}")
    assert result.code == 0, result.err
    (directory.parent / "report.txt").write_text(result.out)
    return directory


@pytest.fixture(scope="session")
def anchor(house):
    return house / "public" / "anchor"


@pytest.fixture(scope="session")
def code_expert(commands, tiny, anchor, tmp_path_factory):
    directory = tmp_path_factory.mktemp("house") / "code"
    config = ["--config=configs/code_expert.py", *tiny, f"--config.anchor.path={anchor}", "--config.evaluation.domains=()"]
    result = commands.main(*config, f"--workdir={directory}")
    assert result.code == 0, result.err
    return directory / "expert"


@pytest.fixture(scope="session")
def merged(commands, house, anchor, code_expert, tmp_path_factory):
    """public, code and math in one model."""
    model = tmp_path_factory.mktemp("house") / "merged"
    result = commands.merge(
        "create", f"--model={model}", f"--anchor={anchor}", f"--expert={house / 'expert'}", f"--expert={code_expert}"
    )
    assert result.code == 0, result.err
    return model


def snapshot(directory):
    """{file: digest} of a directory, without the name of the process that held it last."""
    files = [path for path in sorted(directory.rglob("*")) if path.is_file() and path.name != ".lock"]
    return {str(path.relative_to(directory)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


@pytest.fixture
def refuse(house):
    """Checks the error contract: exit code, one clear line, no text of ours, and nothing lost."""
    before = snapshot(house)

    def check(command, arguments, code, *says, **options):
        result = command(*arguments, **options)
        lines = result.err.splitlines()
        assert result.code == code, f"exit code {result.code}, expected {code}: {result.err}"
        assert lines[-1].startswith("error: "), result.err
        assert all(line.startswith(SPOKEN) for line in lines[:-1]), f"more than one line of error: {result.err}"
        for words in says:
            assert str(words) in lines[-1], f"{words!r} is not said: {lines[-1]}"
        assert SECRET not in result.out + result.err, "a message quotes a text"
        return lines[-1]

    yield check
    assert snapshot(house) == before, "a refusal changed finished work"
