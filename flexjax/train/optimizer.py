"""AdamW with decoupled decay on chosen paths, and the learning-rate schedule."""

import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from flexjax import config as config_lib
from flexjax import errors, tree


def learning_rate(config: config_lib.TrainConfig, updates: Int[Array, ""]) -> Float[Array, ""]:
    """The rate of the update after `updates` earlier ones: linear warm-up, then cosine to `final_fraction`, or constant."""
    count = updates.astype(jnp.float32)
    warmup = jnp.minimum(1.0, (count + 1) / max(1, config.warmup_steps))
    if config.decay == "constant":
        return config.learning_rate * warmup
    span = max(1, config.steps - config.warmup_steps)
    progress = jnp.clip((count - config.warmup_steps) / span, 0.0, 1.0)
    fraction = config.final_fraction + (1 - config.final_fraction) * 0.5 * (1 + jnp.cos(jnp.pi * progress))
    return config.learning_rate * warmup * fraction


def make(config: config_lib.TrainConfig, trainable: tree.Tree) -> optax.GradientTransformation:
    """Clip by global norm, Adam, decoupled weight decay; the caller multiplies by minus the learning rate."""
    if config.decay not in ("cosine", "constant"):
        raise errors.ConfigError(f"train.decay is '{config.decay}', expected 'cosine' or 'constant'")
    decayed = tree.matches(trainable, config.decayed)
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b1=config.b1, b2=config.b2, eps=config.adam_eps),
        optax.add_decayed_weights(config.weight_decay, mask=decayed),
    )
