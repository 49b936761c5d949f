"""The analytic FLOPs of a step are those of the matrix products that XLA compiles."""

import dataclasses

import jax
import pytest

from flexjax import config as config_lib
from flexjax import errors, tree
from flexjax.model import kernels, router, transformer
from flexjax.planning import hlo
from flexjax.train import flops
from flexjax.train import step as step_lib
from tests.train import tiny

MODEL = dataclasses.replace(tiny.MODEL, d_ff=96)
PUBLIC = dataclasses.replace(tiny.PUBLIC, d_ff=96)
JOINT = dataclasses.replace(tiny.JOINT, d_ff=96)
DENSE = transformer.Architecture(MODEL, (PUBLIC,))
TIED = transformer.Architecture(dataclasses.replace(MODEL, tied_head=True), (PUBLIC,))
PAIR = transformer.Architecture(MODEL, (PUBLIC, tiny.MATH), top_k=2)
ALL = transformer.Architecture(MODEL, (PUBLIC, JOINT), top_k=3)
LOW = config_lib.Bank("math", ("math",), 96, rank=12)
LOW_PAIR = transformer.Architecture(MODEL, (PUBLIC, LOW), top_k=2)
LOW_BANKS = (PUBLIC, config_lib.Bank("r8", ("a", "b"), 96, rank=8), LOW, config_lib.Bank("w48", ("c", "d"), 48))
MIXED = transformer.Architecture(MODEL, LOW_BANKS, top_k=6)
CASES = {
    "public, everything trained": (DENSE, ".*"),
    "tied head": (TIED, ".*"),
    "frozen head": (DENSE, "(?!head/).*"),
    "frozen embedding": (DENSE, "(?!embed/).*"),
    "frozen embedding and head": (DENSE, "layers/.*"),
    "attention's keys only": (DENSE, "layers/attention/k"),
    "head only": (DENSE, "head/kernel"),
    "expert pair": (PAIR, "experts/math/.*"),
    "joint, all experts active": (ALL, ".*"),
    "router tuning": (ALL, "experts/(?!public/).*/router/.*"),
    "low-rank pair": (LOW_PAIR, "experts/math/.*"),
    "low-rank pair, factors b only": (LOW_PAIR, "experts/math/.*/b"),
    "low-rank pair, down only": (LOW_PAIR, "experts/math/ffn/down/.*"),
    "low-rank pair, everything trained": (LOW_PAIR, ".*"),
    "mixed sizes, one bank trained": (MIXED, "experts/r8/.*"),
    "mixed sizes, router tuning": (MIXED, "experts/(?!public/).*/router/.*"),
    "mixed sizes, narrow experts trained": (MIXED, "experts/w48/.*"),
}


def _head(architecture):
    return "embed/embedding" if architecture.config.tied_head else "head/kernel"


def compiled_flops(architecture, trainable, frozen, batch_size=tiny.BATCH_SIZE):
    """Dot FLOPs per token of the compiled loss and gradient; a loop whose trips are known at run time only counts once."""
    settings = tiny.settings("dense", router_z_loss=1e-3, load_balance_loss=1e-2)
    head_trainable = _head(architecture) in tree.flatten(trainable)

    def loss(trainable, frozen, batch):
        params = router.constrain(tree.combine(trainable, frozen))
        return step_lib.batch_loss(params, batch, architecture, transformer.Compute(), settings, head_trainable)

    step = jax.jit(jax.value_and_grad(loss, has_aux=True), compiler_options=tiny.QUICK)  # the optimizer multiplies no matrices
    program = step.lower(trainable, frozen, tiny.batch(batch_size=batch_size)).compile()
    return sum(hlo.dot_flops(hlo.Module(program.as_text())).values()) / (batch_size * tiny.SEQ_LEN)


@pytest.mark.parametrize("case", CASES)
def test_analytic_flops_are_those_of_the_compiled_products(case):
    architecture, pattern = CASES[case]
    trainable, frozen = tree.partition(transformer.abstract(architecture), pattern)
    trainable = jax.eval_shape(router.free, trainable)
    analytic = flops.per_token(architecture, trainable, tiny.SEQ_LEN)
    expected = analytic.total
    if _head(architecture) in tree.flatten(trainable):
        # a trainable head computes its logits again in the backward pass, to keep none: no useful work, so not in `analytic`
        expected += 2 * MODEL.d_model * MODEL.vocab_size
    assert compiled_flops(architecture, trainable, frozen) == pytest.approx(expected, rel=0.02)
    assert analytic.forward > 0 and analytic.backward > 0


def test_a_sparse_layer_counts_the_chosen_experts_only():
    sparse = dataclasses.replace(ALL, top_k=2)
    params = transformer.abstract(ALL)
    trainable, _ = tree.partition(params, "experts/joint/ffn/.*")
    whole, part = (flops.per_token(a, trainable, tiny.SEQ_LEN) for a in (ALL, sparse))
    experts = 2 * 2 * 3 * 3 * MODEL.d_model * 96  # layers, FLOPs of a product, matrices, experts
    assert whole.forward - part.forward == pytest.approx(experts / 3)


@pytest.mark.parametrize("pattern", [".*", "experts/joint/.*", "experts/joint/ffn/down"])
def test_the_sparse_path_computes_what_the_chosen_experts_cost(pattern, monkeypatch):
    """Tokens that two of three experts share evenly fill one block per expert: one trip of each loop over blocks."""
    monkeypatch.setattr(kernels, "BLOCKS", (128,))
    sparse = dataclasses.replace(ALL, top_k=2)
    batch_size = 128 * 3 // 2 // tiny.SEQ_LEN
    trainable, frozen = tree.partition(transformer.abstract(sparse), pattern)
    trainable = jax.eval_shape(router.free, trainable)
    expected = flops.per_token(sparse, trainable, tiny.SEQ_LEN).total
    if _head(sparse) in tree.flatten(trainable):
        expected += 2 * MODEL.d_model * MODEL.vocab_size
    assert compiled_flops(sparse, trainable, frozen, batch_size) == pytest.approx(expected, rel=0.02)


def test_a_forward_pass_costs_what_the_named_experts_are():
    """Masked, a model costs what another one costs that holds just those experts."""

    def cost(*banks, top_k=1):
        return flops.per_token(transformer.Architecture(MODEL, (PUBLIC, *banks), top_k), {}, tiny.SEQ_LEN).forward

    def masked(architecture, *experts):
        return flops.forward_per_token(architecture, tiny.SEQ_LEN, experts)

    for architecture in (DENSE, PAIR, ALL, LOW_PAIR, MIXED):
        assert masked(architecture, "public") == flops.forward_per_token(DENSE, tiny.SEQ_LEN) == cost()
        whole = flops.per_token(architecture, {}, tiny.SEQ_LEN).forward
        assert flops.forward_per_token(architecture, tiny.SEQ_LEN) == whole == masked(architecture, *architecture.experts)
    row, ffn = 2 * MODEL.d_model, 2 * 3 * MODEL.d_model  # FLOPs in a layer of a router row, and of a hidden unit
    math = config_lib.Bank("math", ("math",), 96)
    assert masked(ALL, "public", "math") == cost(math, top_k=2) == cost() + 2 * (2 * row + 96 * ffn)
    assert masked(MIXED, "public", "c") == cost(config_lib.Bank("c", ("c",), 48), top_k=2) == cost() + 2 * (2 * row + 48 * ffn)
    assert masked(MIXED, "public", "math") == cost(LOW, top_k=2) == cost() + 2 * (2 * row + 2 * 3 * 12 * (MODEL.d_model + 96))
    alone = masked(LOW_PAIR, "math")  # what it takes of `public` is computed all the same
    assert alone == masked(LOW_PAIR, "public", "math") - 2 * 2 * row
    sparse = dataclasses.replace(ALL, top_k=2)  # as many are chosen as may be, two at most
    assert masked(sparse, "public", "math") == masked(ALL, "public", "math") < masked(ALL, "public", "math", "code")
    assert masked(sparse, "math") == masked(DENSE, "public")


@pytest.mark.parametrize(("named", "says"), [(("public", "law"), "unknown expert 'law'"), ((), "no expert")])
def test_unknown_experts_have_no_price(named, says):
    with pytest.raises(errors.PolicyError, match=says):
        flops.forward_per_token(ALL, tiny.SEQ_LEN, named)


def test_the_backward_pass_of_an_expert_costs_less_than_that_of_the_whole_model():
    params = transformer.abstract(PAIR)
    expert, whole = (
        flops.per_token(PAIR, tree.partition(params, pattern)[0], tiny.SEQ_LEN) for pattern in ("experts/math/.*", ".*")
    )
    assert expert.forward == whole.forward and expert.backward < 0.8 * whole.backward < 1.8 * whole.forward
