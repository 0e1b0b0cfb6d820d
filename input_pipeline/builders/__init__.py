"""TFDS builders that write panoptic datasets as ArrayRecord files, without TensorFlow."""
