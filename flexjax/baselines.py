"""The other ways to make one model out of several that were trained apart: what FlexOlmo is measured against.

A dense model has the bank `public` alone: the anchor, and what further training makes of it. Nothing here trains: these are
starting points for the training loop, and means of what it made. What several models make of one text: `eval.mixtures`.

    soup             mean of the weights (Model soups, Wortsman et al. 2022)
    no coordination  FFNs of dense experts beside the anchor's, nothing trained after (FlexOlmo, Table 1)
    BTX              FFNs into an MoE, the mean of all else, then trained (Branch-Train-MiX, Sukhbaatar et al. 2024)
    joint            copies of the anchor's FFN, trained together on everything (Sparse Upcycling, Komatsuzaki et al. 2023)
    LoRA             a low-rank adapter for each domain (Hu et al. 2022)
    FedAvg           rounds of local training and averaging (McMahan et al. 2017)
"""

import dataclasses
import math
from collections.abc import Mapping, Sequence

import numpy as np
from jaxtyping import Float

from flexjax import config as config_lib
from flexjax import errors, tree
from flexjax.experts import surgery
from flexjax.model import router, transformer

Params = tree.Tree
Rows = Mapping[str, Float[np.ndarray, "L D"]]

JOINT = "joint"  # the bank of all experts that are trained together, `public` among them
OWNERS = "owners"  # the bank of all but `public`
ADAPTER = r"experts/.*/ffn/(gate|up|down)/(a|b)"  # what trains of a LoRA model
NEVER = -1e4  # a bias at which a probability is exactly 0


def soup(models: Sequence[Params], weights: Sequence[float] | None = None) -> Params:
    """The weighted mean of several parameter trees, each leaf in its own dtype.

    Args:
      models: trees with the same paths and shapes.
      weights: of each, not negative, of any sum above 0; None: all alike.

    Raises:
      ConfigError: weights or trees do not go together.
    """
    share = np.ones(len(models)) if weights is None else np.array(weights, np.float64)
    if not models or share.shape != (len(models),) or not np.isfinite(share).all() or share.min() < 0 or share.sum() == 0:
        raise errors.ConfigError(
            f"a mean of {len(models)} models cannot have the weights {share.tolist()}; give one of at least 0 for each"
        )
    share = share / share.sum()
    flat = [tree.flatten(model) for model in models]
    for other in flat[1:]:
        if odd := sorted(set(flat[0]) ^ set(other)):
            raise errors.ConfigError(f"{odd[0]} is not in all of the models; average models of one architecture")
        for path, leaf in flat[0].items():
            if leaf.shape != other[path].shape:
                raise errors.ConfigError(
                    f"{path} is {list(leaf.shape)} in one model and {list(other[path].shape)} in another; "
                    "average models of one architecture"
                )

    def mean(path: str) -> np.ndarray:
        leaves = [np.asarray(leaves[path]) for leaves in flat]
        total = sum((part * leaf.astype(np.float64) for part, leaf in zip(share, leaves, strict=True)), np.float64(0))
        return np.asarray(total).astype(leaves[0].dtype)

    return tree.unflatten({path: mean(path) for path in flat[0]})


def no_coordination(
    architecture: transformer.Architecture, anchor: Params, dense: Mapping[str, Params], rows: Rows
) -> tuple[transformer.Architecture, Params]:
    """The FFNs of dense experts beside the anchor's, all active; everything else is the anchor's.

    Args:
      architecture: of the anchor and of the dense experts.
      anchor: its parameters.
      dense: the anchor trained further on each domain, by name.
      rows: router rows of `public` and of each name.

    Raises:
      ConfigError: the models are not dense, or the rows are not those of the experts.
    """
    ffns = {name: _dense(architecture, params)[1] for name, params in {config_lib.PUBLIC: anchor, **dense}.items()}
    return _routed(architecture.config, _dense(architecture, anchor)[0], ffns, rows, len(ffns))


def branch_train_mix(
    architecture: transformer.Architecture, anchor: Params, dense: Mapping[str, Params], seed: int, top_k: int = 2
) -> tuple[transformer.Architecture, Params]:
    """BTX before its training: the FFNs of the anchor and of the dense experts in the bank `JOINT`.

    All other weights are the mean over the models whose FFN is there, the anchor among them; router rows are drawn from
    N(0, init_std). The caller then trains everything on public text, with a load-balancing loss as BTX has.

    Args:
      architecture, anchor, dense: as for `no_coordination`.
      seed: of the rows.
      top_k: experts per token; 2 in BTX.

    Raises:
      ConfigError: the models are not dense, or differ in their parameters.
    """
    parts = {name: _dense(architecture, params) for name, params in {config_lib.PUBLIC: anchor, **dense}.items()}
    config, names = architecture.config, router.canonical_order(parts)
    drawn = np.random.default_rng(seed).standard_normal((len(names), config.num_layers, config.d_model)) * config.init_std
    rows = dict(zip(names, drawn.astype(np.float32), strict=True))
    shared = soup([shared for shared, _ in parts.values()])
    return _routed(config, shared, {name: parts[name][1] for name in names}, rows, top_k, {JOINT: names})


def copies(
    architecture: transformer.Architecture,
    anchor: Params,
    rows: Rows,
    *,
    public_apart: bool,
    biased: bool = False,
    top_k: int | None = None,
) -> tuple[transformer.Architecture, Params]:
    """The upcycled start of a joint MoE: `public`, and a copy of it for each other row; computes what the anchor computes.

    Args:
      architecture, anchor: a dense model.
      rows: router rows by expert, `public` among them.
      public_apart: `public` has a bank of its own beside the bank `OWNERS` and can stay frozen, the fair twin of what owners
        train; else all are in the bank `JOINT`, to be trained together.
      biased: copies have a bias, 0 at first; `public` has none, so it must be apart.
      top_k: experts per token; None: all.

    Raises:
      ConfigError: the anchor is not dense, `public` has no row, or the choices do not go together.
    """
    if biased and not public_apart:
        raise errors.ConfigError("copies with a bias need public_apart=True: the public expert is the gauge and has none")
    shared, public = _dense(architecture, anchor)
    names = router.canonical_order(rows)
    groups = {config_lib.PUBLIC: names[:1], OWNERS: names[1:]} if public_apart else {JOINT: names}
    return _routed(architecture.config, shared, dict.fromkeys(names, public), rows, top_k or len(names), groups, biased)


def lora(
    architecture: transformer.Architecture, anchor: Params, rank: int, seed: int, name: str
) -> tuple[transformer.Architecture, Params]:
    """A dense model with a low-rank adapter on its FFN matrices, none on attention; computes what the anchor computes.

    The adapter is a low-rank expert that alone is active, always and with gate 1: rows are 0, and the bias of `public` makes
    its probability exactly 0. So the training loop trains it as it is, with `trainable=ADAPTER`; router losses must be off.
    There is no factor alpha / rank: a from N(0, 1 / fan-in), b = 0.

    Args:
      architecture, anchor: a dense model.
      rank: of each matrix.
      seed: of the factors a.
      name: of the domain.

    Raises:
      ConfigError: the anchor is not dense, or the rank cannot be.
    """
    shared, public = _dense(architecture, anchor)
    layers = architecture.config.num_layers
    row = np.zeros((layers, architecture.config.d_model), np.float32)
    never = {"row": row, "bias": np.full(layers, NEVER, np.float32)}
    adapter = surgery.low_rank({part: leaf.shape for part, leaf in public.items()}, rank, seed) | {"router": {"row": row}}
    params, banks = surgery.join(shared, {config_lib.PUBLIC: {"ffn": public, "router": never}, name: adapter})
    return surgery.architecture(architecture.config, banks, 1), params


def fold(architecture: transformer.Architecture, params: Params) -> tuple[transformer.Architecture, Params]:
    """The dense model that a LoRA model computes, its adapter multiplied out.

    Raises:
      ConfigError: the model is none of `lora`.
    """
    adapters = [name for bank in architecture.banks if bank.rank for name in bank.experts]
    if len(adapters) != 1 or set(architecture.experts) != {config_lib.PUBLIC, *adapters}:
        raise errors.ConfigError(
            f"expected {config_lib.PUBLIC} and one low-rank adapter, got experts {', '.join(architecture.experts)}, of which "
            f"low-rank: {', '.join(adapters) or 'none'}; give a model that `lora` made"
        )
    shared, experts = surgery.split(params, architecture.banks)
    (name,) = adapters
    whole = surgery.expand(experts[name], experts[config_lib.PUBLIC])
    folded, banks = surgery.join(shared, {config_lib.PUBLIC: {"ffn": whole["ffn"]}})
    return surgery.architecture(architecture.config, banks, 1), folded


@dataclasses.dataclass(frozen=True)
class Round:
    """One round of FedAvg: every owner takes `steps` steps from the same weights."""

    steps: int
    learning_rate: float


def federated_rounds(steps: int, local_steps: int, learning_rate: float, final_fraction: float = 0.1) -> list[Round]:
    """Cuts each owner's steps into rounds, the last one shorter, at the rates of one cosine (at each round's middle).

    The server's step after each round is the `soup` of what owners trained, weighed by the tokens that each saw. The caller
    trains with `decay="constant"`, and gives each round text of its own.

    Raises:
      ConfigError: a number of steps is below 1.
    """
    if steps < 1 or local_steps < 1:
        raise errors.ConfigError(f"FedAvg: steps={steps} and local_steps={local_steps} must be at least 1")
    found = []
    for start in range(0, steps, local_steps):
        size = min(local_steps, steps - start)
        cosine = 0.5 * (1 + math.cos(math.pi * (start + size / 2) / steps))
        found.append(Round(size, learning_rate * (final_fraction + (1 - final_fraction) * cosine)))
    return found


def _dense(architecture: transformer.Architecture, params: Params) -> tuple[Params, Params]:
    """The shared tree of a dense model, and its FFN, leaves [L, ...]."""
    if architecture.experts != (config_lib.PUBLIC,):
        raise errors.ConfigError(f"expected a dense model, got one of {', '.join(architecture.experts)}; give the anchor alone")
    shared, experts = surgery.split(params, architecture.banks)
    return shared, experts[config_lib.PUBLIC]["ffn"]


def _routed(
    config: config_lib.ModelConfig,
    shared: Params,
    ffns: Mapping[str, Params],
    rows: Rows,
    top_k: int,
    groups: Mapping[str, Sequence[str]] | None = None,
    biased: bool = False,
) -> tuple[transformer.Architecture, Params]:
    if set(rows) != set(ffns):
        raise errors.ConfigError(
            f"router rows of {', '.join(sorted(rows))} for experts {', '.join(sorted(ffns))}; give one each"
        )
    experts = {name: {"ffn": ffn, "router": {"row": rows[name]}} for name, ffn in ffns.items()}
    for name in set(experts) - {config_lib.PUBLIC} if biased else ():
        experts[name]["router"]["bias"] = np.zeros(config.num_layers, np.float32)
    params, banks = surgery.join(shared, experts, groups)
    return surgery.architecture(config, banks, top_k), params
