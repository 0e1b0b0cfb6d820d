"""Scores, pictures and the token table, with a stand-in that reads the class from the colour."""

import functools
import io
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from oneformer_jax.configs import common
from oneformer_jax.eval.predictor import Predictor
from oneformer_jax.models import functional
from oneformer_jax.models.oneformer import PIXEL_MEAN, PIXEL_STD
from oneformer_jax.train import evaluator as evaluators
from oneformer_jax.train import observe, sharding
from oneformer_jax.train.checkpoint import CheckpointError
from oneformer_jax.types import TASK_TOKENS, TASKS, Features
from tests import tiny
from tests.train import eval_scenes
from tests.train.test_observe import read_events, read_lines


def encode_colours(graph, params, stats, image, *, mesh):
    """The class of every pixel of the mask logits, as mask features."""
    del graph, params, stats, mesh
    red = image[:, 2::4, 2::4, :1] * PIXEL_STD[0] + PIXEL_MEAN[0]
    return Features(jnp.round(red) // 40, ())


def decode_colours(graph, params, stats, features, tokens, *, mesh):
    """One query per class. It is right if the parameter is 1, and finds no stuff as "instance"."""
    del graph, stats, mesh
    classes = jnp.arange(tiny.CLASSES)
    truth = features.mask_features[..., 0]
    masks = jnp.where(truth[:, None] == classes[:, None, None], 10.0, -10.0)
    thing = jnp.array(tiny.metadata().is_thing)
    instance = jnp.all(tokens == jnp.array(TASK_TOKENS[1]), axis=-1)
    found = thing | ~instance[:, None]
    target = jnp.where(found, classes, tiny.CLASSES)
    logits = 10 * jax.nn.one_hot(target, tiny.CLASSES + 1)
    masks = masks * params["sign"]
    return types.SimpleNamespace(class_logits=logits[None], mask_logits=lambda: masks)


GOOD = {"params": {"sign": np.float32(1)}, "stats": {}}
MAPILLARY = {"dataset.name": "mapillary"}
BAD = {"params": {"sign": np.float32(-1)}, "stats": {}}


@pytest.fixture
def make(monkeypatch, tmp_path):
    monkeypatch.setattr(functional, "abstract", lambda *_, **__: types.SimpleNamespace(graph=None))
    monkeypatch.setattr(functional, "encode", encode_colours)
    monkeypatch.setattr(functional, "decode", decode_colours)

    def make(devices=1, **settings):
        config = common.get_base()
        config.update_from_flattened_dict({"train.pictures": 0} | settings)
        mesh = sharding.make_mesh(devices=jax.devices()[:devices])
        return evaluators.Evaluator(config, tmp_path, tiny.metadata(), None, mesh)

    return make


@pytest.fixture
def writer(tmp_path):
    writer = observe.make_writer(tmp_path)
    yield writer
    writer.close()


def test_the_averaged_parameters_are_scored(make, writer, tmp_path):
    evaluator = make(**{"eval.limit": 1})
    state = BAD | {"ema": GOOD["params"]}
    metrics = evaluator.run(state, 7, eval_scenes.batches, writer)
    assert all(metrics[name] > 90 for name in evaluators.TOKEN_COLUMNS), metrics
    assert set(metrics) == set(evaluators.metric_names(common.get_base(), tiny.metadata()))
    saved = json.loads((tmp_path / "eval" / "7" / "results.json").read_text())
    assert saved["metrics"] == metrics
    assert saved["images"] == 3  # the limit is the caller's matter
    assert make().finished(7) == metrics
    assert make().finished(8) is None
    (line,) = read_lines(tmp_path)
    assert line.pop("time") > 0
    assert line == {"step": 7} | metrics

    worse = evaluator.run(BAD, 8, eval_scenes.batches, writer, limit=2)
    assert worse["panoptic/PQ"] < 10
    assert json.loads((tmp_path / "eval" / "8" / "results.json").read_text())["images"] == 2


def test_pictures_are_drawn_sharp(make, writer, tmp_path):
    make(**{"train.pictures": 3}).run(GOOD, 5, eval_scenes.batches, writer)
    sheet = np.asarray(Image.open(tmp_path / "pictures" / "step_0000005.png"))
    # Three rows of image, truth and three tasks, each as large as a cell.
    assert sheet.shape[0] > 3 * 360
    assert sheet.shape[1] > 5 * 360
    height, width = sheet.shape[0] // 3, sheet.shape[1] // 5
    cells = [[sheet[r * height :, c * width :][:height, :width] for c in range(5)] for r in (0, 1)]
    for row in cells:
        assert len(np.unique(row[0].reshape(-1, 3), axis=0)) >= tiny.CLASSES
        assert not np.array_equal(row[0], row[1])
    assert not np.array_equal(cells[0][0], cells[1][0])  # another image
    # The prediction is right and looks like the truth, except for the instances: they lack stuff.
    difference = [np.abs(cells[0][1].astype(int) - cells[0][c]).mean() for c in (2, 3, 4)]
    assert difference[0] < difference[1]


def test_each_image_and_task_has_a_picture_that_is_legible_as_a_thumbnail(make, writer, tmp_path):
    make(**{"train.pictures": 2}).run(GOOD, 5, eval_scenes.batches, writer)
    events = {tag: x for tag, x in read_events(tmp_path).items() if "/image_" in tag}
    assert events.keys() == {f"{task}/image_{n}" for task in TASKS for n in (1, 2)}
    pictures = {}
    for tag, ((step, (width, height, content)),) in events.items():
        pictures[tag] = np.asarray(Image.open(io.BytesIO(content)))
        assert step == 5 and pictures[tag].shape[:2] == (int(height), int(width))
        assert 350 <= int(width) <= 400 and int(height) > 2 * 360  # one above the other
    assert not np.array_equal(pictures["panoptic/image_1"], pictures["panoptic/image_2"])
    half = len(pictures["semantic/image_1"]) // 2
    above, below = (pictures["semantic/image_1"][i : i + half].astype(int) for i in (0, half))
    other = pictures["instance/image_1"][half : 2 * half]
    part = np.s_[100:-100, 100:-100]  # without titles
    assert np.abs(above - below)[part].mean() < np.abs(above - other)[part].mean()


def test_images_are_encoded_once_whatever_is_made_of_them(make, writer, monkeypatch):
    calls = []

    def count(name):
        call = getattr(Predictor, name)
        monkeypatch.setattr(Predictor, name, lambda *args: calls.append(name) or call(*args))

    count("encode")
    count("decode")
    once = ["encode", *["decode"] * 3]
    evaluator = make(**{"train.pictures": 3})
    evaluator.run(GOOD, 5, eval_scenes.batches, writer)
    assert calls == once * 2 * 2  # two batches, scored and drawn
    calls.clear()
    evaluator.token_table(GOOD, 5, eval_scenes.batches)
    assert calls == once * 2


def test_tasks_together_score_as_each_alone(writer, tmp_path, monkeypatch):
    """With a real model: its parameters, sharded as in training, are gathered by both programs."""
    made = functools.cache(lambda: programs(*first))  # compiled once for all evaluators
    programs, first = functional.programs, []

    def once(*arguments, **_):
        first[:] = first or arguments
        return made()

    monkeypatch.setattr(functional, "programs", once)
    config = common.get_base()
    model = tiny.model_config(decoder_layers=1)
    _, params, stats = tiny.random_model(model, training=True)
    state = {"params": params, "stats": stats}
    mesh = sharding.make_mesh(2, 4)
    state = jax.device_put(state, sharding.state_shardings(state, mesh, min_size=64))

    def evaluate(*tasks):
        settings = {"eval.tasks": tasks, "train.pictures": 0, "eval.object_mask_threshold": 0.0}
        settings["eval.overlap_threshold"] = 0.0
        config.update_from_flattened_dict(settings)
        evaluator = evaluators.Evaluator(config, tmp_path, tiny.metadata(), model, mesh)
        batches = functools.partial(eval_scenes.batches, count=9, size=8)
        evaluator.run(state, 1, batches, writer)
        saved = json.loads((tmp_path / "eval" / "1" / "results.json").read_text())
        return {name: saved[name] for name in ("metrics", "per_class", "counts")}

    together = evaluate(*TASKS)
    alone = [evaluate(task) for task in TASKS]
    assert together["counts"]["panoptic/fp"] > 0
    for name in ("metrics", "counts"):
        assert together[name] == {key: x for found in alone for key, x in found[name].items()}
    for row, *rows in zip(together["per_class"], *(a["per_class"] for a in alone), strict=True):
        assert row == {key: x for found in rows for key, x in found.items()}


def test_no_pictures(make, writer, tmp_path):
    make(**{"train.pictures": 0}).run(GOOD, 5, eval_scenes.batches, writer)
    assert not (tmp_path / "pictures").exists()


def test_more_pictures_than_images(make, writer, tmp_path):
    make(**{"train.pictures": 9}).run(GOOD, 5, eval_scenes.batches, writer)
    sheet = np.asarray(Image.open(tmp_path / "pictures" / "step_0000005.png"))
    assert 3 * 360 < sheet.shape[0] < 4 * 360


def test_a_batch_over_devices_scores_the_same(make, writer):
    one = make().run(GOOD, 1, lambda limit: eval_scenes.batches(limit, 5, 4), writer)
    assert (
        make(devices=4).run(GOOD, 2, lambda limit: eval_scenes.batches(limit, 5, 4), writer) == one
    )


def test_a_subset_of_the_tasks(make, writer, tmp_path, capsys):
    evaluator = make(**{"eval.tasks": ("semantic",)})
    metrics = evaluator.run(GOOD, 5, eval_scenes.batches, writer)
    assert {name.split("/")[0] for name in metrics} == {"semantic"}
    evaluator.report(5)
    assert "mIoU" in capsys.readouterr().out
    assert make(**{"eval.tasks": ("semantic",)}).finished(5) == metrics
    assert make().finished(5) is None  # this one wants all tasks: they are yet to be scored


def test_a_task_without_metric_is_left_out(make, writer, tmp_path):
    """The official evaluation of Mapillary Vistas scores no instances."""
    evaluator = make(**MAPILLARY)
    metrics = evaluator.run(GOOD, 5, eval_scenes.batches, writer)
    assert {name.split("/")[0] for name in metrics} == {"panoptic", "semantic"}
    assert make(**MAPILLARY).finished(5) == metrics
    table = evaluator.token_table(GOOD, 5, eval_scenes.batches)
    assert table["panoptic"]["instance/AP"] is None
    assert table["panoptic"]["panoptic/PQ"] == metrics["panoptic/PQ"]
    scored = make(**MAPILLARY, **{"eval.protocol": "coco"})
    assert scored.run(GOOD, 6, eval_scenes.batches, writer)["instance/AP"] > 90


def test_instance_file_and_thing_numbers(make, writer, tmp_path):
    """AP against an instance file that lists one thing of each scene, numbered by position."""
    height = eval_scenes.SIDE
    images, annotations = [], []
    for number in range(3):
        cells = eval_scenes.class_map(number) == 2  # the third of the three things
        top, left = (np.flatnonzero(cells.any(axis)).tolist() for axis in (1, 0))
        corners = [left[0], top[0], left[-1] + 1, top[0], left[-1] + 1, top[-1] + 1]
        annotations.append(
            dict(
                id=number + 1,
                image_id=f"scene {number}",
                category_id=2,
                area=float(cells.sum()),
                segmentation=[[*corners, left[0], top[-1] + 1]],
            )
        )
        images.append(dict(id=f"scene {number}", height=height, width=height))
    path = tmp_path / "instances.json"
    categories = [dict(id=i) for i in range(3)]
    path.write_text(json.dumps(dict(images=images, annotations=annotations, categories=categories)))
    settings = {"eval.instance_json": str(path), "eval.instance_ids": "thing"}
    settings["eval.tasks"] = ("instance",)
    make(**settings).run(GOOD, 5, eval_scenes.batches, writer)
    saved = json.loads((tmp_path / "eval" / "5" / "results.json").read_text())
    assert saved["counts"]["instance/ground_truth"] == 3
    found = {row["class"]: row["instance/AP"] for row in saved["per_class"]}
    assert found["car"] > 90 and [found[c] for c in ("cat", "dog", "sky")] == [None] * 3


def test_views_of_the_semantic_task(make, writer, tmp_path, caplog):
    def batches(limit):
        for batch in eval_scenes.batches(limit):
            view = {name: batch[name] for name in ("image", "image_size")}
            yield {**batch, "views": [view]}

    settings = {"eval.tta.enabled": True, "eval.tta.short_edges": (64,)}
    settings |= {"eval.tasks": ("semantic",), "train.pictures": 0}
    with caplog.at_level("INFO", logger="absl"):
        metrics = make(**settings).run(GOOD, 5, batches, writer)
    assert metrics["semantic/mIoU"] > 90
    assert make(**settings).finished(5) == metrics
    plain = make(**{"eval.tasks": ("semantic",)})
    assert plain.finished(5) is None  # its scores are yet to be made
    # All views have the shape of the plain images: one program of each kind.
    assert "1 to encode, 1 to decode" in caplog.text
    with pytest.raises(ValueError, match="needs 1 views"):
        make(**settings).run(GOOD, 5, eval_scenes.batches, writer)


@pytest.mark.parametrize("devices", [1, 4])
def test_every_transfer_is_explicit(make, writer, devices):
    def batches(limit):
        for batch in eval_scenes.batches(limit, 4, 4):
            yield {**batch, "views": [{name: batch[name] for name in ("image", "image_size")}]}

    whole = sharding.replicated(sharding.make_mesh(devices=jax.devices()[:devices]))
    state = jax.device_put(GOOD, whole)
    settings = {"eval.tta.enabled": True, "eval.tta.short_edges": (64,), "train.pictures": 1}
    evaluator = make(devices, **settings)
    with jax.transfer_guard("disallow"):  # as in the training loop
        metrics = evaluator.run(state, 5, batches, writer)
        table = evaluator.token_table(state, 5, batches)
    assert metrics["semantic/mIoU"] > 90
    assert table["panoptic"]["panoptic/PQ"] == metrics["panoptic/PQ"]


def test_undefined_scores_are_no_scalars(make, writer, tmp_path, capsys):
    """A data set without things: AP and the scores of things have no value."""
    batches = eval_scenes.batches(0, 1, 1)
    record = batches[0]["records"][0]
    record["segments"] = [s for s in record["segments"] if s["category"] >= 3]
    record["panoptic"][record["panoptic"] < 4] = 0
    evaluator = make()
    metrics = evaluator.run(GOOD, 5, lambda limit: batches, writer)
    assert metrics["instance/AP"] is None
    assert metrics["panoptic/PQ_stuff"] > 90
    (line,) = read_lines(tmp_path)
    assert "instance/AP" not in line
    assert line["panoptic/PQ_stuff"] == metrics["panoptic/PQ_stuff"]
    assert evaluator.token_table(GOOD, 5, lambda limit: batches)["instance"]["instance/AP"] is None
    evaluator.report(5)
    assert "instance/AP is not defined" in capsys.readouterr().out


def test_token_table(make, writer, tmp_path, capsys):
    evaluator = make()
    metrics = evaluator.run(GOOD, 5, eval_scenes.batches, writer)
    assert not evaluator.has_token_table(5)
    table = evaluator.token_table(GOOD, 5, eval_scenes.batches)
    assert evaluator.has_token_table(5)
    assert list(table) == ["panoptic", "instance", "semantic"]
    for row in table.values():
        assert tuple(row) == evaluators.TOKEN_COLUMNS
    assert table["instance"]["panoptic/PQ_stuff"] == 0
    assert table["panoptic"]["panoptic/PQ"] == metrics["panoptic/PQ"]
    assert json.loads((tmp_path / "eval" / "5" / "task_tokens.json").read_text()) == table
    # Another model at the same step: the table is made anew.
    assert evaluator.token_table(BAD, 5, eval_scenes.batches) != table

    make().finished(5)
    evaluator.report(5)
    shown = capsys.readouterr().out.splitlines()
    for token in table:
        assert any(line.split()[:1] == [token] and len(line.split()) == 6 for line in shown)
    for path in ("eval/5/results.json", "pictures/step_0000005.png", "checkpoints"):
        assert any(line.endswith(str(tmp_path / path)) for line in shown)


def test_format_token_table():
    table = {"panoptic": dict.fromkeys(evaluators.TOKEN_COLUMNS, 12.345)}
    table["instance"] = dict.fromkeys(evaluators.TOKEN_COLUMNS)
    assert evaluators.format_token_table(table).splitlines() == [
        "task token    PQ  PQ_things  PQ_stuff    AP  mIoU",
        "panoptic    12.3       12.3      12.3  12.3  12.3",
        "instance       -          -         -     -     -",
    ]


@pytest.mark.parametrize(
    ("setting", "value", "parts"),
    [
        ("eval.tasks", ("panoptic", "depth"), ("eval.tasks", "depth", "semantic")),
        ("eval.tasks", (), ("eval.tasks", "semantic")),
        ("eval.limit", -1, ("eval.limit is -1",)),
        ("eval.protocol", "lvis", ("eval.protocol is 'lvis'", "cityscapes")),
        ("eval.instance_ids", "own", ("eval.instance_ids is 'own'", "thing")),
        ("eval.instance_json", "gone.json", ("eval.instance_json=gone.json", "no such file")),
    ],
)
def test_wrong_settings_are_found_before_any_evaluation(make, setting, value, parts):
    with pytest.raises((ValueError, FileNotFoundError)) as error:
        make(**{setting: value})
    for part in parts:
        assert part in str(error.value)


def test_tasks_and_views_that_cannot_be_scored_are_found_at_once(make):
    with pytest.raises(ValueError, match=r"eval\.tasks.*mapillary scores only panoptic, semantic"):
        make(**MAPILLARY, **{"eval.tasks": ("instance",)})
    with pytest.raises(ValueError, match=r"eval\.tta\.max_size is 5"):
        make(**{"eval.tta.enabled": True, "eval.tta.max_size": 5})


def test_damaged_results_are_named(make, tmp_path):
    path = tmp_path / "eval" / "5" / "results.json"
    path.parent.mkdir(parents=True)
    for text in ("{", '{"metrics": {}}'):
        path.write_text(text)
        with pytest.raises(CheckpointError, match=str(path)):
            make().finished(5)
