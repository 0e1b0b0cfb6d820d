"""Figures that are read from the output of the GPU compilers."""

from oneformer_jax.kernels.bench import gpu


def test_output_of_ptxas():
    text = """
ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'ms_deform_attn_forward_mosaic_gpu_kernel' for 'sm_90a'
ptxas info    : Function properties for ms_deform_attn_forward_mosaic_gpu_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 48 registers, used 2 barriers, 1 bytes smem
ptxas info    : Compiling entry function 'loop_fusion' for 'sm_90a'
    56 bytes stack frame, 16 bytes spill stores, 12 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""
    assert gpu.kernel_resources(text) == [
        dict(name="ms_deform_attn_forward", registers=48, spill_bytes=0, stack_bytes=0),
        dict(name="loop_fusion", registers=255, spill_bytes=16, stack_bytes=56),
    ]
