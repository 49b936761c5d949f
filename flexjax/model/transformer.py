"""The OLMo-2 decoder in its FlexOlmo form: shared layers, and experts that are named subtrees.

    params = {embed/embedding, layers/{attention, norms}, experts/<bank>/{ffn, router}, head/{norm, kernel}}

`modules` declares ONE layer; here its leaves are stacked over layers `[L, ...]`. Outside this room a model is an
`Architecture` and a plain tree of arrays. Dimension letters: B batch, T time, D model, F hidden, N heads, K key-value heads,
H head, E experts, V vocabulary, L layers.
"""

import dataclasses
from collections.abc import Callable
from functools import lru_cache, partial
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import Mesh
from jaxtyping import Array, Bool, Float, Int

from flexjax import config as config_lib
from flexjax import errors, sharding, tree
from flexjax.model import attention, collectives, dispatch, low_rank, modules, moe, router

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

    @property
    def sparse(self) -> bool:
        """Whether tokens are sent to the experts they chose, rather than every expert computed on every token."""
        return moe.is_sparse(self.banks, self.top_k)


@dataclasses.dataclass(frozen=True)
class Compute:
    """How and where a forward pass is carried out, never what it means.

    Attributes:
      dtype: of the activations.
      remat: what the backward pass computes again, a key of `REMAT`.
      scan: whether the layers are one loop, or laid out one by one.
      mesh: the devices; None for one.
      dispatch: how tokens reach the experts they chose.
    """

    dtype: Any = jnp.float32
    remat: str = "none"
    scan: bool = False
    mesh: Mesh | None = None
    dispatch: moe.Dispatch = moe.Dispatch()


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


Build = Callable[[nnx.Rngs], nnx.Module]


def _modules(architecture: Architecture) -> dict[str, tuple[Build, int]]:
    """Every module of a model by path, with the number of layers it is stacked over (0: not stacked)."""
    config = architecture.config
    parts: dict[str, tuple[Build, int]] = {
        "embed": (partial(modules.Embedding, config), 0),
        "layers": (partial(modules.Layer, config), config.num_layers),
        "head": (partial(modules.Head, config), 0),
    }
    for bank in architecture.banks:
        kind = modules.LowRank if bank.rank else modules.Expert
        parts[f"experts/{bank.name}/ffn"] = (partial(kind, config, bank), config.num_layers)
        if architecture.routed:
            parts[f"experts/{bank.name}/router"] = (partial(modules.Router, config, bank), config.num_layers)
    return parts


def init(architecture: Architecture, seed: int) -> Params:
    """Draws a parameter tree in float32, weights from N(0, init_std), norms 1, biases 0; low-rank experts add 0."""
    parts = {}
    for index, (path, (build, layers)) in enumerate(_modules(architecture).items()):

        def draw(key: Array, build: Build = build) -> Any:
            return nnx.to_pure_dict(nnx.state(build(nnx.Rngs(key)), nnx.Param))

        key = jax.random.fold_in(jax.random.key(seed), index)
        parts[path] = jax.vmap(draw)(jax.random.split(key, layers)) if layers else draw(key)
    return tree.unflatten(parts)


Leaf = tuple[jax.ShapeDtypeStruct, tuple[str, ...]]


@lru_cache(maxsize=64)
def _leaves(config: tuple[Any, ...], banks: tuple[config_lib.Bank, ...], top_k: int) -> dict[str, Leaf]:
    """Shape and logical axes of every parameter; asked for many times in a job, and slow to find out."""
    found = {}
    for path, (build, layers) in _modules(Architecture(config_lib.ModelConfig(*config), banks, top_k)).items():
        state = nnx.state(nnx.eval_shape(lambda build=build: build(nnx.Rngs(0))), nnx.Param)
        for key, leaf in nnx.to_flat_state(state):
            shape, axes = leaf.get_value().shape, leaf.get_metadata("axes")
            shape, axes = ((layers, *shape), ("layer", *axes)) if layers else (shape, axes)
            found["/".join((path, *map(str, key)))] = (jax.ShapeDtypeStruct(shape, leaf.get_value().dtype), axes)
    return found


def _described(architecture: Architecture) -> dict[str, Leaf]:
    return _leaves(dataclasses.astuple(architecture.config), architecture.banks, architecture.top_k)


def abstract(architecture: Architecture) -> Params:
    """The parameter tree as shapes and dtypes; costs nothing at any size."""
    return tree.unflatten({path: shape for path, (shape, _) in _described(architecture).items()})


def logical_axes(architecture: Architecture) -> Params:
    """The parameter tree with a tuple of logical axis names (keys of `sharding.RULES`) for each leaf."""
    apart = living_apart(architecture)

    def place(path: str, names: tuple[str, ...]) -> tuple[str, ...]:
        return names if path.startswith(apart) else tuple("whole" if name == "expert" else name for name in names)

    return tree.unflatten({path: place(path, names) for path, (_, names) in _described(architecture).items()})


def living_apart(architecture: Architecture) -> tuple[str, ...]:
    """Where the weights of experts begin that a mesh's `expert` axis splits: none if every token needs every expert."""
    banks = dispatch.apart(architecture.banks) if architecture.sparse else ()
    return tuple(f"experts/{bank.name}/ffn/" for bank in banks)


def splits(architecture: Architecture) -> dict[str, tuple[int, tuple[str, ...]]]:
    """What a mesh has to divide: setting to (its value, the mesh axes that split it)."""
    config, rules = architecture.config, sharding.RULES
    return {
        "model.num_heads": (config.num_heads, rules["heads"]),
        "model.num_kv_heads": (config.num_kv_heads, rules["kv_heads"]),
        "model.vocab_size": (config.vocab_size, rules["vocab"]),
        "model.d_model": (config.d_model, rules["column"]),
        **{f"d_ff of bank '{bank.name}'": (bank.d_ff, rules["column" if bank.rank else "mlp"]) for bank in architecture.banks},
    }


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


def expert_block(
    h: Float[Array, "B T D"],
    layer: Params,
    experts: Params,
    architecture: Architecture,
    allowed: Bool[Array, "B E"] | None,
    skip_idle: bool = False,
    compute: Compute = Compute(),
    read: Float[Array, "B T D"] | None = None,
) -> tuple[Float[Array, "B T D"], router.Routing | None]:
    """h + RMS(mixture(h)); the experts read the un-normalised h, and so does the router, unless it is given `read`."""
    banks, mesh = architecture.banks, compute.mesh
    ffns, rows, biases = _bank_weights(experts, banks, architecture.routed)
    ffns = jax.tree.map(lambda w: w.astype(h.dtype), ffns)
    if rows is None:
        routing = None
        y = moe.swiglu(h, ffns[0]["gate"][0], ffns[0]["up"][0], ffns[0]["down"][0], mesh)
    else:
        routing = collectives.route(h if read is None else read, rows, biases, architecture.top_k, allowed, mesh)
        if skip_idle:
            y = moe.dense(h, ffns, banks, router.dense_gates(routing), allowed, skip_idle=True)
        else:
            y = moe.apply(h, ffns, banks, routing, allowed, mesh, compute.dispatch)
    y = sharding.constrain(y, mesh, "batch", None, None)
    return h + attention.rms_norm(y, layer["norms"]["ffn"], architecture.config.norm_eps), routing


PRODUCTS = jax.checkpoint_policies.save_from_both_policies(
    jax.checkpoint_policies.checkpoint_dots, jax.checkpoint_policies.save_only_these_names(dispatch.KEPT)
)
REMAT: dict[str, Callable[[Any], Any]] = {
    "none": lambda function: function,
    "dots": lambda function: jax.checkpoint(function, policy=PRODUCTS),
    "full": lambda function: jax.checkpoint(function),
}


def _remat(function: Any, compute: Compute) -> Any:
    """What the backward pass computes again; a weight that was gathered is gathered again rather than kept whole."""
    if compute.remat == "none" and sharding.size(compute.mesh, *sharding.RULES["embed"]) > 1:
        return jax.checkpoint(function, policy=PRODUCTS)
    return REMAT[compute.remat](function)


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
      keep_states: also return what the routers read, [L, B, T, D]: residual states, or their running means.
    """
    config, mesh = architecture.config, compute.mesh
    B, T = tokens.shape
    positions = sharding.constrain(jnp.broadcast_to(jnp.arange(T), (B, T)), mesh, "batch", None)
    rotary = attention.rotary(positions, config.head_dim, config.rope_theta)
    mask = attention.causal_mask(T, segments)
    place = positions if segments is None else router.place_in_document(segments)
    weights = jnp.ones((B, T), jnp.float32) if weights is None else weights
    axes = {}
    if sharding.size(mesh, *sharding.RULES["embed"]) > 1:
        axes = {part: names for part, names in logical_axes(architecture).items() if part in ("layers", "experts")}

    def layer_step(h: Array, leaves: Params) -> tuple[Array, tuple[Any, Any]]:
        if axes:
            leaves = collectives.gather(leaves, axes, compute.dtype, mesh, apart=architecture.sparse)
        with jax.named_scope("attention"):
            state, _ = attention.block(h, leaves["layers"], config, rotary, mask, mesh=mesh)
        with jax.named_scope("experts"):
            read = router.remember(state, place, config.router_memory)
            h, routing = expert_block(
                state, leaves["layers"], leaves["experts"], architecture, allowed, compute=compute, read=read
            )
        stats = None if routing is None else router.stats(routing, weights)
        return h, (stats, read if keep_states else None)

    step = jax.jit(_remat(layer_step, compute))  # traced once for all layers
    stacked = {"layers": params["layers"], "experts": params["experts"]}
    h = collectives.look_up(params["embed"]["embedding"], tokens, compute.dtype, mesh)
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
    if not 0 <= config.router_memory < 1:
        raise errors.ConfigError(f"model.router_memory={config.router_memory} must lie in [0, 1), as 0.98: about 50 tokens")
    low_rank.check(architecture.banks, config)
