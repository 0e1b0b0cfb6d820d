"""Reading compiled programs: texts in the forms of the three compilers, and one real program."""
# ruff: noqa: E501 - the lines of a program

import functools
import inspect

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P

from oneformer_jax.compile import hlo
from oneformer_jax.train.flops import count_flops

# Loops, fusions, a channel in pieces, and the three ways of writing groups; layouts of a TPU.
TEXT = """\
HloModule jit_step, is_scheduled=true

FileNames
1 "/elsewhere/site-packages/flax/linear.py"
2 "{root}/oneformer_jax/models/losses.py"

FunctionNames
1 "f"

FileLocations
1 {file_name_id=2 function_name_id=1 line=40 end_line=40 column=6 end_column=6}
2 {file_name_id=1 function_name_id=1 line=7 end_line=7 column=6 end_column=6}

StackFrames
1 {file_location_id=1 parent_frame_id=1}
2 {file_location_id=2 parent_frame_id=2}

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  ROOT %sum = f32[] add(%a, %a)
}

%all-reduce-scatter.1 (input: f32[8,128]) -> f32[2,128] {
  %input = f32[8,128]{1,0:T(8,128)} parameter(0)
  ROOT %r = f32[8,128]{1,0:T(8,128)} all-reduce(%input), channel_id=5, replica_groups={{0,1,2,3},{4,5,6,7}}, to_apply=%add
}

%fused (p: f32[4]) -> f32[1024,1024] {
  %p = f32[4]{0} parameter(0)
  %piece = bf16[16,100]{1,0:T(8,128)(2,1)} all-gather(%p), channel_id=9, replica_groups=[2,4]<=[8], dimensions={0}
  ROOT %inner = f32[1024,1024]{1,0} broadcast(%p), metadata={op_name="jit(f)/made" stack_frame_id=2}
}

%body (s: (s32[], f32[4])) -> (s32[], f32[4]) {
  %s = (s32[], f32[4]{0}) parameter(0)
  %loop = f32[4]{0:T(128)} all-reduce(%s), channel_id=2, replica_groups=mesh['a'=2,'b'=4], device_ids=([4,4]T(1,0)) {'b'}, to_apply=%add
  ROOT %t = (s32[], f32[4]{0}) tuple(%s, %loop)
}

%condition (s: (s32[], f32[4])) -> pred[] {
  %c = s32[]{:T(128)} constant(10)
  %i = s32[] get-tuple-element(%s), index=0
  ROOT %lt = pred[] compare(%i, %c), direction=LT
}

ENTRY %main (x: f32[4]) -> f32[4] {
  %x = f32[4]{0} parameter(0)
  %w = (s32[], f32[4]{0}) while(%x), condition=%condition, body=%body
  %big = f32[1024,1024]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%fused
  %again = f32[1024,1024]{1,0:T(8,128)} fusion(%x), kind=kLoop, calls=%fused
  %thin = bf16[1,128,3]{2,1,0:T(8,128)(2,1)} copy(%x), metadata={op_name="c" source_file="{root}/kernels/a.py" source_line=3}
  %fast = f32[4096,4096]{1,0:T(8,128)S(1)} copy(%x)
  %part = f32[2,128]{1,0} fusion(%x), kind=kCustom, calls=%all-reduce-scatter.1
  %piece2 = bf16[16,100]{1,0:T(8,128)(2,1)} all-gather(%x), channel_id=9, replica_groups=[2,4]<=[8], dimensions={0}
  %start = (f32[4]{0}, f32[32]{0}, u32[], u32[]) all-gather-start(%x), channel_id=11, replica_groups=[1,8]<=[8], dimensions={0}
  %alone = f32[9]{0} all-reduce(%x), channel_id=12, replica_groups={{0},{1}}, to_apply=%add
  %host = (f32[6]{0}, u32[], token[]) send(%x, %w), channel_id=13, is_host_transfer=true
  %over = (bf16[5,7]{1,0}, u32[], token[]) send(%x, %w), channel_id=14, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  %back = (bf16[5,7]{1,0}, u32[], token[]) recv(%w), channel_id=15, is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla_megascale_runtime",_xla_megascale_transfer_type="ALL_REDUCE"}
  ROOT %out = f32[4]{0} copy(%x)
}
""".replace("{root}", str(hlo.ROOT))


def test_collectives_of_a_text():
    found = hlo.Program(TEXT, 8).collectives()
    by_kind = {(c.kind, c.elements): c for c in found}
    assert set(by_kind) == {
        ("all-reduce", 4),
        ("reduce-scatter", 8 * 128),
        ("all-gather", 1600),
        ("all-gather", 32),
        (hlo.HOST, 6),
        (hlo.SLICES, 35),
    }
    loop = by_kind["all-reduce", 4]
    assert (loop.group, loop.times) == (4, 10)
    assert loop.sent == pytest.approx(10 * 2 * 3 / 4 * 16)
    assert by_kind["reduce-scatter", 1024].sent == pytest.approx(3 / 4 * 8 * 128 * 4)
    assert by_kind["all-gather", 1600].sent == pytest.approx(3 / 4 * 3200)  # its pieces count once
    assert by_kind["all-gather", 32].sent == pytest.approx(7 / 8 * 128)
    assert by_kind[hlo.HOST, 6].sent == 24
    between = by_kind[hlo.SLICES, 35]
    assert (between.name, between.sent) == ("ALL_REDUCE", 70)  # what comes back does not count
    sent = hlo.sent_by_kind(found)
    assert sent["all-gather"] == (2, pytest.approx(2400 + 112))
    assert next(iter(sent)) == "reduce-scatter"


def test_largest_buffers_of_a_text():
    first, second, *_ = hlo.Program(TEXT, 8).largest_buffers(5)
    # In the fusion nothing is kept; its result has no place, but what is in it has.
    assert (first.bytes, first.count, first.shape) == (4 * 2**20, 2, "f32[1024,1024]")
    assert first.source == "oneformer_jax/models/losses.py:40"  # our frame, not that of the library
    assert (second.shape, second.source) == ("bf16[1,128,3]", "kernels/a.py:3")
    assert second.bytes == 128 * 128 * 2  # 3 lanes take 128


def test_a_text_that_is_no_program():
    with pytest.raises(ValueError, match="no ENTRY"):
        hlo.Program("module @jit_f {}", 1)


def test_a_real_program(mesh8):
    """A gradient over 8 devices: its all-reduce has the size of the weights, in every iteration."""
    split, whole = (NamedSharding(mesh8, spec) for spec in (P("data"), P()))

    @functools.partial(jax.jit, in_shardings=(whole, split), out_shardings=whole)
    def gradient(w, x):
        def body(carry, _):
            return carry - jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(carry), None

        return jax.lax.scan(body, w, None, length=5)[0]

    line = inspect.getsourcelines(test_a_real_program)[1]
    w, x = jnp.ones((24, 40)), jnp.ones((16, 24))
    traced = gradient.trace(w, x)
    program = hlo.Program(traced.lower().compile().as_text(), 8)
    (found,) = [c for c in program.collectives() if c.elements == 24 * 40]
    assert (found.kind, found.group, found.times) == ("all-reduce", 8, 5)
    assert found.sent == pytest.approx(5 * 2 * 7 / 8 * 4 * 24 * 40)
    path, _, number = found.source.rpartition(":")
    assert path == "tests/compile/test_hlo.py"
    assert line < int(number) < line + 12
    # Forward, and the gradient of the weights; no one asks for that of x.
    assert count_flops(traced.jaxpr) == 5 * 2 * 2 * 16 * 24 * 40


def test_flops_of_convolutions_branches_and_shards(mesh8):
    image, kernel = jnp.ones((2, 16, 16, 3)), jnp.ones((3, 3, 3, 8))

    def convolve(image, kernel):
        numbers = ("NHWC", "HWIO", "NHWC")
        out = jax.lax.conv_general_dilated(image, kernel, (2, 2), "SAME", dimension_numbers=numbers)
        return out.sum()

    forward = 2 * 2 * 8 * 8 * 8 * 27
    assert count_flops(jax.make_jaxpr(convolve)(image, kernel)) == forward
    gradients = jax.make_jaxpr(jax.grad(convolve, (0, 1)))(image, kernel)
    assert count_flops(gradients) == 3 * forward

    def branch(x):
        return jax.lax.cond(x[0, 0] > 0, lambda x: x @ x @ x, lambda x: x @ x, x)

    assert count_flops(jax.make_jaxpr(branch)(np.ones((4, 4)))) == 2 * 2 * 4**3
    product = jax.shard_map(
        lambda x: x @ x.T, mesh=mesh8, in_specs=P("data"), out_specs=P("data"), check_vma=False
    )
    assert count_flops(jax.make_jaxpr(product)(np.ones((16, 4)))) == 8 * 2 * 2 * 2 * 4
