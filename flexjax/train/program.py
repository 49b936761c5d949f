"""One phase's step, ready to compile, and where everything that it works on lies on the mesh.

Training runs this program; `flexjax.plan` compiles the same one for machines that are not there.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from flexjax import config as config_lib
from flexjax import errors, sharding, tree
from flexjax.data import pipeline
from flexjax.model import moe, placement, router, transformer
from flexjax.train import optimizer as optimizer_lib
from flexjax.train import step as step_lib

KEPT_IN_FLOAT32 = r".*(norm|norms/.*|router/.*)"
CPU_TOKENS = 512  # of a micro-batch: what a layer makes of so many is still in the caches when the next product reads it
INPUTS = {"tokens": jnp.int32, "targets": jnp.int32, "weights": jnp.float32, "segments": jnp.int32}


class Program:
    """The training step of an architecture on a mesh.

    Args:
      architecture: what is trained.
      settings: how; `settings.trainable` selects the leaves that have gradients and optimizer state.
      mesh: the devices, which may be described only.
      choices: how frozen weights lie and tokens travel.
      seq_len: T.
      kernel: the grouped matmul, see `moe.Dispatch`.

    Attributes:
      step: the jitted `step(state, frozen, batch) -> (state, metrics)`; the state is donated.
      state, frozen, batch: shapes, dtypes and shardings of its arguments.

    Raises:
      ConfigError: the mesh does not divide a dimension, or a setting makes no sense.
    """

    def __init__(
        self,
        architecture: transformer.Architecture,
        settings: config_lib.TrainConfig,
        mesh: Mesh,
        choices: config_lib.MeshConfig,
        seq_len: int,
        kernel: str = "auto",
    ) -> None:
        check(settings, architecture, mesh)
        self.architecture, self.settings, self.mesh = architecture, settings, mesh
        self.axes = transformer.logical_axes(architecture)
        shapes = jax.eval_shape(lambda leaves: placement.pad(leaves, architecture, mesh), transformer.abstract(architecture))
        trainable, frozen = tree.partition(shapes, settings.trainable)
        trained = " ".join(tree.flatten(trainable))
        banks = [bank.name for bank in architecture.banks if f"experts/{bank.name}/ffn/" not in trained]
        whole = tuple(banks) if choices.frozen == "replicated" else ()
        compute = transformer.Compute(
            jnp.dtype(settings.compute_dtype),
            settings.remat,
            settings.scan_layers,
            mesh,
            moe.Dispatch(choices.transport, kernel, whole),
        )
        trainable = jax.eval_shape(lambda leaves: router.free(_as_float32(leaves)), trainable)
        self.optimizer = optimizer_lib.make(settings, trainable)
        state = jax.eval_shape(lambda leaves: step_lib.init_state(leaves, self.optimizer), trainable)
        self.state = self._placed(state, sharding.RULES)
        rules = sharding.RULES if choices.frozen == "sharded" else sharding.IN_USE
        self.frozen = self._placed(jax.eval_shape(self._cast, frozen), rules)
        rows = sharding.sharding(mesh, ("batch", None))
        self.batch = {
            name: jax.ShapeDtypeStruct((settings.batch_size, seq_len), dtype, sharding=rows) for name, dtype in INPUTS.items()
        }
        head = "embed/embedding" if architecture.config.tied_head else "head/kernel"
        parts = dataclasses.replace(settings, accumulation=micro_batches(settings, mesh, seq_len))
        step = step_lib.make_step(architecture, compute, parts, self.optimizer, head in tree.flatten(trainable))
        self.step = jax.jit(step, donate_argnums=0, out_shardings=(_shardings(self.state), sharding.sharding(mesh, ())))

    def place(self, params: tree.Tree, state: Any = None) -> tuple[step_lib.TrainState, tree.Tree]:
        """The state and the frozen leaves, on the mesh, of a whole model with effective biases.

        Args:
          params: arrays of the mesh that are trained are donated: nobody may use them any more.
          state: one that was restored; None: the state before the first step.
        """
        params = placement.pad(params, self.architecture, self.mesh)
        trainable, frozen = tree.partition(params, self.settings.trainable)
        frozen = jax.tree.map(lambda leaf, like: sharding.put(leaf.astype(like.dtype), like.sharding), frozen, self.frozen)
        if state is not None:
            return state, frozen
        trainable = _as_float32(router.free(trainable))
        start = jax.jit(
            lambda leaves: step_lib.init_state(leaves, self.optimizer), donate_argnums=0, out_shardings=_shardings(self.state)
        )
        placed = jax.tree.map(lambda leaf, like: sharding.put(leaf, like.sharding), trainable, self.state.trainable)
        return start(placed), frozen

    def lower(self) -> jax.stages.Lowered:
        """The step as a program for the mesh's devices; `.compile()` needs their compiler, not themselves."""
        return self.step.lower(self.state, self.frozen, self.batch)

    def compile(self) -> jax.stages.Compiled:
        """The step, ready to run."""
        return self.lower().compile()

    def put_batch(self, rows: pipeline.Batch, mine: list[int]) -> dict[str, jax.Array]:
        """The global batch, of which this process has the rows `mine`."""
        return sharding.put_rows({name: rows[name] for name in INPUTS}, mine, self.mesh, self.settings.batch_size)

    def _cast(self, frozen: tree.Tree) -> tree.Tree:
        dtype, exact = jnp.dtype(self.settings.frozen_dtype), tree.matches(frozen, KEPT_IN_FLOAT32)
        return jax.tree.map(lambda leaf, keep: leaf.astype(jnp.float32 if keep else dtype), frozen, exact)

    def _placed(self, shapes: Any, rules: sharding.Rules) -> Any:
        places = sharding.of_state(shapes, self.axes, self.mesh, rules)
        return jax.tree.map(lambda s, place: jax.ShapeDtypeStruct(s.shape, s.dtype, sharding=place), shapes, places)


def micro_batches(settings: config_lib.TrainConfig, mesh: Mesh, seq_len: int) -> int:
    """How many parts the gradient of a step is summed over: `settings.accumulation`, and on one CPU more, for speed.

    On CPU a part has as few rows as reach `CPU_TOKENS`, unless a loss looks at the whole batch, as load balancing does.
    """
    platform = mesh.devices.flat[0].platform
    if platform != "cpu" or mesh.size > 1 or settings.load_balance_loss:
        return settings.accumulation
    rows = settings.batch_size // settings.accumulation
    fewest = next(part for part in range(1, rows + 1) if rows % part == 0 and (part * seq_len >= CPU_TOKENS or part == rows))
    return settings.batch_size // fewest


def check(settings: config_lib.TrainConfig, architecture: transformer.Architecture, mesh: Mesh | None = None) -> None:
    """Raises ConfigError if a setting makes no sense, alone, with the architecture, or with the mesh."""
    transformer.check(architecture)
    for name in ("steps", "batch_size", "accumulation", "save_every", "keep", "log_every", "max_bad_steps"):
        if getattr(settings, name) < 1:
            raise errors.ConfigError(f"train.{name} is {getattr(settings, name)}, expected at least 1")
    if settings.batch_size % settings.accumulation:
        raise errors.ConfigError(
            f"train.accumulation={settings.accumulation} must divide train.batch_size={settings.batch_size}"
        )
    for name in ("b1", "b2"):
        if not 0 <= getattr(settings, name) < 1:
            raise errors.ConfigError(f"train.{name} is {getattr(settings, name)}, expected a value from 0 to below 1")
    if settings.clip_norm <= 0 or settings.spike_factor <= 1:
        raise errors.ConfigError(
            f"train.clip_norm={settings.clip_norm} must be above 0 and train.spike_factor={settings.spike_factor} above 1"
        )
    for name in ("compute_dtype", "frozen_dtype"):
        if getattr(settings, name) not in ("float32", "bfloat16"):
            raise errors.ConfigError(f"train.{name} is '{getattr(settings, name)}', expected 'float32' or 'bfloat16'")
    if settings.remat not in transformer.REMAT:
        raise errors.ConfigError(f"train.remat is '{settings.remat}', expected one of {', '.join(transformer.REMAT)}")
    if mesh is not None:
        batch = ("train.batch_size / train.accumulation", (settings.batch_size // settings.accumulation, sharding.BATCH))
        sharding.check(dict([batch]) | transformer.splits(architecture), mesh)


def _as_float32(leaves: tree.Tree) -> tree.Tree:
    return jax.tree.map(lambda leaf: leaf.astype(jnp.float32), leaves)


def _shardings(shapes: Any) -> Any:
    return jax.tree.map(lambda leaf: leaf.sharding, shapes)
