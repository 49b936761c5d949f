"""What a job is told of its corpora, and which files it takes."""

import dataclasses

import pytest
from corpora import VOCAB, texts, write_jsonl

from flexjax import config, errors
from flexjax.data import sources
from flexjax.data import tokenizer as tokenizer_lib

SECRET = "unspeakable"


def job(root, **data):
    settings = dataclasses.replace(config.DataConfig(), root=str(root), **data)
    model = dataclasses.replace(config.ModelConfig(), vocab_size=VOCAB)
    return config.Config(model=model, data=settings, evaluation=config.EvaluationConfig(domains=()))


@pytest.fixture
def root(tmp_path):
    write_jsonl(tmp_path / "root" / "public" / "train.jsonl.gz", texts(200))
    return tmp_path / "root"


def test_a_tokenizer_directory_is_resolved_to_its_file(root, tmp_path):
    made = tokenizer_lib.train(texts(200), VOCAB, tmp_path / "given")
    corpora = sources.Corpora(job(root, tokenizer=str(tmp_path / "given")), tmp_path / "job", None, print)
    assert str(corpora.tokenizer_file) == str(tmp_path / "given" / tokenizer_lib.SENTENCEPIECE_FILE)
    assert corpora.tokenizer.digest == made.digest
    with pytest.raises(errors.ConfigError, match="found 0"):
        sources.Corpora(job(root, tokenizer=str(tmp_path)), tmp_path / "job", None, print)


def test_documents_left_out_are_told_by_place_and_never_by_text(root, tmp_path):
    bad = [f"{SECRET} \ud800"] * 7
    write_jsonl(root / "math" / "train.jsonl.gz", [*texts(7200), *bad])
    said = []
    corpora = sources.Corpora(job(root, bad_documents="quarantine"), tmp_path / "job", None, said.append)
    for _ in range(2):  # tokenised, then from the cache
        said.clear()
        assert len(corpora.source("math").bad_documents) == 7
        assert len(said) == 1 and said[0].startswith("math: 7 documents left out of train: first train.jsonl.gz:7201: lone")
        assert "train.jsonl.gz:7205" in said[0] and "train.jsonl.gz:7206" not in said[0] and SECRET not in said[0]
    said.clear()
    assert not corpora.source("public").bad_documents and not said


def test_tokenising_says_how_far_it_is(root, tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PROGRESS_SECONDS", 0.0)
    said = []
    corpora = sources.Corpora(job(root), tmp_path / "job", None, said.append)
    said.clear()
    corpora.source("public")
    assert said == ["public: 200 documents of train tokenised, 0 MB of text"]
