"""The text of a suite: what owners train on, what is tuned on, and what is reported, cut and split once.

    HOME/<domain>/{train,tune,report,unseen}.jsonl.gz  HOME/<domain>/donated.jsonl.gz  HOME/corpus.json

Training text is cut into passages, since a domain row needs a thousand documents. Validation text is split in two by the hash
of each document: one half to tune on, the other to report; of each document at most one excerpt is scored, so that many
documents count. Sources that a suite keeps unseen are in no training text.
"""

import gzip
import hashlib
import json
import pathlib
from collections.abc import Iterable, Iterator, Mapping

from etils import epath

from benchmarks.suite import suites
from flexjax import errors, workdir
from flexjax.data import builtin

RECIPE = 1  # raise it when the text changes
PASSAGE_CHARACTERS = 4000
EXCERPT_CHARACTERS = 6000
DONATED_SHARE = 0.01  # of an owner's passages, set aside for the variant in which owners donate text
MARKER = "corpus.json"
Document = dict[str, str]


def prepare(suite: suites.Suite, size: suites.Size, data_root: str, home: epath.Path) -> str:
    """Writes the text of a suite below `home` unless it is there; returns its digest.

    Raises:
      ConfigError: the suite needs `--data_root`. DataError: a file is missing or no JSONL.
    """
    root = pathlib.Path(data_root) / suite.corpus
    if not suite.corpus:
        root = pathlib.Path(home) / "installed"
        builtin.build(root)
    elif not data_root:
        raise errors.ConfigError(
            f"suite '{suite.name}' needs --data_root=DIR, which holds {suite.corpus}/DOMAIN/train.jsonl.gz; "
            "--suite=installed runs without"
        )
    inputs = {str(path): _sha256(path.read_bytes()) for path in _files(suite, root)}
    key = {"recipe": RECIPE, "suite": repr(suite), "kilobytes": size.kilobytes, "inputs": sorted(inputs.values())}
    saved = workdir.read_json(home / MARKER)
    if saved is not None and saved["key"] == key and all((home / name).exists() for name in saved["files"]):
        return str(saved["digest"])
    digests = {}
    for name, documents in _parts(suite, size, root):
        (home / name).parent.mkdir(parents=True, exist_ok=True)
        digests[name] = write(home / name, documents)
    digest = _sha256(json.dumps(digests, sort_keys=True).encode())
    workdir.write_json(home / MARKER, {"key": key, "digest": digest, "files": digests})
    return digest


def write(path: epath.Path, documents: Iterable[Mapping[str, str]]) -> str:
    """Writes documents as gzipped JSONL, complete or not at all; returns the digest of what is in it."""
    content = "".join(json.dumps(document, ensure_ascii=False) + "\n" for document in documents).encode()
    workdir.write(path, gzip.compress(content, compresslevel=6, mtime=0))
    return _sha256(content)


def _files(suite: suites.Suite, root: pathlib.Path) -> list[pathlib.Path]:
    needed = [*((domain, split) for domain in suite.domains for split in builtin.SPLITS), *((d, "train") for d in suite.beside)]
    paths = [root / domain / f"{split}.jsonl.gz" for domain, split in needed]
    for path in paths:
        if not path.exists():
            raise errors.DataError(
                f"suite '{suite.name}' needs {path}, which is missing; put it there, or run --suite=installed, which needs none"
            )
    return paths


def _parts(suite: suites.Suite, size: suites.Size, root: pathlib.Path) -> Iterator[tuple[str, list[Document]]]:
    """Every file of the corpus with its documents."""
    left_out = tuple(source for sources in suite.unseen.values() for source in sources)
    for domain in suite.domains:
        unseen = suite.unseen.get(domain, ())
        found = {split: read(root / domain / f"{split}.jsonl.gz") for split in builtin.SPLITS}
        passages = [p for document in found["train"] if not document["source"].startswith(left_out) for p in _cut(document)]
        if domain == suites.PUBLIC:
            for other, megabytes in suite.beside.items():
                others = [d for d in read(root / other / "train.jsonl.gz") if not d["source"].startswith(left_out)]
                passages += capped(_shuffled([p for d in others for p in _cut(d)], "beside"), int(megabytes * 1000))
        passages = _shuffled(passages, "train")
        if domain != suites.PUBLIC:
            donated = int(len(passages) * DONATED_SHARE) + 1
            yield f"{domain}/donated.jsonl.gz", passages[:donated]
            passages = passages[donated:]
        yield f"{domain}/train.jsonl.gz", passages
        seen = _shuffled([d for d in found["validation"] if not d["source"].startswith(unseen)], "validation")
        for part, half in (("tune", 0), ("report", 1)):
            chosen = [_excerpt(document) for document in seen if _half(document) == half]
            yield f"{domain}/{part}.jsonl.gz", capped(chosen, size.kilobytes[part])
        if unseen:
            both = [d for split in builtin.SPLITS for d in found[split] if d["source"].startswith(unseen)]
            chosen = capped([_excerpt(document) for document in _shuffled(both, "unseen")], size.kilobytes["unseen"])
            yield f"{domain}/unseen.jsonl.gz", chosen


def read(path: epath.PathLike) -> list[Document]:
    """The documents of a gzipped JSONL file; raises DataError if it is none."""
    try:
        with gzip.open(path, "rt", encoding="utf-8") as lines:
            documents = [json.loads(line) for line in lines]
    except (OSError, EOFError, ValueError) as error:
        raise errors.DataError(f"{path} is no gzipped JSONL: {error}; restore it") from None
    for number, document in enumerate(documents, 1):
        if not isinstance(document, dict) or not isinstance(document.get("text"), str):
            raise errors.DataError(f"{path}:{number} has no text; each line is an object with text and source")
    return [{"text": d["text"], "source": str(d.get("source", ""))} for d in documents if d["text"].strip()]


def _cut(document: Document) -> list[Document]:
    """Passages of about 4000 characters that end where a line ends."""
    passages, size = [""], 0
    for line in document["text"].splitlines(keepends=True):
        if size and size + len(line) > PASSAGE_CHARACTERS:
            passages.append("")
            size = 0
        passages[-1] += line
        size += len(line)
    return [{"text": text, "source": document["source"]} for text in passages if text.strip()]


def _excerpt(document: Document) -> Document:
    return {**document, "text": document["text"][:EXCERPT_CHARACTERS]}


def _half(document: Document) -> int:
    """0 or 1, by the hash of the whole document."""
    return hashlib.sha256(("half" + document["text"]).encode()).digest()[0] & 1


def _shuffled(documents: list[Document], purpose: str) -> list[Document]:
    """An order that depends on the texts alone."""
    return sorted(documents, key=lambda document: hashlib.sha256((purpose + document["text"]).encode()).digest())


def capped(documents: Iterable[Document], kilobytes: int) -> list[Document]:
    """The leading documents that fit, at least one."""
    kept: list[Document] = []
    room = kilobytes * 1000
    for document in documents:
        room -= len(document["text"].encode())
        if room < 0 and kept:
            break
        kept.append(document)
    return kept


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
