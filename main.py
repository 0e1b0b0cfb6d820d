"""Trains, evaluates and predicts with OneFormer: `python main.py --help` lists modes and flags.

Loader workers import this file again: it loads nothing heavy.
"""

from oneformer_jax.app import cli

if __name__ == "__main__":
    cli.run()
