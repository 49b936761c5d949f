"""Scores a model on texts: bits per byte and routing shares, with any of its experts switched on.

python -m flexjax.evaluate --model=DIR --data=NAME=PATH[,NAME=PATH...] [--experts=public,math] [--json]
"""

import dataclasses
import json
import sys
import tempfile

from absl import flags
from etils import epath

from flexjax import command, errors
from flexjax import config as config_lib
from flexjax.data import corpus, tokens
from flexjax.data import tokenizer as tokenizer_lib
from flexjax.eval import bits_per_byte
from flexjax.experts import store

MODEL = flags.DEFINE_string("model", None, "A merged model or an anchor.")
DATA = flags.DEFINE_list("data", [], "NAME=PATH of JSONL or token files, globs allowed; several, separated by commas.")
EXPERTS = flags.DEFINE_list("experts", None, "Experts that are switched on; default all.")
SEQ_LEN = flags.DEFINE_integer("seq_len", None, "Window in tokens; default what the anchor was trained with.", lower_bound=1)
BATCH_SIZE = flags.DEFINE_integer("batch_size", 16, "Windows at once.", lower_bound=1)
MAX_KILOBYTES = flags.DEFINE_integer("max_kilobytes", 0, "Score at most this much of each text; 0: all.", lower_bound=0)
TOP_K = flags.DEFINE_integer("top_k", None, "Experts per token; default what the model was merged with.")
TEXT_FIELD = flags.DEFINE_string("text_field", "text", "The field of a JSONL line that holds the text.")
TOKEN_DTYPE = flags.DEFINE_string("token_dtype", "uint16", "Of headerless .npy and .bin files.")
JSON = flags.DEFINE_bool("json", False, "Print the result as one JSON object, last on stdout.")

DEFAULT_SEQ_LEN = 1024


def main(argv: list[str]) -> None:
    """Scores each text and prints a table."""
    if argv:
        raise errors.ConfigError(f"unexpected argument '{argv[0]}'; everything is a flag: --model=DIR --data=NAME=PATH")
    if not MODEL.value or not DATA.value:
        raise errors.ConfigError("evaluate needs --model=DIR and --data=NAME=PATH")
    texts = dict(_named(entry) for entry in DATA.value)
    anchor, architecture, params = store.load_any(MODEL.value, TOP_K.value)
    seq_len = SEQ_LEN.value or anchor.manifest["training"].get("seq_len", DEFAULT_SEQ_LEN)
    tokenizer = tokenizer_lib.load(store.tokenizer_path(anchor))
    scorer = bits_per_byte.Scorer(architecture, params, seq_len, BATCH_SIZE.value)
    data = config_lib.DataConfig(text_field=TEXT_FIELD.value, token_dtype=TOKEN_DTYPE.value)
    experts = EXPERTS.value if EXPERTS.value is not None else list(architecture.experts)
    print(f"{'bits per byte':<16}{'':>9}   kB      routing shares, with {', '.join(experts)} switched on")
    scores = {}
    with tempfile.TemporaryDirectory() as cache:
        for name, pattern in texts.items():
            paths = corpus.expand(pattern, "", name)
            source = tokens.tokenize(paths, tokenizer, data, architecture.config.vocab_size, epath.Path(cache))
            score = scorer.score(source, MAX_KILOBYTES.value * 1000, experts)
            shares = "  ".join(f"{expert} {share:.0%}" for expert, share in score.shares.items())
            print(f"{name:<16}{score.bits_per_byte:>9.4f}   {score.num_bytes / 1000:<7.0f} {shares}", flush=True)
            scores[name] = dataclasses.asdict(score)
    if JSON.value:
        sys.stdout.write(json.dumps({"model": MODEL.value, "experts": experts, "scores": scores}) + "\n")


def _named(entry: str) -> tuple[str, str]:
    name, equals, path = entry.partition("=")
    if not (name and equals and path):
        raise errors.ConfigError(f"--data entry '{entry}' must be NAME=PATH, for instance math=validation.jsonl.gz")
    return name, path


if __name__ == "__main__":
    command.run(main)
