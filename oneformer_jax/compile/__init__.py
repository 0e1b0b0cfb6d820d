"""Compile mode: the programs of a run, compiled ahead of time."""
