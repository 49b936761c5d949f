"""The parser of compiled programs, on programs whose cost is known and on lines as TPU compilers write them."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from flexjax import config as config_lib
from flexjax import sharding
from flexjax.planning import collectives, hlo, traffic

D, ROWS, TRIPS = 32, 64, 5


def module(function, *shapes):
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    return hlo.Module(jax.jit(function).lower(*arrays).compile().as_text())


def test_a_scan_counts_its_products_once_per_trip():
    def function(x, weights):
        return jax.lax.scan(lambda h, w: (jnp.tanh(h @ w), None), x, weights)[0]

    found = module(function, (ROWS, D), (TRIPS, D, D))
    assert hlo.dot_flops(found) == {"f32": 2.0 * TRIPS * ROWS * D * D}
    assert not found.dynamic


def test_nested_loops_multiply():
    def function(x, weights):
        def inner(h, w):
            return jax.lax.fori_loop(0, 3, lambda _, y: jnp.tanh(y @ w), h), None

        return jax.lax.scan(inner, x, weights)[0]

    assert hlo.dot_flops(module(function, (ROWS, D), (TRIPS, D, D)))["f32"] == 2.0 * 3 * TRIPS * ROWS * D * D


def test_a_loop_that_the_data_decides_counts_once_and_is_named():
    def function(x, w, limit):
        return jax.lax.while_loop(lambda carry: carry[1] < limit, lambda carry: (carry[0] @ w, carry[1] + 1), (x, 0))[0]

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((ROWS, D), (D, D))]
    text = jax.jit(function).lower(*shapes, jax.ShapeDtypeStruct((), jnp.int32)).compile().as_text()
    found = hlo.Module(text)
    assert hlo.dot_flops(found)["f32"] == 2.0 * ROWS * D * D
    assert len(found.dynamic) == 1


LOOP = """HloModule m

%body (p: (s32[], f32[8,8])) -> (s32[], f32[8,8]) {
  %one = s32[]{:T(128)} constant(2)
  %p = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%p), index=0
  %copy.1 = s32[]{:T(128)S(6)} copy(%i)
  %x = f32[8,8]{1,0:T(8,128)} get-tuple-element(%p), index=1
  %y = f32[8,8]{1,0:T(8,128)} convolution(%x, %x), window={size=1}, dim_labels=bf0_io0->bf0
  %next = s32[]{:T(128)} add(%copy.1, %one)
  ROOT %t = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) tuple(%next, %x)
}

%condition (q: (s32[], f32[8,8])) -> pred[] {
  %bound = s32[]{:T(128)} constant(9)
  %q = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) parameter(0)
  %j = s32[]{:T(128)} get-tuple-element(%q), index=0
  ROOT %lt = pred[]{:T(512)} compare(%j, %bound), direction=LT
}

ENTRY %main (a: f32[8,8]) -> f32[8,8] {
  %a = f32[8,8]{1,0:T(8,128)} parameter(0)
  %zero = s32[]{:T(128)} constant(2)
  %start = s32[]{:T(128)} copy(%zero)
  %init = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) tuple(%start, %a)
  %loop = (s32[]{:T(128)}, f32[8,8]{1,0:T(8,128)}) while(%init), condition=%condition, body=%body
  ROOT %out = f32[8,8]{1,0:T(8,128)} get-tuple-element(%loop), index=1
}
"""


def test_trips_without_an_annotation_come_from_the_condition():
    """TPU compilers say nothing of trips: from 2, in steps of 2, below 9."""
    found = hlo.Module(LOOP)
    steps = {step.instruction.name: step.times for step in found.walk()}
    assert steps["next"] == 4 and steps["out"] == 1
    unknown = hlo.Module(LOOP.replace("constant(9)", "custom-call()"))
    assert {step.instruction.name: step.times for step in unknown.walk()}["next"] == 1
    assert unknown.dynamic == {"loop"}


def convolution(shapes, window, labels):
    left, right, result = shapes
    return hlo.Module(
        f"ENTRY %main (a: {left}, b: {right}) -> {result} {{\n"
        f"  %a = {left}{{0}} parameter(0)\n  %b = {right}{{0}} parameter(1)\n"
        f"  ROOT %c = {result}{{0}} convolution(%a, %b), window={{{window}}}, dim_labels={labels}\n}}\n"
    )


@pytest.mark.parametrize(
    ("shapes", "window", "labels", "expected"),
    [
        # [4 256 512] x [512 1024]
        (("bf16[4,256,512]", "bf16[512,1024,1]", "bf16[4,256,1024]"), "size=1", "0bf_io0->0bf", 2 * 4 * 256 * 512 * 1024),
        # a weight gradient: two axes are contracted
        (("bf16[4,256,1024]", "bf16[4,256,512]", "bf16[1024,512,1]"), "size=4", "0fb_0io->bf0", 2 * 4 * 256 * 1024 * 512),
        # attention scores: the batch axes 2 and 4 become positions of a dilated window
        (
            ("bf16[2,1024,4,128]", "bf16[2,1024,4,128]", "f32[2,4,1024,1024]"),
            "size=2x4 stride=1x3 lhs_dilate=2x4",
            "0b1f_0o1i->01bf",
            2 * 2 * 4 * 1024 * 1024 * 128,
        ),
        (
            ("bf16[2,1024,4,128]", "bf16[2,4,1024,128]", "bf16[2,4,1024,1024]"),
            "size=2x4 stride=2x4 pad=1_1x3_3 lhs_dilate=1x3 rhs_reversal=1x1",
            "0b1f_01oi->01fb",
            2 * 2 * 4 * 1024 * 1024 * 128,
        ),
    ],
)
def test_products_that_a_tpu_writes_as_convolutions(shapes, window, labels, expected):
    assert hlo.dot_flops(convolution(shapes, window, labels)) == {"bf16": expected}


def test_the_kernel_of_a_grouped_product_is_counted_and_other_kernels_are_named():
    line = '  ROOT %{name} = {result} custom-call(%a, %b), custom_call_target="tpu_custom_call"\n'
    text = "ENTRY %main (a: bf16[64,32], b: bf16[8,32,16]) -> bf16[64,16] {{\n  %a = bf16[64,32] parameter(0)\n"
    text += "  %b = bf16[8,32,16] parameter(1)\n{line}}}\n"
    grouped = hlo.Module(text.format(line=line.format(name="ragged-dot-none.1", result="bf16[64,16]")))
    assert hlo.dot_flops(grouped) == {"bf16": 2.0 * 64 * 32 * 16} and not hlo.kernels(grouped)
    other = hlo.Module(text.format(line=line.format(name="splash.1", result="bf16[64,16]")))
    assert hlo.dot_flops(other) == {} and hlo.kernels(other) == {"splash.1"}


def test_a_product_behind_another_library_is_an_error():
    text = 'ENTRY %main (a: f32[8]) -> f32[8] {\n  %a = f32[8]{0} parameter(0)\n  ROOT %c = f32[8]{0} custom-call(%a), custom_call_target="__onednn$matmul"\n}\n'  # noqa: E501
    with pytest.raises(ValueError, match="count those too"):
        hlo.dot_flops(hlo.Module(text))


AXES = {"data": 2, "fsdp": 4, "tensor": 2, "expert": 1}


@pytest.mark.parametrize(
    ("groups", "axes", "size"),
    [
        ("replica_groups=[8,2]<=[16]", ("tensor",), 2),
        ("replica_groups=[4,4]<=[2,4,2]T(0,2,1)", ("fsdp",), 4),
        ("replica_groups=[2,8]<=[8,2]T(1,0)", ("data", "fsdp"), 8),
        ("replica_groups={{0,8},{1,9},{2,10},{3,11},{4,12},{5,13},{6,14},{7,15}}", ("data",), 2),
        ("replica_groups={{0,1,2,3},{4,5,6,7},{8,9,10,11},{12,13,14,15}}", ("fsdp/2", "tensor"), 4),
        ("replica_groups={}", ("data", "fsdp", "tensor"), 16),
        (
            "replica_groups=mesh['data'=2,'fsdp'=4,'tensor'=2,'expert'=1] {'data','fsdp'}, use_global_device_ids=true",
            ("data", "fsdp"),
            8,
        ),
        ("source_target_pairs={{0,2},{2,4},{4,6},{6,0}}", ("fsdp",), 2),
    ],
)
def test_replica_groups_in_every_form_name_the_axes(groups, axes, size):
    found = hlo.Module(
        f"ENTRY %m (a: f32[8]) -> f32[8] {{\n  ROOT %a = f32[8]{{0}} all-reduce(%a), channel_id=1, {groups}\n}}\n"
    )
    (step,) = found.walk()
    assert collectives.spanned(step.instruction, AXES) == (axes, size)


def test_groups_in_an_unknown_form_are_an_error():
    found = hlo.Module("ENTRY %m (a: f32[8]) -> f32[8] {\n  ROOT %a = f32[8]{0} all-reduce(%a), replica_groups=@everybody\n}\n")
    with pytest.raises(ValueError, match="unknown form"):
        collectives.find(found, AXES)


SPREAD = """%start (p: bf16[8,16]) -> bf16[8,64] {
  %p = bf16[8,16]{1,0} parameter(0)
  %g.1 = bf16[8,64]{1,0} all-gather(%p), channel_id=4, replica_groups=[4,4]<=[2,4,2]T(0,2,1), dimensions={1}
  ROOT %c.1 = bf16[8,64]{1,0} custom-call(%g.1), custom_call_target="AsyncCollectiveStart"
}

%done (p: bf16[8,16]) -> bf16[8,64] {
  %q = bf16[8,16]{1,0} parameter(0)
  ROOT %g.2 = bf16[8,64]{1,0} all-gather(%q), channel_id=4, replica_groups=[4,4]<=[2,4,2]T(0,2,1), dimensions={1}
}

%all-reduce-scatter.1 (p: bf16[8,64]) -> bf16[8,16] {
  %r = bf16[8,64]{1,0} parameter(0)
  %s = bf16[8,64]{1,0} all-reduce(%r), channel_id=5, replica_groups=[4,4]<=[2,4,2]T(0,2,1), to_apply=%add
  ROOT %d = bf16[8,16]{1,0} slice(%s), slice={[0:8], [0:16]}
}

ENTRY %main (a: bf16[8,16]) -> bf16[8,16] {
  %a = bf16[8,16]{1,0} parameter(0)
  %f.1 = bf16[8,64]{1,0} fusion(%a), kind=kCustom, calls=%start
  %f.2 = bf16[8,64]{1,0} fusion(%a), kind=kCustom, calls=%done
  %h.1 = (bf16[8,16]{1,0}, bf16[8,64]{1,0}) all-gather-start(%a), channel_id=6, replica_groups=[8,2]<=[16], dimensions={1}
  %h.2 = bf16[8,64]{1,0} all-gather-done(%h.1)
  ROOT %f.3 = bf16[8,16]{1,0} fusion(%f.2), kind=kCustom, calls=%all-reduce-scatter.1
}
"""


def test_an_asynchronous_collective_counts_once_and_a_fused_reduce_scatter_is_one():
    found = collectives.table(collectives.find(hlo.Module(SPREAD), AXES))
    part, whole = 8 * 16 * 2, 8 * 64 * 2
    assert found == {
        ("all-gather", ("fsdp",)): (1, 3 * part),
        ("all-gather", ("tensor",)): (1, part),
        ("reduce-scatter", ("fsdp",)): (1, whole * 3 / 4),
    }


def test_a_ragged_exchange_sends_the_rows_that_there_are():
    text = "ENTRY %main (a: bf16[16,4], b: bf16[64,4]) -> bf16[64,4] {\n"
    text += "  %a = bf16[16,4]{1,0} parameter(0)\n  %b = bf16[64,4]{1,0} parameter(1)\n"
    text += "  ROOT %r = bf16[64,4]{1,0} ragged-all-to-all(%a, %b), channel_id=1, replica_groups=[4,4]<=[2,4,2]T(0,2,1)\n}\n"
    found = collectives.table(collectives.find(hlo.Module(text), AXES))
    assert found == {("ragged-all-to-all", ("fsdp",)): (1, 16 * 4 * 2 * 3 / 4)}


def test_collectives_of_a_sharded_scan_are_those_it_needs():
    """Weights over fsdp are gathered once a layer, partial sums over tensor reduced once a layer."""
    mesh = sharding.make_mesh(config_lib.MeshConfig(fsdp=4, tensor=2))

    def place(*names):
        return NamedSharding(mesh, PartitionSpec(*names))

    def layer(h, w):
        w = jax.lax.with_sharding_constraint(w, place("tensor", None))
        return jax.lax.with_sharding_constraint(jnp.tanh(h @ w), place("fsdp", None)), None

    h = jax.ShapeDtypeStruct((ROWS, D), jnp.float32, sharding=place("fsdp", "tensor"))
    w = jax.ShapeDtypeStruct((TRIPS, D, D), jnp.float32, sharding=place(None, "tensor", "fsdp"))
    text = jax.jit(lambda h, w: jax.lax.scan(layer, h, w)[0], out_shardings=place("fsdp", None)).lower(h, w).compile().as_text()
    found = collectives.table(collectives.find(hlo.Module(text), dict(mesh.shape)))
    assert found["all-gather", ("fsdp",)] == (TRIPS, TRIPS * 3 * (D // 2) * (D // 4) * 4)
    assert found["all-reduce", ("tensor",)] == (TRIPS, TRIPS * (ROWS // 4) * D * 4)


def test_traffic_counts_slices_not_the_stack_they_come_from():
    def function(x, weights):
        return jax.lax.scan(lambda h, w: (h + w, None), x, weights)[0]

    stack = 50 * ROWS * D * 4
    moved = traffic.moved(module(function, (ROWS, D), (50, ROWS, D)))
    assert (
        2 * stack < moved < 6 * stack
    )  # each step reads a slice and h and writes h; the stack as a whole, 50 times, it is not


def test_the_largest_buffer_is_named_with_its_source():
    def function(x, y):
        with jax.named_scope("widest"):
            wide = jnp.tanh(x @ y)
        return wide @ wide.T @ x

    largest = traffic.largest(module(function, (256, 8), (8, 512)))
    assert largest[0].bytes == 256 * 512 * 4 and "widest" in largest[0].source
