"""What transformers itself says of small models. Runs in the second environment (python 3.11, torch, transformers) only:

    .venv-torch/bin/python tests/parity/reference.py goldens tests/parity/goldens    # renew those of the default tests
    .venv-torch/bin/python tests/parity/reference.py build DIR    # DIR/<case>/ as transformers saves it, DIR/<case>.npz
    .venv-torch/bin/python tests/parity/reference.py resave FROM TO    # in bfloat16
    .venv-torch/bin/python tests/parity/reference.py check REPORT FOLDER...    # load folders, write REPORT.npz and .json

Renew the goldens when a case is added, or a release of transformers changes the model on purpose; never to make a
failing comparison pass.
"""

import json
import pathlib
import sys
import tempfile

import numpy as np
import torch
import transformers
from safetensors.torch import load_file, save_file

SIZES = {
    "vocab_size": 128,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 128,
    "bos_token_id": None,
    "eos_token_id": None,
    "pad_token_id": None,
}
# Name -> (settings, every k, experts to delete).
CASES = {
    "dense_mha": ({"num_key_value_heads": 4}, [1], []),
    "dense_gqa_tied": ({"num_key_value_heads": 2, "tie_word_embeddings": True, "rms_norm_eps": 1e-6}, [1], []),
    "moe1_gqa": ({"num_key_value_heads": 2, "num_experts": 1}, [1], []),
    "moe2_mha": ({"num_key_value_heads": 4, "num_experts": 2}, [2, 1], [1]),
    "moe5_gqa_tied": (
        {"num_key_value_heads": 1, "num_experts": 5, "tie_word_embeddings": True, "head_dim": 16},
        [2, 1, 4, 5],
        [0, 3],
    ),
    "moe7_mha": ({"num_key_value_heads": 4, "num_experts": 7}, [5, 2, 7], [1, 6]),
}
TOKENS, PROMPT, NEW = 32, 8, 64


def build(name: str) -> transformers.PreTrainedModel:
    """A model with seeded weights that are exact in bfloat16, so that they pack well and can be cast."""
    settings, top_ks, _ = CASES[name]
    kind = "FlexOlmo" if "num_experts" in settings else "Olmo2"
    extra = {"num_experts_per_tok": top_ks[0]} if kind == "FlexOlmo" else {}
    config = getattr(transformers, f"{kind}Config")(**{**SIZES, **settings, **extra})
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    generator = torch.Generator().manual_seed(sorted(CASES).index(name))
    with torch.no_grad():
        for path, leaf in model.named_parameters():
            noise = torch.randn(leaf.shape, generator=generator)
            if leaf.ndim == 1:
                noise = 1 + 0.2 * noise
            elif "embed_tokens" not in path:
                noise = noise * leaf.shape[-1] ** -0.5
            elif model.config.tie_word_embeddings:
                noise = 0.2 * noise
            leaf.copy_(noise.to(torch.bfloat16).float())
    return model


def without(model: transformers.PreTrainedModel, expert: int) -> transformers.PreTrainedModel:
    """The model with one expert deleted."""
    config = type(model.config)(**model.config.to_dict())
    config.num_experts -= 1
    config.num_experts_per_tok = min(config.num_experts_per_tok, config.num_experts)
    smaller = type(model)(config).eval()
    kept = [e for e in range(model.config.num_experts) if e != expert]
    state = {k: v[kept] if ".experts." in k or k.endswith("mlp.gate.weight") else v for k, v in model.state_dict().items()}
    smaller.load_state_dict(state)
    return smaller


def logits(model: transformers.PreTrainedModel, tokens: np.ndarray) -> np.ndarray:
    with torch.no_grad():
        return model(torch.tensor(tokens)[None]).logits[0].float().numpy()


def greedy(model: transformers.PreTrainedModel, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The continuation of a prompt, and the margin between the two best logits at each step."""
    out = model.generate(
        torch.tensor(tokens[:PROMPT])[None],
        attention_mask=torch.ones(1, PROMPT, dtype=torch.long),
        do_sample=False,
        max_new_tokens=NEW,
        output_scores=True,
        return_dict_in_generate=True,
    )
    best = torch.stack(out.scores)[:, 0].topk(2).values
    return out.sequences[0, PROMPT:].numpy(), (best[:, 0] - best[:, 1]).numpy()


def with_top_k(model: transformers.PreTrainedModel, top_k: int) -> transformers.PreTrainedModel:
    """The same weights, k experts per token."""
    if not hasattr(model.config, "num_experts"):
        return model
    config = type(model.config)(**{**model.config.to_dict(), "num_experts_per_tok": top_k})
    other = type(model)(config).eval()
    other.load_state_dict(model.state_dict())
    return other


def facts(name: str, model: transformers.PreTrainedModel, folder: pathlib.Path) -> dict[str, np.ndarray]:
    """Everything that is compared: the files' content, and what the model computes."""
    _, top_ks, deleted = CASES[name]
    tokens = np.random.default_rng(len(name)).integers(SIZES["vocab_size"], size=TOKENS)
    found = {"tokens": tokens, "config": np.array((folder / "config.json").read_text())}
    for file in sorted(folder.glob("*.safetensors")):
        found |= {f"state/{key}": value.numpy() for key, value in load_file(file).items()}
    for k in top_ks:
        chosen = with_top_k(model, k)
        found[f"logits/{k}"] = logits(chosen, tokens)
        found[f"continuation/{k}"], found[f"margins/{k}"] = greedy(chosen, tokens)
        for expert in deleted:
            found[f"without/{expert}/{k}"] = logits(without(chosen, expert), tokens)
    return found


def build_all(home: pathlib.Path, archives: pathlib.Path) -> None:
    archives.mkdir(parents=True, exist_ok=True)
    for name in CASES:
        model = build(name)
        model.save_pretrained(home / name, max_shard_size="40KB" if name.startswith("moe5") else "5GB")
        np.savez_compressed(archives / f"{name}.npz", **facts(name, model, home / name))
        if name.startswith("moe7"):
            fused = home / f"{name}_fused"
            fused.mkdir()
            (fused / "config.json").write_text((home / name / "config.json").read_text())
            save_file(model.state_dict(), fused / "model.safetensors", {"format": "pt"})


def check(report: str, folders: list[str]) -> None:
    """Loads folders as a user would, and writes what transformers says of the keys, the logits and the continuation."""
    arrays, infos = {}, {}
    for index, folder in enumerate(folders):
        model, info = transformers.AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype="auto")
        model.eval()
        infos[folder] = {
            "class": type(model).__name__,
            "dtype": str(model.dtype),
            "special": [model.config.bos_token_id, model.config.eos_token_id, model.config.pad_token_id],
            "loading": {key: sorted(map(str, value)) for key, value in info.items() if isinstance(value, (set, list, dict))},
        }
        tokens = np.random.default_rng(0).integers(model.config.vocab_size, size=TOKENS)
        arrays[f"{index}/tokens"], arrays[f"{index}/logits"] = tokens, logits(model, tokens)
        model.generation_config.eos_token_id = None
        arrays[f"{index}/continuation"], arrays[f"{index}/margins"] = greedy(model, tokens)
        if (pathlib.Path(folder) / "tokenizer.json").exists():
            tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
            infos[folder]["tokenizer"] = {"ids": tokenizer.encode("two  rivers, 42 boats"), "eos": tokenizer.eos_token}
    np.savez_compressed(f"{report}.npz", **arrays)
    pathlib.Path(f"{report}.json").write_text(json.dumps(infos))


if __name__ == "__main__":
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    verb, target = sys.argv[1], sys.argv[2]
    if verb == "goldens":
        with tempfile.TemporaryDirectory() as scratch:
            build_all(pathlib.Path(scratch), pathlib.Path(target))
    elif verb == "build":
        build_all(pathlib.Path(target), pathlib.Path(target))
    elif verb == "resave":
        transformers.AutoModelForCausalLM.from_pretrained(target, dtype=torch.bfloat16).save_pretrained(sys.argv[3])
    elif verb == "check":
        check(target, sys.argv[3:])
    else:
        sys.exit(f"unknown verb {verb}")
