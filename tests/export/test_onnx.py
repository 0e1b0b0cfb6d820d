"""ONNX files in onnxruntime: what they give beside our own model.

The packages are an extra, since the converter brings hundreds of megabytes.
"""

import json
import pathlib
import re
import sys

import jax
import numpy as np
import pytest
from PIL import Image

from oneformer_jax.eval import predict
from oneformer_jax.eval.postprocess import PostprocessConfig, segment_batch
from oneformer_jax.eval.prediction import ranked
from oneformer_jax.export import onnx_model
from oneformer_jax.export.program import segmentation_of
from oneformer_jax.models import functional
from oneformer_jax.models.backbones import backbone_config
from oneformer_jax.types import TASKS
from tests import tiny
from tests.eval.tiny_segmenter import LENIENT, METADATA, picture
from tests.export import trained
from tests.export.tiny_export import SIZE, assert_same, described

DOCS = pathlib.Path(__file__).resolve().parents[2] / "docs"
BACKBONES = {
    "resnet": tiny.model_config().backbone,
    "swin": backbone_config("swin_tiny", embed_dim=24, depths=(2, 2, 1, 1)),
    "convnext": backbone_config("convnext_large", depths=(1, 1, 1, 1), dims=(16, 32, 64, 128)),
    "dinat": backbone_config(
        "dinat_large",
        depths=(2, 1, 1, 1),
        embed_dim=16,
        num_heads=(1, 2, 4, 8),
        kernel_size=3,
        dilations=((1, 4), (1,), (2,), (1,)),
    ),
}


def session(path):
    runtime = pytest.importorskip("onnxruntime", reason="the extra `export` is not installed")
    runtime.set_default_logger_severity(3)
    return runtime.InferenceSession(path, providers=["CPUExecutionProvider"])


def outputs(path, image, image_size=None):
    found = session(path)
    size = np.array([image_size or image.shape[:2]], np.int32)
    names = [output.name for output in found.get_outputs()]
    values = found.run(names, {"image": image[None], "image_size": size})
    return dict(zip(names, values, strict=True))


def distinct(config):
    """Parameters and statistics with which several queries win pixels, none of them by a hair."""
    _, params, stats = functional.init(config, 0, training=False)
    params = jax.tree.map(np.array, params)
    params["predictor"]["class_embed"]["kernel"] *= 10
    return params, stats


def segmenter_of(backbone, size=SIZE, **head):
    config = tiny.model_config(backbone=backbone, **head)
    params, stats = distinct(config)
    options = dict(postprocess=LENIENT, test_size=(min(size), max(size)))
    return predict.Segmenter(config, params, stats, METADATA, **options)


def our_logits(segmenter, view, image_size, task="panoptic"):
    batch = {"image": view[None], "image_size": np.array([image_size], np.int32)}
    values = segmenter._decode(segmenter._encode(batch), task)
    return dict(zip(("class_logits", "mask_logits"), map(np.asarray, values), strict=True))


@pytest.fixture(scope="module")
def resnet():
    return segmenter_of(BACKBONES["resnet"])


def write(path, segmenter, **fields):
    pytest.importorskip("jax2onnx", reason="the extra `export` is not installed")
    values = dict(num_queries=segmenter.config.num_queries, metadata=segmenter.metadata)
    onnx_model.write(path, segmenter, described(**(values | fields)))
    return path


@pytest.mark.slow
@pytest.mark.parametrize("kind", BACKBONES)
def test_the_logits_and_the_panoptic_result_are_ours(kind, tmp_path):
    segmenter = segmenter_of(BACKBONES[kind])
    path = write(tmp_path / "model.onnx", segmenter)
    image, image_size = picture(*SIZE), (64, 80)
    found = outputs(path, image, image_size)
    assert_logits_and_result(found, segmenter, image, image_size)


def assert_logits_and_result(found, segmenter, image, image_size):
    """The logits are ours within 1e-4 of the largest, the segments are ours; returns these."""
    expected = our_logits(segmenter, image, image_size)
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=0, atol=1e-4 * np.abs(value).max())
    size = np.array([image_size])
    one, other = (
        segment_batch(
            *values.values(),
            size,
            size,
            image.shape[:2],
            task="panoptic",
            config=segmenter.postprocess,
            metadata=segmenter.metadata,
        )[0]
        for values in (found, expected)
    )
    assert other.segments.any()
    assert_same(one, other, 1e-5)
    return other


@pytest.mark.slow
def test_maps_for_an_image_too_large_for_the_small_form_are_ours(tmp_path):
    """More than 1,024 pixels at the strides 8 to 32: gathered rows in place of products."""
    size = (256, 256)
    segmenter = segmenter_of(BACKBONES["swin"], size)
    write(tmp_path / "a.onnx", segmenter, size=size)
    image = picture(*size)
    assert_logits_and_result(outputs(tmp_path / "a.onnx", image), segmenter, image, size)


@pytest.mark.slow
@pytest.mark.parametrize("task", TASKS)
def test_final_maps_are_ours(task, resnet, tmp_path):
    path = write(tmp_path / "maps.onnx", resnet, task=task, postprocess=True)
    image = picture(*SIZE)
    found = {name: value[0] for name, value in outputs(path, image).items()}
    about = described(task=task, postprocess=True)
    result = ranked(segmentation_of(found, image, about), None)
    assert_same(result, resnet(image, task), 1e-5)


@pytest.mark.slow
def test_the_example_of_the_documentation_runs(resnet, tmp_path, monkeypatch, capsys):
    write(tmp_path / "model.onnx", resnet)
    Image.fromarray(picture(100, 50)).save(tmp_path / "photo.jpg")
    (code,) = re.findall(r"```python\n(.*?)```", (DOCS / "export.md").read_text("utf-8"), re.S)
    monkeypatch.chdir(tmp_path)
    names = {}
    exec(code, names)
    assert names["masks"].shape == (1, 7, 16, 24)
    printed = capsys.readouterr().out
    assert any(name in printed for name in METADATA.class_names)
    assert len(code.strip().replace("\n\n", "\n").splitlines()) <= 10
    fields = {name: json.loads(text) for name, text in names["about"].items()}
    assert fields["license"] == "CC BY 4.0"
    assert fields["thresholds"]["topk"] == LENIENT.topk
    assert fields["std"] == [58.395, 57.12, 57.375]


@pytest.mark.slow
def test_swin_t_at_512_pixels_is_ours(tmp_path):
    """After a short training, since the segments of random parameters are a matter of ties.

    Near the threshold of the masked attention the rounding of another runtime lets a query attend
    to other pixels: logits are compared in parts of the largest one.
    """
    size = (512, 512)
    segmenter = predict.Segmenter(
        trained.CONFIG,
        *trained.train(),
        METADATA,
        postprocess=PostprocessConfig(object_mask_threshold=0.3),
        test_size=size,
    )
    write(tmp_path / "model.onnx", segmenter, size=size)
    image, _ = trained.scene(size[0])
    found = outputs(tmp_path / "model.onnx", image)
    other = assert_logits_and_result(found, segmenter, image, size)
    assert len(other.segments_info) >= 3


def test_what_onnx_cannot_do_is_one_line(resnet, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=r"must end with \.onnx"):
        onnx_model.write(tmp_path / "model.bin", resnet, described())
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, "jax2onnx", None)
        with pytest.raises(ValueError, match=r"pip install 'oneformer-jax\[export\]'"):
            onnx_model.write(tmp_path / "model.onnx", resnet, described())
        patch.setattr(onnx_model, "MOST", 1000)
        with pytest.raises(ValueError, match=r"less than 2 GiB.*--format=stablehlo"):
            onnx_model.write(tmp_path / "model.onnx", resnet, described())

    class Converter:
        @staticmethod
        def to_onnx(*_, **__):
            raise NotImplementedError("[converter] No plugins registered for primitive 'fft'")

    monkeypatch.setitem(sys.modules, "jax2onnx", Converter)
    with pytest.raises(ValueError, match=r"cannot do a part of this model.*'fft'.*stablehlo"):
        onnx_model.write(tmp_path / "model.onnx", resnet, described())
    assert not list(tmp_path.iterdir())
