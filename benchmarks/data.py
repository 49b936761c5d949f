"""How fast the built-in public corpus comes through the prefetching iterator: rows go to results/data.jsonl.

python -m benchmarks.data
"""

import tempfile

from absl import app
from etils import epath

from benchmarks import measuring
from flexjax import config as config_lib
from flexjax import presets
from flexjax.data import sources

BATCHES = 50


def measure() -> measuring.Row:
    """Milliseconds for a batch of the quickstart's mixture."""
    config = presets.base("quickstart")
    config_lib.resolve(config)
    with tempfile.TemporaryDirectory() as directory:
        corpora = sources.Corpora(config, epath.Path(directory), None, lambda _: None)
        stream = corpora.pipeline({"public": 0.25, "math": 0.75}, config.anchor.train).iterate(0)
        wall, cpu = measuring.timed(lambda: [next(stream) for _ in range(BATCHES)])
        stream.close()
    tokens = BATCHES * config.anchor.train.batch_size * config.data.seq_len
    return {"what": "pipeline", "ms": wall * 1e3 / BATCHES, "cpu_ms": cpu * 1e3 / BATCHES, "tokens_per_second": tokens / wall}


def main(argv: list[str]) -> None:
    facts = measuring.machine()
    measuring.keep("data.jsonl", [measuring.apart(measure)], facts)


if __name__ == "__main__":
    app.run(main)
