"""Cycles from the schedules of TPU kernels."""

import pytest

from oneformer_jax.kernels.bench import tpu


def test_cycles_of_a_known_schedule():
    text = """
     0   :  { %s1_s0 = smov 0 }
   0x1 LB: > { %s2_s0 = sadd.s32 1, %s2_s0 } /* Start region 7 */
   0x2 LB: >> { %3 = vst [vmem:[%s1_s0] sm:$0xff] %v0 } /* Start region 5 */
   0x3   : >> { %p4_p1 = scmp.ge.s32.totalorder %s3_s1, 6 /* loop exit test */ }
   0x4   : >> { %9 = sbr.rel (!%p4_p1) target = $region5 }
   0x5   : >> {}
   0x6   : >> {}
   0x7   : >> {}
   0x8   : >> {} /* End region 5 */
   0x9   : > { %4 = vld  ;;  %p8_p2 = scmp.ge.s32.totalorder %s2_s0, 10 /* loop exit test */
      a bundle's second line */ }
   0xa   : > { %7 = sbr.rel (!%p8_p2) target = $region7 }
   0xb   :  {}
   0xc   :  {}
   0xd   :  {}
   0xe   :  {}
   0xf   :  {}
"""
    # The inner loop only stores: it fills an array in one of 2 steps of the outer loop.
    assert tpu.issue_cycles(text, tiles=2) == 2 + 10 * (7 + 7 * 6 / 2)
    with pytest.raises(ValueError, match="trip count"):
        tpu.issue_cycles(text.replace("loop exit test", ""), tiles=2)


def test_cycles_of_a_loop_that_ends_by_a_condition():
    text = """
     0   :  { %p1_p0 = scmp.gt.s32.totalorder 1, %s1_s0 }
   0x1   :  { %9 = sbr.rel (%p1_p0) target = $region9 } /* over the loop */
   0x2 LB: > { %s2_s0 = sadd.s32 1, %s2_s0 } /* Start region 7 */
   0x3   : > { %9 = sbr.rel (%p4_p1) target = $region7 }
   0x4   : > {}
   0x5   : > {}
   0x6   : > {}
   0x7   : > {}
   0x8   :  {} /* Start region 9 */
"""
    assert tpu.issue_cycles(text, steps=10) == 3 + 10 * 6
    with pytest.raises(ValueError, match="trip count for the loop of region 7"):
        tpu.issue_cycles(text)


PROGRAM = """
%body.1 (arguments: (s32[], f32[8])) -> (s32[], f32[8]) {
  %i = s32[]{:T(128)} constant(7)
  %a = f32[8] fusion(%x), kind=kLoop, backend_config={"estimated_cycles":"10"}
  %b = f32[8] fusion(%a), kind=kLoop, backend_config={"estimated_cycles":"5"}
}

%condition.1 (arguments: (s32[], f32[8])) -> pred[] {
  %trips = s32[]{:T(128)} constant(6)
  ROOT %less = pred[] compare(%i, %trips), direction=LT
}

ENTRY %main.2 (x: f32[8]) -> f32[8] {
  %c = f32[8] copy(%x), backend_config={"estimated_cycles":"100"}
  %loop = (s32[], f32[8]) while(%tuple), condition=%condition.1, body=%body.1, metadata={}
}
"""


def test_estimated_cycles_of_a_program_with_a_loop():
    assert tpu.estimated_cycles(PROGRAM) == 100 + 6 * 15
    with pytest.raises(ValueError, match=r"no trip count for the loop of body\.1"):
        tpu.estimated_cycles(PROGRAM.replace("constant(6)", "parameter(0)"))


def test_calls_of_a_kernel_are_counted():
    program = """
  %read.2 = f32[8] custom-call(%x), custom_call_target="tpu_custom_call"
  %read.1.gradient_ref = f32[8] custom-call(%read.2), custom_call_target="tpu_custom_call"
  %transpose_jvp_read__.1 = f32[8] custom-call(%x), custom_call_target="tpu_custom_call"
  %read_all.1 = f32[8] custom-call(%read.1.gradient_ref), custom_call_target="tpu_custom_call"
"""
    assert tpu.count_calls(program, "read") == 3
