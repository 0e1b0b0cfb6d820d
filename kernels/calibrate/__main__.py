"""Runs the program's mode "calibrate", with the flags of its command line."""

import sys

if __name__ == "__main__":
    from oneformer_jax.app import cli

    sys.argv.insert(1, "--mode=calibrate")
    cli.run()
