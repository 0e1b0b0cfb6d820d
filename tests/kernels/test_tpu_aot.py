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
