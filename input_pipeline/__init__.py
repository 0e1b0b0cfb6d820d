"""Data on the host: datasets, sources, transforms, targets, batches.

Loader workers import this package, so it stays light: NumPy, but no JAX, Flax or TensorFlow.
`tensorflow_datasets` is imported only when a prepared dataset is opened.
"""

import cv2

# Workers already fill the cores; OpenCV's thread pool would only compete with them.
cv2.setNumThreads(0)
