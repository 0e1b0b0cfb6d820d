"""StableHLO files: what they give, and what is refused when they are read."""

import json

import jax
import numpy as np
import pytest
import safetensors
import safetensors.numpy
from jax import export

import oneformer_jax
from oneformer_jax.app import modes
from oneformer_jax.eval import predict
from oneformer_jax.eval.postprocess import PostprocessConfig
from oneformer_jax.export import stablehlo
from oneformer_jax.files import FileError
from oneformer_jax.kernels import dispatch
from tests.eval.tiny_segmenter import CONFIG, LENIENT, METADATA, picture, state
from tests.export.tiny_export import SIZE, assert_same, described


@pytest.fixture(scope="module")
def segmenter():
    """Its test size is the exported one."""
    options = dict(postprocess=LENIENT, test_size=SIZE)
    return predict.Segmenter(CONFIG, *state(), METADATA, **options)


@pytest.fixture(scope="module")
def file(segmenter, tmp_path_factory):
    path = tmp_path_factory.mktemp("export") / "model.stablehlo"
    stablehlo.write(path, segmenter, described())
    return path


@pytest.fixture(scope="module")
def exported(file):
    return oneformer_jax.load(file)


@pytest.mark.parametrize("size", [SIZE, (48, 72), (128, 192), (150, 225)])
def test_an_exported_model_gives_what_the_segmenter_gives(size, exported, segmenter):
    image = picture(*size)
    found, expected = exported(image), segmenter(image)
    assert found.image is image
    assert_same(found, expected, 1e-6)


def test_an_image_of_another_shape_is_padded(exported, segmenter):
    wide = picture(32, 96)
    padded = np.zeros((*SIZE, 3), np.uint8)
    padded[:32] = wide
    view = {"image": padded[None], "image_size": np.array([[32, 96]], np.int32)}
    expected = segmenter._decode(segmenter._encode(view), "panoptic")
    found = exported.run(*view.values())
    for name, value in zip(("class_logits", "mask_logits"), expected, strict=True):
        np.testing.assert_allclose(found[name], value, atol=1e-6)
    assert exported(wide).size == (32, 96)
    assert exported(picture(100, 20)).size == (100, 20)


def test_a_batch_gives_what_its_images_give(exported):
    images = np.stack([picture(*SIZE, seed=i) for i in range(3)])
    sizes = np.array([SIZE, (40, 96), SIZE], np.int32)
    together = exported.run(images, sizes)
    for i in range(3):
        alone = exported.run(images[i : i + 1], sizes[i : i + 1])
        for name, value in alone.items():
            np.testing.assert_allclose(together[name][i : i + 1], value, atol=1e-6)


@pytest.mark.slow
def test_the_program_for_accelerators_computes_the_same(file, exported, segmenter):
    tensors = safetensors.numpy.load_file(file)
    kept = export.deserialize(bytearray(tensors["program.accelerator"].tobytes()))
    assert kept.platforms == ("cuda", "tpu")
    here = stablehlo._export(segmenter, exported._weights, exported.description, "tpu", ("cpu",))
    image = np.stack([picture(*SIZE), picture(*SIZE, seed=1)])
    sizes = np.array([SIZE, SIZE], np.int32)
    found = jax.jit(here.call)(exported._weights, image, sizes)
    for name, value in exported.run(image, sizes).items():
        np.testing.assert_allclose(found[name], value, atol=1e-5)


def test_a_file_tells_what_it_is(file):
    texts = safetensors.safe_open(file, "numpy").metadata()
    fields = {name: json.loads(text) for name, text in texts.items()}
    assert fields["task"] == "panoptic" and fields["size"] == list(SIZE)
    assert fields["metadata"]["class_names"] == list(METADATA.class_names)
    assert fields["mean"] == [123.675, 116.28, 103.53]
    assert fields["thresholds"]["object_mask_threshold"] == 0.0
    assert fields["license"] == "CC BY 4.0"


def test_the_mode_writes_maps_that_are_loaded(segmenter, tmp_path, monkeypatch, capsys):
    path = tmp_path / "new" / "maps.stablehlo"
    with monkeypatch.context() as patch:
        patch.setattr(oneformer_jax, "load", lambda source, checkpoint: segmenter)
        modes.export("run", str(path), "stablehlo", "semantic", SIZE, postprocess=True)
    assert str(path) in capsys.readouterr().out
    exported = oneformer_jax.load(path)
    image = picture(*SIZE)
    found = exported(image, task=("semantic",))
    assert list(found) == ["semantic"]
    assert_same(found["semantic"], segmenter(image, "semantic"))
    assert "ask those who made the weights" in exported.description.license
    with pytest.raises(ValueError, match="resize it to 64 x 91, or export without --postprocess"):
        exported(picture(100, 142))
    with pytest.raises(ValueError, match="is an exported program"):
        modes.export(str(path), str(tmp_path / "a.onnx"), "onnx", "semantic", SIZE)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((picture(), "semantic"), "exported for the task 'panoptic', not for 'semantic'"),
        ((picture(), "all"), "not for 'all'"),
        ((picture(), "pan"), "unknown task 'pan'"),
        ((picture().astype(np.float32),), r"image is float32 \[48, 70, 3\]"),
        ((picture()[:0],), r"image is uint8 \[0, 70, 3\]"),
    ],
)
def test_a_wrong_call_is_refused(arguments, message, exported):
    with pytest.raises(ValueError, match=message):
        exported(*arguments)


def test_a_program_that_would_keep_duplicates_is_not_made():
    with pytest.raises(ValueError, match="instance_max_iou is not 1"):
        described(
            task="instance",
            postprocess=True,
            thresholds=PostprocessConfig(instance_max_iou=0.5),
        )


def test_a_batch_of_other_shapes_is_refused(exported):
    with pytest.raises(ValueError, match=r"expected \[B, 64, 96, 3\] and \[B, 2\]"):
        exported.run(np.zeros((1, 64, 64, 3), np.uint8), np.array([[64, 64]]))


@pytest.mark.parametrize("size", [(31, 64), (64, 8193)])
def test_an_impossible_size_is_refused(size):
    with pytest.raises(ValueError, match="integer from 32 to 8,192"):
        described(size=size)


def test_the_ending_is_checked(segmenter, tmp_path):
    with pytest.raises(ValueError, match=r"must end with \.stablehlo"):
        stablehlo.write(tmp_path / "model.bin", segmenter, described())
    with pytest.raises(ValueError, match="onnxruntime runs"):
        oneformer_jax.load(tmp_path / "model.onnx")
    with pytest.raises(ValueError, match="leave out short_edge"):
        oneformer_jax.load(tmp_path / "model.stablehlo", short_edge=3)
    with pytest.raises(FileError, match="missing"):
        oneformer_jax.load(tmp_path / "model.stablehlo")


# ------------------------------------------------------------------ hostile files


def other_program(*arguments, function=lambda weights, image, size: {"class_logits": size}):
    exported = export.export(jax.jit(function))(*arguments)
    return np.frombuffer(exported.serialize(), np.uint8)


def changed_text(key, value):
    def change(tensors, texts):
        texts[key] = json.dumps(value)

    return change


def changed_json(key, text):
    def change(tensors, texts):
        texts[key] = text

    return change


def changed_metadata(key, value):
    def change(tensors, texts):
        fields = json.loads(texts["metadata"])
        fields[key] = value
        texts["metadata"] = json.dumps(fields)

    return change


def a_wrong_sum(tensors, texts):
    name = next(name for name in tensors if name.startswith("weights."))
    tensors[name] = tensors[name] + 1


def a_missing_weight(tensors, texts):
    name = next(name for name in tensors if name.startswith("weights."))
    del tensors[name]


def a_weight_less(tensors, texts):
    a_missing_weight(tensors, texts)
    return True


def a_shorter_weight(tensors, texts):
    name = next(name for name in tensors if name.startswith("weights."))
    tensors[name] = tensors[name][:-1]
    return True


def no_program(tensors, texts):
    tensors["program.cpu"] = np.arange(4000, dtype=np.uint8)
    return True


def half_a_program(tensors, texts):
    tensors["program.cpu"] = tensors["program.cpu"][: len(tensors["program.cpu"]) // 2]
    return True


def numbers_for_a_program(tensors, texts):
    tensors["program.cpu"] = np.ones((3, 4), np.float32)
    return True


def a_program_of_other_arguments(tensors, texts):
    tensors["program.cpu"] = other_program(np.zeros(3), np.zeros(2), np.zeros((2, 2)))
    return True


def a_program_that_calls_the_host(tensors, texts):
    weights = {n[8:]: v for n, v in tensors.items() if n.startswith("weights.")}
    (batch,) = export.symbolic_shape("batch")

    def function(weights, image, size):
        image = jax.lax.linalg.cholesky(jax.numpy.eye(3))  # a call of LAPACK, as an example
        shapes = dict(class_logits=(7, 6), mask_logits=(7, 16, 24))
        return {
            name: jax.numpy.broadcast_to(image.sum(), (size.shape[0], *shape))
            for name, shape in shapes.items()
        }

    arguments = stablehlo._arguments(weights, described(), batch)
    with dispatch.tracing_for("cpu"):
        tensors["program.cpu"] = other_program(*arguments, function=function)
    return True


def nothing_told(tensors, texts):
    texts.clear()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (nothing_told, "no exported model"),
        (changed_text("format", "other"), "no exported model"),
        (changed_text("version", 2), "'2' of the format; this program reads version 1"),
        (changed_json("task", "{"), "is damaged"),
        (changed_json("task", "[" * 100_000), "nested too deeply"),
        (changed_text("task", "pan"), "unexpected value"),
        (changed_text("size", [64, 10**9]), "unexpected value"),
        (changed_text("size", [32, 96]), "other arguments or results"),
        (changed_text("num_queries", 8), "other arguments or results"),
        (changed_text("num_queries", -1), "unexpected value"),
        (changed_text("thresholds", {"topk": 0}), "unexpected value"),
        (changed_text("license", "x" * 20_000), "unexpected value"),
        (changed_text("surprise", 1), "unexpected value"),
        (changed_metadata("class_names", ["a"]), "unexpected value"),
        (changed_metadata("colors", [[256, 0, 0]] * 5), "beyond 0 to 255"),
        (a_wrong_sum, "does not have its sum"),
        (a_missing_weight, "lacks, or has too many of these parts: weights"),
        (a_weight_less, "other arguments or results"),
        (a_shorter_weight, "other arguments or results"),
        (no_program, "cannot be read"),
        (half_a_program, "cannot be read"),
        (numbers_for_a_program, "no text of bytes"),
        (a_program_of_other_arguments, "other arguments or results"),
        (a_program_that_calls_the_host, "calls what no export of this program does"),
    ],
)
def test_a_hostile_file_is_refused_in_one_line(change, message, file, tmp_path):
    tensors = safetensors.numpy.load_file(file)
    texts = safetensors.safe_open(file, "numpy").metadata()
    sums_fit = change(tensors, texts)
    if sums_fit:
        texts["digests"] = json.dumps({n: stablehlo._digest(v) for n, v in tensors.items()})
    path = tmp_path / "hostile.stablehlo"
    safetensors.numpy.save_file(tensors, path, metadata=texts)
    with pytest.raises(FileError) as error:
        oneformer_jax.load(path)
    assert message in str(error.value)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)
    assert len(str(error.value)) < 600


@pytest.mark.parametrize("kept", [0, 7, 300, 0.5, 0.99])
def test_a_truncated_file_is_refused(kept, file, tmp_path):
    data = file.read_bytes()
    path = tmp_path / "short.stablehlo"
    path.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    with pytest.raises(FileError, match=str(path)):
        oneformer_jax.load(path)


def test_damaged_bytes_of_a_program_end_in_one_line_or_in_nothing(file, exported):
    """The reader of programs does not crash; what it still accepts is refused by its sum."""
    data = safetensors.numpy.load_file(file)["program.cpu"]
    weights = {name: np.asarray(value) for name, value in exported._weights.items()}
    refused = 0
    for seed in range(12):
        rng = np.random.default_rng(seed)
        damaged = data.copy()
        start = rng.integers(0, len(data) - 64)
        damaged[start : start + 64] = rng.integers(0, 256, 64)
        try:
            stablehlo._program(damaged, weights, exported.description, file)
        except FileError:
            refused += 1
    assert refused > 3
