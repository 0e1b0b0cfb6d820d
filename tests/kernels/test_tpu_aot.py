"""Cycles from the schedules of TPU kernels."""

import pytest

from kernels import tpu_aot


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
    assert tpu_aot.issue_cycles(text, tiles=2) == 2 + 10 * (7 + 7 * 6 / 2)
    with pytest.raises(ValueError, match="trip count"):
        tpu_aot.issue_cycles(text.replace("loop exit test", ""), tiles=2)


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
    assert tpu_aot.issue_cycles(text, steps=10) == 3 + 10 * 6
    with pytest.raises(ValueError, match="trip count for the loop of region 7"):
        tpu_aot.issue_cycles(text)
