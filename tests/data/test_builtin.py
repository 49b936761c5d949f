import ast
import collections
import gzip
import json

import pytest

from flexjax.data import builtin


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    root = tmp_path_factory.mktemp("builtin")
    builtin.build(root)
    return root


def read(root):
    return {
        (domain, split): [json.loads(line) for line in gzip.open(root / domain / f"{split}.jsonl.gz")]
        for domain in builtin.DOMAINS
        for split in builtin.SPLITS
    }


def test_documents(corpus):
    rows = read(corpus)
    texts, sources = collections.Counter(), collections.defaultdict(set)
    for (domain, split), documents in rows.items():
        assert all(set(row) == {"text", "source", "license"} for row in documents)
        assert all(row["text"].strip() for row in documents)
        assert {row["license"] for row in documents} <= {"PSF-2.0", "BSD-3-Clause", "Apache-2.0"}
        texts.update(row["text"] for row in documents)
        sources[domain, split] = {row["source"] for row in documents}
        size = sum(len(row["text"]) for row in documents)
        # an expert's domain row needs at least 1000 documents
        assert (len(documents) >= 1000 and size > 2e6) if split == "train" else size > 1e5, (domain, split)
    assert max(texts.values()) == 1
    for domain in builtin.DOMAINS:
        assert not sources[domain, "train"] & sources[domain, "validation"]


def test_building_again_changes_nothing_and_mends_damage(corpus, monkeypatch):
    before = {path: (path.read_bytes(), path.stat().st_mtime_ns) for path in corpus.rglob("*") if path.is_file()}
    assert len(before) == 7
    builtin.build(corpus)
    assert all((path.read_bytes(), path.stat().st_mtime_ns) == old for path, old in before.items())

    built = []
    monkeypatch.setattr(builtin, "_documents", lambda: built.append(1) or iter([("math", ("text", "module", "MIT"))]))
    (corpus / "math" / "train.jsonl.gz").write_bytes(b"cut")
    builtin.build(corpus)
    assert built == [1]
    builtin.build(corpus)
    assert built == [1]
    (corpus / "builtin.json").unlink()
    builtin.build(corpus)
    assert built == [1, 1]
    for path, (content, _) in before.items():
        path.write_bytes(content)


def test_code_keeps_behaviour_and_loses_words():
    assert not list(builtin._code(ast.parse("short = 1")))
    tree = ast.parse('"""Module."""\n# comment\ndef f():\n    """Doc."""\n' + "\n".join(f"x{i} = 'kept'" for i in range(100)))
    (text,) = builtin._code(tree)
    assert "Doc" not in text and "Module" not in text and "comment" not in text
    assert text.startswith("def f():\n    pass\nx0 = 'kept'\n")


@pytest.mark.slow
def test_the_same_sources_give_the_same_bytes(corpus, tmp_path):
    builtin.build(tmp_path)
    for path in corpus.rglob("*.gz"):
        assert (tmp_path / path.relative_to(corpus)).read_bytes() == path.read_bytes()
