"""Small ground truths and predictions for the tests of the metrics.

Maps are written as one row of pixels and repeated to four rows, so a column is four pixels and
every IoU is a ratio of columns.
"""

import types

import numpy as np

from oneformer_jax.types import Metadata

# Classes 0 and 1 are things, 2 and 3 stuff.
IS_THING = (True, True, False, False)
METADATA = Metadata(
    dataset="four",
    class_names=("car", "person", "road", "sky"),  # of Cityscapes, whose metrics know their names
    is_thing=IS_THING,
    colors=((0, 0, 0),) * 4,
    category_ids=(1, 2, 3, 4),
)


def rows(columns):
    return np.tile(np.array(columns, np.int32), (4, 1))


def truth(columns, classes, crowd=(), areas=None, image_id="7"):
    """A record; `classes` maps segment id -> class, `areas` overrides annotated areas."""
    panoptic = rows(columns) if np.ndim(columns) == 1 else np.array(columns, np.int32)
    segments = [
        dict(
            id=i,
            category=c,
            iscrowd=i in crowd,
            area=(areas or {}).get(i, int((panoptic == i).sum())),
        )
        for i, c in classes.items()
    ]
    return dict(panoptic=panoptic, segments=segments, image_id=image_id)


def panoptic(columns, classes):
    segments = rows(columns) if np.ndim(columns) == 1 else np.array(columns, np.int32)
    info = [dict(id=i, category_id=c) for i, c in classes.items()]
    return types.SimpleNamespace(segments=segments, segments_info=info)


def semantic(columns):
    return types.SimpleNamespace(class_map=rows(columns))


def instances(*found, shape=(4, 10)):
    """Detections as (label, score, mask bool [H, W])."""
    return types.SimpleNamespace(
        masks=np.array([m for _, _, m in found], bool).reshape(len(found), *shape),
        scores=np.array([s for _, s, _ in found], np.float32),
        labels=np.array([label for label, _, _ in found], np.int32),
    )


def columns_mask(start, stop, width=10):
    mask = np.zeros((4, width), bool)
    mask[:, start:stop] = True
    return mask


def random_pair(rng, image_id):
    """A ground truth of blocks with void and crowds, and a prediction that errs here and there."""
    blocks = rng.integers(0, 9, (6, 8))
    ids = np.concatenate([[0], rng.choice(np.arange(1, 5000), 8, replace=False)])
    record = truth(
        np.kron(ids[blocks], np.ones((4, 4), int)),
        {int(i): int(rng.integers(4)) for i in ids[1:]},
        crowd=set(rng.choice(ids[1:], 3, replace=False).tolist()),
        image_id=image_id,
    )
    for segment in record["segments"]:
        segment["area"] += int(rng.integers(0, 3))
    guess = np.where(rng.random((6, 8)) < 0.8, blocks, rng.integers(0, 9, (6, 8)))
    guess = np.kron(guess, np.ones((4, 4), int))
    guess = np.where(rng.random(guess.shape) < 0.9, guess, 0)
    classes = {0: 0} | {
        n: s["category"] if rng.random() < 0.8 else int(rng.integers(4))
        for n, s in enumerate(record["segments"], start=1)
    }
    return record, panoptic(guess, {int(n): classes[int(n)] for n in np.unique(guess) if n})


def random_instances(rng, record, shape):
    """Thing segments with columns cut off, with scores, and some noise."""
    found = []
    for s in record["segments"]:
        mask = record["panoptic"] == s["id"]
        mask[:, : rng.integers(0, shape[1] // 2)] = False
        c = s["category"] if s["category"] < 2 else int(rng.integers(2))
        found.append((c, np.round(rng.random(), 1), mask))  # rounded: many equal scores
    return instances(*found, shape=shape)


def random_updates(task, count=8):
    """Yields (segmentation, record) of random images, the same at every call."""
    rng = np.random.default_rng(2)
    for i in range(count):
        record, prediction = random_pair(rng, f"image {i}")
        if task == "semantic":
            prediction = types.SimpleNamespace(
                class_map=rng.integers(0, 4, record["panoptic"].shape).astype(np.int32)
            )
        elif task == "instance":
            prediction = random_instances(rng, record, record["panoptic"].shape)
        yield prediction, record
