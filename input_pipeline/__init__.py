"""Data on the host: datasets, sources, transforms, targets, batches. NumPy only, never JAX.

Loader workers import this package, so it stays light: no JAX, no Flax, no TensorFlow, and
`tensorflow_datasets` only when a prepared dataset is opened.
"""

import cv2

# Every worker process has its own core; OpenCV's thread pool would only fight with the others.
cv2.setNumThreads(0)
