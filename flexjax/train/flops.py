"""Analytic FLOPs of a training step: what has to be computed, given what is trainable.

A matrix product of [m, k] and [k, n] costs 2 m k n. Per token, with T the window and full (not causally halved) attention:

    attention   2 D (N H) for q and o each, 2 D (K H) for k and v each; scores and values 2 T (N H) each
    expert      2 D F for gate, up and down each, times the experts that are computed (all on the dense path, k when sparse)
    low rank    2 r (D + F) for gate, up and down each; gate, up and down of `public` are computed once for all of them.
                Sparse or not, they and `public` are computed on every token
    router      2 D E
    head        2 D V

Backward, a product y = x W costs its forward again for dW if W is trainable, and again for dx if x depends on anything
trainable. So nothing is spent below the first trainable leaf, and a frozen weight costs no dW. The two products of attention
cost twice their forward once q, k or v depend on anything trainable. What low-rank experts and `public` share costs dx once;
the shared down multiplies a sum that is gated already, so it costs dx also where gates alone are trained. Norms, softmax,
SwiGLU and the optimizer are not counted; neither is what remat computes again: this is the useful work that MFU divides by.
"""

import dataclasses
from collections.abc import Iterable

from flexjax import config as config_lib
from flexjax import tree
from flexjax.model import dispatch, router, transformer


@dataclasses.dataclass(frozen=True)
class Flops:
    """FLOPs per token."""

    forward: float
    backward: float

    @property
    def total(self) -> float:
        """Forward and backward."""
        return self.forward + self.backward


class _Ledger:
    """Adds up products y = x W and remembers whether anything trainable lies below."""

    def __init__(self, trainable: set[str]) -> None:
        self.trainable = trainable
        self.forward = self.backward = 0.0

    def product(self, path: str, size: float, share: float, below: bool) -> bool:
        """Books one product with a weight of `size` scalars; returns whether y depends on anything trainable."""
        cost = 2.0 * size * share
        trained = path in self.trainable
        self.forward += cost
        self.backward += cost * (trained + below)
        return trained or below

    def any(self, *paths: str) -> bool:
        return any(path in self.trainable for path in paths)


def per_token(architecture: transformer.Architecture, trainable: tree.Tree, seq_len: int) -> Flops:
    """FLOPs per token of a step that trains exactly the leaves of `trainable` on windows of `seq_len` tokens."""
    config, banks = architecture.config, architecture.banks
    book = _Ledger({path.replace("raw_bias", "bias") for path in tree.flatten(trainable)})
    heads, kv_heads = config.num_heads * config.head_dim, config.num_kv_heads * config.head_dim
    experts = len(architecture.experts)
    share = 1.0 if architecture.top_k >= experts else architecture.top_k / experts
    below = book.any("embed/embedding")
    for _ in range(config.num_layers):
        q = book.product("layers/attention/q", config.d_model * heads, 1, below)
        k = book.product("layers/attention/k", config.d_model * kv_heads, 1, below)
        v = book.product("layers/attention/v", config.d_model * kv_heads, 1, below)
        inside = q or k or v or book.any("layers/attention/q_norm", "layers/attention/k_norm")
        book.forward += 4.0 * seq_len * heads
        book.backward += 8.0 * seq_len * heads * inside
        out = book.product("layers/attention/o", heads * config.d_model, 1, inside)
        below = out or below or book.any("layers/norms/attention")
        above = _together(book, architecture, below) or below
        for bank in dispatch.apart(banks):
            home, size = f"experts/{bank.name}", config.d_model * bank.d_ff * len(bank.experts)
            gate = book.product(f"{home}/ffn/gate", size, share, below)
            up = book.product(f"{home}/ffn/up", size, share, below)
            down = book.product(f"{home}/ffn/down", size, share, gate or up)
            above = above or down
        if architecture.routed:
            rows = [f"experts/{bank.name}/router/{leaf}" for bank in banks for leaf in ("row", "bias")]
            trained = book.any(*rows)
            cost = 2.0 * config.d_model * experts
            book.forward += cost
            book.backward += cost * (trained + below)
            above = above or trained
        below = above or book.any("layers/norms/ffn")
    below = below or book.any("head/norm")
    head = "embed/embedding" if config.tied_head else "head/kernel"
    book.product(head, config.d_model * config.vocab_size, 1, below)
    return Flops(book.forward, book.backward)


def forward_per_token(architecture: transformer.Architecture, seq_len: int, experts: Iterable[str] | None = None) -> float:
    """FLOPs of a token's forward pass with all experts, or those named, switched on; `public` alone is a dense model.

    Counts what has to be computed: of the named experts `top_k` at most, each at its own width or rank, a low-rank one with
    what it takes of `public`, named or not.

    Raises:
      PolicyError: an expert is unknown, or none is named.
    """
    named = set(architecture.experts if experts is None else experts)
    router.allowed_mask(architecture.experts, named, 1)
    kept = ((bank, tuple(name for name in bank.experts if name in named)) for bank in architecture.banks)
    banks = tuple(dataclasses.replace(bank, experts=names) for bank, names in kept if names)
    masked = transformer.Architecture(architecture.config, banks, min(architecture.top_k, len(named)))
    return per_token(masked, {}, seq_len).forward


def _together(book: _Ledger, architecture: transformer.Architecture, below: bool) -> bool:
    """Books a layer's low-rank experts and `public` beside them; returns whether their sum depends on anything trainable."""
    low = [bank for bank in architecture.banks if bank.rank]
    if not low:
        return False
    d, f = architecture.config.d_model, architecture.config.d_ff
    home = f"experts/{config_lib.PUBLIC}/ffn"
    inside = [book.product(f"{home}/{part}", d * f, 1, below) for part in ("gate", "up")]
    trained = below or book.any(
        *(f"experts/{bank.name}/router/{leaf}" for bank in architecture.banks for leaf in ("row", "bias"))
    )
    above = False
    for bank in low:
        own, size = f"experts/{bank.name}/ffn", bank.rank * len(bank.experts)
        hidden = any(inside)
        for part in ("gate", "up"):
            hidden |= book.product(f"{own}/{part}/b", size * f, 1, book.product(f"{own}/{part}/a", size * d, 1, below))
        above |= book.product(f"{own}/down/b", size * d, 1, book.product(f"{own}/down/a", size * f, 1, hidden))
        trained |= hidden
    return book.product(f"{home}/down", d * f, 1, trained or any(inside)) or above
