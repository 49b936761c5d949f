"""Documents in which domains change, since methods that choose once per document look best on pure text.

- `interleaved`  segments of 32 to 256 tokens from the reported documents of all domains in turn;
- `real`         text that is mixed by nature: problems in words with their programs and documented functions (HumanEval, MBPP;
                 evaluation only), or, where these are not at hand, documented functions of the standard library.
"""

import ast
import gzip
import json
import pathlib
import sysconfig
from collections.abc import Iterator

import numpy as np

from benchmarks.suite import training
from flexjax import workdir
from flexjax.data import tokens

SEGMENT_TOKENS = (32, 257)
DOCUMENT_SEGMENTS = 8
TASKS = ("humaneval", "mbpp")
SEED = 7


def prepare(bench: training.Bench) -> dict[str, tokens.TokenSource]:
    """Both kinds of mixed text, written below the suite's corpus once."""
    limit = bench.size.kilobytes["mixed"] * 1000
    home = bench.home / "corpus" / "mixed"
    home.mkdir(parents=True, exist_ok=True)
    made = {"interleaved": lambda: _interleaved(bench), "real": lambda: _real(bench.data_root)}
    for name, documents in made.items():
        file = home / f"{name}-{bench.corpus[:12]}.jsonl.gz"
        if not file.exists():
            lines = "".join(json.dumps({"text": text}) + "\n" for text in _capped(documents(), limit))
            workdir.write(file, gzip.compress(lines.encode(), mtime=0))
    return {name: bench.text(f"mixed/{name}-{bench.corpus[:12]}") for name in made}


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


def _real(data_root: str) -> Iterator[str]:
    files = [pathlib.Path(data_root) / "tasks" / f"{name}.jsonl.gz" for name in TASKS]
    if data_root and all(file.exists() for file in files):
        for file in files:
            with gzip.open(file, "rt", encoding="utf-8") as lines:
                for line in lines:
                    item = json.loads(line)
                    yield item["prompt"] + item["answer"]
        return
    for path in sorted(pathlib.Path(sysconfig.get_paths()["stdlib"]).glob("*.py")):
        text = path.read_text(encoding="utf-8", errors="replace")
        for node in ast.parse(text).body:
            if isinstance(node, ast.FunctionDef | ast.ClassDef) and len(ast.get_docstring(node) or "") > 200:
                yield (ast.get_source_segment(text, node) or "")[:4000]


def _capped(texts: Iterator[str], limit: int) -> Iterator[str]:
    for text in texts:
        limit -= len(text.encode())
        if limit < 0:
            return
        yield text
