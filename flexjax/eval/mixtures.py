"""Several models over one text: soups chosen by the input, mixtures of next-token probabilities, one model for a whole text.

Mixtures need only what each model makes of every token (`bits_per_byte.TokenScores`), laid one under the other, [M, N].

    soup            mean of the weights, by the likelihood of the input (FlexOlmo, Table 1)
    BTM             mean of the probabilities, by the posterior (Li et al. 2022; c-BTM, Gururangan et al. 2023)
    prompt routing  the model that a text's beginning asks for (FlexOlmo, Table 1)
"""

import math
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import ArrayLike
from jaxtyping import Array, Bool, Float, Int

from flexjax import errors, tree
from flexjax.data import proxies
from flexjax.data import tokens as tokens_lib
from flexjax.eval import bits_per_byte
from flexjax.inference import sequence
from flexjax.model import transformer

Params = tree.Tree


def likelihood_weights(nats: ArrayLike, temperature: float) -> Float[Array, "M ..."]:
    """softmax(-nats / temperature) over M models: the weights of a soup, of the MEAN loss that each has on an input.

    BTM weighs by the SUM over the prefix, see `branch_train_merge`.

    Args:
      nats: mean losses, [M, ...].
      temperature: in nats.

    Raises:
      ConfigError: the temperature is not above 0.
    """
    if not temperature > 0:
        raise errors.ConfigError(f"temperature={temperature} of the mixture must be above 0, for instance 1")
    return jax.nn.softmax(-jnp.asarray(nats) / temperature, axis=0)


def token_nats(
    params: Params,
    batch: Mapping[str, Array],
    architecture: transformer.Architecture,
    compute: transformer.Compute = transformer.Compute(),
) -> Float[Array, "B T"]:
    """-log p of each target of a batch of `pipeline`, 0 where its weight is 0."""
    tokens, targets, segments = batch["tokens"], batch["targets"], batch["segments"]
    nats, _ = bits_per_byte.forward_nats(params, tokens, targets, architecture, compute, segments=segments)
    return nats * batch["weights"]


def soups_of_rows(
    models: Params,
    weights: Float[Array, "B M"],
    batch: Mapping[str, Array],
    architecture: transformer.Architecture,
    compute: transformer.Compute = transformer.Compute(),
) -> Float[Array, "B T"]:
    """Scores each row of a batch with a soup of its own; to be jitted.

    Row by row: on CPU that is as fast as all at once, and one soup is in memory at a time.

    Args:
      models: M dense models of one architecture, leaves [M, ...].
      weights: of the models in each row's soup, summing to 1.
      batch: tokens, targets, weights and segments, [B, T].
    """

    def one(row: tuple[Array, dict[str, Array]]) -> Array:
        mixed = jax.tree.map(lambda leaf: jnp.tensordot(row[0].astype(leaf.dtype), leaf, 1), models)
        return token_nats(mixed, {name: values[None] for name, values in row[1].items()}, architecture, compute)[0]

    return jax.lax.map(one, (weights, _inputs(batch)))


def soup_per_input(
    models: Params,
    batch: Mapping[str, Array],
    architecture: transformer.Architecture,
    temperature: float,
    compute: transformer.Compute = transformer.Compute(),
    opening: float = 0.25,
) -> Float[Array, "B T"]:
    """Scores each row with the soup that its opening chose, by the mean loss of each model there; to be jitted.

    The opening itself is scored with the uniform soup, since nothing is known before it. In forward passes this costs
    1 + opening * M a token, the soups themselves not counted.

    Args:
      models, batch: as for `soups_of_rows`.
      architecture: of one model.
      temperature: of the softmax over mean losses, in nats.
      opening: leading part of a window, of which at least one token.
    """
    length = batch["tokens"].shape[1]
    cut = max(1, math.ceil(opening * length))
    first = {name: values[:, :cut] for name, values in _inputs(batch).items()}
    each = jax.lax.map(lambda params: token_nats(params, first, architecture, compute), models)
    means = each.sum(axis=2) / jnp.maximum(first["weights"].sum(axis=1), 1)[None]
    uniform = jax.tree.map(lambda leaf: leaf.mean(axis=0), models)
    before = token_nats(uniform, first, architecture, compute)
    after = soups_of_rows(models, likelihood_weights(means, temperature).T, batch, architecture, compute)
    return jnp.concatenate([before, after[:, cut:]], axis=1)


def _inputs(batch: Mapping[str, Array]) -> dict[str, Array]:
    return {name: batch[name] for name in ("tokens", "targets", "weights", "segments")}


def mix(nats: Float[np.ndarray, "M N"], weights: Float[np.ndarray, "M N"], top_k: int) -> Float[np.ndarray, " N"]:
    """-log of the mixture of M models' probabilities of each token, over the k models of most weight, renormalised (BTM).

    Of equal weights, the earlier model's counts as the larger. k models cost k forward passes, and M where the weights need
    the losses of all.

    Raises:
      ConfigError: k is not between 1 and M.
    """
    if not 1 <= top_k <= len(nats):
        raise errors.ConfigError(f"top_k={top_k} of a mixture must lie between 1 and the {len(nats)} models")
    chosen = np.argsort(-np.asarray(weights, np.float64), axis=0, kind="stable")[:top_k]
    share = np.take_along_axis(np.asarray(weights, np.float64), chosen, axis=0)
    with np.errstate(divide="ignore"):
        logs = np.log(share / share.sum(axis=0)) - np.take_along_axis(np.asarray(nats, np.float64), chosen, axis=0)
    return -np.logaddexp.reduce(logs, axis=0)


def branch_train_merge(
    nats: Float[np.ndarray, "M N"], starts: Bool[np.ndarray, " N"], temperature: float, top_k: int
) -> Float[np.ndarray, " N"]:
    """BTM on a text: `mix` with w_i = softmax(-loss_i / temperature), loss_i the SUM over the prefix since the last start.

    Args:
      nats: -log p of each token of a text under each model.
      starts: tokens before which nothing is known, the first of the text among them.
      temperature: 1 gives the posterior over models that are equally likely before.
      top_k: models whose predictions are mixed.

    Raises:
      ConfigError: the temperature is not above 0, or k is not between 1 and M.
    """
    return mix(nats, sequence.combine(nats, starts, sequence.Settings(temperature=temperature, share=0.0))[1], top_k)


def branch_train_merge_by_opening(
    nats: Float[np.ndarray, "M N"], starts: Bool[np.ndarray, " N"], temperature: float, top_k: int, opening: int
) -> Float[np.ndarray, " N"]:
    """BTM that runs all models on the first `opening` tokens since a start only, and then keeps the k models of most weight.

    The opening itself is mixed from all, by all that came before each token. It costs M passes a token there and k after it.

    Raises:
      ConfigError: the opening is negative; or as `branch_train_merge`.
    """
    if opening < 0:
        raise errors.ConfigError(f"opening={opening} of a mixture must be 0 (the first k models) or a number of tokens")
    settings = sequence.Settings(temperature=temperature, share=0.0)
    weights = sequence.combine(nats, starts, settings)[1]
    position = np.arange(nats.shape[1])
    first = np.maximum.accumulate(np.where(starts, position, 0))
    after = position - first >= opening
    held = np.where(after, first + opening, position)
    chosen = mix(nats, weights[:, held], top_k)
    return np.where(after, chosen, mix(nats, weights, len(nats)))


def prompt_router(
    sources: Mapping[str, tokens_lib.TokenSource], *, opening: int, documents: int, seed: int
) -> proxies.Classifier:
    """A classifier that picks one model by the first tokens of a text; `scores(openings).argmax(axis=1)` are its choices.

    It stands in for the chat model that the paper asks, and is given more: text of every domain, which owners do not share.

    Args:
      sources: training text by model, in the order in which models are numbered.
      opening: tokens that it reads.
      documents: of each source, at most.
      seed: chooses them.
    """
    rng = np.random.default_rng(seed)
    chosen = {name: rng.permutation(source.num_documents)[:documents] for name, source in sources.items()}
    return proxies.Classifier({name: proxies.openings(sources[name], numbers, opening) for name, numbers in chosen.items()})


def prompt_routed(
    nats: Float[np.ndarray, "M N"], documents: Int[np.ndarray, " N"], choices: Int[np.ndarray, " documents"], opening: int
) -> Float[np.ndarray, " N"]:
    """-log p of each token where one model scores a document: the chosen one from the end of its opening on, model 0 before.

    Args:
      nats: -log p under each model, `public` first.
      documents: the document of each token, in order.
      choices: the model of each document.
      opening: tokens that the choice was made by.
    """
    position = np.arange(len(documents)) - np.searchsorted(documents, documents, side="left")
    model = np.where(position < opening, 0, choices[documents])
    return np.take_along_axis(nats, model[None], axis=0)[0]
