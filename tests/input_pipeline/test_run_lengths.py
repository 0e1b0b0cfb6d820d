"""Run-length codes and polygons: equal to pycocotools where they are right, else refused."""

import hypothesis
import msgspec
import numpy as np
import pytest
from hypothesis import strategies as st
from pycocotools import mask as coco_mask

from oneformer_jax.input_pipeline.annotations import run_lengths, schemas
from oneformer_jax.input_pipeline.annotations.run_lengths import SegmentationError
from oneformer_jax.input_pipeline.annotations.schemas import RunLengths

SHAPE = (6, 9)
few = hypothesis.settings(max_examples=200, deadline=None)


def masks(shape=SHAPE):
    size = shape[0] * shape[1]
    return st.lists(st.booleans(), min_size=size, max_size=size).map(
        lambda bits: np.array(bits).reshape(shape)
    )


def listed(mask):
    """COCO's uncompressed code, run by run."""
    counts, value, run = [], False, 0
    for pixel in mask.ravel("F").tolist():
        if pixel != value:
            counts.append(run)
            value, run = pixel, 0
        run += 1
    return [*counts, run]


@few
@hypothesis.given(masks())
def test_all_forms_of_a_code_give_its_mask(mask):
    code = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    for counts in (code["counts"].decode(), listed(mask), [0, 0, *listed(mask), 0]):
        runs = run_lengths.runs_of(RunLengths(SHAPE, counts), SHAPE)
        np.testing.assert_array_equal(run_lengths.mask_of(runs, SHAPE), mask)
        assert run_lengths.area_of(runs) == mask.sum()
        assert run_lengths.compress(runs, SHAPE) == code["counts"]
        assert (runs[1:] > 0).all()


@pytest.mark.parametrize("shape", [(1, 1), (480, 640), (3000, 5000)])
def test_long_runs_are_read(shape):
    mask = np.zeros(shape, bool)
    mask[:, shape[1] // 2 :] = True
    code = coco_mask.encode(np.asfortranarray(mask, np.uint8))
    runs = run_lengths.runs_of(RunLengths(shape, code["counts"].decode()), shape)
    np.testing.assert_array_equal(run_lengths.mask_of(runs, shape), mask)


points = st.lists(st.floats(-9, 18), min_size=6, max_size=24).map(lambda p: p[: len(p) // 2 * 2])


@few
@hypothesis.given(st.lists(points, min_size=1, max_size=3))
def test_polygons_are_drawn_as_pycocotools_does(polygons):
    runs = run_lengths.runs_of(polygons, SHAPE)
    code = coco_mask.merge(coco_mask.frPyObjects(polygons, *SHAPE))
    np.testing.assert_array_equal(run_lengths.mask_of(runs, SHAPE), coco_mask.decode(code) == 1)


def code(counts, size=SHAPE):
    return RunLengths(size, counts)


@pytest.mark.parametrize(
    ("segmentation", "kind", "message"),
    [
        (code([10, 20]), run_lengths.WRONG_LENGTH, "of 30 pixels, the image has 54"),
        (code([10, 44, 1]), run_lengths.WRONG_LENGTH, "of 55 pixels"),
        (code([]), run_lengths.WRONG_LENGTH, "of 0 pixels"),
        (code(""), run_lengths.WRONG_LENGTH, "of 0 pixels"),
        (code([60, -6]), run_lengths.DAMAGED, "a run of -6"),
        (code([1 << 53] * 3000), run_lengths.WRONG_LENGTH, "pixels, the image has 54"),
        (code([10, 44], (9, 6)), run_lengths.WRONG_LENGTH, r"size \[9, 6\], the image \[6, 9\]"),
        (code("o"), run_lengths.DAMAGED, "breaks off"),
        (code("ooooooooo1"), run_lengths.DAMAGED, "endless number"),
        (code("1 2"), run_lengths.DAMAGED, "strange character"),
        (code("1\u20ac"), run_lengths.DAMAGED, "strange character"),
        ([], run_lengths.NO_SEGMENTATION, "a box alone"),
        ([[]], run_lengths.FEW_POINTS, "polygon of 0 numbers"),
        ([[1, 2, 3, 4]], run_lengths.FEW_POINTS, "polygon of 4 numbers"),
        ([[1, 2, 3, 4, 5, 6, 7]], run_lengths.FEW_POINTS, "polygon of 7 numbers"),
        ([[1, 1, 5, 1, 5, 1e9]], run_lengths.FAR_OUTSIDE, "far outside of its image of 6 x 9"),
        ([[1, 1, 5, 1, -1e300, 5]], run_lengths.FAR_OUTSIDE, "far outside"),
        ([[0, 0, 9, 6] * 300_000], run_lengths.FAR_OUTSIDE, "outline of 5.4e"),
    ],
)
def test_what_is_no_mask_is_refused_before_it_is_decoded(segmentation, kind, message):
    with pytest.raises(SegmentationError, match=message) as error:
        run_lengths.runs_of(segmentation, SHAPE)
    assert error.value.kind == kind


@few
@hypothesis.given(st.text(st.characters(min_codepoint=32, max_codepoint=130), max_size=40))
def test_any_text_is_a_mask_of_the_image_or_refused(text):
    try:
        runs = run_lengths.runs_of(code(text), SHAPE)
    except SegmentationError:
        return
    assert runs.sum() == SHAPE[0] * SHAPE[1] and runs.min() >= 0


@few
@hypothesis.given(st.lists(st.integers(-5, 60), max_size=12))
def test_any_list_of_numbers_is_a_mask_of_the_image_or_refused(counts):
    right = min(counts, default=0) >= 0 and sum(counts) == SHAPE[0] * SHAPE[1]
    try:
        runs = run_lengths.runs_of(code(counts), SHAPE)
    except SegmentationError:
        assert not right
        return
    assert right
    pixels = np.repeat(np.arange(len(counts)) % 2 == 1, counts).reshape(SHAPE[::-1]).T
    np.testing.assert_array_equal(run_lengths.mask_of(runs, SHAPE), pixels)


def test_pairs_of_coordinates_become_a_flat_list():
    text = b"[[[1, 2], [3.5, 4], [5, 6]], [[7, 8], [9, 10], [11, 12]]]"
    assert schemas.segmentation_of(text) == [[1, 2, 3.5, 4, 5, 6], [7, 8, 9, 10, 11, 12]]
    for other in (b"[[[1, 2, 3], [4, 5, 6]]]", b"[1, 2]", b'[["1", "2"]]', b"[[[1, 2], 3]]"):
        with pytest.raises(msgspec.ValidationError):
            schemas.segmentation_of(other)
