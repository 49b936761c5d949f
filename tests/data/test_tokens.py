import dataclasses
import gzip
import hashlib
import os
import pathlib
import signal
import subprocess
import sys
import time
import tracemalloc

import numpy as np
import pytest
from corpora import VOCAB, texts, write_jsonl

from flexjax import config, errors
from flexjax.data import tokenizer as tokenizer_lib
from flexjax.data import tokens

DATA = config.DataConfig()


def tokenize(path, tokenizer, cache, data=DATA, **kwargs):
    return tokens.tokenize([path], tokenizer, data, VOCAB, cache, **kwargs)


def test_stream_of_texts(tokenizer, tmp_path):
    documents = texts(30)
    path = write_jsonl(tmp_path / "a.jsonl.gz", documents)
    source = tokenize(path, tokenizer, tmp_path / "cache")
    expected = [tokenizer.eos_id]
    for text in documents:
        expected += [*tokenizer.encode(text), tokenizer.eos_id]
    assert source.read(0, source.num_tokens).tolist() == expected
    assert source.num_documents == 30
    for i, text in enumerate(documents):
        assert tokenizer.decode(source.document(i)) == text
        assert source.document_bytes(i) == len(text.encode())
    assert source.read(3, 9).tolist() == expected[3:9]
    assert source.read(len(expected) - 2, len(expected) + 5).tolist() == expected[-2:]
    assert source.read(5, 5).dtype == np.int32


def test_cache_is_reused_when_intact_and_made_again_when_not(tokenizer, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", texts(20))
    seen = []
    first = tokenize(path, tokenizer, tmp_path / "cache", progress=lambda *counts: seen.append(counts))
    assert seen[-1] == (20, sum(len(text.encode()) for text in texts(20)))
    directory = tmp_path / "cache" / first.digest
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [first.digest]

    def again():
        made = []
        source = tokenize(path, tokenizer, tmp_path / "cache", progress=lambda *counts: made.append(counts))
        assert source.digest == first.digest
        assert source.read(0, source.num_tokens).tolist() == content
        assert [p.name for p in (tmp_path / "cache").iterdir()] == [first.digest]
        return bool(made)

    content = first.read(0, first.num_tokens).tolist()
    assert not again()
    for damage in ("flip", "cut", "delete", "meta", "empty"):
        for name in ("tokens.bin", "bytes.npy", "meta.json"):
            file = directory / name
            raw = bytearray(file.read_bytes())
            if damage == "flip" and name != "meta.json":
                raw[len(raw) // 2] ^= 1
            elif damage == "cut":
                raw = raw[:-2]
            elif damage == "meta" and name == "meta.json":
                raw = bytearray(b"[]")
            elif damage == "empty":
                raw = bytearray()
            elif damage != "delete":
                continue
            file.unlink() if damage == "delete" else file.write_bytes(raw)
            assert again(), (damage, name)
            assert not again()


def test_digest_follows_the_content_not_the_place(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", texts(20))
    cache = tmp_path / "cache"
    digest = tokenize(path, tokenizer, cache).digest
    assert tokenize(write_jsonl(tmp_path / "other" / "b.jsonl", texts(20)), tokenizer, cache).digest == digest
    other = tokenizer_lib.train(texts(200), VOCAB - 80, tmp_path / "other")
    quarantine = dataclasses.replace(DATA, bad_documents="quarantine")
    changed = [
        tokenize(write_jsonl(tmp_path / "c.jsonl", texts(20, start=1)), tokenizer, cache).digest,
        tokenize(write_jsonl(tmp_path / "a2.jsonl.gz", texts(20)), tokenizer, cache).digest,
        tokenize(path, other, cache).digest,
        tokenize(path, tokenizer, cache, quarantine).digest,
        tokenize(path, tokenizer, cache, dataclasses.replace(quarantine, max_document_mb=1)).digest,
    ]
    assert len({digest, *changed}) == 6


def test_quarantine_is_remembered(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", ["x"] * 700 + [""] + ["x"] * 700)
    data = dataclasses.replace(DATA, bad_documents="quarantine")
    for _ in range(2):
        source = tokenize(path, tokenizer, tmp_path / "cache", data)
        assert source.bad_documents == ("a.jsonl:701: empty document",)
        assert source.num_documents == 1400
    with pytest.raises(errors.DataError, match=r"a\.jsonl:701: empty document"):
        tokenize(path, tokenizer, tmp_path / "cache")


def test_a_failed_tokenisation_leaves_nothing(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl.gz", texts(500))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(errors.DataError):
        tokenize(path, tokenizer, tmp_path / "cache")
    assert not list((tmp_path / "cache").iterdir())


def test_a_file_that_changes_is_refused(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", texts(20))
    with pytest.raises(errors.DataError, match="changed while it was read"):
        tokenize(path, tokenizer, tmp_path / "cache", progress=lambda *_: write_jsonl(path, texts(21)) and None)


def test_refused_settings(tokenizer, tmp_path):
    text = write_jsonl(tmp_path / "a.jsonl", texts(2))
    np.arange(5, dtype=np.uint16).tofile(tmp_path / "a.bin")
    with pytest.raises(errors.ConfigError, match="2 kinds of files"):
        tokens.tokenize([text, tmp_path / "a.bin"], tokenizer, DATA, VOCAB, tmp_path / "cache")
    with pytest.raises(errors.ConfigError, match=r"a\.txt: unknown kind of file"):
        tokenize(tmp_path / "a.txt", tokenizer, tmp_path / "cache")
    with pytest.raises(errors.ConfigError, match=r"raise model\.vocab_size"):
        tokens.tokenize([text], tokenizer, DATA, 100, tmp_path / "cache")
    with pytest.raises(errors.ConfigError, match=r"set data\.cache_dir to a local directory"):
        tokenize(text, tokenizer, "gs://bucket/cache")
    with pytest.raises(errors.DataError, match=r"missing\.jsonl: cannot be read"):
        tokenize(tmp_path / "missing.jsonl", tokenizer, tmp_path / "cache")
    (tmp_path / "file").write_text("")
    with pytest.raises(errors.StorageError, match="token cache cannot be written"):
        tokenize(text, tokenizer, tmp_path / "file")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_token_files_are_used_in_place(dtype, tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_CHUNK_TOKENS", 16)
    documents = texts(9)
    ids = [[*tokenizer.encode(text), tokenizer.eos_id] for text in documents]
    stream = [i for own in ids for i in own]
    first, second = len([i for own in ids[:4] for i in own]), len([i for own in ids[:6] for i in own])
    np.array(stream[:first], dtype).tofile(tmp_path / "a.npy")
    np.save(tmp_path / "b.npy", np.array(stream[first:second], dtype))
    np.array(stream[second:-1], dtype).tofile(tmp_path / "c.bin")  # no EOS at the end
    paths = [tmp_path / name for name in ("a.npy", "b.npy", "c.bin")]
    data = dataclasses.replace(DATA, token_dtype=dtype)
    source = tokens.tokenize(paths, tokenizer, data, VOCAB, tmp_path / "cache")
    assert source.read(0, 10**6).tolist() == stream[:-1]
    assert source.read(first - 3, second + 3).tolist() == stream[first - 3 : second + 3]
    assert [tokenizer.decode(source.document(i)) for i in range(source.num_documents)] == documents
    assert [source.document_bytes(i) for i in range(9)] == [len(text.encode()) for text in documents]
    assert not (tmp_path / "cache").exists()
    other = tokens.tokenize(paths[:2], tokenizer, data, VOCAB, tmp_path / "cache")
    assert other.digest != source.digest


def test_files_of_an_object_store_are_copied_once(tokenizer, tmp_path, monkeypatch):
    ids = np.arange(3, 60, dtype=np.uint16)
    ids.tofile(tmp_path / "a.npy")
    monkeypatch.setattr(tokens.workdir, "is_local", lambda path: path.name != "a.npy")
    for _ in range(2):
        source = tokenize(tmp_path / "a.npy", tokenizer, tmp_path / "cache")
        assert source.read(0, 100).tolist() == ids.tolist()
    copy = tmp_path / "cache" / hashlib.sha256(ids.tobytes()).hexdigest() / "a.npy"
    inode = copy.stat().st_ino
    copy.write_bytes(b"xx")
    assert tokenize(tmp_path / "a.npy", tokenizer, tmp_path / "cache").num_tokens == 57
    assert copy.stat().st_ino != inode


def test_runs_at_every_chunk_size(monkeypatch):
    for stream in ([1, 5, 6, 1, 7, 1], [5, 6, 1, 1, 1, 7], [1], [1, 1], [5], [5, 1]):
        expected = []
        for i, token in enumerate(stream):
            if token != 1:
                if i and stream[i - 1] != 1:
                    expected[-1][1] = i + 1
                else:
                    expected.append([i, i + 1])
        for size in range(1, 8):
            monkeypatch.setattr(tokens, "_CHUNK_TOKENS", size)
            bounds = [run for chunk in tokens._runs(np.array(stream, np.uint16), 1) for run in chunk.tolist()]
            assert bounds == expected, (stream, size)


def test_memory_is_bounded(tokenizer, tmp_path, monkeypatch):
    monkeypatch.setattr(tokens, "_BATCH_BYTES", 50_000)
    path = tmp_path / "big.jsonl.gz"
    line = b'{"text": "' + b"word " * 2000 + b'"}\n'
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(line * 500)
    tracemalloc.start()
    source = tokenize(path, tokenizer, tmp_path / "cache")
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(source.document_bytes(i) for i in range(500)) == 500 * 10_000
    assert peak < 13e6  # of which three chunks of 4 MiB that hash files; the whole text with its ids would be some 40 MB more


def test_two_writers_of_the_same_cache(tokenizer, tmp_path, monkeypatch):
    path = write_jsonl(tmp_path / "a.jsonl", texts(50))
    winners = []

    def other(*_):  # another process begins later and is done first
        with monkeypatch.context() as patch:
            patch.setattr(os, "getpid", os.getppid)
            assert tokenize(path, tokenizer, tmp_path / "cache").num_documents == 50
        winners.append(next((tmp_path / "cache").glob("[!.]*")).stat().st_ino)

    source = tokenize(path, tokenizer, tmp_path / "cache", progress=other)
    assert source.num_documents == 50
    (directory,) = (tmp_path / "cache").iterdir()
    assert directory.stat().st_ino == winners[0]


def test_kill_while_tokenising(tokenizer, tmp_path):
    path = write_jsonl(tmp_path / "a.jsonl", texts(3000))
    tokenizer_lib.train(texts(200), VOCAB, tmp_path)
    program = f"""
import time
from flexjax import config
from flexjax.data import tokenizer, tokens
def progress(*_):
    print("writing", flush=True)
    time.sleep(60)
tokens.tokenize([{str(path)!r}], tokenizer.load({str(tmp_path)!r}), config.DataConfig(), {VOCAB},
                {str(tmp_path / "cache")!r}, progress)
"""
    root = pathlib.Path(tokens.__file__).parents[2]
    child = subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, env={**os.environ, "PYTHONPATH": str(root)}
    )
    assert child.stdout.readline() == b"writing\n"
    assert [p.name[:5] for p in (tmp_path / "cache").iterdir()] == [".tmp-"]
    child.send_signal(signal.SIGKILL)
    child.wait()
    child.stdout.close()
    start = time.time()
    source = tokenize(path, tokenizer, tmp_path / "cache")
    assert source.num_documents == 3000 and time.time() - start < 10
    assert [p.name for p in (tmp_path / "cache").iterdir()] == [source.digest]
