"""What is read from compiled programs: those of XLA on CPU, and the TPU compiler's forms."""

import math

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from mos_jax.planning.counting import count_program, group_size
from mos_jax.planning.hlo import read_arrays, read_program
from mos_jax.planning.outline import held_bytes, outline_step
from tests.planning.fixtures_planning import deeper, tiny_request

LAYERS, ROWS, WIDTH, CHIPS = 5, 16, 64, 4


def counted(compiled, chips=CHIPS):
    return count_program(read_program(compiled.as_text()), chips)


@pytest.fixture(scope="module")
def scanned():
    """x @ w for each of 5 weights, which 4 devices hold a part of each and gather in turn."""
    mesh = jax.make_mesh((CHIPS,), ("x",), axis_types=(AxisType.Auto,))

    def at(*spec):
        return NamedSharding(mesh, PartitionSpec(*spec))

    def products(x, weights):
        def body(x, w):
            return x @ jax.lax.with_sharding_constraint(w, at(None, None)), None

        x, _ = jax.lax.scan(body, x, weights)
        return x, jnp.sum(x)

    x = jax.ShapeDtypeStruct((ROWS, WIDTH), jnp.float32, sharding=at("x", None))
    shape = (LAYERS, WIDTH, WIDTH)
    weights = jax.ShapeDtypeStruct(shape, jnp.float32, sharding=at(None, "x", None))
    out = (at("x", None), at())
    return jax.jit(products, out_shardings=out).lower(x, weights).compile()


def test_a_loop_counts_as_often_as_it_runs(scanned):
    found = counted(scanned)
    assert list(found.loops.values()) == [LAYERS]
    assert found.unknown_loops == ()
    product = 2 * (ROWS // CHIPS) * WIDTH * WIDTH
    assert found.flops == LAYERS * product
    # XLA's own count has the body once, and additions beside the product.
    assert product <= scanned.cost_analysis()["flops"] < 2 * product


def test_collectives_by_kind_number_and_bytes(scanned):
    weight = 4 * WIDTH * WIDTH
    found = counted(scanned).by_kind()
    assert found == {
        "all-gather": {
            "count": LAYERS,
            "payload": LAYERS * weight,
            "received": LAYERS * weight * (CHIPS - 1) // CHIPS,
        },
        # The sum, fp32 [], travels the ring twice.
        "all-reduce": {"count": 1, "payload": 4, "received": 6},
    }


def test_bytes_are_those_that_move_and_not_those_of_the_stack(scanned):
    weight, x = 4 * WIDTH * WIDTH, 4 * ROWS * WIDTH // CHIPS
    found = counted(scanned).bytes
    # At least each gathered weight written and read, and x read and written, in every layer.
    assert found > LAYERS * 2 * (weight + x)
    # A layer that read the whole stack would read a share of 5 weights 5 times.
    assert found < LAYERS * (5 * weight + 4 * x) + 4 * LAYERS * weight // CHIPS


def test_a_loop_without_a_known_end_is_named_and_counted_once():
    def until(x):
        return jax.lax.while_loop(lambda x: jnp.sum(x) < 100.0, lambda x: x @ x, x)

    compiled = jax.jit(until).lower(jnp.ones((8, 8))).compile()
    found = counted(compiled, 1)
    assert len(found.unknown_loops) == 1
    assert found.flops == 2 * 8**3


def test_convolutions_count_the_pairs_that_meet():
    def convolve(x, kernel):
        return jax.lax.conv_general_dilated(
            x, kernel, (2, 1), ((1, 1), (0, 0)), dimension_numbers=("NHWC", "HWIO", "NHWC")
        )

    # 3 of 5 places along the padded axis, 2 along the other; the kernel's edge meets padding once
    # on each side.
    text = (
        jax.jit(convolve)
        .lower(jnp.ones((2, 5, 4, 3)), jnp.ones((3, 3, 3, 7)))
        .compiler_ir("hlo")
        .as_hlo_text()
    )
    # The text before compilation has the same form, but its operands have no %.
    convolution = [line for line in text.splitlines() if " convolution(" in line]
    assert len(convolution) == 1
    found = count_program(read_program(_with_percent(text)), 1)
    assert found.flops == 2 * 2 * 3 * 7 * (3 * 3 - 2) * (3 * 2)


def _with_percent(text):
    """Marks names in a program's text as the text of compiled programs does."""
    import re

    names = set(re.findall(r"^\s+(?:ROOT )?([\w.\-]+) = ", text, re.MULTILINE))
    lines = []
    for line in text.splitlines():
        head, equals, rest = line.partition(" = ")
        rest = re.sub(r"(?<=[(, ])([\w.\-]+)(?=[,)])", lambda m: _marked(m[1], names), rest)
        lines.append(head + equals + rest)
    return "\n".join(lines)


def _marked(word, names):
    return f"%{word}" if word in names else word


# In the TPU compiler's manner: a gather that runs beside two fusions in pieces, a reduce-scatter as
# an all-reduce of which a part is cut, arrays in fast memory (S(1)), a stack that is read a slice
# at a time, and estimates in cycles.
TPU = """HloModule jit_step, is_scheduled=true

%start (p: bf16[8,64]) -> (bf16[8,64], bf16[32,64]) {
  %p = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %all-gather.1 = bf16[32,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}, frontend_attributes={chain_id="0"}
  ROOT %t = (bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, bf16[32,64]{1,0:T(8,128)(2,1)}) tuple(%p, %all-gather.1)
}

%middle (p: bf16[8,64], q: bf16[16,32]) -> (f32[16,64], bf16[32,64]) {
  %p = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} parameter(0)
  %q = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(1)
  %w = bf16[32,64]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=1, replica_groups=mesh['a'=4,'b'=2] {'a'}, dimensions={0}, frontend_attributes={chain_id="0"}
  %c = f32[16,64]{1,0:T(8,128)} convolution(%q, %w), dim_labels=bf_io->bf
  ROOT %t = (f32[16,64]{1,0:T(8,128)}, bf16[32,64]{1,0:T(8,128)(2,1)}) tuple(%c, %w)
}

%all-reduce-scatter.2 (p: f32[16,64]) -> f32[2,64] {
  %p = f32[16,64]{1,0:T(8,128)} parameter(0)
  %all-reduce.3 = f32[16,64]{1,0:T(8,128)} all-reduce(%p), channel_id=2, replica_groups={{0,1,2,3,4,5,6,7}}, to_apply=%add
  %zero = s32[] constant(0)
  ROOT %cut = f32[2,64]{1,0:T(8,128)} dynamic-slice(%all-reduce.3, %zero, %zero), dynamic_slice_sizes={2,64}
}

%slice (stack: bf16[10,8,64], i: s32[]) -> bf16[8,64] {
  %stack = bf16[10,8,64]{2,1,0:T(8,128)(2,1)} parameter(0)
  %i = s32[]{:T(128)S(6)} parameter(1)
  %zero = s32[] constant(0)
  %one = bf16[1,8,64]{2,1,0:T(8,128)(2,1)S(1)} dynamic-slice(%stack, %i, %zero, %zero), dynamic_slice_sizes={1,8,64}
  ROOT %b = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} bitcast(%one)
}

%body (arg: (s32[], bf16[10,8,64], bf16[16,32])) -> (s32[], bf16[10,8,64], bf16[16,32]) {
  %arg = (s32[]{:T(128)}, bf16[10,8,64]{2,1,0:T(8,128)(2,1)}, /*index=2*/bf16[16,32]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  %stack = bf16[10,8,64]{2,1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=1
  %x = bf16[16,32]{1,0:T(8,128)(2,1)} get-tuple-element(%arg), index=2
  %share = bf16[8,64]{1,0:T(8,128)(2,1)S(1)} fusion(%stack, %i), kind=kLoop, calls=%slice, backend_config={"estimated_cycles":"7","a":["b, c"]}
  %s = (bf16[8,64]{1,0:T(8,128)(2,1)S(1)}, bf16[32,64]{1,0:T(8,128)(2,1)}) fusion(%share), kind=kCustom, calls=%start
  %m = (f32[16,64]{1,0:T(8,128)}, bf16[32,64]{1,0:T(8,128)(2,1)}) fusion(%share, %x), kind=kOutput, calls=%middle, backend_config={"estimated_cycles":"100"}
  %y = f32[16,64]{1,0:T(8,128)} get-tuple-element(%m), index=0
  %part = f32[2,64]{1,0:T(8,128)} fusion(%y), kind=kCustom, calls=%all-reduce-scatter.2
  ROOT %out = (s32[]{:T(128)}, bf16[10,8,64]{2,1,0:T(8,128)(2,1)}, bf16[16,32]{1,0:T(8,128)(2,1)}) tuple(%i, %stack, %x)
}

%condition (arg: (s32[], bf16[10,8,64], bf16[16,32])) -> pred[] {
  %ten = s32[]{:T(128)} constant(10)
  %arg = (s32[]{:T(128)}, bf16[10,8,64]{2,1,0:T(8,128)(2,1)}, bf16[16,32]{1,0:T(8,128)(2,1)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%arg), index=0
  ROOT %lt = pred[]{:T(512)} compare(%i, %ten), direction=LT
}

ENTRY %main (a: s32[], b: bf16[10,8,64], c: bf16[16,32]) -> (s32[], bf16[10,8,64], bf16[16,32]) {
  %a = s32[]{:T(128)} parameter(0)
  %b = bf16[10,8,64]{2,1,0:T(8,128)(2,1)} parameter(1)
  %c = bf16[16,32]{1,0:T(8,128)(2,1)} parameter(2)
  %all = (s32[]{:T(128)}, bf16[10,8,64]{2,1,0:T(8,128)(2,1)}, bf16[16,32]{1,0:T(8,128)(2,1)}) tuple(%a, %b, %c)
  ROOT %loop = (s32[]{:T(128)}, bf16[10,8,64]{2,1,0:T(8,128)(2,1)}, bf16[16,32]{1,0:T(8,128)(2,1)}) while(%all), condition=%condition, body=%body
}
"""  # noqa: E501


def test_the_tpu_compilers_forms():
    found = count_program(read_program(TPU), 8)
    assert found.loops == {"loop": 10}
    assert found.flops == 10 * 2 * 16 * 32 * 64
    assert found.cycles == 10 * 107
    gathered, scattered = 2 * 32 * 64, 4 * 16 * 64
    assert found.by_kind() == {
        # In pieces and counted once; among the 4 of axis a.
        "all-gather": {"count": 10, "payload": 10 * gathered, "received": 10 * gathered * 3 // 4},
        "reduce-scatter": {
            "count": 10,
            "payload": 10 * scattered,
            "received": 10 * scattered * 7 // 8,
        },
    }
    share, x, y, part = 2 * 8 * 64, 2 * 16 * 32, 4 * 16 * 64, 4 * 2 * 64
    in_body = (
        share  # a slice of the stack; it lands in fast memory
        + gathered  # the collective takes the share from there and makes the whole
        + x + y  # the product's input and result
        + part  # what is cut
        + 2 * y  # the other collective
    )  # fmt: skip
    # And numbers: the slice's index, and the condition's two and its verdict.
    assert found.bytes == 10 * (in_body + 4 + 4 + 4 + 1)


@pytest.mark.parametrize(
    ("groups", "size"),
    [
        ("{{0,1,2},{3,4,5}}", 3),
        ("[4,2]<=[8]", 2),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['a'=4,'b'=2] {'a'}", 4),
        ("mesh['a'=4,'b'=2] {'a','b'}", 8),
        ("{}", 8),
    ],
)
def test_sizes_of_groups_in_every_form(groups, size):
    text = f"""
ENTRY %main (p: f32[4]) -> f32[4] {{
  %p = f32[4]{{0}} parameter(0)
  ROOT %r = f32[4]{{0}} all-reduce(%p), channel_id=1, replica_groups={groups}, to_apply=%add
}}
"""
    program = read_program(text)
    assert group_size(program.computations["main"].instructions["r"], 8) == size


def test_arrays_of_types():
    (number, codes, nothing) = read_arrays("(f32[]{:T(128)}, s4[3,5]{1,0:S(1)}, f32[0,7]{1,0})")
    assert (number.bytes, number.dims, number.space) == (4, (), 0)
    assert (codes.bytes, codes.space) == (8, 1)
    assert nothing.bytes == 0


def test_a_text_that_is_no_program_is_refused():
    with pytest.raises(ValueError, match="no entry computation"):
        read_program("nothing of the kind")


@pytest.fixture(scope="module")
def steps():
    """Counts and compiled step of a tiny run with 2, 4 and 6 layers, on 4 devices."""
    found = {}
    for layers in (2, 4, 6):
        request = deeper(tiny_request(remat="full"), layers)
        compiled = outline_step(request, jax.devices()).lower().compile()
        found[layers] = request, counted(compiled), compiled
    return found


def test_the_work_of_a_step_grows_by_equal_parts_with_its_layers(steps):
    flops = [steps[layers][1].flops for layers in (2, 4, 6)]
    gathered = [steps[layers][1].by_kind()["all-gather"]["received"] for layers in (2, 4, 6)]
    assert flops[2] - flops[1] == flops[1] - flops[0] > 0
    assert gathered[2] - gathered[1] == gathered[1] - gathered[0] > 0
    # XLA's count does not see how often a loop runs, so it is the same for any number of layers.
    counts = [steps[layers][2].cost_analysis()["flops"] for layers in (2, 4, 6)]
    assert max(counts) < 1.05 * min(counts)


def test_two_layers_do_what_the_products_of_two_layers_are(steps):
    (small, few, _), (_, many, _) = steps[2], steps[4]
    c, tokens = small.model, small.rows * small.width // CHIPS
    weights = sum(h * o for _, h, o in c.site_shapes().values())
    down = c.d_ff * c.d_model
    # Forward, again without the last product, and backward to the inputs.
    base = 2 * tokens * (3 * weights - down)
    attention = 4 * tokens * small.width * c.num_heads * c.head_dim * 4
    rank, widths = 4, sum(h + o for _, h, o in c.site_shapes().values())
    adapter = 2 * tokens * rank * widths * 4
    layers = (many.flops - few.flops) / 2
    assert layers == pytest.approx(base + attention + adapter, rel=0.1)


def test_what_chips_hold_is_what_the_compiled_step_takes(steps):
    for request, _, compiled in steps.values():
        # A step does not look at which example a target is of, so that array is left out.
        unused = 4 * request.rows * request.targets // CHIPS
        assert held_bytes(request) == compiled.memory_analysis().argument_size_in_bytes + unused


def test_what_chips_hold_of_a_quantised_base_on_a_mesh_of_all_axes():
    request = tiny_request(mesh=(1, 2, 2), method="lora", quantize="int8")
    compiled = outline_step(request, jax.devices()).lower().compile()
    held = compiled.memory_analysis().argument_size_in_bytes
    assert math.isclose(held_bytes(request), held, rel_tol=0.001)


# As XLA writes it for NVIDIA GPUs: a product in a loop, one in batches that is transposed, one
# whose configuration does not say how, and attention.
GPU = """HloModule jit_step, is_scheduled=true

%body (arg: (s32[], f32[16,64])) -> (s32[], f32[16,64]) {
  %arg = (s32[], f32[16,64]{1,0}) parameter(0)
  %i = s32[] get-tuple-element(%arg), index=0
  %x = f32[16,64]{1,0} get-tuple-element(%arg), index=1
  %w = f32[64,64]{1,0} constant({...})
  %gemm = (f32[16,64]{1,0}, s8[4096]{0}) custom-call(%x, %w), \
custom_call_target="__cublas$lt$matmul", backend_config={"operation_queue_id":"0",\
"gemm_backend_config":{"alpha_real":1,"beta":0,"dot_dimension_numbers":{\
"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["0"],"lhs_batch_dimensions":[],\
"rhs_batch_dimensions":[]},"epilogue":"DEFAULT"}}
  %y = f32[16,64]{1,0} get-tuple-element(%gemm), index=0
  ROOT %next = (s32[], f32[16,64]{1,0}) tuple(%i, %y)
}

%condition (arg.1: (s32[], f32[16,64])) -> pred[] {
  %arg.1 = (s32[], f32[16,64]{1,0}) parameter(0)
  ROOT %true = pred[] constant(true)
}

ENTRY %main (start: (s32[], f32[16,64]), q: bf16[4,32,8], k: bf16[4,32,8]) -> bf16[4,8,8] {
  %start = (s32[], f32[16,64]{1,0}) parameter(0)
  %q = bf16[4,32,8]{2,1,0} parameter(1)
  %k = bf16[4,32,8]{2,1,0} parameter(2)
  %loop = (s32[], f32[16,64]{1,0}) while(%start), condition=%condition, body=%body, \
backend_config={"known_trip_count":{"n":"5"}}
  %unknown = bf16[4,8,8]{2,1,0} custom-call(%q, %k), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{}}
  %fmha = bf16[4,32,8]{2,1,0} custom-call(%q, %k, %k), custom_call_target="__cudnn$fmhaSoftmax"
  ROOT %scores = bf16[4,8,8]{2,1,0} custom-call(%q, %k), custom_call_target="__cublas$gemm", \
backend_config={"gemm_backend_config":{"dot_dimension_numbers":{\
"lhs_contracting_dimensions":["1"],"rhs_contracting_dimensions":["1"],\
"lhs_batch_dimensions":["0"],"rhs_batch_dimensions":["0"]}}}
}
"""


def test_products_that_are_left_to_cublas_are_counted_and_other_calls_are_named():
    found = count_program(read_program(GPU.replace("\\\n", "")), 1)
    assert found.flops == 5 * 2 * 16 * 64 * 64 + 2 * 4 * 32 * 8 * 8
    assert found.uncounted == ("__cublas$gemm", "__cudnn$fmhaSoftmax")
    # Without the 4,096 bytes that the product in the loop works in.
    product = 4 * (16 * 64 + 64 * 64 + 16 * 64)
    rest = 2 * (2 * (2 * 4 * 32 * 8 + 4 * 8 * 8) + 4 * 4 * 32 * 8)
    assert found.bytes == 5 * product + rest
