"""The command: text in, streamed text out, exit codes."""

import json
import os
import subprocess
import sys

import pytest

from flexjax import config as config_lib
from flexjax.data import tokenizer as tokenizer_lib
from flexjax.experts import models, publishing, store, surgery
from flexjax.inference import decode
from flexjax.model import transformer
from tests.model import noise

ROOT = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A merged model of noise: public, alpha and beta."""
    home = tmp_path_factory.mktemp("generate")
    text = "the quick brown fox jumps over the lazy dog; pack my box with five dozen jugs. " * 20
    tokenizer = tokenizer_lib.train([text], 320, home / "tokenizer.model")
    config = config_lib.ModelConfig(
        vocab_size=tokenizer.vocab_size + 5, d_model=16, num_layers=1, num_heads=2, num_kv_heads=2, head_dim=8, d_ff=12
    )
    banks = (*transformer.dense_banks(config), config_lib.Bank("w12", ("alpha", "beta"), 12))
    params = noise.params(transformer.Architecture(config, banks, 2))
    shared, experts = surgery.split(params, banks)
    anchor = publishing.write_anchor(
        home / "anchor", config, home / "tokenizer.model",
        lambda writer: writer.put_tree({**shared, "expert": experts["public"]}), rows="random", training={},
    )  # fmt: skip
    bundles = {name: publishing.write_bundle(home / name, name, anchor, experts[name], {}) for name in ("alpha", "beta")}
    models.write_model(home / "model", anchor, bundles, top_k=2)
    return home


def generate(*arguments, locale="C"):
    environment = {**os.environ, "PYTHONPATH": ROOT, "JAX_PLATFORMS": "cpu", "XLA_FLAGS": "", "LC_ALL": locale}
    return subprocess.run(
        [sys.executable, "-m", "flexjax.generate", *arguments], env=environment, capture_output=True, timeout=120, check=False
    )


def test_text_streams_and_json_comes_last(model):
    prompt = "the fox è 漢"
    done = generate(
        f"--model={model / 'model'}", f"--prompt={prompt}", "--experts=public,alpha", "--max_new_tokens=20",
        "--temperature=1", "--top_k=50", "--top_p=0.95", "--seed=3", "--json",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr.decode()
    *shown, last, end = done.stdout.decode().split("\n")
    result = json.loads(last)
    assert end == "" and "\n".join(shown) == prompt + result["text"]
    assert result["experts"] == ["public", "alpha"] and result["prompt"] == prompt
    assert b"tokens in" in done.stderr
    opened = models.open_any(model / "model")
    anchor, (architecture, params) = opened.anchor, models.load_any(opened)
    tokenizer = tokenizer_lib.load(store.tokenizer_path(anchor))
    decoder = decode.Decoder(params, architecture, tokenizer.eos_id, tokenizer.vocab_size)
    request = decode.Request(tokenizer.encode(prompt).tolist(), ("public", "alpha"), 1.0, 50, 0.95, 3)
    expected = decoder.generate([request], 20)[0]
    assert result["text"] == tokenizer.decode(expected) and result["tokens"] == len(expected)
    assert result["ended"] == (len(expected) < 20)


def test_an_anchor_answers_an_empty_prompt(model):
    done = generate(f"--model={model / 'anchor'}", "--prompt=", "--max_new_tokens=5")
    assert done.returncode == 0, done.stderr.decode()
    assert done.stdout.endswith(b"\n") and len(done.stdout) > 1


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (["--experts=public,news"], 5, "unknown expert 'news'; this model has public, alpha, beta"),
        (["--top_p=2"], 2, "top_p=2.0"),
    ],
)
def test_refusals_are_one_line_and_an_exit_code(model, arguments, code, message):
    done = generate(f"--model={model / 'model'}", "--prompt=a", *arguments)
    assert (done.returncode, done.stdout) == (code, b"")
    assert done.stderr.decode().startswith("error: ") and message in done.stderr.decode()
    assert done.stderr.count(b"\n") == 1
