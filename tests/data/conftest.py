"""A tokenizer trained on a small text, and token sources made of such texts."""

import pytest
from corpora import VOCAB, texts, write_jsonl

from flexjax import config
from flexjax.data import tokenizer as tokenizer_lib
from flexjax.data import tokens


@pytest.fixture(scope="session")
def tokenizer(tmp_path_factory):
    return tokenizer_lib.train(texts(200), VOCAB, tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def make_source(tokenizer, tmp_path_factory):
    def make(documents):
        directory = tmp_path_factory.mktemp("source")
        path = write_jsonl(directory / "train.jsonl.gz", documents)
        return tokens.tokenize([path], tokenizer, config.DataConfig(), VOCAB, directory / "cache")

    return make
