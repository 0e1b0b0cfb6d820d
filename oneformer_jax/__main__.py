"""Runs the program: `python -m oneformer_jax` is `python main.py` without a clone."""

from oneformer_jax.app import cli

if __name__ == "__main__":  # loader workers import this file again
    cli.run()
