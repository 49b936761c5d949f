"""Greedy decoding of a merged model, 8 experts of which a token uses 4, against transformers' in the same run.

taskset -c 0 python -m benchmarks.decode      # rows go to results/decode.jsonl
"""

import dataclasses
import functools
from collections.abc import Callable

from absl import app, flags

from benchmarks import expert_step, measuring
from benchmarks.peer import call
from flexjax import config as config_lib
from flexjax.inference import decode
from flexjax.model import transformer

FILE = "decode.jsonl"
EXPERTS, ACTIVE, NEW_TOKENS = 8, 4, 128
PEERS = ("eager", "batched_mm")  # how transformers computes experts; what counts is the faster one


def measure(size: str, batch: int) -> measuring.Row:
    """Our decoder, from an empty prompt; EOS is a token that random weights do not choose."""
    model = expert_step.SHAPES[size]
    names = tuple(f"e{e}" for e in range(EXPERTS - 1))
    banks = (*transformer.dense_banks(model), config_lib.Bank("owners", names, model.d_ff))
    architecture = transformer.Architecture(model, banks, ACTIVE)
    decoder = decode.Decoder(transformer.init(architecture, 0), architecture, eos_id=model.vocab_size - 1)
    requests = [decode.Request([row + 1], None) for row in range(batch)]
    lengths: list[int] = []

    def generate() -> None:
        lengths.append(sum(map(len, decoder.generate(requests, NEW_TOKENS))))

    wall, cpu = measuring.timed(generate)
    return {"tokens": float(lengths[-1]), "tokens_per_second": lengths[-1] / wall, "cpu_ms_per_step": 1e3 * cpu / NEW_TOKENS}


def against_peer(size: str, batch: int, peer: bool) -> measuring.Row:
    """Ours and each kind of the peer, in turn; `ratio` is how many times as fast ours is."""
    shapes = call.shape(dataclasses.asdict(expert_step.SHAPES[size]))
    sides: dict[str, Callable[[], measuring.Row]] = {"ours": lambda: measuring.apart(measure, size, batch)}
    if peer:
        sides |= {kind: functools.partial(call.run, "decode", shapes, kind, str(batch), str(NEW_TOKENS)) for kind in PEERS}
    found = measuring.in_turn(sides)
    row = {"what": f"decode, {size}, {EXPERTS} experts, {ACTIVE} active, batch {batch}", **found["ours"]}
    theirs = {kind: 1e3 * batch * NEW_TOKENS / found[kind]["ms"] for kind in PEERS if kind in found}
    if theirs:
        row |= {"peer_tokens_per_second": theirs, "ratio": row["tokens_per_second"] / max(theirs.values())}
    return row


_BATCHES = flags.DEFINE_list("batches", ["1", "8"], "Requests at once.")
_SHAPE = flags.DEFINE_string("shape", "small", f"One of {', '.join(expert_step.SHAPES)}.")


def main(argv: list[str]) -> None:
    facts = measuring.machine()
    for batch in map(int, _BATCHES.value):
        measuring.keep(FILE, [against_peer(_SHAPE.value, batch, expert_step.PEER.value)], facts)


if __name__ == "__main__":
    app.run(main)
