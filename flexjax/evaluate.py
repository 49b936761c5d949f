"""Scores a model on texts: bits per byte and routing shares, with any of its experts switched on.

python -m flexjax.evaluate --model=DIR --data=NAME=PATH[,NAME=PATH...] [--experts=public,math] [--mesh=AXIS=N,...]
    [--routing=token|sequence] [--policy=FILE --user=NAME] [--json]
"""

import dataclasses
import functools
import json
import math
import sys
import tempfile

import numpy as np
from absl import flags
from etils import epath

from flexjax import command, distributed, errors, hosts, memory, sharding
from flexjax import config as config_lib
from flexjax.data import tokens
from flexjax.eval import bits_per_byte
from flexjax.experts import models, store
from flexjax.inference import access, sequence
from flexjax.model import router, transformer
from flexjax.train import flops

MODEL = flags.DEFINE_string("model", None, "A merged model or an anchor.")
DATA = flags.DEFINE_list("data", [], "NAME=PATH of JSONL or token files, globs allowed; several, separated by commas.")
EXPERTS = flags.DEFINE_list("experts", None, "Experts that are switched on; default all.")
SEQ_LEN = flags.DEFINE_integer("seq_len", None, "Window in tokens; default what the anchor was trained with.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Windows at once.", lower_bound=1)
MAX_KILOBYTES = flags.DEFINE_integer("max_kilobytes", 0, "Score at most this much of each text; 0: all.", lower_bound=0)
TOP_K = flags.DEFINE_integer("top_k", None, "Experts per token; default what the model was merged with.")
ROUTING = flags.DEFINE_enum(
    "routing", "token", ["token", "sequence"], "What chooses among experts: a token or its text so far."
)
SEQUENCE = flags.DEFINE_enum("sequence", None, sequence.KINDS, "How a text so far chooses; default mixture.")
TEXT_FIELD = flags.DEFINE_string("text_field", "text", "The field of a JSONL line that holds the text.")
TOKEN_DTYPE = flags.DEFINE_string("token_dtype", "uint16", "Of headerless .npy and .bin files.")
MESH = flags.DEFINE_list("mesh", [], "Sizes of the mesh axes data, fsdp, tensor, expert, such as expert=4; default all data.")
JSON = flags.DEFINE_bool("json", False, "Print the result as one JSON object, last on stdout.")
POLICY = flags.DEFINE_string("policy", None, "JSON file that says who may use which experts; needs --user.")
USER = flags.DEFINE_string("user", None, "Who asks, as the policy names them.")
DECISION_LOG = flags.DEFINE_string("decision_log", None, "Where decisions are logged; default POLICY.decisions.jsonl.")

DEFAULT_SEQ_LEN = 1024


def main(argv: list[str]) -> None:
    """Scores each text and prints a table."""
    memory.keep_freed()
    if argv:
        raise errors.ConfigError(f"unexpected argument '{argv[0]}'; everything is a flag: --model=DIR --data=NAME=PATH")
    if not MODEL.value or not DATA.value:
        raise errors.ConfigError("evaluate needs --model=DIR and --data=NAME=PATH")
    how = sequence.from_flags(ROUTING.value, SEQUENCE.value)
    texts = command.named_texts(DATA.value, "data")
    settings = MODEL, DATA, EXPERTS, SEQ_LEN, BATCH_SIZE, MAX_KILOBYTES, TOP_K, TEXT_FIELD, TOKEN_DTYPE, MESH, POLICY, USER
    hosts.join({f"--{holder.name}": holder.value for holder in (*settings, ROUTING, SEQUENCE)})
    mesh = sharding.make_mesh(hosts.mesh_sizes(MESH.value))
    model = models.open_any(MODEL.value)
    decision = access.admit(model, EXPERTS.value, POLICY.value, USER.value, DECISION_LOG.value)
    anchor = model.anchor
    architecture, params = models.load_any(model, TOP_K.value, mesh)
    if TOP_K.value not in (None, architecture.top_k):
        raise errors.ConfigError(f"--top_k={TOP_K.value}: {MODEL.value} is an anchor and has one expert; leave the flag out")
    allowed = EXPERTS.value if decision is None else decision.granted
    experts = list(architecture.experts if allowed is None else allowed)
    router.allowed_mask(architecture.experts, experts, 1)  # refuses unknown names before any text is read
    how = sequence.worthwhile(how, architecture.experts, experts)
    masks = sequence.candidates(architecture.experts, experts) if how else (tuple(experts),)
    seq_len = SEQ_LEN.value or anchor.manifest["training"].get("seq_len", DEFAULT_SEQ_LEN)
    if type(seq_len) is not int or not 0 < seq_len <= 2**24:
        raise errors.IntegrityError(f"{anchor.label} states seq_len {str(seq_len)[:20]}; pass --seq_len")
    tokenizer = store.tokenizer(anchor)
    scorer = bits_per_byte.Scorer(architecture, params, seq_len, BATCH_SIZE.value, mesh=mesh)
    data = config_lib.DataConfig(text_field=TEXT_FIELD.value, token_dtype=TOKEN_DTYPE.value)
    passes = dense_passes(architecture, masks, seq_len)
    what = f"mean weight of each candidate, {passes:.2f} dense passes a token" if how else "routing shares"
    show = functools.partial(print, flush=True) if distributed.is_main() else lambda _: None
    show(f"{'bits per byte':<16}{'':>9}   kB      {what}, with {', '.join(experts)} switched on")
    scores = {}
    with tempfile.TemporaryDirectory() as cache:
        for name, paths in texts.items():
            source = tokens.tokenize(paths, tokenizer, data, architecture.config.vocab_size, epath.Path(cache))
            score = _score(scorer, source, MAX_KILOBYTES.value * 1000, masks, how)
            shares = "  ".join(f"{label} {share:.0%}" for label, share in score.shares.items())
            show(f"{name:<16}{score.bits_per_byte:>9.4f}   {score.num_bytes / 1000:<7.0f} {shares}")
            scores[name] = dataclasses.asdict(score)
    if JSON.value and distributed.is_main():
        routing = {"routing": "sequence", "sequence": how.kind} if how else {"routing": "token"}
        result = {"model": MODEL.value, "user": USER.value, "experts": experts, **routing, "dense_passes": passes}
        sys.stdout.write(json.dumps(result | {"scores": scores}) + "\n")


def dense_passes(architecture: transformer.Architecture, masks: sequence.Masks, seq_len: int) -> float:
    """Forward FLOPs of a token under all masks together, as multiples of those of a dense model such as the anchor.

    Counts what has to be computed (`train.flops`): of a mask, its own experts, `top_k` of them at most.
    """
    dense = transformer.Architecture(architecture.config, transformer.dense_banks(architecture.config))
    together = sum(flops.forward_per_token(architecture, seq_len, mask) for mask in masks)
    return together / flops.forward_per_token(dense, seq_len)


def _score(
    scorer: bits_per_byte.Scorer,
    source: tokens.TokenSource,
    max_bytes: int,
    masks: sequence.Masks,
    how: sequence.Settings | None,
) -> bits_per_byte.Score:
    """The score of a text; routed by sequence, its shares are the mean weights of the candidates."""
    if how is None:
        return scorer.score(source, max_bytes, masks[0])
    found = [scorer.tokens(source, max_bytes, mask) for mask in masks]
    nats, weights = sequence.combine(np.stack([each.nats for each in found]), found[0].starts, how)
    num_bytes = int(found[0].document_bytes.sum())
    shares = dict(zip(map(sequence.label, masks), weights.mean(axis=1).tolist(), strict=True))
    return bits_per_byte.Score(float(nats.sum()) / math.log(2) / num_bytes, num_bytes, len(nats), shares)


if __name__ == "__main__":
    command.run(main)
