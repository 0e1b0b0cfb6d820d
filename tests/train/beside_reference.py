"""A process that runs `reference_training.train`: the case as JSON in, its result as JSON out.

In float64 both programs are made to compute in it, although neither is meant to: the name float32
stands for float64 before their modules are loaded. So all that differs is what they compute, where
float32 would hide a difference of one in a million behind its rounding.
"""

from __future__ import annotations

import json
import pathlib
import sys

import jax
import jax.numpy as jnp


def use_float64() -> None:
    """Lets float32 mean float64 in all modules that are loaded from now on."""
    import torch

    jax.config.update("jax_enable_x64", True)
    jnp.float32 = jnp.float64
    torch.set_default_dtype(torch.float64)
    torch.float32 = torch.float = torch.float64
    torch.Tensor.float = torch.Tensor.double


def main(case: str, dtype: str, out: str) -> None:
    """Writes the result for the fields `case` of a `reference_training.Case` to the file `out`."""
    if dtype == "float64":
        use_float64()
    from tests.train import reference_training

    result = reference_training.train(reference_training.Case(**json.loads(case)), dtype)
    pathlib.Path(out).write_text(json.dumps(result))


if __name__ == "__main__":
    main(*sys.argv[1:])
