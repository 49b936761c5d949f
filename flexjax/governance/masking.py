"""That a masked expert cannot matter: a model with one more slot, whatever fills it, answers as the model without it.

Bit-identity is claimed of one program on several contents of the slot; that masking is removing, within a tolerance, since
these are two programs.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np

from flexjax import config as config_lib
from flexjax import errors, tree
from flexjax.experts import models, schema, surgery
from flexjax.inference import decode
from flexjax.model import router, transformer

TOLERANCE = 1e-5  # of masked against removed, relative to the largest logit, in float32
PROMPTS, LENGTH, NEW_TOKENS = 4, 24, 8
FILLINGS = {"normal numbers": np.float32(1), "numbers a hundred times larger": np.float32(100), "NaN": np.float32(np.nan)}


def compare(model: models.Model, removed: str, size: Mapping[str, Any]) -> dict[str, Any]:
    """Runs the model as it was with the expert masked, its slot filled in three ways, and the model as it is.

    Needs memory for the whole model as it is read and as it generates (`decode.serving_layout`), and for one bank more: a copy
    of that in which the slot is.

    Args:
      model: one without the expert.
      removed: a name for the slot.
      size: {"d_ff", "rank"} of the expert that it held.

    Returns:
      What was done and found, for a certificate.

    Raises:
      IntegrityError: a filling changes a bit of an answer, or masking and removing differ by more than the tolerance.
    """
    architecture, params = models.load(model)
    names = architecture.experts
    shape = (PROMPTS, LENGTH)
    prompts = np.random.default_rng(0).integers(0, architecture.config.vocab_size, shape).astype(np.int32)
    begin, *others = FILLINGS
    wider, filled = _with_slot(architecture, params, removed, size)
    _fill(wider, filled, removed, begin)
    runner = _Runner(wider, filled, prompts, names)
    first = runner.run(filled)
    for filling in others:
        _fill(wider, filled, removed, filling)
        found = runner.run(filled)
        if found[0].tobytes() != first[0].tobytes() or found[1] != first[1]:
            raise errors.IntegrityError(
                f"with '{removed}' masked, filling its slot with {filling} changes an answer; report this"
            )
    program = runner.program
    del runner, found  # with its copy of the weights
    own = _Runner(architecture, params, prompts, names).run(params)[0]
    difference = float(np.abs(own - first[0]).max() / np.abs(own).max())
    if not difference <= TOLERANCE:
        raise errors.IntegrityError(
            f"masking '{removed}' and removing it differ by {difference:.2g}, more than {TOLERANCE}; report this"
        )
    return {
        "slot": size,
        "fillings": list(FILLINGS),
        "logits_bit_equal": True,
        "continuations_equal": True,
        "prompts": PROMPTS,
        "tokens": LENGTH,
        "new_tokens": NEW_TOKENS,
        "masked_against_removed": difference,
        "tolerance": TOLERANCE,
        "program": program,
    }


class _Runner:
    """The programs of one architecture, compiled once: bit-identity is a promise about one program on two contents."""

    def __init__(
        self, architecture: transformer.Architecture, params: tree.Tree, prompts: np.ndarray, allowed: Sequence[str]
    ) -> None:
        self._architecture, self._prompts = architecture, prompts
        self._mask = router.allowed_mask(architecture.experts, allowed, len(prompts))
        self._requests = [decode.Request(row.tolist(), tuple(allowed)) for row in prompts]
        self._decoder = decode.Decoder(params, architecture, eos_id=0)

        def logits(params: tree.Tree, tokens: jax.Array, mask: jax.Array) -> jax.Array:
            return transformer.logits(params, transformer.forward(params, tokens, architecture, allowed=mask).hidden)

        lowered = jax.jit(logits).lower(params, prompts, self._mask)
        self.program = tree.sha256(lowered.as_text().encode())
        self._logits = lowered.compile()

    def run(self, params: tree.Tree) -> tuple[np.ndarray, list[list[int]]]:
        """Logits of all positions, and greedy continuations by the path that generation takes."""
        self._decoder.weights = decode.serving_layout(params, self._architecture)
        answers = self._decoder.generate(self._requests, NEW_TOKENS)
        return np.asarray(self._logits(params, self._prompts, self._mask)), [ids.tolist() for ids in answers]


def _with_slot(
    architecture: transformer.Architecture, params: tree.Tree, name: str, size: Mapping[str, Any]
) -> tuple[transformer.Architecture, tree.Tree]:
    """The model with one more expert of the size that left, all zeros: the bank it joins is copied, the others are shared."""
    config, held = architecture.config, architecture.banks
    shapes = schema.expert_shapes(config.num_layers, config.d_model, size["d_ff"], biased=True, rank=size["rank"])
    leaves = {path.removeprefix("expert/"): shape for path, shape in shapes.items()}
    widths = {member: bank.d_ff for bank in held for member in bank.experts} | {name: size["d_ff"]}
    ranks = {member: bank.rank for bank in held for member in bank.experts} | {name: size["rank"]}
    experts, banks = dict(params["experts"]), []
    for bank, names in surgery.group(widths, ranks).items():
        banks.append(config_lib.Bank(bank, names, widths[names[0]], bank != config_lib.PUBLIC, ranks[names[0]]))
        if name in names:
            there = tree.flatten(experts.get(bank, {}))
            empty = {path: np.zeros((shape[0], 0, *shape[1:]), np.float32) for path, shape in leaves.items()}
            experts[bank] = tree.unflatten(
                {path: np.insert(np.asarray(there.get(path, empty[path])), names.index(name), 0, axis=1) for path in empty}
            )
        elif "router" not in experts[bank]:  # public was alone; whatever its row, all others are masked
            experts[bank] = {**experts[bank], "router": {"row": np.zeros((config.num_layers, 1, config.d_model), np.float32)}}
    return surgery.architecture(config, tuple(banks), architecture.top_k), {**params, "experts": experts}


def _fill(architecture: transformer.Architecture, params: tree.Tree, name: str, filling: str) -> None:
    """Overwrites the slot of `_with_slot`, in its own copy of that bank, by numbers that are anything but weights."""
    rng = np.random.default_rng(1 + list(FILLINGS).index(filling))
    (bank,) = (bank for bank in architecture.banks if name in bank.experts)
    for _, leaf in sorted(tree.flatten(params["experts"][bank.name]).items()):
        shape = (len(leaf), *leaf.shape[2:])
        leaf[:, bank.experts.index(name)] = FILLINGS[filling] * rng.standard_normal(shape, np.float32)
