"""The sparse path on eight devices: equal to one device and to the oracle, and really parallel."""

import dataclasses
import functools
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from flexjax import config as config_lib
from flexjax import errors, sharding
from flexjax.model import dispatch, exchange, kernels, moe, router
from flexjax.model.collectives import route
from flexjax.planning import collectives, hlo
from tests.model import oracle

B, T, D = 8, 6, 8
NAMES = ("public", "a", "b", "c", "d", "e", "f")
ONE_BANK = (("all", NAMES[:7], 8),)
TWO_WIDTHS = (("wide", ("b", "public", "a"), 8), ("narrow", ("e", "d", "c", "f"), 4))
FIVE = (("public", ("public",), 8), ("wide", ("c", "a"), 8), ("narrow", ("d", "b"), 4))
QUICK = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}  # compiling is what costs here


@dataclasses.dataclass(frozen=True)
class Case:
    """A mesh, banks of experts, k, and how the dispatch is done."""

    sizes: tuple[tuple[str, int], ...]
    layout: tuple
    top_k: int
    transport: str = "padded"
    whole: tuple[str, ...] = ()

    @property
    def mesh(self):
        return sharding.make_mesh(config_lib.MeshConfig(**dict(self.sizes)))

    @property
    def banks(self):
        return tuple(config_lib.Bank(name, experts, width) for name, experts, width in self.layout)

    def __str__(self):
        mesh = "x".join(f"{axis}{size}" for axis, size in self.sizes)
        return f"{mesh}-{len(router.expert_names(self.banks))}experts-k{self.top_k}-{self.transport}"


def case(layout, top_k, transport="padded", whole=(), **sizes):
    return Case(tuple(sizes.items()), layout, top_k, transport, whole)


CASES = [
    case(ONE_BANK, 2, expert=8),
    case(FIVE, 3, expert=4, data=2),
    case(TWO_WIDTHS, 4, expert=2, fsdp=2, tensor=2),
    case(FIVE, 2, fsdp=8),
]
RAGGED = [case(ONE_BANK, 2, "ragged", expert=8), case(FIVE, 3, "ragged", expert=4, data=2)]
PLACES = (
    ("padded", (), {"expert": 8}),
    ("padded", (), {"expert": 4, "data": 2}),
    ("padded", (), {"expert": 2, "fsdp": 2, "tensor": 2}),
    ("padded", ("wide", "all"), {"expert": 2, "fsdp": 2, "tensor": 2}),
    ("padded", (), {"expert": 2, "tensor": 4}),
    ("padded", (), {"fsdp": 4, "tensor": 2}),
    ("ragged", (), {"expert": 8}),
    ("ragged", (), {"expert": 4, "fsdp": 2}),
    ("ragged", (), {"expert": 2, "data": 4}),
)
KINDS = list(itertools.product((1, 2, 3, 4), (ONE_BANK, TWO_WIDTHS, FIVE)))
GRID = [  # every place meets every k and every layout, not every pair of them
    case(layout, top_k, transport, whole, **sizes)
    for i, (transport, whole, sizes) in enumerate(PLACES)
    for top_k, layout in KINDS[i % 3 :: 5] + KINDS[(i + 2) % 5 :: 5]
]


def ragged_by_hand(operand, output, input_offsets, send_sizes, output_offsets, recv_sizes, *, axis_name):
    """What `jax.lax.ragged_all_to_all` does, out of what CPUs can do; NaN if the two ends disagree."""
    operands, starts, sizes, targets = (
        jax.lax.all_gather(array, axis_name) for array in (operand, input_offsets, send_sizes, output_offsets)
    )
    me, row = jax.lax.axis_index(axis_name), jnp.arange(output.shape[0])
    for source in range(operands.shape[0]):
        start, size, target = (array[source, me] for array in (starts, sizes, targets))
        taken = operands[source][jnp.clip(start + row - target, 0, operand.shape[0] - 1)]
        taken = jnp.where(size == recv_sizes[source], taken, jnp.nan)
        output = jnp.where(((target <= row) & (row < target + size))[:, None], taken, output)
    return output


@pytest.fixture(autouse=True)
def ragged_on_cpu(monkeypatch):
    monkeypatch.setattr(jax.lax, "ragged_all_to_all", ragged_by_hand)


def draw(layout, seed=0, scale=D**-0.5):
    """Arrays in float64 that hold float32 values; expert weights by bank."""
    random = np.random.default_rng(seed)
    E = sum(len(experts) for _, experts, _ in layout)
    arrays = {"h": random.normal(size=(B, T, D)), "rows": random.normal(size=(E, D)), "bias": -np.abs(random.normal(size=E))}
    for name, experts, width in layout:
        shapes = {"gate": (D, width), "up": (D, width), "down": (width, D)}
        arrays[name] = {part: scale * random.normal(size=(len(experts), *shape)) for part, shape in shapes.items()}
    return jax.tree.map(lambda array: array.astype(np.float32).astype(np.float64), arrays)


def by_oracle(arrays, case, allowed):
    weights = {}
    for name, experts, _ in case.layout:
        for slot, expert in enumerate(experts):
            weights[expert] = tuple(arrays[name][part][slot] for part in ("gate", "up", "down"))
    ordered = [weights[name] for name in router.expert_names(case.banks)]
    return oracle.mixture(arrays["h"], ordered, arrays["rows"], arrays["bias"], case.top_k, allowed)


def layer_output(case, arrays, allowed, mesh):
    state = arrays["h"], arrays["rows"], arrays["bias"], case.top_k, allowed
    routing = router.route(*state) if allowed is not None else route(*state, mesh)
    ffns = [arrays[bank.name] for bank in case.banks]
    return moe.apply(arrays["h"], ffns, case.banks, routing, allowed, mesh, moe.Dispatch(case.transport, whole=case.whole))


@functools.cache
def program(case, parallel):
    """Jitted (y, gradients of sum(y * c)) on the mesh of a case, or on one device; shared by all tests of this file."""

    def loss(arrays, allowed, c):
        y = layer_output(case, arrays, allowed, case.mesh if parallel else None)
        return (y * c).sum(), y

    def run(arrays, allowed, c):
        (_, y), gradients = jax.value_and_grad(loss, has_aux=True)(arrays, allowed, c)
        return y, gradients

    return jax.jit(run, compiler_options=QUICK)


def on_mesh(case, arrays, allowed, c):
    """The arguments as a training step would hold them."""
    mesh, X = case.mesh, case.mesh.shape["expert"]
    batch, everywhere = sharding.sharding(mesh, ("batch",)), sharding.sharding(mesh, ())
    placed = {"h": sharding.put(arrays["h"], batch)}
    placed |= {name: sharding.put(arrays[name], everywhere) for name in ("rows", "bias")}
    for bank in case.banks:
        rules = sharding.IN_USE if bank.name in case.whole else sharding.RULES
        placed[bank.name] = {
            part: sharding.put(
                np.pad(weight, ((0, -len(bank.experts) % X), (0, 0), (0, 0))),
                sharding.sharding(mesh, dispatch.LOGICAL[part], rules),
            )
            for part, weight in arrays[bank.name].items()
        }
    return placed, None if allowed is None else sharding.put(allowed, batch), sharding.put(c, batch)


def run(case, arrays, allowed, parallel=True):
    """(y, gradients) without the padded slots, whose gradients must be 0."""
    c = np.random.default_rng(9).normal(size=(B, T, D)).astype(np.float32)
    arrays = jax.tree.map(lambda array: array.astype(np.float32), arrays)
    if not parallel:
        return jax.tree.map(np.asarray, program(case, False)(arrays, allowed, c))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(dispatch, "resolve", lambda transport, mesh: transport)  # the fixture lets CPUs do either
        y, gradients = jax.tree.map(np.asarray, program(case, True)(*on_mesh(case, arrays, allowed, c)))
    for bank in case.banks:
        for part, gradient in gradients[bank.name].items():
            assert not gradient[len(bank.experts) :].any(), f"padded slots of {bank.name}/{part}"
            gradients[bank.name][part] = gradient[: len(bank.experts)]
    return y, gradients


def distance(actual, expected):
    """Largest difference relative to the largest value."""
    return np.abs(actual - expected).max() / max(np.abs(expected).max(), 1e-30)


def masks(case):
    """Who may use what: everybody everything; some rows fewer than k; all tokens of all rows one expert alone."""
    E, random = len(router.expert_names(case.banks)), np.random.default_rng(case.top_k)
    some = random.random((B, E)) < 0.4
    some[np.arange(B), random.integers(E, size=B)] = True
    return {"all": np.ones((B, E), bool), "some": some, "one": np.tile(np.arange(E) == E - 2, (B, 1))}


def skewed(arrays, case):
    """Every token's first choice is the same expert, wherever it may be used."""
    arrays["h"][..., 0] = np.abs(arrays["h"][..., 0]) + 1
    arrays["rows"] *= 0.1
    arrays["rows"][1, 0], arrays["bias"][:] = 3, 0
    f32 = jax.tree.map(np.float32, {name: arrays[name] for name in ("h", "rows", "bias")})
    assert (router.route(**f32, top_k=case.top_k, allowed=None).indices[..., 0] == 1).all()
    return jax.tree.map(lambda array: array.astype(np.float32).astype(np.float64), arrays)


def check_equality(case):
    for name, allowed in masks(case).items():
        for arrays in (draw(case.layout, seed=1), skewed(draw(case.layout, seed=2), case)):
            y, gradients = run(case, arrays, allowed)
            expected_y, expected = run(case, arrays, allowed, parallel=False)
            assert distance(y, expected_y) < 1e-6, name
            assert distance(y, by_oracle(arrays, case, allowed)) < 1e-5, name
            for gradient, other in zip(jax.tree.leaves(gradients), jax.tree.leaves(expected), strict=True):
                assert distance(gradient, other) < 1e-5, name


@pytest.mark.parametrize("case", CASES + RAGGED, ids=str)
def test_equals_one_device_and_the_oracle(case):
    check_equality(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", GRID, ids=str)
def test_equals_one_device_and_the_oracle_on_the_whole_grid(case):
    check_equality(case)


@pytest.mark.parametrize("case", [CASES[1], CASES[2], RAGGED[1]], ids=str)
def test_what_a_forbidden_expert_holds_reaches_nobody(case):
    arrays, names = draw(case.layout, seed=3), router.expert_names(case.banks)
    allowed = masks(case)["some"] & (np.array(names) != "b")
    allowed[~allowed.any(axis=1), 0] = True
    y, gradients = run(case, arrays, allowed)
    name, slot = next((bank, experts.index("b")) for bank, experts, _ in case.layout if "b" in experts)
    for part in arrays[name].values():
        part[slot] = np.nan
    arrays["rows"][names.index("b")] = arrays["bias"][names.index("b")] = np.nan
    poisoned_y, poisoned = run(case, arrays, allowed)
    np.testing.assert_array_equal(poisoned_y, y)
    for before, after in zip(jax.tree.leaves(gradients), jax.tree.leaves(poisoned), strict=True):
        np.testing.assert_array_equal(after, before)


@pytest.mark.parametrize("case", [CASES[1], CASES[2], RAGGED[1]], ids=str)
def test_a_broken_expert_hurts_only_the_rows_that_use_it(case):
    arrays, names = draw(case.layout, seed=4), router.expert_names(case.banks)
    allowed = masks(case)["all"]
    allowed[1:, names.index("b")] = False
    allowed[0] = np.array(names) == "b"
    y, gradients = run(case, arrays, allowed)
    name, slot = next((bank, experts.index("b")) for bank, experts, _ in case.layout if "b" in experts)
    for part in arrays[name].values():
        part[slot] = np.nan
    broken_y, broken = run(case, arrays, allowed)
    assert np.isnan(broken_y[0]).all()
    np.testing.assert_array_equal(broken_y[1:], y[1:])
    np.testing.assert_array_equal(broken["h"][1:], gradients["h"][1:])


def test_bfloat16_is_as_near_as_on_one_device():
    layer, arrays = CASES[1], jax.tree.map(jnp.bfloat16, draw(CASES[1].layout, seed=5))

    def run(h, ffns, mesh):
        routing = router.route(h, arrays["rows"], arrays["bias"], layer.top_k, None)
        return moe.apply(h, ffns, layer.banks, routing, None, mesh)

    ffns = [arrays[bank.name] for bank in layer.banks]
    padded = jax.tree.map(lambda w: jnp.pad(w, ((0, -w.shape[0] % 4), (0, 0), (0, 0))), ffns)
    jitted = jax.jit(run, static_argnums=2, compiler_options=QUICK)
    one, eight = jitted(arrays["h"], ffns, None), jitted(arrays["h"], padded, layer.mesh)
    assert eight.dtype == jnp.bfloat16
    assert distance(np.asarray(eight, np.float32), np.asarray(one, np.float32)) < 2**-8


def arguments(case):
    """As in training: no masks, and each device routes its own tokens."""
    return on_mesh(case, jax.tree.map(np.float32, draw(case.layout)), None, np.ones((B, T, D), np.float32))


def compiled(case):
    placed = arguments(case)
    return program(case, True).lower(*placed).compile(), placed


def instructions(text, mesh):
    """(op, arrays such as f32[6,8], mesh axes, text) of every collective that joins devices, and of every sort and product."""
    found = []
    for step in hlo.Module(text).walk():
        instruction = step.instruction
        arrays = [f"{array.dtype}{list(array.dimensions)}".replace(" ", "") for array in instruction.arrays]
        if instruction.op in collectives.KINDS:
            axes, size = collectives.spanned(instruction, mesh.shape)
            if size > 1:
                found.append((instruction.op, arrays, axes))
        elif instruction.op in ("sort", "dot"):
            found.append((instruction.op, arrays, ()))
    return found


def test_it_is_really_parallel():
    """Tokens travel and weights do not; every device holds and updates its part of every bank."""
    layer = case(TWO_WIDTHS, 2, expert=4, fsdp=2)
    program, (placed, *_) = compiled(layer)
    given, returned = program.input_shardings[0][0], program.output_shardings[1]
    for bank in layer.banks:
        for part, leaf in placed[bank.name].items():
            assert {shard.data.nbytes for shard in leaf.addressable_shards} == {leaf.nbytes // 4 // 2}
            assert given[bank.name][part].shard_shape(leaf.shape) == leaf.addressable_shards[0].data.shape
            assert returned[bank.name][part].is_equivalent_to(leaf.sharding, 3), f"gradient of {bank.name}/{part}"
    found = [(op, arrays, axes) for op, arrays, axes in instructions(program.as_text(), layer.mesh) if "expert" in axes]
    assert [axes for op, _, axes in found if op == "all-to-all"] == [("expert",)] * 4  # there and back, values and gradients
    slots = 4 * 2
    assert [arrays for op, arrays, axes in found if op == "all-gather"] == [[f"s32[4,{slots}]"]]  # rows from whom to whom


def test_weights_are_gathered_over_fsdp_again_and_their_gradients_scattered():
    layer = case(FIVE, 2, fsdp=8)
    found = [op for op, *_ in instructions(compiled(layer)[0].as_text(), layer.mesh)]
    leaves = 3 * len(layer.banks)
    assert found.count("reduce-scatter") == leaves
    assert found.count("all-gather") == 2 * leaves  # the backward pass does not keep them
    held = dataclasses.replace(layer, whole=tuple(bank.name for bank in layer.banks))
    found = [op for op, *_ in instructions(compiled(held)[0].as_text(), layer.mesh)]
    assert not found.count("all-gather") and not found.count("reduce-scatter")


def test_partial_sums_over_tensor_are_added_once():
    """One sum of [n, D] in the forward pass, where two banks times k choices each have partial results."""
    layer = case(TWO_WIDTHS, 4, expert=2, tensor=4)

    def run(arrays, allowed, c):
        return layer_output(layer, arrays, allowed, layer.mesh)

    text = jax.jit(run, compiler_options=QUICK).lower(*arguments(layer)).compile().as_text()
    found = instructions(text, layer.mesh)
    assert [arrays for op, arrays, axes in found if "tensor" in axes] == [[f"f32[{B // 2 * T},{D}]"]]


def test_no_sort_is_global_and_no_product_has_padding():
    layer = CASES[1]
    found = instructions(compiled(layer)[0].as_text(), layer.mesh)
    sorts = [arrays for op, arrays, _ in found if op == "sort"]
    assert sorts and all(f"s32[{B // 8 * T * layer.top_k}]" in arrays for arrays in sorts)
    rows = [int(arrays[0].split("[")[1].split(",")[0]) for op, arrays, _ in found if op == "dot"]
    room = dispatch.buffer_bound(layer.banks, layer.mesh, B // 8 * T, layer.top_k, D, jnp.float32)
    assert kernels.BLOCKS[-1] in rows and room.rows not in rows


@pytest.mark.parametrize("ragged", [False, True], ids=["padded", "ragged"])
@pytest.mark.parametrize("slots", [1, 3])
def test_rows_come_to_their_slot_and_back(slots, ragged):
    """`send` groups rows by slot with nothing lost and `collect` is its inverse, wherever the choices point."""
    X, n, k = 4, 5, 2
    mesh = sharding.make_mesh(config_lib.MeshConfig(expert=X), jax.devices()[:X])
    split = PartitionSpec("expert")

    def local(h, slot):
        route, starts, sizes = exchange.plan(slot, X, slots, ragged)
        x = exchange.send(h, route)
        row = jnp.arange(x.shape[0])
        inside = (row >= starts[0]) & (row < starts[-1] + sizes[-1])
        x = jnp.where(inside[:, None], x, jnp.nan)  # what lies beyond the groups must not matter
        group = jnp.searchsorted(starts, row, side="right", method="compare_all") - 1
        mine = jax.lax.axis_index("expert") * slots + group
        return x, jnp.where(inside, mine, -1), exchange.collect(x, route)

    run = jax.jit(jax.shard_map(local, mesh=mesh, in_specs=(split, split), out_specs=split), compiler_options=QUICK)
    for seed in range(12):
        random = np.random.default_rng(seed)
        choices = np.stack([random.permutation(X * slots + 1)[:k] for _ in range(X * n)]).astype(np.int32)
        if seed < X:  # all tokens to one device
            choices[:] = seed * slots + np.arange(k) % slots
            choices[:, 1:][choices[:, 1:] == choices[:, :1]] = X * slots
        h = np.arange(X * n, dtype=np.float32)[:, None] * np.ones((1, D), np.float32)
        x, slot, back = jax.tree.map(np.asarray, run(h, choices))
        sent = sorted((int(s), int(token)) for token, row in enumerate(choices) for s in row if s < X * slots)
        assert sorted((int(s), int(token)) for s, token in zip(slot, x[:, 0], strict=True) if s >= 0) == sent
        np.testing.assert_array_equal(back, np.where(choices[..., None] < X * slots, h[:, None], 0))


def test_the_room_for_rows_is_what_the_worst_routing_needs():
    mesh = sharding.make_mesh(config_lib.MeshConfig(expert=4, data=2))
    banks = [config_lib.Bank(name, experts, width) for name, experts, width in FIVE]  # 1 + 2 + 2 experts: 3 slots on each of 4
    room = dispatch.buffer_bound(banks, mesh, tokens=100, top_k=2, d_model=64, dtype=jnp.bfloat16)
    assert (room.expected, room.pair, room.rows, room.bytes) == (200, 200, 800, 800 * 64 * 2)
    assert str(room) == "room for 800 rows a device (0.1 MiB a buffer), 200 if routing is even"
    assert dispatch.buffer_bound(banks, mesh, 100, 4, 64, jnp.float32).rows == 4 * 100 * 3
    assert dispatch.buffer_bound(banks, None, 100, 2, 64, jnp.float32).rows == 200
    layer = CASES[1]
    room = dispatch.buffer_bound(layer.banks, layer.mesh, B // 8 * T, layer.top_k, D, jnp.float32)
    found = instructions(compiled(layer)[0].as_text(), layer.mesh)
    assert {tuple(arrays) for op, arrays, _ in found if op == "all-to-all"} == {(f"f32[{room.pair},{D}]",) * 4}


def test_transports_are_chosen_by_the_target():
    mesh = CASES[0].mesh
    assert dispatch.resolve("auto", mesh) == dispatch.resolve("padded", mesh) == "padded"
    with pytest.raises(errors.ConfigError, match=r"mesh.transport 'ragged' needs TPUs, these devices are cpu; take 'padded'"):
        dispatch.resolve("ragged", mesh)
    with pytest.raises(errors.ConfigError, match=r"mesh.transport is 'fast', expected one of auto, padded, ragged"):
        dispatch.resolve("fast", mesh)


FLAT, TORUS = "v5e:2x4", "v5p:2x2x2"
PODS = [
    ("ragged", FLAT, {"expert": 8}, "ragged"),
    ("padded", FLAT, {"expert": 8}, "padded"),
    ("ragged", FLAT, {"expert": 2, "fsdp": 2, "tensor": 2}, "ragged"),
    ("auto", TORUS, {"expert": 4, "fsdp": 2}, "ragged"),
    ("auto", FLAT, {"expert": 4, "data": 2}, "padded"),
]


@pytest.mark.slow
@pytest.mark.parametrize(("transport", "topology", "sizes", "expected"), PODS)
def test_a_compiler_for_tpus_makes_the_exchange(monkeypatch, transport, topology, sizes, expected):
    """Ahead of time, for machines that are not there: forward and gradient."""
    pytest.importorskip("libtpu", reason="the compiler for TPUs (package libtpu) is not installed")
    monkeypatch.undo()  # the real exchange
    monkeypatch.setenv("TPU_SKIP_MDS_QUERY", "1")
    monkeypatch.setenv("ALLOW_MULTIPLE_LIBTPU_LOAD", "1")
    from jax.experimental import topologies

    mesh = sharding.make_mesh(config_lib.MeshConfig(**sizes), topologies.get_topology_desc(topology, platform="tpu").devices)
    X, tokens, d = mesh.shape["expert"], 256, 128
    banks = (config_lib.Bank("wide", NAMES[:5], 256), config_lib.Bank("narrow", NAMES[5:], 128))

    def shape(names, *dimensions, dtype=jnp.bfloat16):
        return jax.ShapeDtypeStruct(dimensions, dtype, sharding=sharding.sharding(mesh, names))

    def loss(h, ffns, rows, bias):
        routing = router.route(h, rows, bias, 2, None)
        return moe.apply(h, ffns, banks, routing, None, mesh, moe.Dispatch(transport)).astype(jnp.float32).sum()

    ffns = []
    for bank in banks:
        E, f = -(-len(bank.experts) // X) * X, bank.d_ff
        ffns.append(
            {part: shape(names, E, *((f, d) if part == "down" else (d, f))) for part, names in dispatch.LOGICAL.items()}
        )
    h, rows = shape(("batch", None, None), 8, tokens, d), shape((None, None), 7, d, dtype=jnp.float32)
    arguments = h, ffns, rows, shape((None,), 7, dtype=jnp.float32)
    text = jax.jit(jax.value_and_grad(loss, (0, 1, 2, 3))).lower(*arguments).compile().as_text()
    found = {name: len(re.findall(rf" {name}all-to-all(?:-start)?\(", text)) for name in ("ragged-", "")}
    assert found == {"ragged-": 4 * (expected == "ragged"), "": 4 * (expected == "padded")}
    products = re.findall(r"%ragged-dot-none\S* = ", text)
    assert len(products) == 3 * 3 * len(banks)  # value and two gradients of gate, up and down
    for bank in banks:  # no device sees more than its own experts
        E = -(-len(bank.experts) // X) * X
        assert E == E // X or not re.search(rf"bf16\[{E},(?:{d},{bank.d_ff}|{bank.d_ff},{d})\]", text)
