"""Small corpora for the tests of this folder."""

import gzip
import json

VOCAB = 400


def texts(count, start=0):
    """Documents of very different lengths; every seventh is one word."""
    return [
        f"word{i}"
        if i % 7 == 0
        else f"Document {i}:\n\tdef f(x):\r\n        return x + {i}  # \u00e9t\u00e9 \u6f22\n" * (1 + i % 5)
        for i in range(start, start + count)
    ]


def write_jsonl(path, documents):
    """One `{"text"}` per line; gzip by suffix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = "".join(json.dumps({"text": text}) + "\n" for text in documents).encode()
    path.write_bytes(gzip.compress(content, mtime=0) if path.suffix == ".gz" else content)
    return path
