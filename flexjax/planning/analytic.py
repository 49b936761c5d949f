"""A training step by formulas, where no compiler exists or hundreds of meshes are compared. An estimate, and labelled so.

Exact: the bytes of the arguments, and useful FLOPs. Everything else assumes what the program is built to do: a layer's
weights are gathered over `fsdp` and `expert` when it is computed and again when it is differentiated, activations are split
by sequences and over `tensor`, remat "full" keeps one residual per layer. Letters as in the model; t tokens of a device in one
micro-batch, c bytes of the compute dtype.
"""

import math

import jax
import jax.numpy as jnp

from flexjax import hardware, sharding, tree
from flexjax.model import attention, dispatch, losses
from flexjax.planning import collectives, facts
from flexjax.train import flops, program

GATHERED_AHEAD = 2  # layers whose weights are whole at once: the next is fetched while one computes


class Step:
    """The quantities that the formulas share; scalars are those of one device."""

    def __init__(self, job: program.Program, accumulation: int) -> None:
        settings, architecture = job.settings, job.architecture
        self.job, self.mesh, self.config = job, job.mesh, architecture.config
        self.micro = accumulation
        self.in_blocks = False  # whether attention holds the scores of some queries only, as on TPU
        rows, self.length = job.batch["tokens"].shape
        self.sequences = rows / (self.micro * sharding.size(job.mesh, *sharding.BATCH))
        self.tokens = self.sequences * self.length
        self.tensor = sharding.size(job.mesh, "tensor")
        self.c = jnp.dtype(settings.compute_dtype).itemsize
        trained = {path.replace("raw_bias", "bias"): leaf for path, leaf in tree.flatten(job.state.trainable).items()}
        leaves = trained | tree.flatten(job.frozen)
        weights = {path: leaf for path, leaf in leaves.items() if len(leaf.shape) > 1 and path != "embed/embedding"}
        used = {path: self._in_use(path, leaf) for path, leaf in weights.items()}
        layers = {path for path in weights if tree.is_stacked(path)}
        fetched = {
            path for path, leaf in weights.items() if _scalars(leaf) < used[path] * (leaf.shape[0] if path in layers else 1)
        }
        head = "embed/embedding" if self.config.tied_head else "head/kernel"
        self.layer = sum(used[path] for path in layers)  # weights of a layer, as it computes with them
        self.layer_fetched = sum(used[path] for path in layers & fetched)
        self.layer_trained = sum(used[path] for path in layers & set(trained))
        self.head = self.config.d_model * self.config.vocab_size / self.tensor
        self.head_fetched = self.head * (head in fetched or self.config.tied_head)
        self.head_trained = self.head * (head in trained)
        self.state = sum(_scalars(leaf) for leaf in trained.values())
        room = facts.room(job, accumulation)
        self.rows = 0.0 if room is None else float(room.rows)  # kept free for tokens that choose this device's experts
        sent = dispatch.apart(architecture.banks) if room else ()
        self.hidden = float(sum(bank.d_ff * len(bank.experts) for bank in architecture.banks if bank not in sent))  # of a token
        self.hidden += max((bank.d_ff for bank in sent), default=0) * self.rows / self.tokens
        self.cost = flops.per_token(architecture, job.state.trainable, self.length)

    def _in_use(self, path: str, leaf: jax.ShapeDtypeStruct) -> float:
        names = tree.flatten(self.job.axes)[path]
        if "/ffn/" in path:  # low-rank factors are gathered as other weights are, the embedding's columns never
            names = tuple("mlp" if name == "column" else name for name in names)
        shape = sharding.sharding(self.mesh, names, sharding.IN_USE).shard_shape(leaf.shape)
        return math.prod(shape) / (leaf.shape[0] if tree.is_stacked(path) else 1)


def _scalars(leaf: jax.ShapeDtypeStruct) -> int:
    return math.prod(leaf.sharding.shard_shape(leaf.shape))


def estimate(job: program.Program, chip: hardware.Chip | None, why: str, accumulation: int = 0) -> facts.Facts:
    """The facts of a step by formulas.

    Args:
      job: the step.
      chip: figures for the time, None for no time.
      why: what stands in a compiler's way.
      accumulation: micro-batches; 0: those of the job.
    """
    step = Step(job, accumulation or job.settings.accumulation)
    step.in_blocks = chip is not None and chip.dimensions > 0 and step.length % attention.TPU_BLOCK == 0
    dtype, executed = {2: "bf16", 4: "f32"}[step.c], _executed(step)
    found = facts.Facts(
        method=f"formulas ({why})",
        arguments=facts.argument_bytes(job),
        temporaries=int(temporaries(step)),
        flops={dtype: executed},
        moved=_moved(step),
        exchanges=_collectives(step),
    )
    if chip is not None:
        compute, memory = executed / facts.peak(chip, dtype), found.moved / chip.bandwidth
        found.seconds = facts.Seconds(compute, memory, compute + memory / 2)  # half of the traffic hides behind products
    return found


def temporaries(step: Step) -> float:
    """Bytes beside the arguments at the worst moment: what is kept for the backward pass, and the widest operation."""
    config, c, t = step.config, step.c, step.tokens
    remat = step.job.settings.remat
    heads = config.num_heads * config.head_dim
    residual = t * config.d_model * c
    hidden = t * step.hidden / step.tensor * c
    inner = 6 * t * heads / step.tensor * c + 3 * hidden  # q, k, v and their like; gate, up and their product
    inner += 4 * step.rows * config.d_model * c  # sent, received, computed and sent back
    kept = config.num_layers * {"full": residual, "dots": residual + inner, "none": 3 * residual + 2 * inner}[remat]
    on_cpu = step.mesh.devices.flat[0].platform == "cpu"
    queries = attention.TPU_BLOCK if step.in_blocks else step.length
    scores = 3 * step.sequences * config.num_heads / step.tensor * queries * step.length * 4
    if remat == "none":
        kept += config.num_layers * scores / 3 * step.length / queries
    rows = min(losses.CHUNK_ROWS, t)
    logits = 2 * rows * config.vocab_size / step.tensor * 4 + step.head_trained * 4
    weights = GATHERED_AHEAD * step.layer_fetched * c + step.head_fetched * c
    if c < 4:
        weights += (step.layer - step.layer_fetched) * c  # cast from float32 layer by layer
    gradients = 4 * step.state * (2 if step.micro > 1 else 1)
    differentiating = kept + weights + step.layer_trained * c + gradients + max(scores + inner, 2 * inner, logits)
    updating = 4 * 4 * step.state if on_cpu else 0.0  # gradients, updates and two moments, which a TPU writes in place
    return max(differentiating, updating)


def _executed(step: Step) -> float:
    """Useful FLOPs, and what remat computes again."""
    config = step.config
    head = 2.0 * config.d_model * config.vocab_size
    again = step.cost.forward - head if step.job.settings.remat == "full" else 0.0
    again += head if step.head_trained else 0.0  # its logits
    return (step.cost.total + again) * step.tokens * step.micro / step.tensor


def _moved(step: Step) -> float:
    """Weights as often as they are gathered and used, activations of every product, scores, and the optimizer."""
    config, c, t = step.config, step.c, step.tokens
    passes = 4 if step.job.settings.remat == "full" else 3  # forward, again, and two products backward
    weights = passes * 2 * step.layer * c
    activations = passes * t * c * (16 * config.d_model + 8 * step.hidden / step.tensor)
    scores = passes * 4 * t * step.length * config.num_heads / step.tensor * 4
    head = passes * (step.head * c + t * config.vocab_size / step.tensor * 4)
    state = 2 * facts.argument_bytes(step.job)
    return step.micro * (config.num_layers * (weights + activations + scores) + head) + state


def _collectives(step: Step) -> list[collectives.Collective]:
    config, c, layers = step.config, step.c, step.config.num_layers
    found: list[collectives.Collective] = []

    def add(kind: str, axes: tuple[str, ...], whole: float, times: int, source: str) -> None:
        used = tuple(axis for axis in axes if sharding.size(step.mesh, axis) > 1)
        group = sharding.size(step.mesh, *used)
        if group > 1 and whole:
            share = (2 if kind == "all-reduce" else 1) * (group - 1) / group
            found.append(collectives.Collective(kind, used, group, share * whole, times, source))

    sparse, again = step.job.architecture.sparse, step.job.settings.remat == "full"
    weights: tuple[str, ...] = ("fsdp",) if sparse else ("fsdp", "expert")
    activations = step.tokens * config.d_model * c
    passes = (6 if again else 4) * layers * step.micro  # two places forward, again, and backward
    add("all-gather", weights, step.layer_fetched * c, 2 * layers * step.micro, "weights of a layer")
    add("all-gather", ("fsdp", "expert"), step.head_fetched * c, 1, "head")
    add("all-reduce", sharding.BATCH, step.layer_trained * c, layers * step.micro, "gradients of a layer")
    add("all-reduce", sharding.BATCH, step.head_trained * c, step.micro, "gradient of the head")
    add("all-reduce", ("tensor",), activations, passes, "activations")
    if sparse:
        rows = activations * step.job.architecture.top_k
        add("all-to-all", ("expert",), rows, passes, "tokens to their experts and back")
    return found
