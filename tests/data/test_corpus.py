import gzip
import json
import os
import tracemalloc

import numpy as np
import pytest

from flexjax import errors
from flexjax.data import corpus

SECRET = "Zanzibar"  # stands in every bad line and must stand in no message
GOOD = json.dumps({"text": "good"}).encode()


def read(path, **kwargs):
    return list(corpus.documents([path], **kwargs))


def write(path, *lines):
    content = b"\n".join(lines) + b"\n"
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path


BAD_LINES = {
    "broken_json": (b'{"text": "' + SECRET.encode(), "broken JSON at column"),
    "two_values": (b'{"text": "a"} {"text": "' + SECRET.encode() + b'"}', "broken JSON at column"),
    "not_an_object": (json.dumps([SECRET]).encode(), "expected a JSON object, got list"),
    "missing_field": (json.dumps({"body": SECRET}).encode(), "no field 'text'"),
    "not_a_string": (json.dumps({"text": [SECRET]}).encode(), "must be a string, got list"),
    "null": (b'{"text": null}', "must be a string, got NoneType"),
    "invalid_utf8": (b'{"text": "' + SECRET.encode() + b'\xff"}', "invalid UTF-8 at byte 18"),
    "utf16": (json.dumps({"text": SECRET}).encode("utf-16"), "invalid UTF-8 at byte 0"),
    "byte_order_mark": (b"\xef\xbb\xbf" + GOOD, "broken JSON at column 1"),
    "empty_document": (b'{"text": ""}', "empty document"),
    "blank_line": (b"  ", "blank line"),
    "lone_surrogate": (b'{"text": "' + SECRET.encode() + b'\\ud800"}', "lone surrogate at character 8"),
    "duplicate_key": (b'{"text": "a", "text": "' + SECRET.encode() + b'"}', "a key occurs twice"),
    "deep": (b"[" * 100_000 + b"]" * 100_000, "beyond all measure"),
    "huge_number": (b'{"n": ' + b"9" * 5000 + b"}", "beyond all measure"),
    "too_long": (json.dumps({"text": SECRET * 200_000}).encode(), "longer than data.max_document_mb (1 MB)"),
}


@pytest.mark.parametrize("suffix", [".jsonl", ".jsonl.gz"])
@pytest.mark.parametrize("kind", BAD_LINES)
def test_strict_refuses_a_bad_line_by_file_and_line(kind, suffix, tmp_path):
    line, reason = BAD_LINES[kind]
    path = write(tmp_path / f"bad{suffix}", GOOD, GOOD, line, GOOD)
    with pytest.raises(errors.DataError) as caught:
        read(path, max_document_mb=1)
    message = str(caught.value)
    assert message.startswith(f"{path}:3: ") and reason in message
    assert SECRET not in message and "\n" not in message
    assert caught.value.exit_code == 3


@pytest.mark.parametrize("kind", BAD_LINES)
def test_quarantine_counts_and_lists_without_text(kind, tmp_path):
    line, reason = BAD_LINES[kind]
    path = write(tmp_path / "bad.jsonl", *[GOOD] * 1500, line, GOOD)
    report = corpus.Report()
    found = read(path, max_document_mb=1, bad_documents="quarantine", report=report)
    assert len(found) == report.documents == 1501
    assert found[-1].id == "bad.jsonl:1502"
    (bad,) = report.bad
    assert bad.startswith("bad.jsonl:1501: ") and reason in bad and SECRET not in bad


def test_quarantine_aborts_above_one_per_mille(tmp_path):
    bad = BAD_LINES["broken_json"][0]
    assert len(read(write(tmp_path / "a.jsonl", bad, *[GOOD] * 999), bad_documents="quarantine")) == 999
    path = write(tmp_path / "b.jsonl", bad, bad, *[GOOD] * 1900)
    with pytest.raises(errors.DataError, match=r"2 of 1902 documents are bad.*b\.jsonl:1: broken JSON") as caught:
        read(path, bad_documents="quarantine")
    assert SECRET not in str(caught.value)


def test_quarantine_gives_up_early_on_a_hopeless_file(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_HOPELESS", 3)
    path = write(tmp_path / "a.jsonl", *[b"["] * 4, b"\xff")
    with pytest.raises(errors.DataError, match="4 of 4 documents are bad"):
        read(path, bad_documents="quarantine")


def test_unknown_treatment_is_a_config_error(tmp_path):
    with pytest.raises(errors.ConfigError, match=r"bad_documents is 'skip'"):
        read(write(tmp_path / "a.jsonl", GOOD), bad_documents="skip")


@pytest.mark.parametrize("bad_documents", ["strict", "quarantine"])
def test_damaged_files_are_always_refused(bad_documents, tmp_path):
    whole = gzip.compress(b"".join(b'{"text": "%d %s"}\n' % (i, os.urandom(20).hex().encode()) for i in range(5000)), mtime=0)
    flipped = bytearray(whole)
    flipped[len(whole) // 2] ^= 0xFF
    crc = bytearray(whole)
    crc[-6] ^= 0xFF
    for name, content in {
        "cut": whole[: len(whole) // 2],
        "cut_trailer": whole[:-3],
        "cut_header": whole[:5],
        "flipped": bytes(flipped),
        "crc": bytes(crc),
        "no_gzip": b'{"text": "plain"}\n',
        "empty": b"",
        "empty_inside": gzip.compress(b""),
    }.items():
        path = tmp_path / f"{name}.jsonl.gz"
        path.write_bytes(content)
        with pytest.raises(errors.DataError) as caught:
            read(path, bad_documents=bad_documents)
        message = str(caught.value)
        assert message.startswith(f"{path}:"), message
        if not (name == "flipped" and bad_documents == "strict"):  # the line that it breaks may come before the checksum
            assert ("the file is empty" if name.startswith("empty") else "cut or corrupt") in message, message


def test_the_line_of_a_cut_stream_is_named(tmp_path):
    lines = [json.dumps({"text": os.urandom(500).hex()}).encode() for _ in range(400)]
    path = write(tmp_path / "a.jsonl.gz", *lines)
    path.write_bytes(path.read_bytes()[:-4])
    with pytest.raises(errors.DataError, match=r"a\.jsonl\.gz:401: the gzip stream is cut"):
        read(path)


def test_a_vanished_file(tmp_path):
    first, second = write(tmp_path / "a.jsonl", GOOD), write(tmp_path / "b.jsonl", GOOD)
    reader = corpus.documents([first, second])
    assert next(reader).id == "a.jsonl:1"
    second.unlink()
    with pytest.raises(errors.DataError, match=r"b\.jsonl:1: cannot be read \(No such file"):
        next(reader)


def test_legal_oddities_are_kept(tmp_path):
    texts = ["\x00", "a\x00b", "  ", "\n", "\u2028\u2029\x85", "\ufffd", "\U0001f600", "\ufeff"]
    lines = [json.dumps({"text": text, "n": 1}, ensure_ascii=i % 2 == 0).encode() for i, text in enumerate(texts)]
    path = tmp_path / "odd.jsonl.gz"
    path.write_bytes(gzip.compress(b"\r\n".join(lines)))  # and no newline at the end
    found = read(path)
    assert [document.text for document in found] == texts
    assert [document.num_bytes for document in found] == [len(text.encode()) for text in texts]


def test_a_giant_line_is_refused_in_little_memory(tmp_path):
    path = tmp_path / "giant.jsonl.gz"
    with gzip.open(path, "wb", compresslevel=1) as file:
        file.write(GOOD + b'\n{"text": "')
        for _ in range(100):
            file.write(b"x" * 1_000_000)
        file.write(b'"}\n' + GOOD + b"\n")
    tracemalloc.start()
    with pytest.raises(errors.DataError, match=r":2: longer than"):
        read(path, max_document_mb=2)
    report = corpus.Report()
    with pytest.raises(errors.DataError, match="1 of 3 documents"):
        read(path, max_document_mb=2, bad_documents="quarantine", report=report)
    assert tracemalloc.get_traced_memory()[1] < 20e6
    tracemalloc.stop()
    assert report.documents == 2


def test_expand(tmp_path):
    for name in ("math/train.jsonl.gz", "math/b.jsonl", "code/train.jsonl.gz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        write(tmp_path / name, GOOD)
    root = str(tmp_path)
    assert [p.name for p in corpus.expand("{root}/{domain}/train.jsonl.gz", root, "math")] == ["train.jsonl.gz"]
    assert [p.name for p in corpus.expand("{root}/{domain}/*", root + "/", "math")] == ["b.jsonl", "train.jsonl.gz"]
    both = corpus.expand("{root}/math/*.jsonl, {root}/*/train.jsonl.gz,{root}/math/b.jsonl", root, "any")
    assert [str(p.relative_to(tmp_path)) for p in both] == ["code/train.jsonl.gz", "math/b.jsonl", "math/train.jsonl.gz"]


def test_expand_refuses(tmp_path):
    with pytest.raises(errors.DataError, match=r"/news/train\.jsonl\.gz: no file matches \(domain 'news'\); check data\.root"):
        corpus.expand("{root}/{domain}/train.jsonl.gz", str(tmp_path), "news")
    with pytest.raises(errors.DataError, match="no file matches"):
        corpus.expand(str(tmp_path), "", "news")  # a directory
    with pytest.raises(errors.ConfigError, match=r"needs a root directory; set data\.root"):
        corpus.expand("{root}/a.jsonl", "", "news")
    with pytest.raises(errors.ConfigError, match="empty part"):
        corpus.expand("", "", "news")


@pytest.mark.parametrize("dtype", ["uint16", "uint32"])
def test_token_arrays_with_and_without_header(dtype, tmp_path):
    ids = np.arange(50, dtype=dtype)
    ids.tofile(tmp_path / "raw.npy")
    ids.tofile(tmp_path / "raw.bin")
    np.save(tmp_path / "real.npy", ids)
    for name in ("raw.npy", "raw.bin", "real.npy"):
        found = corpus.token_array(tmp_path / name, token_dtype=dtype, vocab_size=50)
        assert isinstance(found, np.memmap)
        np.testing.assert_array_equal(found, ids)


def test_token_arrays_refused(tmp_path, monkeypatch):
    monkeypatch.setattr(corpus, "_CHECKED_TOKENS", 8)
    ids = np.arange(50, dtype=np.uint16)
    np.save(tmp_path / "int64.npy", ids.astype(np.int64))
    np.save(tmp_path / "big.npy", ids.astype(">u2"))
    np.save(tmp_path / "square.npy", ids.reshape(5, 10))
    np.save(tmp_path / "objects.npy", np.array([{}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "whole.npy", ids)
    (tmp_path / "cut.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:-6])
    (tmp_path / "header.npy").write_bytes((tmp_path / "whole.npy").read_bytes()[:30])
    (tmp_path / "odd.bin").write_bytes(b"abc")
    (tmp_path / "empty.bin").write_bytes(b"")
    ids.tofile(tmp_path / "vocabulary.bin")
    for name, reason in {
        "int64.npy": "expected a flat uint16 array, got int64",
        "big.npy": "expected a flat uint16 array, got >u2",
        "square.npy": r"got uint16 \[5, 10\]",
        "objects.npy": "got object",
        "cut.npy": r"declares 50 tokens, \+6 bytes are missing",
        "header.npy": r"broken \.npy header",
        "odd.bin": "3 bytes are no whole number",
        "empty.bin": "no tokens",
        "vocabulary.bin": "token 40 has id 40, the vocabulary has 40",
        "missing.bin": "No such file",
    }.items():
        with pytest.raises(errors.DataError, match=reason) as caught:
            corpus.token_array(tmp_path / name, token_dtype="uint16", vocab_size=40)
        assert str(caught.value).startswith(str(tmp_path / name))
    with pytest.raises(errors.ConfigError, match="token_dtype"):
        corpus.token_array(tmp_path / "whole.npy", token_dtype="int32", vocab_size=40)
