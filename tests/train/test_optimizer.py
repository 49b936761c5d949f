"""The schedule's values, what decays, and clipping."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from flexjax import config, errors, presets, tree
from flexjax.model import router
from flexjax.train import optimizer
from tests.train import tiny

SETTINGS = config.TrainConfig(steps=110, warmup_steps=10, learning_rate=2.0, final_fraction=0.1)


def rates(settings, updates):
    return np.array([float(optimizer.learning_rate(settings, jnp.asarray(update))) for update in updates])


def test_cosine_schedule_warms_up_peaks_halves_and_ends():
    found = rates(SETTINGS, [0, 4, 9, 10, 60, 110, 500])
    np.testing.assert_allclose(found, [0.2, 1.0, 2.0, 2.0, 2 * 0.55, 0.2, 0.2], rtol=1e-6)


def test_constant_schedule_stays_after_the_warm_up():
    settings = config.TrainConfig(steps=110, warmup_steps=10, learning_rate=2.0, decay="constant")
    np.testing.assert_allclose(rates(settings, [0, 9, 10, 110, 500]), [0.2, 2, 2, 2, 2], rtol=1e-6)


@pytest.mark.parametrize(("steps", "warmup"), [(1, 0), (5, 0), (5, 5), (5, 9)])
def test_odd_schedules_stay_finite_positive_and_below_the_peak(steps, warmup):
    settings = config.TrainConfig(steps=steps, warmup_steps=warmup, learning_rate=1.0)
    found = rates(settings, range(steps))
    assert (found > 0).all() and (found <= 1).all()


def test_unknown_decay_is_refused():
    with pytest.raises(errors.ConfigError, match=r"train\.decay is 'linear', expected 'cosine' or 'constant'"):
        optimizer.make(config.TrainConfig(decay="linear"), tiny.params_of("pair"))


def test_exactly_the_chosen_paths_decay():
    params = router.free(tiny.params_of("pair"))
    made = optimizer.make(config.TrainConfig(weight_decay=0.5), params)

    @functools.partial(jax.jit, compiler_options=tiny.QUICK)
    def update(params):
        with jax.numpy_dtype_promotion("standard"):
            return made.update(jax.tree.map(jnp.zeros_like, params), made.init(params), params)[0]

    updates = update(params)
    decayed = {path for path, leaf in tree.flatten(updates).items() if np.asarray(leaf).any()}
    ffn = {f"experts/{bank}/ffn/{leaf}" for bank in ("public", "math") for leaf in ("gate", "up", "down")}
    assert decayed == ffn | {f"layers/attention/{leaf}" for leaf in "qkvo"} | {"head/kernel", "embed/embedding"}
    for path in decayed:
        np.testing.assert_allclose(tree.flatten(updates)[path], 0.5 * np.asarray(tree.flatten(params)[path]), rtol=1e-6)


def test_a_large_gradient_is_clipped_to_the_norm_before_adam_sees_it():
    params = {"a": jnp.zeros(4)}
    made = optimizer.make(config.TrainConfig(clip_norm=1.0, b1=0.5, decayed="a"), params)
    with jax.numpy_dtype_promotion("standard"):
        _, state = made.update({"a": jnp.full(4, 50.0)}, made.init(params), params)
    np.testing.assert_allclose(state[1].mu["a"], np.full(4, 0.25), rtol=1e-6)


def test_joint_training_of_every_variant_trains_no_bias():
    for variant in presets.VARIANTS:
        pattern = presets.joint_training(variant).trainable
        trained, _ = tree.partition(tiny.params_of("joint"), pattern)
        assert [path for path in tree.flatten(trained) if "bias" in path] == []
