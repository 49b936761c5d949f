"""Tree surgery: experts in and out of a parameter tree, by name. Pure functions of trees, no I/O.

An expert on its own is `{ffn: {gate, up, down}, router: {row, bias}}` with leaves `[L, ...]`, without an expert axis; of a
low-rank one, gate, up and down are `{a, b}`, what it adds to the public matrix being a b. Everything else of a model is its
shared tree `{embed, layers, head}`. `split` and `join` are inverses.
"""

import types
from collections.abc import Mapping, Sequence

import jax.numpy as jnp
import numpy as np

from flexjax import config as config_lib
from flexjax import errors, tree
from flexjax.model import router, transformer

Experts = Mapping[str, tree.Tree]
ALL_FULL: Mapping[str, int] = types.MappingProxyType({})


def width(expert: tree.Tree) -> int:
    """Hidden units of an expert's SwiGLU."""
    gate = expert["ffn"]["gate"]
    return int((gate["b"] if isinstance(gate, Mapping) else gate).shape[-1])


def rank(expert: tree.Tree) -> int:
    """The rank of what a low-rank expert adds to the public matrices; 0 for an expert with matrices of its own."""
    gate = expert["ffn"]["gate"]
    return int(gate["a"].shape[-1]) if isinstance(gate, Mapping) else 0


def group(widths: Mapping[str, int], ranks: Mapping[str, int] = ALL_FULL) -> dict[str, tuple[str, ...]]:
    """The standard banks: `public` alone, then `w<width>` for each width and `r<rank>` for each rank, in order.

    Args:
      widths: hidden units by expert.
      ranks: of the low-rank experts among them.
    """
    banks: dict[str, list[str]] = {}
    for name in router.canonical_order(widths):
        bank = f"r{ranks[name]}" if ranks.get(name) else f"w{widths[name]}"
        banks.setdefault(config_lib.PUBLIC if name == config_lib.PUBLIC else bank, []).append(name)
    return {bank: tuple(names) for bank, names in banks.items()}


def join(
    shared: tree.Tree, experts: Experts, groups: Mapping[str, Sequence[str]] | None = None
) -> tuple[tree.Tree, tuple[config_lib.Bank, ...]]:
    """Puts experts beside a shared tree; returns the parameters and their banks.

    Args:
      shared: {embed, layers, head}.
      experts: by name; `public` must be among them. With `public` alone the result is a dense model without a router.
      groups: bank name to expert names; None: `group`. In a bank where some have a bias, it is 0 for the others.

    Raises:
      ConfigError: `public` is missing, an expert is in no bank or in two, or experts of one bank differ in size.
    """
    if config_lib.PUBLIC not in experts:
        raise errors.ConfigError("a model needs the expert 'public'; it is the anchor's own and cannot be left out")
    if groups is None:
        groups = group(*({name: size(expert) for name, expert in experts.items()} for size in (width, rank)))
    if sorted(name for names in groups.values() for name in names) != sorted(experts):
        raise errors.ConfigError(f"the banks {dict(groups)} must hold each of the experts {', '.join(sorted(experts))} once")
    banks, trees = [], {}
    for bank, names in groups.items():
        sizes = sorted({(width(experts[name]), rank(experts[name])) for name in names})
        if len(sizes) > 1:
            said = ", ".join(f"rank {low}" if low else f"width {wide}" for wide, low in sizes)
            raise errors.ConfigError(f"bank '{bank}' mixes experts of {said}; give each size its own bank")
        members = [tree.flatten(experts[name]) for name in names]
        biases = [member.get("router/bias") for member in members]
        biased = len(experts) > 1 and any(bias is not None for bias in biases)
        if biased:
            zero = np.zeros(members[0]["router/row"].shape[:1], np.float32)
            members = [{"router/bias": zero, **member} for member in members]
        keep = [path for path in members[0] if path.startswith("ffn/") or len(experts) > 1]
        trees[bank] = tree.unflatten({path: _stack([member[path] for member in members]) for path in keep})
        banks.append(config_lib.Bank(bank, tuple(names), sizes[0][0], biased, sizes[0][1]))
    return {**shared, "experts": trees}, tuple(banks)


def split(params: tree.Tree, banks: Sequence[config_lib.Bank]) -> tuple[tree.Tree, dict[str, tree.Tree]]:
    """Inverse of `join`: returns (shared tree, experts by name)."""
    experts = {}
    for bank in banks:
        for slot, name in enumerate(bank.experts):
            experts[name] = tree.map_with_path(lambda _, leaf, slot=slot: leaf[:, slot], params["experts"][bank.name])
    return {key: value for key, value in params.items() if key != "experts"}, experts


def remove(params: tree.Tree, banks: Sequence[config_lib.Bank], name: str) -> tuple[tree.Tree, tuple[config_lib.Bank, ...]]:
    """The model as if `name` had never been merged, bit for bit.

    Raises:
      PolicyError: there is no such expert. ConfigError: it is `public`.
    """
    shared, experts = split(params, banks)
    if name not in experts:
        raise errors.PolicyError(f"no expert '{name}' to remove; the model has {', '.join(router.canonical_order(experts))}")
    if name == config_lib.PUBLIC:
        raise errors.ConfigError("'public' is the anchor's own expert and cannot be removed")
    return join(shared, {other: expert for other, expert in experts.items() if other != name})


def architecture(config: config_lib.ModelConfig, banks: tuple[config_lib.Bank, ...], top_k: int) -> transformer.Architecture:
    """The checked architecture of joined parameters."""
    result = transformer.Architecture(config, banks, top_k)
    transformer.check(result)
    return result


def narrow(expert: tree.Tree, d_ff: int) -> tree.Tree:
    """Keeps the d_ff hidden units of largest |gate| |up| |down| in each layer.

    Raises:
      ConfigError: the expert has fewer units than asked for, or is of low rank.
    """
    if rank(expert):
        raise errors.ConfigError(f"an expert of rank {rank(expert)} has no units of its own to keep; expand it first")
    if not 0 < d_ff <= width(expert):
        raise errors.ConfigError(f"expert.d_ff={d_ff} must lie between 1 and the public expert's {width(expert)}")
    if d_ff == width(expert):
        return expert
    ffn = {name: np.asarray(leaf, np.float32) for name, leaf in expert["ffn"].items()}
    strength = np.linalg.norm(ffn["gate"], axis=1) * np.linalg.norm(ffn["up"], axis=1) * np.linalg.norm(ffn["down"], axis=2)
    kept = np.sort(np.argsort(-strength, axis=1, kind="stable")[:, :d_ff], axis=1)  # [L, d_ff]
    columns = {name: np.take_along_axis(ffn[name], kept[:, None, :], axis=2) for name in ("gate", "up")}
    return {**expert, "ffn": {**columns, "down": np.take_along_axis(ffn["down"], kept[:, :, None], axis=1)}}


def low_rank(shapes: Mapping[str, tuple[int, ...]], rank: int, seed: int) -> tree.Tree:
    """Draws the FFN of a low-rank expert that starts as the public one: a from N(0, 1 / fan-in), b = 0, both float32.

    Args:
      shapes: of the public gate, up and down, layers first.
      rank: at least 1, at most the smaller side of a matrix.
      seed: decides `a`.

    Raises:
      ConfigError: the rank cannot be.
    """
    found = {}
    for stream, name in enumerate(("gate", "up", "down")):
        layers, fan_in, fan_out = shapes[name]
        if not 1 <= rank <= min(fan_in, fan_out):
            raise errors.ConfigError(f"expert.rank={rank} must lie between 1 and {min(fan_in, fan_out)}")
        a = np.random.default_rng((seed, stream)).standard_normal((layers, fan_in, rank), np.float32)
        found[name] = {"a": a * np.float32(fan_in**-0.5), "b": np.zeros((layers, rank, fan_out), np.float32)}
    return {"ffn": found}


def expand(expert: tree.Tree, public: tree.Tree) -> tree.Tree:
    """The full expert that a low-rank one stands for, in float32: each matrix the public one plus a b; others as they are.

    Args:
      expert, public: of all layers, or of the same one, then without the layer axis.
    """
    if not rank(expert):
        return expert

    def whole(name: str) -> np.ndarray:
        a, b = (np.asarray(expert["ffn"][name][side], np.float32) for side in ("a", "b"))
        return np.asarray(public["ffn"][name], np.float32) + a @ b

    return {**expert, "ffn": {name: whole(name) for name in expert["ffn"]}}


def _stack(leaves: Sequence[object]) -> object:
    library = np if all(isinstance(leaf, np.ndarray) for leaf in leaves) else jnp
    return library.stack(leaves, axis=1)
