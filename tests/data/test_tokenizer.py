import json

import hypothesis
import numpy as np
import pytest
import tokenizers
from hypothesis import strategies as st

from flexjax import errors
from flexjax.data import tokenizer as tokenizer_lib

SPACE = "\u2581"
ODDITIES = [
    "", " ", "  lead and trail  ", "a\n\n    b", "\r\n", "\t\tx", "\x00", "a\x00\x00b", "</s>", "<unk>", "<s>", "<0x0A>",
    SPACE, f"{SPACE} {SPACE}{SPACE}a b{SPACE}", "e\u0301 \u00e9 \ufb01", "\ufeff\u200b", "\ufffd", "a\ufffd", "\u2028\x85",
    "\U0001f600\u6f22", "\U0010ffff\ue000", "<|endoftext|>", "  \n  \n", " " * 100,
]  # fmt: skip


@pytest.fixture(scope="module")
def byte_level(tmp_path_factory):
    """A `tokenizer.json` like OLMo's: byte-level BPE with special tokens, truncation and padding set."""
    path = tmp_path_factory.mktemp("hf") / "tokenizer.json"
    byte_level_bpe().save(str(path))
    return tokenizer_lib.load(path)


def byte_level_bpe(eos="<|endoftext|>"):
    model = tokenizers.Tokenizer(tokenizers.models.BPE())
    model.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    model.decoder = tokenizers.decoders.ByteLevel()
    trainer = tokenizers.trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=["<|pad|>", eos],
        initial_alphabet=tokenizers.pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    model.train_from_iterator(["the cat sat on the mat, didn't it? 'tis so"] * 3, trainer)
    model.enable_truncation(5)
    model.enable_padding(length=7)
    return model


@pytest.mark.parametrize("kind", ["tokenizer", "byte_level"])
def test_lossless(kind, request):
    model = request.getfixturevalue(kind)

    @hypothesis.settings(max_examples=400, deadline=None, derandomize=True)
    @hypothesis.given(st.text() | st.text("\u2581 \n\t\r\x00<>/s0xA") | st.sampled_from(ODDITIES))
    def check(text):
        ids = model.encode(text)
        assert ids.dtype == np.int32 and ids.ndim == 1
        assert model.eos_id not in ids
        assert all(0 <= i < model.vocab_size for i in ids)
        assert model.decode(ids) == text
        assert "".join(model.stream(ids)) == text

    check()
    for text in ODDITIES:
        assert model.decode(model.encode(text)) == text, repr(text)
    batch = model.encode_batch(ODDITIES)
    assert [ids.tolist() for ids in batch] == [model.encode(text).tolist() for text in ODDITIES]


@pytest.mark.parametrize("kind", ["tokenizer", "byte_level"])
def test_decoding_any_ids_never_crashes(kind, request):
    model = request.getfixturevalue(kind)

    @hypothesis.settings(max_examples=200, deadline=None, derandomize=True)
    @hypothesis.given(st.lists(st.integers(0, model.vocab_size + 20)))
    def check(ids):
        assert "".join(model.stream(ids)) == model.decode(ids)
        model.decode(ids).encode("utf-8")

    check()


@pytest.mark.parametrize("kind", ["tokenizer", "byte_level"])
def test_streaming_shows_no_half_characters(kind, request):
    model = request.getfixturevalue(kind)
    pieces = list(model.stream(model.encode("h\u00e9llo \u6f22 \U0001f600 x")))
    assert len(pieces) > 5 and not any("\ufffd" in piece for piece in pieces)
    cut = list(model.stream(model.encode("\U0001f600")[:2]))
    assert cut and set("".join(cut)) == {"\ufffd"}


def test_eos_is_left_out_of_decoded_text(tokenizer, byte_level):
    for model in (tokenizer, byte_level):
        ids = [model.eos_id, *model.encode("a b"), model.eos_id, *model.encode(" c")]
        assert model.decode(ids) == "a b c"


def test_long_texts_are_encoded_in_parts(tokenizer, monkeypatch):
    text = "\n".join("x " * (i % 30) + f"line{i}\u6f22" for i in range(300)) + "y" * 500
    whole = tokenizer.encode(text)
    monkeypatch.setattr(tokenizer_lib, "_PART_CHARACTERS", 120)
    parts = tokenizer.encode(text)
    assert tokenizer.decode(parts) == text
    without_tail = tokenizer.encode(text[: text.rindex("\n") + 1])
    assert parts[: len(without_tail)].tolist() == whole[: len(without_tail)].tolist()  # cuts after newlines change nothing


def test_training_is_deterministic_and_saves(tokenizer, tmp_path):
    texts = ["if x:\n    return  [1234]\n\tpass\n", "for y in range(7):\n        x += y\n"] * 40
    first = tokenizer_lib.train(iter(texts), 330, tmp_path / "a")
    second = tokenizer_lib.train(texts, 330, tmp_path / "b" / "own.model")
    assert first.digest == second.digest != tokenizer.digest
    assert first.vocab_size <= 330
    for piece in ("\n", "\t", "    ", "        "):
        assert len(first.encode(piece)) == 1, piece
    assert len(first.encode("1234")) == 4
    assert tokenizer_lib.load(tmp_path / "a").digest == tokenizer_lib.load(tmp_path / "b" / "own.model").digest == first.digest


def test_a_directory_stands_for_the_file_in_it(byte_level, tmp_path):
    byte_level_bpe().save(str(tmp_path / "tokenizer.json"))
    assert tokenizer_lib.model_file(tmp_path) == tokenizer_lib.model_file(tmp_path / "tokenizer.json")
    assert tokenizer_lib.load(tmp_path).digest == byte_level.digest


@pytest.mark.parametrize("texts, size", [([], 300), (["abc"], 100), (["\x00", SPACE], 300)])
def test_training_refuses_what_cannot_be(texts, size, tmp_path):
    with pytest.raises(errors.ConfigError, match=f"no tokenizer of {size} pieces"):
        tokenizer_lib.train(texts, size, tmp_path)
    assert not (tmp_path / "tokenizer.model").exists()


def test_load_refuses(tokenizer, tmp_path):
    def refused(error, match, path):
        with pytest.raises(error, match=match) as caught:
            tokenizer_lib.load(path)
        assert "\n" not in str(caught.value) and str(tmp_path) in str(caught.value)

    refused(errors.ConfigError, "no such tokenizer", tmp_path / "none.model")
    refused(errors.ConfigError, "found 0", tmp_path)
    refused(errors.ConfigError, "is a .model or .json file", tmp_path / "x.txt")
    (tmp_path / "broken.model").write_bytes(b"nonsense")
    refused(errors.IntegrityError, "broken tokenizer file", tmp_path / "broken.model")
    (tmp_path / "empty.model").write_bytes(b"")
    refused(errors.IntegrityError, "broken tokenizer file", tmp_path / "empty.model")
    (tmp_path / "broken.json").write_text('{"a": 1')
    refused(errors.IntegrityError, "broken tokenizer file", tmp_path / "broken.json")
    byte_level_bpe("<end>").save(str(tmp_path / "eos.json"))
    refused(errors.ConfigError, "no end-of-text token", tmp_path / "eos.json")
    lower = byte_level_bpe()
    lower.normalizer = tokenizers.normalizers.NFKC()
    lower.save(str(tmp_path / "nfkc.json"))
    refused(errors.ConfigError, "does not give back its text", tmp_path / "nfkc.json")
    byte_level_bpe().save(str(tmp_path / "special.json"))
    special = json.loads((tmp_path / "special.json").read_text())
    special["added_tokens"][1]["special"] = False  # then the text "<|endoftext|>" would end a document
    (tmp_path / "special.json").write_text(json.dumps(special))
    refused(errors.ConfigError, "does not give back its text", tmp_path / "special.json")
    tokenizer_lib.train(["some text"] * 9, 300, tmp_path / "two")
    byte_level_bpe().save(str(tmp_path / "two" / "tokenizer.json"))
    refused(errors.ConfigError, "found 2", tmp_path / "two")
