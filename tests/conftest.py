"""Strict JAX for every test: eight fake CPU devices, no silent rank or dtype promotion."""

import os

os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "") + " --xla_force_host_platform_device_count=8"
os.environ.setdefault("JAX_PLATFORMS", "cpu")

import hypothesis
import jax

jax.config.update("jax_numpy_rank_promotion", "raise")
jax.config.update("jax_numpy_dtype_promotion", "strict")
hypothesis.settings.register_profile("flexjax", deadline=None, derandomize=True)  # a loaded machine is no failure
hypothesis.settings.load_profile("flexjax")
