"""Compile mode: the programs of a run, compiled for devices that are not there."""
