"""Annotation files: their JSON by schema, run-length codes, and the list of faults.

Nothing here reads an image. Training's sources and the evaluation's truth both use it.
"""
