"""`config.json` of a Hugging Face folder to and from our own description of a model."""

import dataclasses
import json
from typing import Any

from etils import epath

from flexjax import config as config_lib
from flexjax import errors
from flexjax.experts.huggingface import safetensors_io as io

CONFIG = "config.json"
GENERATION = "generation_config.json"
DENSE, MIXTURE = "Olmo2ForCausalLM", "FlexOlmoForCausalLM"
MODEL_TYPE = {DENSE: "olmo2", MIXTURE: "flex_olmo"}
# What transformers takes for a field that a config.json leaves out.
DEFAULTS: dict[str, dict[str, Any]] = {
    DENSE: {"rms_norm_eps": 1e-5, "rope_theta": 10_000.0, "max_position_embeddings": 2048},
    MIXTURE: {"rms_norm_eps": 1e-6, "rope_theta": 500_000.0, "max_position_embeddings": 4096},
}
# Settings that our forward pass has in one form only.
ONLY: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False,),
    "clip_qkv": (None,),
    "sliding_window": (None,),
    "quantization_config": (None,),
}
SPECIAL = ("bos_token_id", "eos_token_id", "pad_token_id")
DEFAULT_POSITIONS = 4096
MAX_COUNT = 1024  # of layers and of experts


@dataclasses.dataclass(frozen=True)
class Description:
    """What a folder says of its model. `experts` is 0 for a dense OLMo-2; `record` is what we keep to give it back."""

    model: config_lib.ModelConfig
    experts: int
    top_k: int
    record: dict[str, Any]


def read_config(directory: epath.Path) -> Description:
    """Reads `config.json`.

    Raises:
      StorageError: there is none. IntegrityError: it is broken, or a size is missing or no size.
      ConfigError: the architecture or a setting of it is not supported.
    """
    file = directory / CONFIG
    if not file.exists():
        raise errors.StorageError(f"{directory} is no Hugging Face model: it has no {CONFIG}; give the folder that holds one")
    raw = io.read_json(file)
    architecture = raw.get("architectures")
    if not isinstance(architecture, list) or len(architecture) != 1 or architecture[0] not in MODEL_TYPE:
        raise errors.ConfigError(f"{file}: architectures is {str(architecture)[:60]}; supported are [{DENSE}] and [{MIXTURE}]")
    for name, allowed in ONLY.items():
        if raw.get(name, allowed[0]) not in allowed:
            raise errors.ConfigError(f"{file}: {name} is {str(raw[name])[:40]}; only {str(allowed[0]).lower()} is supported")
    defaults, heads = DEFAULTS[architecture[0]], _size(raw, "num_attention_heads", file)
    hidden = _size(raw, "hidden_size", file)
    model = config_lib.ModelConfig(
        vocab_size=_size(raw, "vocab_size", file),
        d_model=hidden,
        num_layers=_size(raw, "num_hidden_layers", file, most=MAX_COUNT),
        num_heads=heads,
        num_kv_heads=_size(raw, "num_key_value_heads", file, heads),
        head_dim=_size(raw, "head_dim", file, hidden // heads),
        d_ff=_size(raw, "intermediate_size", file),
        tied_head=_flag(raw, "tie_word_embeddings", file),
        rope_theta=_rope_theta(raw, defaults["rope_theta"], file),
        norm_eps=_number(raw, "rms_norm_eps", file, defaults["rms_norm_eps"]),
    )
    record: dict[str, Any] = {name: _token(raw, name, file) for name in SPECIAL}
    record["max_position_embeddings"] = _size(raw, "max_position_embeddings", file, defaults["max_position_embeddings"])
    if architecture[0] == DENSE:
        return Description(model, 0, 1, record)
    experts, top_k = _size(raw, "num_experts", file, most=MAX_COUNT), _size(raw, "num_experts_per_tok", file)
    if top_k > experts:
        raise errors.ConfigError(f"{file}: num_experts_per_tok is {top_k}, more than its {experts} experts; lower it")
    return Description(model, experts, top_k, record)


def _size(raw: dict[str, Any], name: str, file: epath.Path, default: int | None = None, most: int = 2**24) -> int:
    value = default if raw.get(name) is None else raw[name]
    if type(value) is not int or not 0 < value <= most:
        raise errors.IntegrityError(f"{file}: {name} is {str(value)[:20]}, expected a plausible size; restore the file")
    return value


def _number(raw: dict[str, Any], name: str, file: epath.Path, default: float) -> float:
    value = raw.get(name, default)
    if type(value) not in (int, float) or not 0 < value < float("inf"):
        raise errors.IntegrityError(f"{file}: {name} is {str(value)[:20]}, expected a positive number; restore the file")
    return float(value)


def _token(raw: dict[str, Any], name: str, file: epath.Path) -> int | list[int] | None:
    value = raw.get(name)
    for each in value if isinstance(value, list) else [0 if value is None else value]:
        if type(each) is not int or not 0 <= each < 2**24:
            raise errors.IntegrityError(f"{file}: {name} is {str(value)[:20]}, expected token ids or null; restore the file")
    return value


def _flag(raw: dict[str, Any], name: str, file: epath.Path) -> bool:
    value = raw.get(name, False)
    if type(value) is not bool:
        raise errors.IntegrityError(f"{file}: {name} is {str(value)[:20]}, expected true or false; restore the file")
    return value


def _rope_theta(raw: dict[str, Any], default: float, file: epath.Path) -> float:
    """transformers 4 has `rope_theta` and `rope_scaling`, transformers 5 has both in `rope_parameters`."""
    found: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        entry = {} if raw.get(name) is None else raw[name]
        if not isinstance(entry, dict):
            raise errors.IntegrityError(f"{file}: {name} is {str(entry)[:20]}, expected an object; restore the file")
        if entry.get("rope_type", entry.get("type", "default")) != "default" or entry.get("partial_rotary_factor", 1) != 1:
            raise errors.ConfigError(f"{file}: {name} rescales rotary positions; only the default is supported")
        found |= {key: value for key, value in entry.items() if key == "rope_theta"}
    return _number(found or raw, "rope_theta", file, default)


def contents(description: Description, dtype: str) -> dict[str, dict[str, Any]]:
    """What `generation_config.json` and `config.json` hold, by file name; readable by transformers 4 and 5."""
    model, record, mixture = description.model, description.record, description.experts > 0
    architecture = MIXTURE if mixture else DENSE
    special = {name: record.get(name) for name in SPECIAL}
    content: dict[str, Any] = {
        "architectures": [architecture],
        "model_type": MODEL_TYPE[architecture],
        "vocab_size": model.vocab_size,
        "hidden_size": model.d_model,
        "intermediate_size": model.d_ff,
        "num_hidden_layers": model.num_layers,
        "num_attention_heads": model.num_heads,
        "num_key_value_heads": model.num_kv_heads,
        "head_dim": model.head_dim,
        "hidden_act": "silu",
        "attention_bias": False,
        "attention_dropout": 0.0,
        "max_position_embeddings": record.get("max_position_embeddings", DEFAULT_POSITIONS),
        "rms_norm_eps": model.norm_eps,
        "rope_parameters": {"rope_theta": model.rope_theta, "rope_type": "default"},
        "rope_theta": model.rope_theta,
        "tie_word_embeddings": model.tied_head,
        "dtype": dtype,
        "use_cache": True,
        **special,
    }
    if mixture:
        content["num_experts"] = description.experts
        content["num_experts_per_tok"] = min(description.top_k, description.experts)
        content["norm_topk_prob"] = False
    generation = {name: value for name, value in special.items() if value is not None}
    return {GENERATION: generation, CONFIG: content}


def encode(content: dict[str, Any]) -> str:
    """JSON as transformers writes it."""
    return json.dumps(content, indent=2, sort_keys=True) + "\n"
