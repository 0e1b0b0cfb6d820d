"""Maps from logits on the device, as the host's post-processing makes them; plain operations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oneformer_jax.eval.postprocess import PostprocessConfig, segment_batch
from oneformer_jax.export import inline, program
from oneformer_jax.kernels import dispatch
from oneformer_jax.types import TASKS
from tests import tiny
from tests.export.tiny_export import assert_same, described

SIZE = (50, 70)  # no multiples of the stride
IMAGE_SIZES = np.array([[50, 70], [31, 70]], np.int32)
REMAP = PostprocessConfig(topk=40, ade_instance_remap=True, instance_score_threshold=0.1)
STRICT = PostprocessConfig(object_mask_threshold=0.3, overlap_threshold=0.4, topk=9)


def logits(queries=30, seed=0):
    """Blobs of confident queries: things, stuff twice, and some that are nothing."""
    rng = np.random.default_rng(seed)
    padded = program.padded_size(SIZE)
    coarse = np.full((2, queries, 24), -6, np.float32)
    for image in coarse:
        image[np.arange(queries), rng.integers(0, 24, queries)] = 9
    coarse = coarse.reshape(2, queries, 4, 6)
    masks = jax.image.resize(coarse, (2, queries, padded[0] // 4, padded[1] // 4), "cubic")
    classes = rng.normal(0, 2, (2, queries, tiny.CLASSES + 1)).astype(np.float32)
    return classes, np.asarray(masks)


@pytest.mark.parametrize(
    ("task", "thresholds"),
    [(task, STRICT) for task in TASKS] + [("instance", REMAP)],
)
def test_maps_on_the_device_equal_those_of_the_host(task, thresholds):
    about = described(task=task, size=SIZE, postprocess=True, num_queries=30, thresholds=thresholds)
    values = logits()
    maps = jax.jit(lambda *arrays: program._maps(*arrays, about))(*values, IMAGE_SIZES)
    maps = jax.device_get(maps)
    shapes = {name: (x.shape[1:], str(x.dtype)) for name, x in maps.items()}
    assert shapes == program.output_shapes(about)
    expected = segment_batch(
        *values,
        IMAGE_SIZES,
        IMAGE_SIZES,
        program.padded_size(SIZE),
        task=task,
        config=thresholds,
        metadata=tiny.metadata(),
    )
    for i, one in enumerate(expected):
        image = np.zeros((*IMAGE_SIZES[i], 3), np.uint8)
        found = program.segmentation_of({k: v[i] for k, v in maps.items()}, image, about)
        assert_same(found, one, 1e-6)
        if task == "panoptic":
            assert not maps["segments"][i, IMAGE_SIZES[i][0] :].any()
    if task == "panoptic" and thresholds is STRICT:
        assert len(expected[0].segments_info) > 5
        assert any(not s["isthing"] for s in expected[0].segments_info)


def test_a_function_becomes_plain_operations():
    @jax.custom_vjp
    def own(x):
        return jax.nn.softmax(x) + 1

    own.defvjp(lambda x: (own(x), None), lambda _, g: (g,))

    def function(x, image):
        def step(carry, item):
            return carry + own(item), (item > 0, jax.nn.relu(item))

        carry, (signs, rest) = jax.lax.scan(step, x[0], x, reverse=True)
        pooled = jax.lax.reduce_window(
            image,
            -jnp.inf,
            jax.lax.max,
            (1, 3, 3, 1),
            (1, 2, 2, 1),
            [(0, 0), (1, 1), (1, 1), (0, 0)],
        )
        looped = jax.lax.map(jax.checkpoint(lambda y: jax.jit(jnp.sin)(y)), x)
        stacked = jnp.stack([jax.lax.optimization_barrier(carry), carry])
        return carry, signs, rest, pooled, looped, stacked

    rng = np.random.default_rng(0)
    x = rng.normal(size=(5, 4)).astype(np.float32)
    image = -rng.uniform(1, 2, (1, 7, 8, 2)).astype(np.float32)
    plain = inline.inlined(function, x, image)
    for found, expected in zip(plain(x, image), function(x, image), strict=True):
        np.testing.assert_allclose(found, expected, rtol=1e-6)
    text = str(jax.make_jaxpr(plain)(x, image))
    for name in (*inline.CALLS, *inline.HINTS, *inline.FORMS):
        assert f" {name}[" not in text and f" {name} " not in text, name
    assert text.count(" scan[") == 1  # the one whose results are float32; the other is unrolled


def test_a_program_is_traced_for_the_named_platform():
    before = dispatch.platform()
    with dispatch.tracing_for("tpu"):
        assert dispatch.platform() == "tpu"
    assert dispatch.platform() == before
