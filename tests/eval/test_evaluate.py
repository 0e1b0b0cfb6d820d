"""The evaluation loop, from the logits of a model that knows the answer to the written result."""

import dataclasses
import gc
import json
import os
import pathlib
import socket
import subprocess
import sys
import weakref

import jax.numpy as jnp
import numpy as np
import pytest

from oneformer_jax.eval import evaluate as evaluate_module
from oneformer_jax.eval.evaluate import (
    EvalResult,
    evaluate,
    evaluate_tokens,
    format_results,
    write_results,
)
from oneformer_jax.eval.postprocess import PostprocessConfig
from oneformer_jax.eval.protocol import Protocol
from oneformer_jax.types import TASKS, Metadata

METADATA = Metadata(
    dataset="blocks",
    class_names=("cat", "dog", "grass", "sky"),
    is_thing=(True, True, False, False),
    colors=((255, 0, 0), (0, 255, 0), (0, 0, 255), (9, 9, 9)),
    category_ids=(1, 2, 5, 7),
)
CLASSES, QUERIES, PADDED = 4, 6, 64
SETTINGS = dict(metadata=METADATA, postprocess=PostprocessConfig(topk=12))

SIZES = ((64, 64), (48, 64), (64, 40))


def make_record(number):
    """Two cats, a dog, grass and sky in blocks of 8 pixels, and a strip of void at the right."""
    height, width = SIZES[number % len(SIZES)]
    panoptic = np.full((height, width), 900, np.int32)
    panoptic[height // 2 // 8 * 8 :] = 800
    panoptic[8:24, 0:16] = 11
    panoptic[8:24, 24:32] = 12
    panoptic[32:48, 8 : 16 + 8 * (number % 2)] = 13
    panoptic[:, -8:] = 0
    classes = {11: 0, 12: 0, 13: 1, 800: 2, 900: 3}
    segments = [
        dict(id=i, category=c, iscrowd=False, area=int((panoptic == i).sum()))
        for i, c in classes.items()
    ]
    return dict(
        image=np.zeros((height, width, 3), np.uint8),
        panoptic=panoptic,
        segments=segments,
        image_id=str(number),
        file_name=f"{number}.jpg",
    )


def make_batches(numbers, batch_size=2):
    """Batches of records; the last is filled up with slots whose content means nothing."""
    for start in range(0, len(numbers), batch_size):
        chosen = list(numbers[start : start + batch_size])
        records = [make_record(n) for n in chosen] + [None] * (batch_size - len(chosen))
        sizes = [r["panoptic"].shape if r else (9999, 9999) for r in records]
        yield dict(
            image=np.zeros((batch_size, PADDED, PADDED, 3), np.uint8),
            image_size=np.array(sizes, np.int32),
            original_size=np.array(sizes, np.int32),
            valid=np.array([r is not None for r in records]),
            index=np.arange(start, start + batch_size, dtype=np.int32),
            records=records,
        )


class Oracle:
    """Logits made from the ground truth: one query per segment, the others say "no object".

    The masks have the resolution of the image, so that no interpolation rounds their corners.
    `segments(record, task)` chooses the segments that it sees under a task token.
    """

    def __init__(self, segments=lambda record, task: record["segments"]):
        self.segments = segments
        self.encoded = 0
        self.tokens = []

    def encode(self, batch):
        self.encoded += 1
        return batch

    def decode(self, batch, task):
        self.tokens.append(task)
        size = len(batch["valid"])
        classes = np.zeros((size, QUERIES, CLASSES + 1), np.float32)
        masks = np.full((size, QUERIES, PADDED, PADDED), -20, np.float32)
        classes[..., CLASSES] = 20
        for b, record in enumerate(batch["records"]):
            for q, s in enumerate(self.segments(record, task) if record else []):
                classes[b, q, CLASSES] = 0
                classes[b, q, s["category"]] = 20
                cells = record["panoptic"] == s["id"]
                masks[b, q, : cells.shape[0], : cells.shape[1]][cells] = 20
        return jnp.asarray(classes), jnp.asarray(masks)


def things_only(record, task):
    if task == "instance":
        return [s for s in record["segments"] if METADATA.is_thing[s["category"]]]
    return record["segments"]


HUNDREDS = (
    "panoptic/PQ",
    "panoptic/PQ_things",
    "panoptic/PQ_stuff",
    "panoptic/SQ",
    "panoptic/RQ",
    "instance/AP",
    "instance/AP50",
    "semantic/mIoU",
    "semantic/pACC",
)


@pytest.fixture(scope="module")
def perfect():
    model = Oracle()
    result = evaluate(model, make_batches(range(5)), **SETTINGS)
    return model, result


def test_a_perfect_model_gets_100(perfect):
    model, result = perfect
    assert {name: result.metrics[name] for name in HUNDREDS} == pytest.approx(
        dict.fromkeys(HUNDREDS, 100.0)
    )
    assert result.images == 5  # the sixth slot is a filler
    assert model.tokens == list(TASKS) * 3  # three batches, a run for each task
    assert model.encoded == 3
    assert result.token is None
    assert result.counts["panoptic/tp"] == 25
    assert result.counts["instance/ground_truth"] == 15
    assert [row["class"] for row in result.per_class] == list(METADATA.class_names)
    assert result.per_class[1]["panoptic/PQ"] == pytest.approx(100)
    assert result.per_class[2]["instance/AP"] is None


def test_every_none_has_a_reason(perfect):
    missing = {name for name, value in perfect[1].metrics.items() if value is None}
    assert missing == set(perfect[1].reasons) == {"instance/APm", "instance/APl"}


def test_seconds_add_up(perfect):
    seconds = dict(perfect[1].seconds)
    total = seconds.pop("total")
    assert set(seconds) == {"data", "predict", "postprocess", "metrics"}
    assert sum(seconds.values()) == pytest.approx(total)
    assert min(seconds.values()) > 0


def test_each_output_is_scored_under_its_own_token():
    """Blind for stuff under the instance token only: AP, PQ and mIoU do not notice."""
    result = evaluate(Oracle(things_only), make_batches(range(2)), **SETTINGS)
    for name in HUNDREDS:
        assert result.metrics[name] == pytest.approx(100)


def test_every_token_gives_all_metrics_from_its_one_prediction():
    model = Oracle(things_only)
    results = evaluate_tokens(model, make_batches(range(4)), **SETTINGS)
    assert model.tokens == list(TASKS) * 2
    assert model.encoded == 2
    assert [(token, result.token) for token, result in results.items()] == [(t, t) for t in TASKS]
    wrong = results["instance"].metrics
    assert wrong["panoptic/PQ_stuff"] == 0
    assert wrong["panoptic/PQ_things"] == pytest.approx(100)
    assert wrong["instance/AP"] == pytest.approx(100)
    assert 0 < wrong["semantic/mIoU"] < 60
    for token in ("panoptic", "semantic"):
        for name in HUNDREDS:
            assert results[token].metrics[name] == pytest.approx(100)


def test_features_of_one_batch_are_kept_at_a_time():
    """Also not those of the batch before, while the next one is encoded."""

    class Watched(Oracle):
        def encode(self, batch):
            gc.collect()
            assert all(reference() is None for reference in self.features)
            found = Features(super().encode(batch))
            self.features.append(weakref.ref(found))
            return found

        def decode(self, features, task):
            return super().decode(features.batch, task)

    class Features:
        def __init__(self, batch):
            self.batch = batch

    for run in (evaluate, evaluate_tokens):
        model = Watched()
        model.features = []
        run(model, make_batches(range(6)), **SETTINGS)
        assert len(model.features) == 3


def test_chosen_outputs():
    model = Oracle()
    result = evaluate(model, make_batches(range(2)), outputs=("semantic",), **SETTINGS)
    assert model.tokens == ["semantic"]
    assert {name.partition("/")[0] for name in result.metrics} == {"semantic"}
    assert "panoptic" not in format_results(result, METADATA)


def test_thresholds_reach_the_post_processing():
    """A model whose segments have probability 0.6 is silent at the threshold of 0.8."""

    class Unsure(Oracle):
        def decode(self, batch, task):
            classes, masks = super().decode(batch, task)
            # softmax of log(.6), log(.1) x 4
            return jnp.where(classes == 20, jnp.log(0.6), jnp.log(0.1)), masks

    found = []
    for threshold in (0.5, 0.8):
        config = PostprocessConfig(object_mask_threshold=threshold, topk=12)
        result = evaluate(
            Unsure(),
            make_batches(range(2)),
            metadata=METADATA,
            postprocess=config,
            outputs=("panoptic",),
        )
        found.append(result.metrics["panoptic/PQ"])
    assert found == pytest.approx([100, 0])


@pytest.mark.parametrize("instance_ids", ["contiguous", "thing"])
@pytest.mark.parametrize("exported", [False, True])
def test_ap_does_not_depend_on_the_numbering(instance_ids, exported):
    metadata = dataclasses.replace(METADATA, is_thing=(False, True, False, True))
    result = evaluate(
        Oracle(),
        make_batches(range(2)),
        metadata=metadata,
        postprocess=PostprocessConfig(topk=12, ade_instance_remap=exported),
        outputs=("instance",),
        protocol=Protocol("ade20k", instance_ids),
    )
    assert result.metrics["instance/AP"] == pytest.approx(100)
    assert [row["instance/AP"] for row in result.per_class] == [None, 100, None, 100]


def test_progress_is_told_after_every_batch():
    calls = []
    evaluate(
        Oracle(),
        make_batches(range(3)),
        outputs=("semantic",),
        progress=lambda images, seconds: calls.append((images, seconds)),
        **SETTINGS,
    )
    assert [images for images, _ in calls] == [2, 3]
    assert 0 < calls[0][1] < calls[1][1]


def test_a_batch_of_fillers_only_is_run_but_not_scored():
    """A host that has run out of images must still take part in the model's step."""
    filler = next(make_batches(range(1)))
    filler = filler | {"valid": np.zeros(2, bool), "records": [None, None]}
    model = Oracle()
    batches = [*make_batches(range(2)), filler]
    result = evaluate(model, batches, outputs=("semantic",), **SETTINGS)
    assert result.images == 2
    assert model.tokens == ["semantic"] * 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (dict(outputs=("depth",)), "unknown task 'depth'"),
        (dict(outputs=()), "no outputs"),
        (dict(protocol=Protocol("mapillary")), "mapillary has no metric for the task 'instance'"),
        (dict(), "saw no image of blocks"),
    ],
)
def test_bad_arguments(options, message):
    with pytest.raises(ValueError, match=message):
        evaluate(Oracle(), [], **SETTINGS, **options)


def test_model_of_another_data_set():
    metadata = dataclasses.replace(
        METADATA,
        class_names=METADATA.class_names[:3],
        is_thing=METADATA.is_thing[:3],
        colors=METADATA.colors[:3],
        category_ids=METADATA.category_ids[:3],
    )
    with pytest.raises(ValueError, match="3 classes"):
        evaluate(
            Oracle(), make_batches(range(2)), metadata=metadata, postprocess=PostprocessConfig()
        )


def small_result(**changes):
    fields = dict(
        dataset="blocks",
        token=None,
        images=1200,
        metrics={"semantic/mIoU": 71.25, "semantic/pACC": None},
        reasons={"semantic/pACC": "no pixel"},
        per_class=[{"class": c, "isthing": False, "semantic/IoU": 50.0} for c in "abcd"],
        counts={"semantic/images": 1200},
        seconds={"total": 3.0},
    )
    return EvalResult(**(fields | changes))


def test_format_results(perfect):
    lines = format_results(perfect[1], METADATA).splitlines()
    assert lines[0] == "blocks: 5 images, protocol coco, task token: each output its own"
    cells = [line.split() for line in lines]
    assert ["panoptic", "PQ", "SQ", "RQ"] in cells
    assert ["things", "100.0", "100.0", "100.0"] in cells
    assert ["instance", "AP", "AP50", "AP75", "APs", "APm", "APl"] in cells
    assert ["all", "100.0", "100.0", "100.0", "100.0", "-", "-"] in cells
    assert ["class", "kind", "PQ", "SQ", "RQ", "AP", "IoU", "ACC"] in cells
    assert ["sky", "stuff", "100.0", "100.0", "100.0", "-", "100.0", "100.0"] in cells
    assert any(line.startswith("instance/APm is not defined: ") for line in lines)
    # Aligned: the header and the last row of the table of classes end in the same column.
    assert len(lines[-1]) == len(lines[-6])


def test_format_results_names_the_token_and_checks_the_classes():
    assert "task token: instance" in format_results(small_result(token="instance"), METADATA)
    with pytest.raises(ValueError, match="2 classes"):
        format_results(small_result(per_class=small_result().per_class[:2]), METADATA)


def test_write_results(tmp_path, perfect):
    path = tmp_path / "eval" / "10" / "results.json"
    write_results(path, perfect[1])
    assert json.loads(path.read_text()) == dataclasses.asdict(perfect[1])
    write_results(str(path), small_result())
    assert json.loads(path.read_text())["metrics"] == {
        "semantic/mIoU": 71.25,
        "semantic/pACC": None,
    }
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_write_results_leaves_the_old_file_if_it_fails(tmp_path, monkeypatch):
    path = tmp_path / "results.json"
    write_results(path, small_result())
    before = path.read_text()

    def broken(handle):
        raise OSError("no space left on device")

    monkeypatch.setattr(evaluate_module.os, "fsync", broken)
    with pytest.raises(OSError, match="no space"):
        write_results(path, small_result(images=7))
    assert path.read_text() == before
    assert [p.name for p in tmp_path.iterdir()] == ["results.json"]


WORKER = """
import json, sys
import jax
port, process = sys.argv[1], int(sys.argv[2])
jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_cpu_collectives_implementation", "gloo")
jax.distributed.initialize(f"localhost:{port}", num_processes=2, process_id=process)
import numpy as np
from oneformer_jax.eval.evaluate import merge_hosts
from oneformer_jax.eval.protocol import Protocol
from tests.eval.metric_cases import random_updates, METADATA
found = {}
protocol = Protocol("cityscapes")
for task in protocol.tasks:
    metric = protocol.make_metric(task, METADATA)
    for i, update in enumerate(random_updates(task, 5)):
        if i % 2 == process:
            metric.update(*update)
    if task == "semantic":
        metric._add_pairs(np.array([0]), np.array([2**40]))
    metric = merge_hosts(metric)
    found[task] = [metric.counts(), {n: repr(v) for n, v in metric.compute().items()}]
from oneformer_jax.eval.findings import Findings
from oneformer_jax.eval.metrics.outcome import Outcome
from tests.eval.test_findings import METADATA as CLASSES, truth_of
findings = Findings(CLASSES)
for i in range(process, 9, 2):
    record, segmented = truth_of(i, "panoptic")
    findings.add(segmented, record | {"image_id": str(i)}, Outcome(float(i), []))
examples = json.loads(merge_hosts(findings).state()["json"].tobytes())[2]["panoptic"]
found["examples"] = [example["image"] for example in examples]
print("RESULT", json.dumps(found))
"""


def test_two_processes_agree_on_the_whole():
    """Real processes: unequal shares (3 and 2 images), counts beyond 32 bits."""
    from tests.eval.metric_cases import METADATA as cases
    from tests.eval.metric_cases import random_updates

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    root = pathlib.Path(evaluate_module.__file__).parents[2]
    environment = os.environ | {"PYTHONPATH": str(root), "JAX_PLATFORMS": "cpu"}
    environment.pop("XLA_FLAGS", None)
    workers = [
        subprocess.Popen(
            [sys.executable, "-c", WORKER, str(port), str(process)],
            cwd=root,
            env=environment,
            text=True,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
        )
        for process in range(2)
    ]
    try:
        outputs = [worker.communicate(timeout=120) for worker in workers]
    finally:
        for worker in workers:
            worker.kill()
    for worker, (_, errors) in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, errors
    results = [
        json.loads(next(line for line in out.splitlines() if line.startswith("RESULT"))[6:])
        for out, _ in outputs
    ]
    assert results[0] == results[1]
    assert results[0]["examples"] == ["0", "1", "2", "6", "7", "8"]
    for task in TASKS:
        whole = Protocol("cityscapes").make_metric(task, cases)
        for update in random_updates(task, 5):
            whole.update(*update)
        if task == "semantic":
            whole._add_pairs(np.array([0]), np.array([2**41]))
        counts, values = results[0][task]
        assert counts == whole.counts()
        for name, value in whole.compute().items():
            assert float(values[name]) == pytest.approx(value, nan_ok=True)
