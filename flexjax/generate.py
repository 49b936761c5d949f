"""Continues a text with a model, with any of its experts switched on.

    python -m flexjax.generate --model=DIR --prompt=TEXT [--experts=public,math] [--max_new_tokens=N] [--temperature=T]
        [--top_k=K] [--top_p=P] [--seed=N] [--routing=token|sequence] [--policy=FILE --user=NAME] [--json]

The prompt and its continuation stream to stdout. With --json the last line there is one object, and logs go to stderr.
"""

import json
import sys
import time
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from absl import flags

from flexjax import command, errors, tree
from flexjax.data import tokenizer as tokenizer_lib
from flexjax.experts import models, store
from flexjax.inference import access, decode, sequence, sequence_decode
from flexjax.model import transformer

MODEL = flags.DEFINE_string("model", None, "A merged model or an anchor.")
PROMPT = flags.DEFINE_string("prompt", None, "The text to continue; may be empty.")
EXPERTS = flags.DEFINE_list("experts", None, "Experts that are switched on; default all.")
MAX_NEW_TOKENS = flags.DEFINE_integer("max_new_tokens", 128, "Longest continuation.")
TEMPERATURE = flags.DEFINE_float("temperature", 0.8, "0 always takes the most probable token.")
TOP_K = flags.DEFINE_integer("top_k", 0, "Draw among this many tokens; 0: all.")
TOP_P = flags.DEFINE_float("top_p", 1.0, "Draw among the fewest tokens whose probabilities reach this sum.")
ROUTING = flags.DEFINE_enum(
    "routing", "token", ["token", "sequence"], "What chooses among experts: a token or its text so far."
)
SEQUENCE = flags.DEFINE_enum("sequence", None, sequence.KINDS, "How a text so far chooses; default mixture.")
SEED = flags.DEFINE_integer("seed", 0, "The same seed gives the same text.")
JSON = flags.DEFINE_bool("json", False, "Print the result as one JSON object, last on stdout.")
POLICY = flags.DEFINE_string("policy", None, "JSON file that says who may use which experts; needs --user.")
USER = flags.DEFINE_string("user", None, "Who asks, as the policy names them.")
DECISION_LOG = flags.DEFINE_string("decision_log", None, "Where decisions are logged; default POLICY.decisions.jsonl.")


def main(argv: list[str]) -> None:
    """Streams one continuation."""
    if argv:
        raise errors.ConfigError(f"unexpected argument '{argv[0]}'; everything is a flag: --model=DIR --prompt=TEXT")
    if not MODEL.value or PROMPT.value is None:
        raise errors.ConfigError("generate needs --model=DIR and --prompt=TEXT")
    how = sequence.from_flags(ROUTING.value, SEQUENCE.value)
    model = models.open_any(MODEL.value)
    decision = access.admit(model, EXPERTS.value, POLICY.value, USER.value, DECISION_LOG.value)
    allowed = EXPERTS.value if decision is None else decision.granted
    architecture, params = models.load_any(model)
    tokenizer = store.tokenizer(model.anchor)
    request = decode.Request(
        prompt=tokenizer.encode(_text(PROMPT.value)).tolist(),
        experts=None if allowed is None else tuple(allowed),
        temperature=TEMPERATURE.value,
        top_k=TOP_K.value,
        top_p=TOP_P.value,
        seed=SEED.value,
    )
    decode.check(request, architecture, MAX_NEW_TOKENS.value)
    experts = architecture.experts if request.experts is None else request.experts
    how = sequence.worthwhile(how, architecture.experts, experts)
    masks = sequence.candidates(architecture.experts, experts) if how else (experts,)
    weights: list[float] = []
    answer = _answer(params, architecture, tokenizer, request, how, weights)
    del params  # the decoder has its own layout
    started = time.monotonic()
    ids: list[int] = []
    pieces = []
    _show(PROMPT.value)
    for piece in tokenizer.stream(_recorded(answer, ids)):
        pieces.append(piece)
        _show(piece)
    _show("\n")
    seconds = time.monotonic() - started
    print(f"{len(ids)} tokens in {seconds:.1f} s, compilation included", file=sys.stderr)
    if JSON.value:
        routing: dict[str, Any] = {"routing": "token"}
        if how:
            named = dict(zip(map(sequence.label, masks), weights, strict=True))
            routing = {"routing": "sequence", "sequence": how.kind, "weights": named}
        ended = len(ids) < MAX_NEW_TOKENS.value
        result = {
            "model": MODEL.value,
            "user": USER.value,
            "experts": list(experts),
            **routing,
            "forward_passes": len(masks) * (len(request.prompt) + len(ids) + ended),
            "prompt": PROMPT.value,
            "text": "".join(pieces),
            "tokens": len(ids),
            "ended": ended,
            "seconds": round(seconds, 3),
        }
        _show(json.dumps(result) + "\n")


def _answer(
    params: tree.Tree,
    architecture: transformer.Architecture,
    tokenizer: tokenizer_lib.Tokenizer,
    request: decode.Request,
    how: sequence.Settings | None,
    weights: list[float],
) -> Iterator[int]:
    """The ids of the continuation as they come; routed by sequence, `weights` becomes what the last of them leaves."""
    dtype = jnp.float32 if jax.default_backend() == "cpu" else jnp.bfloat16
    basis = params, architecture, tokenizer.eos_id, tokenizer.vocab_size, dtype
    if how is None:
        return decode.Decoder(*basis).stream(request, MAX_NEW_TOKENS.value)
    return _weighed(sequence_decode.SequenceDecoder(*basis, how).follow(request, MAX_NEW_TOKENS.value), weights)


def _weighed(pieces: Iterator[tuple[list[int], np.ndarray]], weights: list[float]) -> Iterator[int]:
    for ids, now in pieces:
        weights[:] = now.tolist()
        yield from ids


def _recorded(ids: Iterator[int], record: list[int]) -> Iterator[int]:
    for token in ids:
        record.append(token)
        yield token


def _text(argument: str) -> str:
    """The prompt, if the shell passed UTF-8."""
    try:
        argument.encode()
    except UnicodeEncodeError:
        raise errors.ConfigError("--prompt is not UTF-8; convert the text first") from None
    return argument


def _show(text: str) -> None:
    sys.stdout.buffer.write(text.encode())  # UTF-8 whatever the locale says
    sys.stdout.buffer.flush()


if __name__ == "__main__":
    command.run(main)
