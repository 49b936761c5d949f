"""Hugging Face folders from goldens, and our forward pass over what was imported from them."""

import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
from safetensors.numpy import save_file

from flexjax.experts import models, store, surgery
from flexjax.model import router, transformer

GOLDENS = pathlib.Path(__file__).parent / "goldens"
CASES = sorted(path.stem for path in GOLDENS.glob("*.npz"))
RENEW = (
    "the golden comes from transformers itself; renew it with `.venv-torch/bin/python tests/parity/reference.py goldens "
    "tests/parity/goldens` only if transformers changed the model on purpose"
)
TOLERANCE = 1e-4
NEAR_TIE = 1e-4
PROMPT = 8


def golden(name: str) -> dict[str, np.ndarray]:
    with np.load(GOLDENS / f"{name}.npz") as archive:
        return dict(archive)


def state_of(facts: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    return {key.removeprefix("state/"): value for key, value in facts.items() if key.startswith("state/")}


def write(folder: pathlib.Path, config: dict, state: dict[str, np.ndarray], shards: int = 1) -> pathlib.Path:
    """Writes a folder as the format's own library does."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config))
    names = sorted(state)
    files = ["model.safetensors"] if shards == 1 else [f"model-{i + 1:05d}-of-{shards:05d}.safetensors" for i in range(shards)]
    where = {name: files[i % shards] for i, name in enumerate(names)}
    for file in files:
        held = {name: np.ascontiguousarray(state[name]) for name in names if where[name] == file}
        save_file(held, folder / file, {"format": "pt"})
    if shards > 1:
        index = {"metadata": {"total_size": sum(value.nbytes for value in state.values())}, "weight_map": where}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return folder


def write_golden(folder: pathlib.Path, name: str, shards: int = 1) -> pathlib.Path:
    facts = golden(name)
    return write(folder, json.loads(str(facts["config"])), state_of(facts), shards)


def fuse(state: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
    """Per-expert tensors to transformers 5's layout in memory: gate_up_proj [E, 2F, H] and down_proj [E, H, F]."""
    fused = {name: value for name, value in state.items() if ".experts." not in name}
    for prefix in sorted({name.split(".experts.")[0] for name in state if ".experts." in name}):
        count = len([name for name in state if name.startswith(prefix + ".experts.") and name.endswith("down_proj.weight")])
        part = {
            kind: [state[f"{prefix}.experts.{e}.{kind}_proj.weight"] for e in range(count)] for kind in ("gate", "up", "down")
        }
        pairs = zip(part["gate"], part["up"], strict=True)
        fused[f"{prefix}.experts.gate_up_proj"] = np.stack([np.concatenate(pair) for pair in pairs])
        fused[f"{prefix}.experts.down_proj"] = np.stack(part["down"])
    return fused


def load(directory: pathlib.Path) -> tuple[transformer.Architecture, dict]:
    if (directory / "anchor").exists():
        return models.load(models.open_model(directory))
    return models.load_anchor(store.open_anchor(directory))


def logits(
    architecture: transformer.Architecture,
    params: dict,
    sequences: list[np.ndarray],
    top_k: int,
    allowed: list[list[str]] | None = None,
) -> list[np.ndarray]:
    """Our logits [T, V] of each sequence, in one padded batch, each row with its own experts (None: all have all)."""
    chosen = surgery.architecture(architecture.config, architecture.banks, top_k)
    length = max(map(len, sequences))
    tokens = np.stack([np.pad(sequence, (0, length - len(sequence))) for sequence in sequences])
    mask = None
    if allowed is not None:
        mask = jnp.concatenate([router.allowed_mask(chosen.experts, names, 1) for names in allowed])

    @jax.jit
    def run(params, tokens):
        hidden = transformer.forward(params, tokens, chosen, transformer.Compute(scan=True), allowed=mask).hidden
        return transformer.logits(params, hidden)

    found = np.asarray(run(params, jnp.asarray(tokens, jnp.int32)))
    return [row[: len(sequence)] for row, sequence in zip(found, sequences, strict=True)]


def check_case(facts: dict[str, np.ndarray], directory: pathlib.Path, names: list[str]) -> dict[str, float]:
    """Compares everything in a golden with our model in `directory`; returns the relative errors."""
    architecture, params = load(directory)
    seen = {}
    for k in sorted(int(key.split("/")[1]) for key in facts if key.startswith("logits/")):
        deleted = [int(key.split("/")[1]) for key in facts if key.startswith("without/") and key.endswith(f"/{k}")]
        continued = np.concatenate([facts["tokens"][:PROMPT], facts[f"continuation/{k}"]])
        allowed = [names, names, *([name for i, name in enumerate(names) if i != e] for e in deleted)] if deleted else None
        rows = logits(architecture, params, [facts["tokens"], continued] + [facts["tokens"]] * len(deleted), k, allowed)
        seen[f"k={k}"] = relative_error(rows[0], facts[f"logits/{k}"])
        compared = check_greedy(rows[1], PROMPT, facts[f"continuation/{k}"], facts[f"margins/{k}"])
        assert compared > 16, f"k={k}: a near-tie comes too early to compare continuations; choose another seed"
        for e, row in zip(deleted, rows[2:], strict=True):
            seen[f"k={k} without {e}"] = relative_error(row, facts[f"without/{e}/{k}"])
    return seen


def relative_error(ours: np.ndarray, theirs: np.ndarray) -> float:
    return float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def check_greedy(ours: np.ndarray, prompt: int, continuation: np.ndarray, margins: np.ndarray) -> int:
    """Asserts that our argmax continues alike up to the first near-tie; returns the number of tokens compared.

    `ours` are logits over prompt and their continuation: as long as all tokens so far are alike, its argmax at the next
    position is what our own greedy decoding would add.
    """
    ties = np.flatnonzero(margins < NEAR_TIE)
    count = int(ties[0]) if ties.size else len(continuation)
    np.testing.assert_array_equal(ours[prompt - 1 : -1].argmax(axis=-1)[:count], continuation[:count])
    return count
