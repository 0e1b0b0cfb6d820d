"""Has the device say which implementation of an operation runs where the config says "auto".

A `Chooser` is called with a program before it is compiled. It traces the program, which notes every
"auto" call with its real shapes and dtypes (`oneformer_jax.kernels.choice`). Calls that nobody has
measured on such a device are tried (`attempt`): each candidate is compiled, compared with plain JAX
in float32, forward and gradients, and timed. The fastest right one is taken, and the program is
traced again with it. What was found is kept for the user (`store`), so that the next start measures
nothing; a candidate that ended or hung the process is left out from then on.

    python -m oneformer_jax.kernels.calibrate --config=coco:swin_large   # prints the table alone
"""

from oneformer_jax.kernels.bench.records import table as as_text
from oneformer_jax.kernels.calibrate.chooser import Chooser, known_rows, open_store, try_calls
from oneformer_jax.kernels.calibrate.store import environment_of, withdraw

__all__ = [
    "Chooser",
    "as_text",
    "environment_of",
    "known_rows",
    "open_store",
    "try_calls",
    "withdraw",
]
