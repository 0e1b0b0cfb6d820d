"""A process that loads batches with two workers, for the tests that kill and interrupt it.

    python -m tests.input_pipeline.worker_job MODE NAME

Shared memory gets names that begin with NAME. After the first batch it prints "ready". MODE:
  forever   reads on;
  saves     counts signals; after the first one reads 6 more batches, closes, prints "saved";
  plain     reads on, leaves Ctrl-C to Python;
  exits     ends after the first batch without closing.
"""

import os
import signal
import sys
import time
from multiprocessing import shared_memory

import numpy as np

from oneformer_jax.input_pipeline import loader, transforms
from oneformer_jax.input_pipeline.datasets import DatasetInfo

MODE, NAME = sys.argv[1:3]
shared_memory._SHM_NAME_PREFIX = f"/{NAME}"
shared_memory._SHM_SAFE_NAME_LENGTH = len(NAME) + 16

INFO = DatasetInfo("test", ("sky", "person"), (False, True), ((0, 0, 1), (0, 1, 0)), (1, 2))


class Source:
    def __len__(self):
        return 8

    def __getitem__(self, i):
        panoptic = np.ones((64, 64), np.int32)
        panoptic[20:40] = 2
        segments = [{"id": k, "category": k - 1, "iscrowd": False, "area": 1} for k in (1, 2)]
        return {
            "image": np.full((64, 64, 3), i, np.uint8),
            "panoptic": panoptic,
            "segments": segments,
            "image_id": str(i),
            "file_name": f"{i}.jpg",
        }


def main():
    received = []
    if MODE == "saves":
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, lambda number, frame: received.append(number))
    config = loader.LoaderConfig(
        batch_size=2,
        num_slots=5,
        num_texts=7,
        augment=transforms.AugmentConfig("none", crop_size=(256, 256)),
        num_workers=2,
        num_threads=2,
        prefetch=4,
    )
    batches = loader.train_loader(Source(), config, INFO)
    print(f"starting {os.getpid()}", flush=True)
    next(batches)
    print("ready", flush=True)
    if MODE == "exits":
        return
    while len(received) < 2:
        next(batches)
        time.sleep(0.1)
    for _ in range(6):
        next(batches)
    batches.close()
    print("saved", flush=True)


if __name__ == "__main__":
    main()
