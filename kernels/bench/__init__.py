"""One benchmark for all operations: `python -m oneformer_jax.kernels.bench OPERATION`, see `cli`.

An operation has a module `bench` in its folder, which says what its calls are (`operation`); the
rest is here: timing on the device that is there, and compiling for TPUs (`tpu`) and GPUs (`gpu`)
that are not.
"""
