"""Models of a few thousand parameters, batches for them, and compiled steps that the tests of this room share."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from etils import epath

from flexjax import config as config_lib
from flexjax import tree
from flexjax.data import pipeline, tokens
from flexjax.model import router, transformer
from flexjax.train import loop
from flexjax.train import optimizer as optimizer_lib
from flexjax.train import step as step_lib

MODEL = config_lib.ModelConfig(
    vocab_size=304, d_model=32, num_layers=2, num_heads=4, num_kv_heads=2, head_dim=8, d_ff=64, init_std=0.1
)
SEQ_LEN = 16
BATCH_SIZE = 4
PUBLIC = config_lib.Bank("public", ("public",), 64, biased=False)
MATH = config_lib.Bank("math", ("math",), 48)
JOINT = config_lib.Bank("joint", ("code", "math"), 64)
ARCHITECTURES = {
    "dense": transformer.Architecture(MODEL, (PUBLIC,)),
    "pair": transformer.Architecture(MODEL, (PUBLIC, MATH), top_k=2),
    "joint": transformer.Architecture(MODEL, (PUBLIC, JOINT), top_k=2),
    "merged": transformer.Architecture(MODEL, (PUBLIC, JOINT), top_k=3),
}
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compiling is what costs here
TRAINABLE = {
    "dense": ".*",
    "pair": "experts/math/.*",
    "joint": r"(?!.*bias$).*",
    "merged": "experts/(?!public/).*/router/.*",
}


class Letters(tokens.TokenSource):
    """A source in memory: documents of random ids that repeat themselves, so that there is something to learn."""

    def __init__(self, seed=0, documents=200, length=40, vocab=MODEL.vocab_size, period=8):
        rng = np.random.default_rng(seed)
        pieces = [np.array([1], np.uint16)]
        for _ in range(documents):
            pieces += [np.tile(rng.integers(2, vocab, period), length // period + 1)[:length], [1]]
        tokenizer = type("Tokenizer", (), {"eos_id": 1, "digest": "t", "decode": lambda self, ids: "x" * len(ids)})()
        super().__init__([np.concatenate(pieces).astype(np.uint16)], tokenizer, f"letters-{seed}-{period}")


def stream(batch_size=BATCH_SIZE, seq_len=SEQ_LEN, seed=0, source=None, prefetch=2):
    """A pipeline over one source."""
    return pipeline.Pipeline({"public": source or Letters()}, {"public": 1.0}, seq_len, batch_size, seed, prefetch=prefetch)


@functools.cache
def _batch(step, batch_size):
    batch = stream(batch_size).batch(step)
    return {name: batch[name] for name in ("tokens", "targets", "weights", "segments")}


def batch(step=0, batch_size=BATCH_SIZE, uneven=False):
    """What a step is given; `uneven`: sequences with 16, 9, 2 and 0 tokens that count."""
    found = dict(_batch(step, batch_size))
    if uneven:
        counts = np.resize([16, 9, 2, 0], batch_size)
        found["weights"] = (np.arange(SEQ_LEN)[None] < counts[:, None]).astype(np.float32)
    return found


@functools.cache
def params_of(name):
    """Parameters of an architecture, biases at -0.2."""
    params = tree.flatten(jax.jit(lambda: transformer.init(ARCHITECTURES[name], 1), compiler_options=QUICK)())
    return tree.unflatten({path: np.asarray(leaf - 0.2 if path.endswith("bias") else leaf) for path, leaf in params.items()})


def settings(name, **changes):
    """The training config of an architecture's usual phase."""
    base = config_lib.TrainConfig(
        trainable=TRAINABLE[name], steps=50, batch_size=BATCH_SIZE, learning_rate=1e-2, warmup_steps=2, weight_decay=0.1
    )
    return dataclasses.replace(base, **changes)


@dataclasses.dataclass
class Run:
    """A compiled step with the state before it."""

    step: object
    state: step_lib.TrainState
    frozen: tree.Tree

    def __call__(self, batch, state=None):
        return self.step(self.state if state is None else state, self.frozen, batch)


def run(name, **changes):
    """A run of an architecture with changed settings; equal ones share the compiled step."""
    return _run(name, tuple(sorted(changes.items())))


@functools.cache
def _run(name, changes):
    config = settings(name, **dict(changes))
    compute = transformer.Compute(jnp.dtype(config.compute_dtype), config.remat, config.scan_layers)
    trainable, frozen = tree.partition(params_of(name), config.trainable)
    trainable = router.free(trainable)
    optimizer = optimizer_lib.make(config, trainable)
    head = "head/kernel" in tree.flatten(trainable)
    step = step_lib.make_step(ARCHITECTURES[name], compute, config, optimizer, head)
    return Run(jax.jit(step, compiler_options=QUICK), step_lib.init_state(trainable, optimizer), frozen)


def config(name, **changes):
    """The whole job of a run."""
    found = config_lib.Config(phase="expert", model=MODEL, train=settings(name, **changes))
    found.data.seq_len = SEQ_LEN
    return found


def train(name, directory, pipe=None, options=None, **changes):
    """Runs the training loop in a directory."""
    directory = epath.Path(directory)
    directory.mkdir(parents=True, exist_ok=True)
    job = config(name, **changes)
    pipe = pipe or stream(job.train.batch_size)
    return loop.train(
        params_of(name), ARCHITECTURES[name], pipe, job, directory, name, options or loop.Options(), origin="anchor"
    )


class Tampered:
    """A pipeline that calls `actions[step](batch)` when the batch of a step (from 1) is asked for, and yields the result."""

    def __init__(self, pipe, actions):
        self._pipe, self._actions = pipe, actions

    def identity(self):
        return self._pipe.identity()

    def iterate(self, start, rows=None):
        for step, found in enumerate(self._pipe.iterate(start, rows), start + 1):
            yield self._actions[step](found) if step in self._actions else found


def same_bytes(a, b):
    """Whether two trees of arrays have the same structure and the same bytes."""
    a, b = jax.tree_util.tree_flatten(a), jax.tree_util.tree_flatten(b)
    return a[1] == b[1] and all(
        np.asarray(x).dtype == np.asarray(y).dtype and np.asarray(x).tobytes() == np.asarray(y).tobytes()
        for x, y in zip(a[0], b[0], strict=True)
    )


def digest(params):
    """{path: SHA-256 of dtype, shape and bytes}."""
    arrays = {path: np.asarray(leaf) for path, leaf in tree.flatten(params).items()}
    return {path: tree.sha256(repr((a.dtype.str, a.shape)).encode() + a.tobytes()) for path, a in arrays.items()}
