"""Which Hugging Face tensor is which of ours: the one table that import and export both walk."""

import dataclasses
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from flexjax import config as config_lib
from flexjax import errors
from flexjax.experts import schema
from flexjax.experts.huggingface import safetensors_io as io

ROW, BIAS = "expert/router/row", "expert/router/bias"
# Our path -> (name within Hugging Face's layer, whether it is stored transposed).
LAYER = {
    "layers/attention/q": ("self_attn.q_proj.weight", True),
    "layers/attention/k": ("self_attn.k_proj.weight", True),
    "layers/attention/v": ("self_attn.v_proj.weight", True),
    "layers/attention/o": ("self_attn.o_proj.weight", True),
    "layers/attention/q_norm": ("self_attn.q_norm.weight", False),
    "layers/attention/k_norm": ("self_attn.k_norm.weight", False),
    "layers/norms/attention": ("post_attention_layernorm.weight", False),
    "layers/norms/ffn": ("post_feedforward_layernorm.weight", False),
}
OUTSIDE = {
    "embed/embedding": ("model.embed_tokens.weight", False),
    "head/norm": ("model.norm.weight", False),
    "head/kernel": ("lm_head.weight", True),
}
GATE, UP, DOWN = "expert/ffn/gate", "expert/ffn/up", "expert/ffn/down"
FFN = {GATE: "gate_proj.weight", UP: "up_proj.weight", DOWN: "down_proj.weight"}


@dataclasses.dataclass(frozen=True)
class Link:
    """One Hugging Face tensor and the slice of ours that it is.

    `expert` is None for shared tensors and for a layer's router matrix, which holds the rows of all experts.
    """

    name: str
    shape: tuple[int, ...]
    path: str
    layer: int | None
    expert: int | None
    transposed: bool

    @property
    def ours(self) -> tuple[int, ...]:
        """Shape of our slice, without the layer axis."""
        return self.shape[::-1] if self.transposed else self.shape


def table(config: config_lib.ModelConfig, experts: int) -> list[Link]:
    """All tensors of a model, in the order of the forward pass; `experts` is 0 for a dense OLMo-2."""
    shared = schema.shared_shapes(config)
    narrow, wide = config.d_model, config.d_ff
    ffn = {"expert/ffn/gate": (wide, narrow), "expert/ffn/up": (wide, narrow), "expert/ffn/down": (narrow, wide)}

    def link(name: str, path: str, shape: tuple[int, ...], layer: int | None, transposed: bool) -> Link:
        return Link(name, shape[::-1] if transposed else shape, path, layer, None, transposed)

    outside = {path: link(name, path, shared[path], None, t) for path, (name, t) in OUTSIDE.items() if path in shared}
    found = [outside["embed/embedding"]]
    for layer in range(config.num_layers):
        prefix = f"model.layers.{layer}."
        found += [link(prefix + n, path, shared[path][1:], layer, t) for path, (n, t) in LAYER.items()]
        if experts:
            found.append(Link(prefix + "mlp.gate.weight", (experts, config.d_model), ROW, layer, None, False))
        for e in range(max(1, experts)):
            home = prefix + (f"mlp.experts.{e}." if experts else "mlp.")
            found += [Link(home + n, ffn[path], path, layer, e, True) for path, n in FFN.items()]
    return found + [outside[path] for path in ("head/norm", "head/kernel") if path in outside]


@dataclasses.dataclass(frozen=True)
class Place:
    """Where a link's rows begin in a stored tensor: not at 0 where experts are fused."""

    stored: io.Stored
    start: int

    def rows(self, link: Link) -> Iterator[np.ndarray]:
        count = link.shape[0] if len(link.shape) > 1 else 1
        return self.stored.rows(self.start, self.start + count)


def locate(wanted_links: Sequence[Link], tensors: Mapping[str, io.Stored], config: config_lib.ModelConfig) -> dict[Link, Place]:
    """Finds every link among the tensors of a folder, per expert or fused as transformers 5 holds them in memory.

    Raises:
      IntegrityError: a tensor is missing, left over, of another shape, or not of the dtype of the other layers.
    """
    fused = any(name.endswith("mlp.experts.gate_up_proj") for name in tensors)
    experts = 1 + max((link.expert or 0) for link in wanted_links)
    d, f = config.d_model, config.d_ff
    wanted: dict[Link, tuple[str, tuple[int, ...], int]] = {}
    for link in wanted_links:
        wanted[link] = (link.name, link.shape, 0)
        if fused and link.path in FFN:
            e, home = link.expert or 0, f"model.layers.{link.layer}.mlp.experts."
            if link.path == "expert/ffn/down":
                wanted[link] = (home + "down_proj", (experts, d, f), e * d)
            else:
                start = 2 * f * e + (f if link.path == "expert/ffn/up" else 0)
                wanted[link] = (home + "gate_up_proj", (experts, 2 * f, d), start)
    folder = next(iter(tensors.values())).file.parent if tensors else "the folder"
    expected = {name: shape for name, shape, _ in wanted.values()}
    for name in sorted(set(expected) - set(tensors)):
        raise errors.IntegrityError(f"{folder}: tensor {name} is missing; expected shape {list(expected[name])}")
    for name in sorted(set(tensors) - set(expected)):
        raise errors.IntegrityError(f"{folder}: tensor {name[:80]} is unexpected; config.json describes a model without it")
    found: dict[Link, Place] = {}
    dtypes: dict[tuple[str, int | None], str] = {}
    for link, (name, shape, start) in wanted.items():
        stored = tensors[name]
        if stored.shape != shape:
            raise errors.IntegrityError(f"{folder}: tensor {name} has shape {list(stored.shape)}, expected {list(shape)}")
        dtype = dtypes.setdefault((link.path, link.expert), stored.dtype)
        if dtype != stored.dtype:
            raise errors.IntegrityError(
                f"{folder}: tensor {name} is {stored.dtype}, in layer 0 it is {dtype}; cast one of them"
            )
        found[link] = Place(stored, start)
    return found
