"""Tokenizers that lose nothing: `decode(encode(text)) == text` for every string that UTF-8 can write.

Two kinds of files: a SentencePiece model (`tokenizer.model`, which `train` makes) and Hugging Face's `tokenizer.json`. One that
normalises text, adds or drops spaces is refused when loaded, since bits per byte would then measure another text.
"""

import abc
import hashlib
import io
import itertools
import re
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import sentencepiece
import tokenizers
from etils import epath

from flexjax import errors, storage, workdir

SENTENCEPIECE_FILE = "tokenizer.model"
MAX_BYTES = 2**28
HUGGING_FACE_FILE = "tokenizer.json"

_THREADS = 2
_SPACE = "\u2581"  # SentencePiece writes a space as this character
_REPLACEMENT = "\ufffd".encode()
_PART_CHARACTERS = 1_000_000  # encoded at a time: the encoders need some hundred bytes of memory per character
_LINE_CHARACTERS = 4_000  # of text for training at a time
_TRAINING_CHARACTERS = 20_000_000
_EOS_NAMES = ("<|endoftext|>", "</s>", "<|end_of_text|>", "<eos>", "<|im_end|>", "<|eot_id|>")
_PROBES = (
    "  two  spaces \n\n\tdef f(x):\r\n        return x\n",
    f" {_SPACE}a{_SPACE}{_SPACE} \x00 </s> <0x0A> <unk> n 't e\u0301 \u00e9 \ufb01 \u2075 \u6f22 \U0001f600 \u200b\ufeff .",
)


class Tokenizer(abc.ABC):
    """Text to ids and back.

    Attributes:
      eos_id: the id that stands before and after every document; no text is encoded to it.
      vocab_size: one more than the largest id.
      digest: SHA-256 of the model file, hexadecimal.
    """

    eos_id: int
    vocab_size: int
    digest: str

    def __init__(self, content: bytes):
        self.digest = hashlib.sha256(content).hexdigest()

    @abc.abstractmethod
    def _encode_parts(self, parts: list[str]) -> list[list[int]]:
        """Ids of each part."""

    @abc.abstractmethod
    def _decode_ids(self, ids: list[int]) -> str:
        """Text of ids without EOS; cut UTF-8 sequences become U+FFFD."""

    def encode(self, text: str) -> np.ndarray:
        """Returns the ids, int32 `[tokens]`, without EOS."""
        return self.encode_batch([text])[0]

    def encode_batch(self, texts: Sequence[str]) -> list[np.ndarray]:
        """Returns the ids of many texts, int32 `[tokens]` each; faster than one by one.

        A text above a million characters is encoded in parts that end after a newline where there is one.
        """
        parts = [list(_parts(text)) for text in texts]
        groups = _groups(itertools.chain.from_iterable(parts))
        encoded = (np.asarray(ids, np.int32) for group in groups for ids in self._encode_parts(group))
        empty = np.zeros(0, np.int32)
        return [np.concatenate([empty, *itertools.islice(encoded, len(own_parts))]) for own_parts in parts]

    def decode(self, ids: Iterable[int]) -> str:
        """Returns the text of ids. EOS ids are left out; bytes that are no UTF-8 become U+FFFD."""
        return self._decode_ids([int(i) for i in ids if i != self.eos_id])

    def stream(self, ids: Iterable[int]) -> Iterator[str]:
        """Yields the text of ids as they come; a character is held back until all of its bytes are there.

        The joined pieces equal `decode(ids)`.
        """
        held: list[int] = []
        for i in ids:
            held.append(int(i))
            text = self.decode(held)
            if text and not text.endswith("\ufffd"):
                yield text
                held = []
        if text := self.decode(held):
            yield text


class SentencePiece(Tokenizer):
    """A SentencePiece model. Decoding is our own table of bytes, since the library's cannot tell U+2581 from a space."""

    def __init__(self, content: bytes):
        super().__init__(content)
        self._model = sentencepiece.SentencePieceProcessor()
        self._model.load_from_serialized_proto(content)  # the constructor takes empty content for none
        self.vocab_size = self._model.vocab_size()
        self.eos_id = self._model.eos_id()
        if self.eos_id < 0:
            raise errors.ConfigError("the SentencePiece model has no EOS piece; train one with eos_id >= 0")
        self._bytes = [self._piece_bytes(i) for i in range(self.vocab_size)]
        self._space = [self._model.piece_to_id(f"<0x{byte:02X}>") for byte in _SPACE.encode()]

    def _piece_bytes(self, i: int) -> bytes:
        piece = self._model.id_to_piece(i)
        if self._model.is_byte(i):
            return bytes([int(piece[3:5], 16)])
        if self._model.is_unknown(i):
            return _REPLACEMENT
        return b"" if self._model.is_control(i) else piece.replace(_SPACE, " ").encode()

    def _encode_parts(self, parts: list[str]) -> list[list[int]]:
        encoded = self._model.encode(parts, num_threads=min(_THREADS, len(parts)))
        return [self._space if part == _SPACE else ids for part, ids in zip(parts, encoded, strict=True)]

    def _decode_ids(self, ids: list[int]) -> str:
        table, size = self._bytes, self.vocab_size
        return b"".join(table[i] if 0 <= i < size else _REPLACEMENT for i in ids).decode("utf-8", errors="replace")


class HuggingFace(Tokenizer):
    """A `tokenizer.json`. Names of special tokens in a text are text."""

    def __init__(self, content: bytes):
        super().__init__(content)
        self._model = tokenizers.Tokenizer.from_str(content.decode("utf-8"))
        self._model.no_truncation()
        self._model.no_padding()
        self._model.encode_special_tokens = True
        self.vocab_size = max(self._model.get_vocab(with_added_tokens=True).values()) + 1
        found = (self._model.token_to_id(name) for name in _EOS_NAMES)
        eos_id = next((i for i in found if i is not None), None)
        if eos_id is None:
            raise errors.ConfigError(f"no end-of-text token; add one of {', '.join(_EOS_NAMES)} to tokenizer.json")
        self.eos_id = eos_id

    def _encode_parts(self, parts: list[str]) -> list[list[int]]:
        return [encoded.ids for encoded in self._model.encode_batch_fast(parts, add_special_tokens=False)]

    def _decode_ids(self, ids: list[int]) -> str:
        return self._model.decode(ids, skip_special_tokens=False)


def _parts(text: str) -> Iterator[str]:
    """Cuts a text before and after each U+2581, and into parts of bounded length."""
    for part in re.split(f"({_SPACE})", text):
        start = 0
        while start < len(part):
            end = min(start + _PART_CHARACTERS, len(part))
            if end < len(part):
                end = part.rfind("\n", start, end) + 1 or end
            yield part[start:end]
            start = end


def _groups(parts: Iterable[str]) -> Iterator[list[str]]:
    """Puts parts together to what is encoded in one call: enough for two threads, little enough for memory."""
    group: list[str] = []
    size = 0
    for part in parts:
        group.append(part)
        size += len(part)
        if size >= 2 * _PART_CHARACTERS:
            yield group
            group, size = [], 0
    if group:
        yield group


def model_file(path: epath.PathLike) -> epath.Path:
    """Returns the path of a `.model` or `.json` file, or the one of either in a directory; raises ConfigError."""
    path = epath.Path(path)
    if workdir.is_local(path) and path.is_dir():
        found = [path / name for name in (SENTENCEPIECE_FILE, HUGGING_FACE_FILE) if (path / name).exists()]
        if len(found) != 1:
            raise errors.ConfigError(
                f"{path}: expected either {SENTENCEPIECE_FILE} or {HUGGING_FACE_FILE}, found {len(found)}; "
                "name the file in data.tokenizer"
            )
        path = found[0]
    return path


def load(path: epath.PathLike) -> Tokenizer:
    """Reads a `.model` or `.json` file, or the one of either in a directory.

    Raises:
      ConfigError: there is no such file, it has no EOS, or it does not give back the text.
      IntegrityError: the file is broken.
    """
    path = model_file(path)
    _kind(str(path))  # before anything is read
    return parse(read(path), str(path))


def parse(content: bytes, name: str) -> Tokenizer:
    """The tokenizer of a file that was read already.

    Args:
      content: its bytes.
      name: its name, which says by `.model` or `.json` what it is; errors name it.

    Raises:
      ConfigError, IntegrityError: as `load`.
    """
    return _checked(_kind(name), content, name)


def _kind(name: str) -> type[Tokenizer]:
    kinds: dict[str, type[Tokenizer]] = {".model": SentencePiece, ".json": HuggingFace}
    suffix = epath.Path(name).suffix
    if suffix not in kinds:
        raise errors.ConfigError(f"{name}: a tokenizer is a .model or .json file; set data.tokenizer")
    return kinds[suffix]


def read(path: epath.Path) -> bytes:
    """The bytes of a tokenizer file; raises ConfigError if it cannot be read."""
    try:
        return path.read_bytes() if workdir.is_local(path) else storage.read_small(path, MAX_BYTES)
    except OSError:
        raise errors.ConfigError(f"{path}: no such tokenizer; set data.tokenizer") from None


def _checked(kind: type[Tokenizer], content: bytes, name: str) -> Tokenizer:
    try:
        tokenizer = kind(content)
    except errors.ConfigError as error:
        raise errors.ConfigError(f"{name}: {error}") from None
    except Exception:  # the libraries raise whatever they like, down to a bare Exception
        raise errors.IntegrityError(f"{name}: broken tokenizer file; fetch or train it again") from None
    for probe in (*_PROBES, *_EOS_NAMES):
        ids = tokenizer.encode(probe)
        if tokenizer.eos_id in ids or tokenizer.decode(ids) != probe:
            raise errors.ConfigError(
                f"{name}: the tokenizer does not give back its text (it normalises, adds or drops spaces, or reads "
                "special tokens in text), so bits per byte would be wrong; use a byte-level or byte-fallback one"
            )
    return tokenizer


def train(texts: Iterable[str], vocab_size: int, path: epath.PathLike) -> Tokenizer:
    """Trains a byte-pair SentencePiece model on the first 20 million characters and writes it.

    Nothing is normalised; all bytes are in the vocabulary; newline and tab are pieces of their own and runs of spaces may
    be; digits stand alone. The same texts give the same file. `path` is a `.model` file, or a directory for
    `tokenizer.model`. There are fewer than `vocab_size` pieces if the texts do not yield more.

    Raises:
      ConfigError: the texts and the vocabulary size do not go together.
      StorageError: the file cannot be written.
    """
    path = epath.Path(path)
    path = path if path.suffix == ".model" else path / SENTENCEPIECE_FILE
    content = io.BytesIO()
    try:
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=_training_lines(texts), model_writer=content, model_type="bpe", vocab_size=vocab_size,
            normalization_rule_name="identity", remove_extra_whitespaces=False, add_dummy_prefix=False,
            byte_fallback=True, character_coverage=0.9995, split_digits=True, allow_whitespace_only_pieces=True,
            user_defined_symbols=["\n", "\t"], unk_id=0, eos_id=1, bos_id=-1, pad_id=-1, hard_vocab_limit=False,
            max_sentence_length=4 * _LINE_CHARACTERS + 4, num_threads=_THREADS, minloglevel=2,
        )  # fmt: skip
    except RuntimeError:  # its message may quote the text
        raise errors.ConfigError(
            f"{path}: no tokenizer of {vocab_size} pieces can be trained on these texts; there must be some text, and room "
            "for the 256 bytes and every frequent character: give more text or raise model.vocab_size"
        ) from None
    workdir.write(path, content.getvalue())
    return _checked(SentencePiece, content.getvalue(), str(path))


def _training_lines(texts: Iterable[str]) -> Iterator[str]:
    """Short pieces of text with their newlines; the two characters that the trainer cannot take are left out."""
    left = _TRAINING_CHARACTERS
    for text in texts:
        for line in text.replace(_SPACE, "").replace("\x00", "").splitlines(keepends=True):
            for start in range(0, len(line), _LINE_CHARACTERS):
                yield line[start : start + _LINE_CHARACTERS]
        left -= len(text)
        if left <= 0:
            return
