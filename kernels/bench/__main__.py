"""Runs `kernels.bench.cli`."""

import sys

from kernels.bench import cli

if __name__ == "__main__":
    sys.exit(cli.main())
