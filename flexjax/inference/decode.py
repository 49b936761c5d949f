"""Generation with a cache of keys and values; the whole loop over tokens is one compiled program.

A batch is laid out right-aligned: every prompt ends in the same slot, whatever its length, and what stands before it is
padding that nobody attends to. Each request has its own set of allowed experts, its own temperature and its own seed, and
gets the answer that it would get alone: nothing is dropped, and no row's mask or noise depends on another row.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from flexjax import errors, tree
from flexjax.inference import sampling
from flexjax.model import attention, kernels, router, transformer

Weights = dict[str, Any]
PROMPT_BUCKET = 16  # prompts are padded to multiples of this, so that few lengths are compiled
STREAM_TOKENS = 8  # tokens between two looks at a stream
MATRICES = ("q", "k", "v", "o", "gate", "up", "down")


@dataclasses.dataclass(frozen=True)
class Request:
    """One prompt and how to continue it.

    Attributes:
      prompt: token ids without EOS; the decoder puts one before them, as before every document of the training text.
      experts: names of the experts that may be used; None for all.
      temperature: 0 for greedy; the others as in `sampling.Sampling`.
    """

    prompt: Sequence[int]
    experts: tuple[str, ...] | None = None
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class Past:
    """What a layer keeps of all slots before the last filled one: keys and values, and what its router last read."""

    attention: attention.KeyValues
    read: Float[Array, "B 1 D"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass
class State:
    """A batch under way: tokens [B, S], of which `filled` slots are known; `start` is each row's first slot."""

    tokens: Int[Array, "B S"]
    filled: Int[Array, ""]
    done: Bool[Array, " B"]
    cache: list[Past]  # per layer
    start: Int[Array, " B"]
    allowed: Bool[Array, "B E"]
    settings: sampling.Sampling


def serving_layout(params: transformer.Params, architecture: transformer.Architecture, dtype: Any = jnp.float32) -> Weights:
    """Separates stacked parameters into one leaf per layer and expert, cast to the dtype of computation.

    Slicing stacked weights inside the loop over tokens would copy them at every step. Router rows, biases and norms stay in
    float32. Returns {embed, head, layers: [per layer], experts: [per layer]}; each FFN leaf is a tuple over its bank. The
    matrices of layers lie as `kernels.to_decode` says.
    """

    def cast(path: str, leaf: Any) -> Any:
        exact = "/router/" in path or "norm" in path
        weight = jnp.asarray(leaf, jnp.float32 if exact else dtype)
        return kernels.to_decode(weight) if path.rpartition("/")[2] in MATRICES else weight

    def layer(part: str, index: int) -> tree.Tree:
        flat = {path: leaf[index] for path, leaf in tree.flatten(params[part]).items()}
        return tree.unflatten(
            {
                path: tuple(cast(path, expert) for expert in leaf) if "/ffn/" in path else cast(path, leaf)
                for path, leaf in flat.items()
            }
        )

    count = architecture.config.num_layers
    ends = {part: tree.map_with_path(cast, params[part]) for part in ("embed", "head")}
    return {
        **ends,
        "layers": [layer("layers", i) for i in range(count)],
        "experts": [layer("experts", i) for i in range(count)],
    }


class Decoder:
    """A model ready to generate: weights in serving layout and the two programs that use them.

    Args:
      params: the tree of `transformer.init` or `models.load`.
      architecture: what it means.
      eos_id: the token that separates documents: context of every prompt, and end of every answer.
      vocab_size: ids from here on are padding of the vocabulary and never drawn; None: all may be.
      dtype: of computation and of the cache.
    """

    def __init__(
        self,
        params: transformer.Params,
        architecture: transformer.Architecture,
        eos_id: int,
        vocab_size: int | None = None,
        dtype: Any = jnp.float32,
    ) -> None:
        self.architecture = architecture
        self.eos_id = eos_id
        self.vocab_size = architecture.config.vocab_size if vocab_size is None else vocab_size
        self.dtype = dtype
        self.weights = serving_layout(params, architecture, dtype)
        self.prefill = jax.jit(self._prefill, static_argnames="filled")
        self.advance = jax.jit(self._advance, donate_argnames="state")

    def generate(self, requests: Sequence[Request], max_new_tokens: int) -> list[np.ndarray]:
        """Continues every prompt by at most `max_new_tokens` ids, up to and without EOS.

        Raises:
          PolicyError: a request names an unknown expert, or none. ConfigError: its settings make no sense.
        """
        pieces = [ids for ids, _ in self._run(requests, max_new_tokens, max_new_tokens)]
        return [np.concatenate([piece[row] for piece in pieces]) for row in range(len(requests))]

    def stream(self, request: Request, max_new_tokens: int) -> Iterator[int]:
        """Yields the ids of one continuation as they come; they are those of `generate`."""
        for ids, _ in self._run([request], max_new_tokens, STREAM_TOKENS):
            yield from ids[0].tolist()

    def _run(self, requests: Sequence[Request], max_new_tokens: int, stride: int) -> Iterator[tuple[list[np.ndarray], State]]:
        """Yields, for every `stride` new slots, each row's ids before its EOS, and the batch as it then stands."""
        state = self.start(requests, max_new_tokens)
        first = int(state.filled)
        ended = np.zeros(len(requests), bool)
        for filled in range(first, first + max_new_tokens, stride):
            until = min(filled + stride, first + max_new_tokens)
            state = self.advance(self.weights, state, until)
            new = np.asarray(state.tokens[:, filled:until])
            stop = np.cumsum(new == self.eos_id, axis=1).astype(bool) | ended[:, None]
            yield [row[~after] for row, after in zip(new, stop, strict=True)], state
            ended = stop[:, -1]
            if ended.all():
                return

    def start(self, requests: Sequence[Request], max_new_tokens: int) -> State:
        """Lays out a batch and computes the keys and values of all prompt slots but the last."""
        tokens, start, settings = self.lay_out(requests, max_new_tokens)
        names = self.architecture.experts
        masks = [router.allowed_mask(names, names if r.experts is None else r.experts, 1) for r in requests]
        return self.prefill(
            self.weights, tokens, start, jnp.concatenate(masks), settings, filled=tokens.shape[1] - max_new_tokens
        )

    def lay_out(
        self, requests: Sequence[Request], max_new_tokens: int
    ) -> tuple[Int[np.ndarray, "B S"], Int[np.ndarray, " B"], sampling.Sampling]:
        """Tokens of a batch with room for new ones, each row's first slot, and how rows draw; raises as `check`."""
        for request in requests:
            check(request, self.architecture, max_new_tokens)
        settings = sampling.Sampling(
            temperature=jnp.array([r.temperature for r in requests], jnp.float32),
            top_k=jnp.array([r.top_k for r in requests], jnp.int32),
            top_p=jnp.array([r.top_p for r in requests], jnp.float32),
            seed=jnp.array([r.seed for r in requests], jnp.int32),
        )
        prompts = [[self.eos_id, *r.prompt] for r in requests]
        longest = max(map(len, prompts))
        longest += -longest % PROMPT_BUCKET
        tokens = np.full((len(requests), longest + max_new_tokens), self.eos_id, np.int32)
        for row, prompt in zip(tokens, prompts, strict=True):
            row[longest - len(prompt) : longest] = prompt
        return tokens, np.array([longest - len(prompt) for prompt in prompts], np.int32), settings

    def _prefill(
        self, weights: Weights, tokens: Array, start: Array, allowed: Array, settings: sampling.Sampling, filled: int
    ) -> State:
        _, cache = self.fill(weights, tokens, start, allowed, filled)
        return State(tokens, jnp.int32(filled), jnp.zeros(len(tokens), bool), cache, start, allowed, settings)

    def fill(
        self, weights: Weights, tokens: Array, start: Array, allowed: Array, filled: int
    ) -> tuple[Float[Array, "B T D"], list[Past]]:
        """Runs all filled slots but the last, T, through the model: the stream behind the last layer, and the cache."""
        S = tokens.shape[1]
        config, T = self.architecture.config, filled - 1
        slots = jnp.arange(T)
        real = slots[None] >= start[:, None]
        mask = attention.causal_mask(T, None) & real[:, None, None] | jnp.eye(T, dtype=bool)[None, None]
        positions = jnp.maximum(slots[None] - start[:, None], 0)
        rotary = attention.rotary(positions, config.head_dim, config.rope_theta)
        h = weights["embed"]["embedding"][tokens[:, :T]]
        cache = []
        for layer, experts in zip(weights["layers"], weights["experts"], strict=True):
            h, new = attention.block(h, layer, config, rotary, mask)
            read = router.remember(h, positions, config.router_memory)
            h, _ = transformer.expert_block(h, layer, _stack(experts), self.architecture, allowed, read=read)
            new = jax.tree.map(lambda leaf: jnp.pad(leaf, ((0, 0), (0, 0), (0, S - T), (0, 0))), new)
            cache.append(Past(new, read[:, -1:]))
        return h, cache

    def step(self, weights: Weights, state: State) -> tuple[Float[Array, "B V"], list[Past]]:
        """Runs the last filled slot through the model: next-token logits, and the cache with that slot's entries."""
        config, slot = self.architecture.config, state.filled - 1
        slots = jnp.arange(state.tokens.shape[1])[None]
        mask = ((slots <= slot) & (slots >= state.start[:, None]))[:, None, None]
        place = (slot - state.start)[:, None]
        rotary = attention.rotary(place, config.head_dim, config.rope_theta)
        h = weights["embed"]["embedding"][jax.lax.dynamic_slice_in_dim(state.tokens, slot, 1, axis=1)]
        cache = []
        for layer, experts, past in zip(weights["layers"], weights["experts"], state.cache, strict=True):
            h, new = attention.block(h, layer, config, rotary, mask, (past.attention, slot))
            read = router.remember_one(h, past.read, place, config.router_memory)
            h, _ = transformer.expert_block(h, layer, experts, self.architecture, state.allowed, skip_idle=True, read=read)
            cache.append(Past(new, read))
        hidden = attention.rms_norm(h[:, 0], weights["head"]["norm"], config.norm_eps)
        return transformer.logits(weights, hidden), cache

    def extend[S: State](self, state: S, logits: Float[Array, "B V"], cache: list[Past]) -> S:
        """The batch with one more slot, drawn by these logits; what follows an EOS stays EOS."""
        logits = jnp.where(jnp.arange(logits.shape[1])[None] < self.vocab_size, logits, -jnp.inf)
        drawn = sampling.sample(logits, state.settings, state.filled - state.start)
        token = jnp.where(state.done, self.eos_id, drawn)
        tokens = jax.lax.dynamic_update_slice_in_dim(state.tokens, token[:, None], state.filled, axis=1)
        done = state.done | (token == self.eos_id)
        return dataclasses.replace(state, tokens=tokens, filled=state.filled + 1, done=done, cache=cache)

    def _advance(self, weights: Weights, state: State, until: Array) -> State:
        return until_ended(lambda state: self.extend(state, *self.step(weights, state)), state, until)


def until_ended[S: State](body: Callable[[S], S], state: S, until: Array) -> S:
    """Applies `body`, which fills one slot, until all before `until` are filled or every row has ended."""
    return jax.lax.while_loop(lambda state: (state.filled < until) & ~state.done.all(), body, state)


def check(request: Request, architecture: transformer.Architecture, max_new_tokens: int) -> None:
    """Raises PolicyError if a request names an unknown expert or none, ConfigError if its settings make no sense."""
    if request.experts is not None:
        router.allowed_mask(architecture.experts, request.experts, 1)
    sampling.check(request.temperature, request.top_k, request.top_p, request.seed)
    vocabulary = architecture.config.vocab_size
    if any(not 0 <= token < vocabulary for token in request.prompt):
        raise errors.ConfigError(f"a prompt holds an id outside of 0..{vocabulary - 1}; another tokenizer made it")
    if max_new_tokens < 1:
        raise errors.ConfigError(f"max_new_tokens={max_new_tokens} must be at least 1")


def _stack(experts: tree.Tree) -> tree.Tree:
    """One layer's experts with an expert axis again, as the paths for many tokens want them."""

    def stack(_: str, leaf: Any) -> Array:
        return jnp.stack([kernels.to_prefill(expert) for expert in leaf]) if isinstance(leaf, tuple) else leaf

    return tree.map_with_path(stack, experts)
