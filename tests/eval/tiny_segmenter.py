"""A tiny segmenter and what it gives, for the tests of prediction."""

import functools
import io

import numpy as np
from PIL import Image

from oneformer_jax.eval import folder, predict
from oneformer_jax.eval.postprocess import PostprocessConfig
from oneformer_jax.eval.segmentation import Segmentation
from oneformer_jax.input_pipeline.records import RecordError
from tests import tiny

METADATA = tiny.metadata()
# Low thresholds: an untrained model is never sure.
LENIENT = PostprocessConfig(object_mask_threshold=0.0, overlap_threshold=0.0, topk=10)
SIZE = (64, 96)
CONFIG = tiny.model_config(decoder_layers=1)


@functools.cache
def state():
    """(params, stats) of a model with its text branch."""
    return tiny.random_model(CONFIG, training=True)[1:]


@functools.cache
def segmenter():
    return predict.Segmenter(CONFIG, *state(), METADATA, postprocess=LENIENT, test_size=SIZE)


def picture(height=48, width=70, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3)).astype(np.uint8)


def fake(image, tasks):
    """Segmentations of `image` in two halves; what a Segmenter gives, without a model."""
    panoptic = np.ones(image.shape[:2], np.int32)
    panoptic[: len(image) // 2] = 2
    segments = [dict(id=1, category=3), dict(id=2, category=1)]
    record = dict(image=image, panoptic=panoptic, segments=segments)
    return {task: Segmentation.from_record(record, METADATA, task) for task in tasks}


class Fake:
    """A Segmenter for `predict_files` that gives the results of `fake`."""

    fingerprint = "fake"

    def __init__(self, segment=fake):
        self.segment = segment
        self.seen = []

    def segment_source(self, source, tasks, *, threshold=None, broken=None):
        for index in range(len(source)):
            try:
                record = source[index]
            except RecordError as error:
                broken[index] = str(error)
                continue
            self.seen.append(record["file_name"])
            yield index, self.segment(record["image"], tasks)


def predict_files(model, path, out, *rest, **options):
    """Writes the results of an image file or a folder; returns the files."""
    found = folder.find_images(path, out)
    return list(folder.predict_files(model, found, out, *rest, **options).written)


def assert_same_result(one, other):
    """Two files of results have the same content; an overlay also tells of what it was made."""
    if not one.name.endswith("_overlay.png"):
        assert one.read_bytes() == other.read_bytes()
        return
    pictures = [np.asarray(Image.open(io.BytesIO(path.read_bytes()))) for path in (one, other)]
    np.testing.assert_array_equal(*pictures)
