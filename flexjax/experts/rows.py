"""The public row and an owner's row, by the method that belongs to the anchor: `domains` applied to a job."""

import numpy as np
from jax.sharding import Mesh

from flexjax import config as config_lib
from flexjax import errors, sharding, tree
from flexjax.data import tokens
from flexjax.experts import domains, models, store
from flexjax.model import transformer


def public_rows(
    config: config_lib.Config,
    architecture: transformer.Architecture,
    params: tree.Tree,
    source: tokens.TokenSource,
    mesh: Mesh,
) -> tuple[tree.Tree, np.ndarray]:
    """The statistics that owners need for their rows, and the public row [L, D], by the anchor's method."""
    count, seed, method = config.anchor.statistics_tokens, config.seed, config.anchor.rows
    documents = domains.choose(source, max(domains.LEAST_DOCUMENTS, count // config.data.seq_len), seed)
    states = domains.states(architecture, params, source, documents, config.data.seq_len, count, seed, mesh)
    statistics = {"states": states}
    if method == "logistic":
        return statistics, np.zeros((states.shape[0], states.shape[2]), np.float32)
    if method == "mean":
        return statistics, domains.scaled(states.mean(axis=1), states)
    if method == "random":
        return statistics, domains.scaled(domains.random_vector(states.shape[2], seed), states)
    projection = domains.text_projection(source, documents, config.model.vocab_size, config.model.d_model)
    statistics["projection"] = projection
    return statistics, domains.scaled(domains.text_vector(source, documents, projection), states)


def domain_row(
    config: config_lib.Config,
    anchor: store.Artefact,
    source: tokens.TokenSource,
    mesh: Mesh,
) -> np.ndarray:
    """The owner's row [L, D], by the method of the anchor."""
    name, method = config.expert.name, anchor.manifest["rows"]
    seed = config.seed + int(tree.sha256(name.encode())[:6], 16)  # owners of one seed draw different random rows
    documents = domains.choose_owner(source, config.expert.row_documents, name, seed)
    if "statistics/states" not in anchor.manifest["tensors"]:
        raise errors.ConfigError(
            f"{anchor.label} carries no public statistics, so no domain row can be made; "
            f"add them: --config=configs/public.py --config.anchor.path={anchor.directory}"
        )
    public = anchor.tensor("statistics/states").astype(np.float32)
    if method == "random":
        return domains.scaled(domains.random_vector(public.shape[2], seed), public)
    if method == "text":
        return domains.scaled(domains.text_vector(source, documents, anchor.tensor("statistics/projection")), public)
    architecture, params = models.load_anchor(anchor, mesh)
    mine = domains.states(architecture, params, source, documents, config.data.seq_len, public.shape[1], seed, mesh)
    if method == "logistic":
        return sharding.from_main(domains.logistic_rows(mine, public))
    return sharding.from_main(domains.scaled(mine.mean(axis=1), public))
