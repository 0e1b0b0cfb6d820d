"""One benchmark for all operations: `python -m oneformer_jax.kernels.bench OPERATION`, see `cli`.

The module `bench` in an operation's folder defines its calls (`operation`). The rest is here:
timing on this machine's device, and compiling for other TPUs (`tpu`) and GPUs (`gpu`).
"""
