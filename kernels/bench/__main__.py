"""Runs `oneformer_jax.kernels.bench.cli`."""

import sys

from oneformer_jax.kernels.bench import cli

if __name__ == "__main__":
    sys.exit(cli.main())
