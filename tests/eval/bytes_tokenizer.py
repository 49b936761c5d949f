"""A tokenizer that needs no training: a token is a byte."""

from flexjax.data import tokenizer

VOCAB = 258


class Bytes(tokenizer.Tokenizer):
    eos_id = 1
    vocab_size = VOCAB

    def __init__(self):
        super().__init__(b"bytes")

    def _encode_parts(self, parts):
        return [[byte + 2 for byte in part.encode()] for part in parts]

    def _decode_ids(self, ids):
        return bytes(i - 2 for i in ids).decode(errors="replace")
