"""Documents in which domains change, since methods that choose once per document look best on pure text.

- `interleaved`  segments of 32 to 256 tokens from the reported documents of all domains in turn;
- `real`         text that is mixed by nature: problems in words with their programs and documented functions (HumanEval, MBPP;
                 evaluation only), or, without these, documented functions of those standard modules that nobody trains on.
"""

import ast
import functools
import pathlib
import sysconfig
from collections.abc import Iterator

import numpy as np
from etils import epath

from benchmarks.suite import corpora, training
from flexjax import tree
from flexjax.data import builtin, tokens
from flexjax.eval import items

SEGMENT_TOKENS = (32, 257)
DOCUMENT_SEGMENTS = 8
FOLDER = "tasks"  # below --data_root
TASKS = ("humaneval", "mbpp")
LEAST_DOCSTRING = 100  # characters
SEED = 7


@functools.cache
def prepare(bench: training.Bench) -> dict[str, tokens.TokenSource]:
    """Both kinds of mixed text, written below the suite's corpus; known by what they hold."""
    limit = bench.size.kilobytes["mixed"]
    found = {}
    for name, texts in (("interleaved", _interleaved(bench)), ("real", _real(bench))):
        documents = corpora.capped([{"text": text} for text in texts], limit)
        path = bench.home / "corpus" / "mixed" / f"{name}-{tree.sha256(repr(documents).encode())[:12]}.jsonl.gz"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            corpora.write(path, documents)
        found[name] = bench.text(path)
    return found


def _interleaved(bench: training.Bench) -> Iterator[str]:
    """Documents of eight segments, neighbours of different domains, until a domain runs out."""
    rng = np.random.default_rng(SEED)
    domains = list(bench.suite.domains)
    sources = {domain: bench.text(f"{domain}/report") for domain in domains}
    places = dict.fromkeys(domains, 0)
    tokenizer = bench.sources.tokenizer
    while True:
        order: list[str] = []
        pieces = []
        for _ in range(DOCUMENT_SEGMENTS):
            domain = str(rng.choice([name for name in domains if not order or name != order[-1]]))
            length = int(rng.integers(*SEGMENT_TOKENS))
            ids = sources[domain].read(places[domain], places[domain] + length)
            places[domain] += length
            if len(ids) < length:
                return
            order.append(domain)
            pieces.append(tokenizer.decode(ids[ids != sources[domain].eos_id]))
        yield "\n".join(pieces)


def _real(bench: training.Bench) -> Iterator[str]:
    folder = epath.Path(bench.data_root) / FOLDER
    if bench.data_root and all((folder / f"{name}.jsonl.gz").exists() for name in TASKS):
        for name in TASKS:
            for item in items.read(folder, name).items:
                yield item.text + item.continuations[0]
        return
    kept = bench.home / "corpus" / "installed"  # only modules that are in nobody's training text
    builtin.build(kept)
    held_out = {document["source"] for document in corpora.read(kept / "code" / "validation.jsonl.gz")}
    root = pathlib.Path(sysconfig.get_paths()["stdlib"])
    for path in sorted(root.rglob("*.py")):
        if ".".join(path.relative_to(root).with_suffix("").parts) not in held_out:
            continue
        text = path.read_text(encoding="utf-8", errors="replace")
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and len(ast.get_docstring(node) or "") > LEAST_DOCSTRING:
                yield (ast.get_source_segment(text, node) or "")[: corpora.PASSAGE_CHARACTERS]
