"""Routing by sequence: which experts answer is chosen for a text as a whole, by what its beginning says.

The domain is in the sequence rather than in the token. So a request has candidates, each a set of allowed experts under which
the model gives every next token a probability p_i, and weights w_i over them, known before the token is:

    mixture   p(token) = sum_i w_i p_i(token)
    hard      p(token) = p_i(token) of the largest w_i, chosen anew every `stride` tokens
    after it  w_i = w_i p_i(token)^(1/temperature) / sum_j w_j p_j(token)^(1/temperature)
              w_i = (1 - share) w_i + share prior_i

The first line after a token is Bayes' rule; the second, fixed share (Herbster and Warmuth, 1998), lets the weights change
their mind inside a text. With temperature 1 and no share, a text costs at most log(candidates) nats more than under the best.
"""

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np
from jaxtyping import Bool, Float

from flexjax import config as config_lib
from flexjax import distributed, errors
from flexjax.model import router

KINDS = ("mixture", "hard")
Masks = tuple[tuple[str, ...], ...]


@dataclasses.dataclass(frozen=True)
class Settings:
    """How candidates are weighed.

    Attributes:
      kind: "mixture" or "hard".
      temperature: above 1, evidence counts less.
      share: of the prior in the weights after each token; 0: what has been unlikely for long stays so.
      stride: tokens between two choices of "hard".

    Raises:
      ConfigError: a value makes no sense.
    """

    kind: str = "mixture"
    temperature: float = 1.0
    share: float = 0.01
    stride: int = 1

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise errors.ConfigError(f"kind='{self.kind}' of routing by sequence must be one of {', '.join(KINDS)}")
        if not 0 < self.temperature < math.inf:
            raise errors.ConfigError(f"temperature={self.temperature} of routing by sequence must be a positive number")
        if not 0 <= self.share < 1:
            raise errors.ConfigError(f"share={self.share} must be at least 0 and below 1, where evidence would not count")
        if self.stride < 1 or (self.stride > 1 and self.kind != "hard"):
            raise errors.ConfigError(f"stride={self.stride} must be at least 1, and 1 unless kind is hard")


def from_flags(routing: str, kind: str | None) -> Settings | None:
    """What the flags --routing and --sequence ask for; None: routing by token. Raises ConfigError if they do not agree."""
    if routing == "sequence":
        return Settings() if kind is None else Settings(kind)
    if kind is not None:
        raise errors.ConfigError(f"--sequence={kind} needs --routing=sequence; leave it out or pass both")
    return None


def candidates(names: Sequence[str], allowed: Iterable[str]) -> Masks:
    """The sets of experts that a request may be answered under, none of them outside of `allowed`.

    `public` alone and beside each other expert; without `public`, each expert alone. All of them together is no candidate: it
    costs most and is hardly ever the best (0.0006 bits per byte worse with it, on four domains).

    Raises:
      PolicyError: a name is not among `names`, or none is allowed.
    """
    every = router.canonical_order(set(allowed))
    router.allowed_mask(names, every, 1)
    public = every[:1] if config_lib.PUBLIC in every else ()
    return (*(public,) * len(public), *((*public, name) for name in every[len(public) :]))


def worthwhile(settings: Settings | None, names: Sequence[str], allowed: Iterable[str]) -> Settings | None:
    """The settings, or None, as for routing by token, where there is but one candidate; says so then."""
    if settings is None or len(found := candidates(names, allowed)) > 1:
        return settings
    distributed.say(f"warning: with {label(found[0])} alone --routing=sequence has nothing to choose and does what token does")
    return None


def label(mask: Sequence[str]) -> str:
    """A candidate's name: `public+math`."""
    return "+".join(mask)


# The posterior, in logarithms, with NumPy or JAX as `xp`: weights [C, n] of n texts.


def update(xp: Any, log_weights: Any, nats: Any, log_prior: Any, settings: Settings) -> Any:
    """The log weights after a token that cost `nats` [C, n]; `log_prior` [C, n or 1]."""
    evidence = log_weights - nats / settings.temperature
    posterior = evidence - xp.logaddexp.reduce(evidence, axis=0, keepdims=True)
    if settings.share == 0:
        return posterior
    return xp.logaddexp(posterior + math.log1p(-settings.share), log_prior + math.log(settings.share))


def in_use(xp: Any, log_weights: Any, used: Any, index: Any, settings: Settings) -> Any:
    """The log weights that the token with this number in its text is mixed by, 0 or -inf if one candidate is chosen.

    `used`: those of the token before.
    """
    if settings.kind == "mixture":
        return log_weights
    best = log_weights.argmax(axis=0)
    chosen = xp.where(xp.arange(len(log_weights))[:, None] == best[None], 0.0, -math.inf)
    return xp.where(index % settings.stride == 0, chosen, used)


def combine(
    nats: Float[np.ndarray, "C N"],
    starts: Bool[np.ndarray, " N"],
    settings: Settings = Settings(),
    prior: Sequence[float] | None = None,
) -> tuple[Float[np.ndarray, " N"], Float[np.ndarray, "C N"]]:
    """What the tokens of a text cost, given what they cost under each candidate, and the weights before each token.

    Args:
      nats: -log p of every token under each candidate. Candidates may be anything that predicts the same tokens.
      starts: the tokens before which the weights are the prior again; the first must be one.
      settings: how candidates are weighed.
      prior: of each candidate; None: all alike.

    Returns -log p of each token [N], and the weights, of "hard" too, that were known before it [C, N].

    Raises:
      ConfigError: the prior is no distribution over the candidates.
    """
    nats = np.asarray(nats, np.float64)
    log_prior = _log_prior(prior, len(nats))[:, None]
    assert len(starts) == nats.shape[1] and starts[:1].all(), "one flag a token, and the first token starts a segment"
    first = np.flatnonzero(starts)
    lengths = np.diff(first, append=nats.shape[1])
    longest_first = np.argsort(-lengths, kind="stable")
    first, lengths = first[longest_first], lengths[longest_first]
    cost, weights = np.empty(nats.shape[1]), np.empty(nats.shape)
    log_weights = used = np.repeat(log_prior, len(first), axis=1)
    for time in range(lengths.max(initial=0)):
        live = np.searchsorted(-lengths, -time)  # so many segments are longer
        here = first[:live] + time
        log_weights = log_weights[:, :live]
        used = in_use(np, log_weights, used[:, :live], time, settings)
        weights[:, here] = np.exp(log_weights)
        cost[here] = -np.logaddexp.reduce(used - nats[:, here], axis=0)
        log_weights = update(np, log_weights, nats[:, here], log_prior, settings)
    return cost, weights


def _log_prior(prior: Sequence[float] | None, count: int) -> Float[np.ndarray, " C"]:
    given = np.full(count, 1 / count) if prior is None else np.asarray(prior, np.float64)
    if given.shape != (count,) or not (given >= 0).all() or not abs(given.sum() - 1) < 1e-6:
        raise errors.ConfigError(f"prior={prior} must have one probability for each of {count} candidates, 1 in sum")
    with np.errstate(divide="ignore"):
        return np.log(given)
