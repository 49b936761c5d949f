"""The text of a suite: nothing that is reported was trained on or tuned on."""

import gzip
import json

import pytest
from etils import epath

from benchmarks.suite import corpora, suites
from flexjax import errors

SUITE = suites.Suite(
    "small", "mix", ("math",), beside={"news": 0.003}, unseen={"math": ("other:",), "public": ("left:",)}, gate={}
)
SIZE = suites.SIZES["smoke"]


def write(root, domain, split, documents):
    path = root / "mix" / domain / f"{split}.jsonl.gz"
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = "".join(json.dumps({"text": text, "source": source}) + "\n" for text, source in documents)
    path.write_bytes(gzip.compress(lines.encode()))


@pytest.fixture
def root(tmp_path):
    for domain, odd in (("public", "left:"), ("math", "other:"), ("news", "x")):
        for split, count in (("train", 40), ("validation", 30)):
            documents = [(f"{domain} {split} {i} " + "word " * 50 * (i % 7 + 1) + "\n", f"{domain}:{i}") for i in range(count)]
            documents += [(f"{domain} {split} odd {i}\n", f"{odd}{i}") for i in range(5)]
            write(tmp_path, domain, split, documents)
    return tmp_path


def read(home, name):
    with gzip.open(home / f"{name}.jsonl.gz", "rt") as lines:
        return [json.loads(line) for line in lines]


def test_parts_have_nothing_in_common(root, tmp_path):
    home = epath.Path(tmp_path / "corpus")
    digest = corpora.prepare(SUITE, SIZE, str(root), home)
    for domain in SUITE.domains:
        parts = {part: read(home, f"{domain}/{part}") for part in ("train", "tune", "report", "unseen")}
        texts = {part: {row["text"] for row in found} for part, found in parts.items()}
        assert all(texts.values())
        assert len(set.union(*texts.values())) == sum(map(len, texts.values()))
        odd = SUITE.unseen[domain]
        assert all(row["source"].startswith(odd) for row in parts["unseen"])
        assert not any(row["source"].startswith(odd) for part in ("train", "tune", "report") for row in parts[part])
        for part in ("tune", "report"):
            size = sum(len(row["text"].encode()) for row in parts[part])
            assert size <= SIZE.kilobytes[part] * 1000 or len(parts[part]) == 1
    donated = {row["text"] for row in read(home, "math/donated")}
    assert donated and not donated & {row["text"] for row in read(home, "math/train")}
    assert any(row["source"].startswith("news:") for row in read(home, "public/train")), "a public mix has some of everything"
    assert not any(row["source"].startswith("news:") for row in read(home, "public/report"))
    assert corpora.prepare(SUITE, SIZE, str(root), home) == digest


def test_text_is_cut_where_lines_end_and_nothing_is_lost(root, tmp_path):
    text = "".join(f"line {i} {'x' * (i % 90)}\n" for i in range(1000))
    write(root, "math", "train", [(text, "math:1")])
    home = epath.Path(tmp_path / "corpus")
    corpora.prepare(SUITE, SIZE, str(root), home)
    passages = read(home, "math/train") + read(home, "math/donated")
    assert sorted(line for row in passages for line in row["text"].splitlines()) == sorted(text.splitlines())
    assert all(row["text"].endswith("\n") and len(row["text"]) <= corpora.PASSAGE_CHARACTERS for row in passages)


def test_a_changed_file_changes_the_digest(root, tmp_path):
    home = epath.Path(tmp_path / "corpus")
    before = corpora.prepare(SUITE, SIZE, str(root), home)
    write(root, "math", "train", [("new text\n", "math:1"), ("and more\n", "math:2")])
    assert corpora.prepare(SUITE, SIZE, str(root), home) != before
    assert {row["text"] for row in read(home, "math/train") + read(home, "math/donated")} == {"new text\n", "and more\n"}


@pytest.mark.parametrize(
    ("break_it", "says"),
    [
        (lambda path: path.unlink(), "--suite=installed, which needs none"),
        (lambda path: path.write_bytes(b"not gzip"), "no gzipped JSONL"),
        (lambda path: path.write_bytes(gzip.compress(b'{"text": "a"}\n{"txt": "b"}\n')), ":2 has no text"),
        (lambda path: path.write_bytes(path.read_bytes()[:-10]), "no gzipped JSONL"),
    ],
)
def test_a_file_that_is_missing_or_broken_is_named(root, tmp_path, break_it, says):
    path = root / "mix" / "math" / "train.jsonl.gz"
    break_it(path)
    with pytest.raises(errors.DataError, match=r"math/train\.jsonl\.gz") as caught:
        corpora.prepare(SUITE, SIZE, str(root), epath.Path(tmp_path / "corpus"))
    assert says in str(caught.value)
