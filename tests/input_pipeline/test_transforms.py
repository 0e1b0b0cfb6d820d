"""Transforms against known cases and against plain re-computation."""

import dataclasses

import numpy as np
import pytest
from PIL import Image

from oneformer_jax.input_pipeline import resize, transforms
from oneformer_jax.input_pipeline.transforms import AugmentConfig


class FixedRandom:
    """Stands in for a generator and returns what the test prescribes, in order."""

    def __init__(self, *values):
        self.values = list(values)

    def _next(self, *args, **kwargs):
        return self.values.pop(0)

    random = integers = uniform = _next


def smooth_image(height, width, seed=0):
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (max(height // 6, 2), max(width // 6, 2), 3), np.uint8)
    return np.array(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def make_record(height=24, width=36, seed=0):
    rng = np.random.default_rng(seed)
    return {
        "image": smooth_image(height, width, seed),
        "panoptic": rng.integers(0, 2**24, (height, width)).astype(np.int32),
        "segments": [{"id": 1, "category": 0, "iscrowd": False, "area": 1}],
        "image_id": "7",
        "file_name": "seven.jpg",
    }


def aligned_record(height, width):
    """Image and ids hold the same number in every pixel, so misalignment shows."""
    ids = np.arange(height * width, dtype=np.int32).reshape(height, width) + 1
    image = np.stack([ids & 255, ids >> 8, ids >> 16], -1).astype(np.uint8)
    return {"image": image, "panoptic": ids, "segments": [], "file_name": "aligned.png"}


def assert_aligned(record):
    image = record["image"].astype(np.int32)
    decoded = image[..., 0] + (image[..., 1] << 8) + (image[..., 2] << 16)
    inside = record["panoptic"] > 0
    np.testing.assert_array_equal(decoded[inside], record["panoptic"][inside])
    assert (record["image"][~inside] == 128).all()


# --------------------------------------------------------------------------------------- sizes


@pytest.mark.parametrize(
    ("base", "expected"),
    [
        (
            512,
            [256, 307, 358, 409, 460, 512, 563, 614, 665, 716, 768, 819, 870, 921, 972, 1024],
        ),
        (640, list(range(320, 1281, 64))),
        (
            896,
            [
                *(448, 537, 627, 716, 806, 896, 985, 1075),
                *(1164, 1254, 1344, 1433, 1523, 1612, 1702, 1792),
            ],
        ),
        (1280, list(range(640, 2561, 128))),
        (
            1024,
            [
                *(512, 614, 716, 819, 921, 1024, 1126, 1228),
                *(1331, 1433, 1536, 1638, 1740, 1843, 1945, 2048),
            ],
        ),
        (2048, [int(204.8 * x) for x in range(5, 21)]),
    ],
)
def test_short_edges_are_the_official_lists(base, expected):
    assert list(AugmentConfig(short_edge=base).short_edges()) == expected


@pytest.mark.parametrize(
    ("size", "short", "long", "expected"),
    [
        ((480, 640), 800, 1333, (800, 1067)),
        ((640, 480), 800, 1333, (1067, 800)),
        ((300, 900), 800, 1333, (444, 1333)),  # the cap shortens the short side
        ((100, 100), 64, 1000, (64, 64)),
        ((427, 640), 800, 1333, (800, 1199)),
    ],
)
def test_shortest_edge_size(size, short, long, expected):
    assert resize.shortest_edge_size(size, short, long) == expected


@pytest.mark.parametrize("size", [(40, 50), (61, 83), (20, 30), (26, 36), (24, 20)])
def test_resize_image_equals_pil_to_one_level(size):
    image = smooth_image(25, 35)
    expected = Image.fromarray(image).resize(size[::-1], Image.Resampling.BILINEAR)
    result = resize.resize_image(image, size)
    assert result.shape == (*size, 3) and result.dtype == np.uint8
    assert np.abs(result.astype(int) - np.asarray(expected)).max() <= 1


@pytest.mark.parametrize("size", [(40, 50), (61, 83), (13, 17), (24, 36), (7, 91)])
def test_resize_ids_equals_pil_nearest(size):
    ids = make_record()["panoptic"]
    expected = Image.fromarray(ids).resize(size[::-1], Image.Resampling.NEAREST)
    result = resize.resize_ids(ids, size)
    assert result.dtype == np.int32
    np.testing.assert_array_equal(result, np.asarray(expected))


def test_resize_for_test_is_pil_exactly():
    image = smooth_image(45, 60)
    result = resize.resize_for_test(image, 20, 30)
    expected = Image.fromarray(image).resize((27, 20), Image.Resampling.BILINEAR)
    np.testing.assert_array_equal(result, np.asarray(expected))


# --------------------------------------------------------------------------------- crop, flip, pad


def test_crop_keeps_image_and_ids_aligned_and_reaches_every_place():
    record = aligned_record(6, 8)
    config = AugmentConfig(crop_size=(4, 5))
    rng = np.random.default_rng(0)
    corners = set()
    for _ in range(200):
        result = transforms.random_crop(rng, record, config)
        assert result["panoptic"].shape == (4, 5)
        assert_aligned(result)
        corners.add(int(result["panoptic"][0, 0]))
    assert corners == {row * 8 + column + 1 for row in range(3) for column in range(4)}


def test_crop_keeps_a_side_that_is_too_small():
    result = transforms.random_crop(
        np.random.default_rng(0), aligned_record(3, 9), AugmentConfig(crop_size=(4, 5))
    )
    assert result["image"].shape == (3, 5, 3)


def test_flip_is_exact_and_follows_its_probability():
    record = aligned_record(3, 5)
    config = AugmentConfig(flip_prob=0.25)
    flipped = transforms.random_flip(FixedRandom(0.2499), record, config)
    np.testing.assert_array_equal(flipped["image"], record["image"][:, ::-1])
    np.testing.assert_array_equal(flipped["panoptic"], record["panoptic"][:, ::-1])
    same = transforms.random_flip(FixedRandom(0.25), record, config)
    np.testing.assert_array_equal(same["panoptic"], record["panoptic"])


def test_pad_values_and_place():
    record = aligned_record(3, 5)
    result = transforms.pad(None, record, AugmentConfig(crop_size=(4, 8)))
    assert result["image"].shape == (4, 8, 3) and result["panoptic"].dtype == np.int32
    np.testing.assert_array_equal(result["image"][:3, :5], record["image"])
    assert (result["image"][3:] == 128).all() and (result["image"][:, 5:] == 128).all()
    assert (result["panoptic"][3:] == 0).all() and (result["panoptic"][:, 5:] == 0).all()


def test_pad_of_a_larger_image_names_file_and_key():
    with pytest.raises(ValueError, match=r"aligned\.png.*data\.crop_size"):
        transforms.augment(None, aligned_record(5, 5), AugmentConfig("none", crop_size=(8, 4)))


# ------------------------------------------------------------------------------- large-scale jitter


@pytest.mark.parametrize(
    ("scale", "expected"),
    [(1.0, (32, 48)), (0.1, (3, 5)), (2.0, (64, 96)), (0.5, (16, 24))],
)
def test_lsj_fits_into_the_scaled_box(scale, expected):
    config = AugmentConfig("lsj", crop_size=(48, 48))
    result = transforms.large_scale_jitter(FixedRandom(scale), make_record(24, 36), config)
    assert result["image"].shape == (*expected, 3)
    assert result["panoptic"].shape == expected


def test_lsj_never_loses_a_side():
    config = AugmentConfig("lsj", crop_size=(16, 16))
    result = transforms.large_scale_jitter(FixedRandom(0.1), make_record(4, 400), config)
    assert result["panoptic"].shape == (1, 2)


@pytest.mark.parametrize("fraction", [0.0, 0.4, 0.999])
def test_fixed_size_crop_uses_one_fraction_and_pads(fraction):
    record = aligned_record(11, 20)
    config = AugmentConfig("lsj", crop_size=(8, 8))
    result = transforms.fixed_size_crop(FixedRandom(fraction), record, config)
    assert_aligned(result)
    assert result["panoptic"][0, 0] == round(3 * fraction) * 20 + round(12 * fraction) + 1
    small = transforms.fixed_size_crop(FixedRandom(fraction), aligned_record(5, 20), config)
    assert small["panoptic"].shape == (8, 8)
    assert (small["panoptic"][5:] == 0).all() and (small["panoptic"][:5] > 0).all()
    assert_aligned(small)


# ------------------------------------------------------------------------------------------ colour


def test_color_brightness_truncates_and_clips():
    record = aligned_record(2, 2)
    record["image"] = np.array([[[0, 100, 250], [31, 32, 33]]] * 2, np.uint8)
    # Brightness +10.7; then no contrast, saturation or hue.
    bright = transforms.random_color(FixedRandom(1, 10.7, 1, 0, 0, 0), record, AugmentConfig())
    np.testing.assert_array_equal(bright["image"][0], [[10, 110, 255], [41, 42, 43]])
    dark = transforms.random_color(FixedRandom(1, -31.5, 1, 0, 0, 0), record, AugmentConfig())
    np.testing.assert_array_equal(dark["image"][0], [[0, 68, 218], [0, 0, 1]])


def test_color_contrast_scales():
    record = aligned_record(1, 1)
    record["image"] = np.array([[[3, 100, 250]]], np.uint8)
    result = transforms.random_color(FixedRandom(0, 1, 1, 1.5, 0, 0), record, AugmentConfig())
    np.testing.assert_array_equal(result["image"], [[[4, 150, 255]]])


def test_color_saturation_and_hue_act_in_hsv():
    record = aligned_record(1, 1)
    record["image"] = np.array([[[200, 100, 100]]], np.uint8)  # hue 0, saturation 0.5, value 200
    grey = transforms.random_color(FixedRandom(0, 1, 0, 1, 0.5, 0), record, AugmentConfig())
    np.testing.assert_allclose(grey["image"], [[[200, 150, 150]]], atol=1)
    # 60 steps of 2 degrees turn red into green; -60 into blue.
    wide = AugmentConfig(hue=60)
    green = transforms.random_color(FixedRandom(0, 1, 0, 0, 1, 60), record, wide)
    np.testing.assert_allclose(green["image"], [[[100, 200, 100]]], atol=1)
    blue = transforms.random_color(FixedRandom(0, 1, 0, 0, 1, -60), record, wide)
    np.testing.assert_allclose(blue["image"], [[[100, 100, 200]]], atol=1)


def test_color_order_is_drawn():
    record = aligned_record(1, 1)
    record["image"] = np.array([[[250, 100, 40]]], np.uint8)
    # The same factors: contrast 1.5 clips red before or after the saturation is halved.
    first = transforms.random_color(FixedRandom(0, 1, 1, 1.5, 1, 0.5, 0), record, AugmentConfig())
    last = transforms.random_color(FixedRandom(0, 0, 1, 0.5, 0, 1, 1.5), record, AugmentConfig())
    # Contrast first: (255, 150, 60), saturation 195 / 255 halved gives a minimum near 157.
    np.testing.assert_allclose(first["image"][0, 0], [255, 202, 157], atol=2)
    # Saturation first: (250, 175, 145), times 1.5.
    np.testing.assert_allclose(last["image"][0, 0], [255, 255, 217], atol=2)


def test_color_leaves_ids_and_input_alone_and_is_deterministic():
    record = make_record()
    before = record["image"].copy()
    outputs = []
    for seed in range(12):
        a, b = (
            transforms.random_color(np.random.default_rng(seed), record, AugmentConfig())
            for _ in range(2)
        )
        np.testing.assert_array_equal(a["image"], b["image"])
        assert a["panoptic"] is record["panoptic"]
        outputs.append(a["image"].tobytes())
    np.testing.assert_array_equal(record["image"], before)
    assert len(set(outputs)) >= 9  # 1 in 16 draws nothing


# ------------------------------------------------------------------------------------------- chains


@pytest.mark.parametrize("kind", ("unified", "lsj", "none"))
def test_chains_give_static_sizes_by_seed(kind):
    config = AugmentConfig(kind, crop_size=(40, 44), short_edge=24, max_size=96)
    record = make_record(24, 36)
    frozen = {key: np.copy(record[key]) for key in ("image", "panoptic")}
    images = []
    for seed in range(6):
        a, b = (transforms.augment(np.random.default_rng(seed), record, config) for _ in range(2))
        assert a["image"].shape == (40, 44, 3) and a["image"].dtype == np.uint8
        assert a["panoptic"].shape == (40, 44) and a["panoptic"].dtype == np.int32
        assert a["file_name"] == "seven.jpg" and a["segments"] is record["segments"]
        assert a["image"].flags.c_contiguous and a["panoptic"].flags.c_contiguous
        np.testing.assert_array_equal(a["image"], b["image"])
        np.testing.assert_array_equal(a["panoptic"], b["panoptic"])
        images.append(a["image"].tobytes())
    assert len(set(images)) == (1 if kind == "none" else 6)
    for key, value in frozen.items():
        np.testing.assert_array_equal(record[key], value)


def test_chains_have_the_official_order():
    t = transforms
    unified = (t.random_shortest_edge, t.random_crop, t.random_color, t.random_flip, t.pad)
    assert t.chain(AugmentConfig("unified")) == unified
    assert t.chain(AugmentConfig("unified", color=False)) == unified[:2] + unified[3:]
    assert t.chain(AugmentConfig("lsj")) == (
        t.random_flip,
        t.large_scale_jitter,
        t.fixed_size_crop,
    )


def test_unified_resize_draws_every_short_edge():
    config = AugmentConfig(short_edge=10, crop_size=(99, 99), max_size=1000)
    rng = np.random.default_rng(0)
    record = aligned_record(20, 30)
    seen = {
        transforms.random_shortest_edge(rng, record, config)["panoptic"].shape[0]
        for _ in range(200)
    }
    assert seen == set(config.short_edges()) == set(range(5, 21))


@pytest.mark.parametrize(
    ("change", "key"),
    [
        ({"kind": "mosaic"}, r"data\.augment\.kind"),
        ({"crop_size": (0, 4)}, r"data\.crop_size"),
        ({"flip_prob": 1.5}, r"data\.augment\.flip_prob"),
        ({"short_edge": 0}, r"data\.augment\.short_edge"),
        ({"max_size": 0}, r"data\.augment\.max_size"),
        ({"scale": (2.0, 1.0)}, r"data\.augment\.scale"),
        ({"lsj_scale": (0.0, 1.0)}, r"data\.augment\.lsj_scale"),
        ({"brightness": -1.0}, r"data\.augment\.brightness"),
        ({"contrast": (1.5, 0.5)}, r"data\.augment\.contrast"),
        ({"saturation": (-1.0, 0.5)}, r"data\.augment\.saturation"),
        ({"hue": -1}, r"data\.augment\.hue"),
    ],
)
def test_bad_settings_name_their_key(change, key):
    with pytest.raises(ValueError, match=key):
        dataclasses.replace(AugmentConfig(), **change)
