"""Annotation files: their JSON by schema, run-length codes, and the list of what is wrong.

Nothing here reads an image. The sources read training data through it, the evaluation its truth.
"""
