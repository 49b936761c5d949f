"""`flexjax.evaluate` with bad input: one clear line, the right exit code, nothing lost."""

import json
import shutil

import numpy as np
import pytest

CONFIG, DATA, INTEGRITY, POLICY, STORAGE = 2, 3, 4, 5, 6


@pytest.fixture
def scoring(merged, corpus):
    return [f"--model={merged}", f"--data=math={corpus}/math/validation.jsonl", "--batch_size=2", "--seq_len=16"]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], ["--model=DIR", "--data=NAME=PATH"]),
        (["--model=m"], ["--data=NAME=PATH"]),
        (["--data=a=b"], ["--model=DIR"]),
        (["--model=", "--data=a=b"], ["--model=DIR"]),
        (["--model=m", "--data=a=b", "c"], ["unexpected argument 'c'"]),
        (["--model=m", "--data=file.jsonl"], ["'file.jsonl'", "NAME=PATH"]),
        (["--model=m", "--data==file.jsonl"], ["'=file.jsonl'", "NAME=PATH"]),
        (["--model=m", "--data=math="], ["'math='", "NAME=PATH"]),
        (["--model=m", "--seq_len=0"], ["--seq_len=0", "positive"]),
        (["--model=m", "--batch_size=-1"], ["--batch_size=-1", "positive"]),
        (["--model=m", "--max_kilobytes=-1"], ["--max_kilobytes=-1"]),
        (["--model=m", "--expert=math"], ["unknown flag --expert", "did you mean --experts?"]),
    ],
)
def test_flags(refuse, commands, arguments, says):
    refuse(commands.evaluate, arguments, CONFIG, *says)


def test_texts(refuse, commands, scoring, corpus, tmp_path):
    file = f"{corpus}/math/validation.jsonl"
    refuse(commands.evaluate, [*scoring, f"--data=a={file},a={file}"], CONFIG, "'a' twice")
    refuse(commands.evaluate, [*scoring, f"--data=a={file},"], CONFIG, "''", "NAME=PATH")
    refuse(commands.evaluate, [*scoring, f"--data=a={file},b=missing.jsonl"], DATA, "missing.jsonl")
    refuse(commands.evaluate, [*scoring, "--text_field=body"], DATA, f"{file}:1", "'body'")
    tokens = tmp_path / "tokens.bin"
    np.array([7, 8, 900], "<u2").tofile(tokens)
    refuse(commands.evaluate, [*scoring, f"--data=a={tokens}"], DATA, tokens, "token 2 has id 900")
    refuse(commands.evaluate, [*scoring, f"--data=a={tokens}", "--token_dtype=int7"], CONFIG, "'int7'", "uint16")
    np.array([1, 1], "<u2").tofile(tokens)
    refuse(commands.evaluate, [*scoring, f"--data=a={tokens}"], DATA, "no document")


def test_experts(refuse, commands, scoring, anchor):
    refuse(commands.evaluate, [*scoring, "--experts="], POLICY, "no expert is allowed", "public, code, math")
    refuse(commands.evaluate, [*scoring, "--experts=public,physics"], POLICY, "'physics'", "public, code, math")
    refuse(commands.evaluate, [*scoring, "--top_k=4"], CONFIG, "top_k=4", "3 experts")
    refuse(commands.evaluate, [*scoring, "--top_k=0"], CONFIG, "top_k=0")
    refuse(commands.evaluate, [*scoring, f"--model={anchor}", "--top_k=2"], CONFIG, "--top_k=2", anchor)
    refuse(commands.evaluate, [*scoring, f"--model={anchor}", "--experts=math"], POLICY, "'math'", "public")


def test_models(refuse, commands, scoring, merged, house, tmp_path):
    refuse(commands.evaluate, [*scoring, "--model=missing"], STORAGE, "missing", "does not exist")
    refuse(commands.evaluate, [*scoring, f"--model={house}"], STORAGE, f"{house / 'model'}?")
    refuse(commands.evaluate, [*scoring, f"--model={house / 'expert'}"], INTEGRITY, "'expert'", "expected 'model'")
    shutil.copytree(merged, tmp_path / "model")
    file = next((tmp_path / "model" / "experts").rglob("c/0/0/0"))
    content = bytearray(file.read_bytes())
    content[5] ^= 1
    file.write_bytes(content)
    refuse(commands.evaluate, [*scoring, f"--model={tmp_path / 'model'}"], INTEGRITY, file)


def test_json_and_windows_lines(commands, scoring, corpus, tmp_path):
    """The last line of stdout is one JSON object, logs are on stderr; CRLF between lines is no part of a text."""
    plain = corpus / "math" / "validation.jsonl"
    windows = tmp_path / "validation.jsonl"
    windows.write_bytes(plain.read_bytes().replace(b"\n", b"\r\n"))
    arguments = [*scoring, f"--data=plain={plain},windows={windows}", "--experts=public,math", "--json"]
    result = commands.evaluate(*arguments)
    assert (result.code, result.err) == (0, "")
    found = json.loads(result.out.splitlines()[-1])
    assert found["experts"] == ["public", "math"]
    assert found["scores"]["plain"] == found["scores"]["windows"]
    assert found["scores"]["plain"]["shares"]["code"] == 0
