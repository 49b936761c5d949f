"""What a model is made of, as NNX modules of ONE layer; each dimension has its logical name (`sharding.RULES`)."""

import jax
import jax.numpy as jnp
from flax import nnx

from flexjax import config as config_lib


def _weight(rngs: nnx.Rngs, std: float, **axes: int) -> nnx.Param:
    return nnx.Param(std * jax.random.normal(rngs.params(), tuple(axes.values()), jnp.float32), axes=tuple(axes))


def _scale(size: int) -> nnx.Param:
    return nnx.Param(jnp.ones((size,), jnp.float32), axes=("whole",))


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
            q_norm=_scale(heads),
            k_norm=_scale(kv_heads),
        )
        self.norms = nnx.Dict(attention=_scale(d), ffn=_scale(d))


class Expert(nnx.Module):
    """One bank of experts of one layer: SwiGLU weights with a leading expert axis."""

    def __init__(self, config: config_lib.ModelConfig, bank: config_lib.Bank, rngs: nnx.Rngs) -> None:
        e, d, f = len(bank.experts), config.d_model, bank.d_ff
        self.gate = _weight(rngs, config.init_std, expert=e, embed=d, mlp=f)
        self.up = _weight(rngs, config.init_std, expert=e, embed=d, mlp=f)
        self.down = _weight(rngs, config.init_std, expert=e, mlp=f, embed=d)


class LowRank(nnx.Module):
    """One bank of low-rank experts of one layer: of each matrix of the public expert, two factors; at first they add 0."""

    def __init__(self, config: config_lib.ModelConfig, bank: config_lib.Bank, rngs: nnx.Rngs) -> None:
        e, r = len(bank.experts), bank.rank

        def factors(inside: dict[str, int], outside: dict[str, int]) -> nnx.Dict:
            (fan_in,) = inside.values()
            a = _weight(rngs, fan_in**-0.5, expert=e, **inside, whole=r)
            return nnx.Dict(a=a, b=_weight(rngs, 0.0, expert=e, whole=r, **outside))

        narrow, wide = {"embed": config.d_model}, {"column": bank.d_ff}
        self.gate, self.up, self.down = factors(narrow, wide), factors(narrow, wide), factors(wide, narrow)


class Router(nnx.Module):
    """The rows and biases of one bank of one layer."""

    def __init__(self, config: config_lib.ModelConfig, bank: config_lib.Bank, rngs: nnx.Rngs) -> None:
        e = len(bank.experts)
        self.row = nnx.Param(config.init_std * jax.random.normal(rngs.params(), (e, config.d_model)), axes=("whole", "whole"))
        if bank.biased:
            self.bias = nnx.Param(jnp.zeros((e,), jnp.float32), axes=("whole",))


class Embedding(nnx.Module):
    """The token embedding."""

    def __init__(self, config: config_lib.ModelConfig, rngs: nnx.Rngs) -> None:
        self.embedding = _weight(rngs, config.init_std, token=config.vocab_size, column=config.d_model)


class Head(nnx.Module):
    """The final norm and, unless tied, the output projection."""

    def __init__(self, config: config_lib.ModelConfig, rngs: nnx.Rngs) -> None:
        self.norm = _scale(config.d_model)
        if not config.tied_head:
            self.kernel = _weight(rngs, config.init_std, embed=config.d_model, vocab=config.vocab_size)
