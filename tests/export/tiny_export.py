"""Descriptions of exports of the tiny segmenter."""

from oneformer_jax.export import description
from tests.eval.tiny_segmenter import CONFIG, LENIENT, METADATA

SIZE = (64, 96)


def described(**fields):
    values = dict(
        task="panoptic",
        size=SIZE,
        postprocess=False,
        num_queries=CONFIG.num_queries,
        metadata=METADATA,
        thresholds=LENIENT,
        license="CC BY 4.0",
        made_by="a test",
    )
    return description.describe(**(values | fields))


def assert_same(found, expected, tolerance=0.0):
    """Two segmentations are equal; scores within the tolerance."""
    import numpy as np

    assert found.task == expected.task
    assert found.metadata == expected.metadata
    for name in ("segments", "class_map", "masks", "labels", "scores"):
        x, y = getattr(found, name), getattr(expected, name)
        assert (x is None) == (y is None), name
        if x is not None:
            assert x.dtype == y.dtype, name
            limit = tolerance if name == "scores" else 0
            np.testing.assert_allclose(x, y, rtol=limit, atol=limit, err_msg=name)
    for a, b in zip(found.segments_info or (), expected.segments_info or (), strict=True):
        assert abs(a.pop("score") - b.pop("score")) <= tolerance
        assert a == b
