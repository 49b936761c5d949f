"""The OLMo-2 decoder in its FlexOlmo form: shared layers, and experts that are named subtrees.

    params = {embed/embedding, layers/{attention, norms}, experts/<bank>/{ffn, router}, head/{norm, kernel}}

`Layer`, `Expert` (a bank of them) and `Router` are declared as NNX modules of ONE layer; their leaves are stacked over layers
`[L, ...]`. Outside this room a model is an `Architecture` and a plain tree of arrays. Dimension letters: B batch, T time,
D model, F hidden, N heads, K key-value heads, H head, E experts, V vocabulary, L layers.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from flexjax import config as config_lib
from flexjax import errors, tree
from flexjax.model import attention, kernels, moe, router

Params = tree.Tree


@dataclasses.dataclass(frozen=True)
class Architecture:
    """What a tree of parameters means: shapes, banks of experts, and how many experts a token uses."""

    config: config_lib.ModelConfig
    banks: tuple[config_lib.Bank, ...]
    top_k: int = 1

    @property
    def experts(self) -> tuple[str, ...]:
        """Names of all experts in canonical order."""
        return router.expert_names(self.banks)

    @property
    def routed(self) -> bool:
        """A model of one expert has no router."""
        return len(self.experts) > 1


@dataclasses.dataclass(frozen=True)
class Compute:
    """How a forward pass is carried out, never what it means."""

    dtype: Any = jnp.float32
    remat: str = "none"
    scan: bool = False


@dataclasses.dataclass
class KeyValues:
    """Cached keys and values of one layer, [B, S, K, H] each."""

    k: Array
    v: Array


jax.tree_util.register_dataclass(KeyValues)


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Output:
    """Final-norm hidden states [B, T, D]; routing statistics and the states that the routers read, stacked over layers."""

    hidden: Float[Array, "B T D"]
    routing: router.RoutingStats | None
    states: Float[Array, "L B T D"] | None


def dense_banks(config: config_lib.ModelConfig) -> tuple[config_lib.Bank, ...]:
    """The banks of an anchor: the public expert alone."""
    return (config_lib.Bank(config_lib.PUBLIC, (config_lib.PUBLIC,), config.d_ff, biased=False),)


def _weight(rngs: nnx.Rngs, std: float, **axes: int) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(rngs.params(), tuple(axes.values()), jnp.float32), axes=tuple(axes))


def _scale(**axes: int) -> nnx.Param:
    return nnx.Param(jnp.ones(tuple(axes.values()), jnp.float32), axes=tuple(axes))


class Layer(nnx.Module):
    """The shared part of one layer: attention and the norms on the sub-layers' outputs."""

    def __init__(self, config: config_lib.ModelConfig, rngs: nnx.Rngs) -> None:
        d, heads = config.d_model, config.num_heads * config.head_dim
        kv_heads = config.num_kv_heads * config.head_dim
        self.attention = nnx.Dict(
            q=_weight(rngs, config.init_std, embed=d, heads=heads),
            k=_weight(rngs, config.init_std, embed=d, kv_heads=kv_heads),
            v=_weight(rngs, config.init_std, embed=d, kv_heads=kv_heads),
            o=_weight(rngs, config.init_std, heads=heads, embed=d),
            q_norm=_scale(heads=heads),
            k_norm=_scale(kv_heads=kv_heads),
        )
        self.norms = nnx.Dict(attention=_scale(embed=d), ffn=_scale(embed=d))


class Expert(nnx.Module):
    """One bank of experts of one layer: SwiGLU weights with a leading expert axis."""

    def __init__(self, config: config_lib.ModelConfig, bank: config_lib.Bank, rngs: nnx.Rngs) -> None:
        e, d, f = len(bank.experts), config.d_model, bank.d_ff
        self.gate = _weight(rngs, config.init_std, expert=e, embed=d, mlp=f)
        self.up = _weight(rngs, config.init_std, expert=e, embed=d, mlp=f)
        self.down = _weight(rngs, config.init_std, expert=e, mlp=f, embed=d)


class Router(nnx.Module):
    """The rows and biases of one bank of one layer."""

    def __init__(self, config: config_lib.ModelConfig, bank: config_lib.Bank, rngs: nnx.Rngs) -> None:
        e = len(bank.experts)
        self.row = _weight(rngs, config.init_std, expert=e, embed=config.d_model)
        if bank.biased:
            self.bias = nnx.Param(jnp.zeros((e,), jnp.float32), axes=("expert",))


class Embedding(nnx.Module):
    """The token embedding."""

    def __init__(self, config: config_lib.ModelConfig, rngs: nnx.Rngs) -> None:
        self.embedding = _weight(rngs, config.init_std, vocab=config.vocab_size, embed=config.d_model)


class Head(nnx.Module):
    """The final norm and, unless tied, the output projection."""

    def __init__(self, config: config_lib.ModelConfig, rngs: nnx.Rngs) -> None:
        self.norm = _scale(embed=config.d_model)
        if not config.tied_head:
            self.kernel = _weight(rngs, config.init_std, embed=config.d_model, vocab=config.vocab_size)


Build = Callable[[nnx.Rngs], nnx.Module]


def _modules(architecture: Architecture) -> dict[str, tuple[Build, int]]:
    """Every module of a model by path, with the number of layers it is stacked over (0: not stacked)."""
    config = architecture.config
    modules: dict[str, tuple[Build, int]] = {
        "embed": (partial(Embedding, config), 0),
        "layers": (partial(Layer, config), config.num_layers),
        "head": (partial(Head, config), 0),
    }
    for bank in architecture.banks:
        modules[f"experts/{bank.name}/ffn"] = (partial(Expert, config, bank), config.num_layers)
        if architecture.routed:
            modules[f"experts/{bank.name}/router"] = (partial(Router, config, bank), config.num_layers)
    return modules


def init(architecture: Architecture, seed: int) -> Params:
    """Draws a parameter tree in float32, weights from N(0, init_std), norms 1, biases 0."""
    parts = {}
    for index, (path, (build, layers)) in enumerate(_modules(architecture).items()):

        def draw(key: Array, build: Build = build) -> Any:
            return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))

        key = jax.random.fold_in(jax.random.key(seed), index)
        parts[path] = jax.vmap(draw)(jax.random.split(key, layers)) if layers else draw(key)
    return tree.unflatten(parts)


def abstract(architecture: Architecture) -> Params:
    """The parameter tree as shapes and dtypes; costs nothing at any size."""
    return jax.eval_shape(lambda: init(architecture, 0))


def logical_axes(architecture: Architecture) -> Params:
    """The parameter tree with a tuple of logical axis names for each leaf."""
    parts = {}
    for path, (build, layers) in _modules(architecture).items():
        state = nnx.state(nnx.eval_shape(lambda build=build: build(nnx.Rngs(0))), nnx.Param)
        axes = {"/".join(map(str, key)): leaf.get_metadata("axes") for key, leaf in nnx.to_flat_state(state)}
        parts[path] = {key: (("layer", *names) if layers else names) for key, names in axes.items()}
    return tree.unflatten(tree.flatten({path: tree.unflatten(part) for path, part in parts.items()}))


def _bank_weights(params: Params, banks: tuple[config_lib.Bank, ...], routed: bool) -> tuple[Any, Any, Any]:
    """Splits one layer's experts into (ffns by bank, rows [E, D], biases [E]), rows and biases in canonical order."""
    ffns = [params[bank.name]["ffn"] for bank in banks]
    if not routed:
        return ffns, None, None
    routers = [params[bank.name]["router"] for bank in banks]
    zero = [jnp.zeros(len(bank.experts), jnp.float32) for bank in banks]
    order = jnp.array(router.positions(banks))
    rows = jnp.concatenate([r["row"] for r in routers])[order]
    biases = jnp.concatenate([r.get("bias", zero[i]) for i, r in enumerate(routers)])[order]
    return ffns, rows, biases


def attention_block(
    h: Float[Array, "B T D"],
    layer: Params,
    config: config_lib.ModelConfig,
    rotary: tuple[Array, Array],
    mask: Bool[Array, "#B 1 T S"],
    cache: tuple[KeyValues, Array] | None = None,
) -> tuple[Float[Array, "B T D"], KeyValues]:
    """h + RMS(attention(h)); with a cache (keys and values so far, write position) the new ones are written into it."""
    B, T, _ = h.shape
    w = layer["attention"]
    q = attention.rms_norm(kernels.project(h, w["q"]), w["q_norm"], config.norm_eps)
    k = attention.rms_norm(kernels.project(h, w["k"]), w["k_norm"], config.norm_eps)
    v = kernels.project(h, w["v"]).reshape(B, T, config.num_kv_heads, config.head_dim)
    q = attention.rotate(q.reshape(B, T, config.num_heads, config.head_dim), *rotary)
    k = attention.rotate(k.reshape(B, T, config.num_kv_heads, config.head_dim), *rotary)
    if cache is not None:
        past, position = cache
        k = jax.lax.dynamic_update_slice_in_dim(past.k, k.astype(past.k.dtype), position, axis=1)
        v = jax.lax.dynamic_update_slice_in_dim(past.v, v.astype(past.v.dtype), position, axis=1)
    out = attention.attend(q, k, v, mask).reshape(B, T, -1)
    out = attention.rms_norm(kernels.project(out, w["o"]), layer["norms"]["attention"], config.norm_eps)
    return h + out, KeyValues(k, v)


def expert_block(
    h: Float[Array, "B T D"],
    layer: Params,
    experts: Params,
    architecture: Architecture,
    allowed: Bool[Array, "B E"] | None,
    skip_idle: bool = False,
) -> tuple[Float[Array, "B T D"], router.Routing | None]:
    """h + RMS(mixture(h)); router and experts read the un-normalised h."""
    banks = architecture.banks
    ffns, rows, biases = _bank_weights(experts, banks, architecture.routed)
    ffns = jax.tree.map(lambda w: w.astype(h.dtype), ffns)
    if rows is None:
        routing = None
        y = moe.swiglu(h, ffns[0]["gate"][0], ffns[0]["up"][0], ffns[0]["down"][0])
    else:
        routing = router.route(h, rows, biases, architecture.top_k, allowed)
        if skip_idle:
            y = moe.dense(h, ffns, banks, router.dense_gates(routing), allowed, skip_idle=True)
        else:
            y = moe.apply(h, ffns, banks, routing, allowed)
    return h + attention.rms_norm(y, layer["norms"]["ffn"], architecture.config.norm_eps), routing


REMAT: dict[str, Callable[[Any], Any]] = {
    "none": lambda function: function,
    "dots": lambda function: jax.checkpoint(function, policy=jax.checkpoint_policies.checkpoint_dots),
    "full": lambda function: jax.checkpoint(function),
}


def _unstack(stacked: Params, layers: int) -> list[Params]:
    """Splits [L, ...] leaves by one operation whose gradient is one concatenation, not L padded sums."""
    flat = {path: jax.lax.split(leaf, (1,) * layers, axis=0) for path, leaf in tree.flatten(stacked).items()}
    return [tree.unflatten({path: slices[i][0] for path, slices in flat.items()}) for i in range(layers)]


def forward(
    params: Params,
    tokens: Int[Array, "B T"],
    architecture: Architecture,
    compute: Compute = Compute(),
    *,
    allowed: Bool[Array, "B E"] | None = None,
    segments: Int[Array, "B T"] | None = None,
    weights: Float[Array, "B T"] | None = None,
    keep_states: bool = False,
) -> Output:
    """Runs the decoder up to the final norm (`logits` and `losses.cross_entropy` apply the head).

    Args:
      params: the tree of `init`, biases effective (at most 0).
      tokens: ids below the vocabulary size.
      allowed: experts that each row may use, in canonical order; None allows all.
      segments: document numbers; tokens attend within their own only. None: the whole window.
      weights: token weights of the routing statistics; None weighs all alike.
      keep_states: also return the residual states that the routers read, [L, B, T, D].
    """
    config = architecture.config
    B, T = tokens.shape
    rotary = attention.rotary(jnp.broadcast_to(jnp.arange(T), (B, T)), config.head_dim, config.rope_theta)
    mask = attention.causal_mask(T, segments)
    weights = jnp.ones((B, T), jnp.float32) if weights is None else weights

    def layer_step(h: Array, leaves: Params) -> tuple[Array, tuple[Any, Any]]:
        with jax.named_scope("attention"):
            state, _ = attention_block(h, leaves["layers"], config, rotary, mask)
        with jax.named_scope("experts"):
            h, routing = expert_block(state, leaves["layers"], leaves["experts"], architecture, allowed)
        stats = None if routing is None else router.stats(routing, weights)
        return h, (stats, state if keep_states else None)

    step = REMAT[compute.remat](layer_step)
    stacked = {"layers": params["layers"], "experts": params["experts"]}
    h = params["embed"]["embedding"][tokens].astype(compute.dtype)
    if compute.scan:
        h, (stats, states) = jax.lax.scan(step, h, stacked)
    else:
        collected = []
        for leaves in _unstack(stacked, config.num_layers):
            h, extra = step(h, leaves)
            collected.append(extra)
        stats, states = jax.tree.map(lambda *leaves: jnp.stack(leaves), *collected)
    return Output(attention.rms_norm(h, params["head"]["norm"], config.norm_eps), stats, states)


def head_kernel(params: Params) -> Float[Array, "D V"]:
    """The output projection; a tied head is the transposed embedding."""
    return params["head"]["kernel"] if "kernel" in params["head"] else params["embed"]["embedding"].T


def logits(params: Params, hidden: Float[Array, "... D"]) -> Float[Array, "... V"]:
    """Next-token logits in float32."""
    return jnp.dot(hidden, head_kernel(params).astype(hidden.dtype), preferred_element_type=jnp.float32)


def check(architecture: Architecture) -> None:
    """Raises ConfigError if the shapes or the number of active experts make no model."""
    config, names = architecture.config, architecture.experts
    if config.num_heads % config.num_kv_heads:
        raise errors.ConfigError(f"model.num_heads={config.num_heads} is no multiple of num_kv_heads={config.num_kv_heads}")
    if config.head_dim % 2:
        raise errors.ConfigError(f"model.head_dim={config.head_dim} must be even for rotary positions")
    if not 1 <= architecture.top_k <= len(names):
        raise errors.ConfigError(
            f"top_k={architecture.top_k} must lie between 1 and the {len(names)} experts {', '.join(names)}"
        )
    if len(set(names)) != len(names):
        raise errors.ConfigError(f"expert names must be unique; got {', '.join(names)}")
