"""A tiny anchor and bundles of every size, made without training."""

import numpy as np

from flexjax import config as config_lib
from flexjax import tree
from flexjax.experts import provenance, publishing, surgery
from flexjax.model import transformer
from tests.model import noise

CONFIG = config_lib.ModelConfig(vocab_size=17, d_model=8, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=4, d_ff=6)
BANKS = (
    *transformer.dense_banks(CONFIG),
    config_lib.Bank("r2", ("delta", "epsilon"), 6, rank=2),
    config_lib.Bank("w3", ("beta",), 3),
    config_lib.Bank("w6", ("alpha", "gamma"), 6),
)
NAMES = ("alpha", "beta", "delta", "epsilon", "gamma")
PARAMS = noise.params(transformer.Architecture(CONFIG, BANKS, 2))
SHARED, EXPERTS = surgery.split(PARAMS, BANKS)
STATES = np.random.default_rng(1).normal(size=(2, 64, 8)).astype(np.float32)


def write_anchor(directory, statistics=False):
    """An anchor; with statistics, routers are probed, and rows of noise may fail."""
    extra = {"statistics": {"states": STATES}} if statistics else {}
    return publishing.write_anchor(
        directory, CONFIG, None, lambda writer: writer.put_tree({**SHARED, "expert": EXPERTS["public"], **extra}),
        rows="random", training={"steps": 3},
    )  # fmt: skip


def write_bundle(directory, name, anchor, shared=None, expert=None, **stated):
    """A bundle of one of the experts above, or of another tree."""
    found = EXPERTS[name] if expert is None else expert
    return publishing.write_bundle(directory, name, anchor, found, {}, provenance.Provenance(**stated), shared)


def write_all(home, statistics=False):
    """An anchor and a bundle of every name."""
    anchor = write_anchor(home / "anchor", statistics)
    return anchor, {name: write_bundle(home / name, name, anchor) for name in NAMES}


def moved(seed, paths=("embed/embedding", "head/kernel")):
    """Shared leaves as a recipe that unfroze them would leave them."""
    rng, flat = np.random.default_rng(seed), tree.flatten(SHARED)
    return tree.unflatten({p: np.asarray(flat[p] + 0.1 * rng.standard_normal(flat[p].shape), np.float32) for p in paths})
