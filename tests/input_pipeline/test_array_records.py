"""Records of ArrayRecord files: all damage is a RecordError that names file and record."""

import dataclasses
import os
import pickle
import random

import cv2
import numpy as np
import pytest
from tensorflow_datasets.proto import tf_example_pb2

from oneformer_jax.input_pipeline import eval_loader, loader, sources, transforms
from oneformer_jax.input_pipeline.array_records import RecordFiles
from oneformer_jax.input_pipeline.records import RecordError
from tests.input_pipeline import prepared_scenes
from tests.input_pipeline.prepared_scenes import COUNT


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return prepared_scenes.make(tmp_path_factory.mktemp("data"))


@pytest.fixture
def folder(original, tmp_path):
    return prepared_scenes.copy(original, tmp_path)


def test_records_are_numbered_over_all_files(tmp_path):
    content = [[b"a", b"bb"], [], [b"ccc"], [b"d", b"e", b"f"]]
    paths = [str(tmp_path / f"{i}.array_record") for i in range(len(content))]
    for path, records in zip(paths, content, strict=True):
        prepared_scenes.write_records(path, records)
    files = RecordFiles(paths, [len(records) for records in content])
    expected = [record for records in content for record in records]
    assert len(files) == 6 and [files[i] for i in range(6)] == expected
    copy = pickle.loads(pickle.dumps(files))
    assert [copy[i] for i in (5, 0, 2)] == [b"f", b"a", b"ccc"]
    assert files.where(2) == f"{paths[2]}, record 0" and files.where(5) == f"{paths[3]}, record 2"
    for index in (-1, 6):
        with pytest.raises(IndexError):
            files[index]


# ------------------------------------------------------------------------------- damaged files


def _cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    return "damaged"


def _cut_by_a_byte(path):
    path.write_bytes(path.read_bytes()[:-1])
    return "damaged"


def _empty(path):
    path.write_bytes(b"")
    return r"damaged \(ArrayRecord file should be at least 64KB big\)"


def _other_content(path):
    path.write_bytes(b"<html>404</html>" * 10_000)
    return "damaged"


def _shifted(path):
    path.write_bytes(path.read_bytes()[65_536:] + bytes(65_536))
    return "damaged"


def _index(path):
    data = bytearray(path.read_bytes())
    data[-65_536 + 30] ^= 1  # in the last block: where the index lies
    path.write_bytes(data)
    return "damaged"


def _missing(path):
    path.unlink()
    return "cannot be read .No such file"


def _directory(path):
    path.unlink()
    path.mkdir()
    return "not a regular file"


def _pipe(path):
    path.unlink()
    os.mkfifo(path)
    return "not a regular file"


def _endless(path):
    path.unlink()
    path.symlink_to("/dev/zero")
    return "not a regular file"


def _fewer_records(path):
    prepared_scenes.write_records(path, prepared_scenes.read_records(path)[:-1])
    return r"has 5 records, but dataset_info\.json says 6"


def _no_record(path):
    prepared_scenes.write_records(path, [])
    return r"has 0 records, but dataset_info\.json says 6"


WHOLE_FILE = [
    _cut, _cut_by_a_byte, _empty, _other_content, _shifted, _index, _missing, _directory, _pipe,
    _endless, _fewer_records, _no_record,
]  # fmt: skip


@pytest.mark.parametrize("damage", WHOLE_FILE, ids=lambda f: f.__name__.strip("_"))
def test_a_damaged_file_is_a_record_error_that_names_it(folder, damage):
    path = prepared_scenes.train_file(folder)
    message = damage(path)
    source = sources.TfdsSource(folder, "train")
    for index in (0, COUNT - 1):
        with pytest.raises(RecordError, match=message) as error:
            source[index]
        assert str(path) in str(error.value) and "skip_broken" in str(error.value)
        assert "\n" not in str(error.value)
    assert sources.TfdsSource(folder, "validation")[1]["image"].shape == (48, 48, 3)


def _flip(path, index):
    """Flips a bit in the middle of a record."""
    data = bytearray(path.read_bytes())
    record = prepared_scenes.read_records(path)[index]
    data[data.index(record[-2000:-1900]) + 50] ^= 4
    path.write_bytes(data)


def _change(path, index, change):
    """Replaces a record by what `change` makes of its parsed example."""
    records = prepared_scenes.read_records(path)
    example = tf_example_pb2.Example.FromString(records[index])
    result = change(example.features.feature)
    records[index] = result if isinstance(result, bytes) else example.SerializeToString()
    prepared_scenes.write_records(path, records)


def _replace(key, **values):
    def change(fields):
        fields[key].Clear()
        for kind, value in values.items():
            getattr(fields[key], kind).value.extend(value)

    return change


OBJECTS = "panoptic_objects"
BAD_RECORDS = {
    "nothing": (lambda fields: b"", "no field panoptic_objects/id"),
    "no example": (lambda fields: b"\xff" * 50, "not a serialised example"),
    "half an example": (lambda fields: b"\x0a\x50" + bytes(5), "not a serialised example"),
    "no image": (lambda fields: fields.__delitem__("image"), "no field image"),
    "image of no type": (_replace("image"), "field image is a None"),
    "image as numbers": (_replace("image", int64_list=[1, 2]), "image is a int64_list, not a byte"),
    "two images": (_replace("image", bytes_list=[b"a", b"b"]), "image has 2 values, not 1"),
    "image of no format": (_replace("image", bytes_list=[b"abc"]), "cannot be decoded"),
    "empty image": (_replace("image", bytes_list=[b""]), "cannot be decoded"),
    "image of another size": (
        _replace(
            "image", bytes_list=[cv2.imencode(".png", np.zeros((4, 4, 3), np.uint8))[1].tobytes()]
        ),
        "the image has 4 x 4 pixels",
    ),
    "grey map": (
        _replace(
            "panoptic_image",
            bytes_list=[cv2.imencode(".png", np.zeros((48, 48), np.uint8))[1].tobytes()],
        ),
        "must be 8-bit RGB",
    ),
    "ids as fractions": (_replace(f"{OBJECTS}/id", float_list=[1.5]), "id is a float_list, not"),
    "no crowd": (lambda fields: fields.__delitem__(f"{OBJECTS}/is_crowd"), "no field.*is_crowd"),
    "crowd 7": (
        lambda fields: fields[f"{OBJECTS}/is_crowd"].int64_list.value.__setitem__(0, 7),
        "is_crowd is out of range",
    ),
    "negative area": (
        lambda fields: fields[f"{OBJECTS}/area"].int64_list.value.__setitem__(0, -5),
        "area is out of range",
    ),
    "an id more": (
        lambda fields: fields[f"{OBJECTS}/id"].int64_list.value.append(9),
        r"fields of panoptic_objects have \[",
    ),
    "unknown class": (
        lambda fields: fields[f"{OBJECTS}/label"].int64_list.value.__setitem__(0, 99),
        "class 99, but the dataset has 13 classes",
    ),
    "huge id": (
        lambda fields: fields[f"{OBJECTS}/id"].int64_list.value.__setitem__(0, 2**40),
        "is out of range",
    ),
    "name of bytes": (_replace("image/filename", bytes_list=[b"\xff\xfe"]), "can't decode"),
}


@pytest.mark.parametrize("case", BAD_RECORDS)
def test_a_record_of_another_form_is_a_record_error_that_names_it(folder, case):
    path = prepared_scenes.train_file(folder)
    change, message = BAD_RECORDS[case]
    _change(path, 2, change)
    source = sources.TfdsSource(folder, "train")
    for read in (source.__getitem__, source.compact):
        with pytest.raises(RecordError, match=message) as error:
            read(2)
        assert f"{path}, record 2" in str(error.value)
    assert source[3]["image_id"] == "train_000003"


def test_records_without_segments_are_read(folder):
    path = prepared_scenes.train_file(folder)
    black = cv2.imencode(".png", np.zeros((48, 48, 3), np.uint8))[1].tobytes()

    def change(fields):
        _replace("panoptic_image", bytes_list=[black])(fields)
        for key in ("id", "area", "label", "is_crowd"):
            fields[f"{OBJECTS}/{key}"].int64_list.ClearField("value")

    _change(path, 1, change)
    record = sources.TfdsSource(folder, "train")[1]
    assert record["segments"] == [] and not record["panoptic"].any()


def test_a_semantic_map_must_fit_the_image_and_the_classes(folder):
    source = sources.TfdsSource(folder, "train")
    record = source[0]
    fits = cv2.imencode(".png", np.full((48, 48), 13, np.uint8))[1].tobytes()
    assert (source._semantic_map(fits, record, "here") == 12).all()
    for wrong in (np.full((48, 48), 14), np.zeros((48, 47)), np.zeros((48, 48, 3))):
        data = cv2.imencode(".png", wrong.astype(np.uint8))[1].tobytes()
        with pytest.raises(RecordError, match=r"here: the semantic map.*does not fit"):
            source._semantic_map(data, record, "here")


# ------------------------------------------------------------------------------ broken ones in use

AUGMENT = transforms.AugmentConfig("none", crop_size=(64, 64))


@pytest.mark.parametrize("num_workers", [0, pytest.param(1, marks=pytest.mark.slow)])
def test_training_skips_and_counts_broken_records_only_if_it_may(folder, num_workers):
    path = prepared_scenes.train_file(folder)
    _flip(path, 4)
    source = sources.TfdsSource(folder, "train")
    config = loader.LoaderConfig(
        batch_size=2,
        num_slots=8,
        num_texts=9,
        augment=AUGMENT,
        num_workers=num_workers,
        num_threads=2,
        prefetch=2,
    )
    for skip in (False, True):
        changed = dataclasses.replace(config, skip_broken=skip)
        batches = loader.train_loader(source, changed, source.info)
        try:
            if skip:
                indices = np.concatenate([next(batches)["index"] for _ in range(6)])
                assert 4 not in indices and len(set(indices)) == COUNT - 1
                assert list(batches.broken) == [4] and f"{path}, record 4" in batches.broken[4]
            else:
                with pytest.raises(RecordError, match=r"record 4: damaged .*hash mismatch"):
                    [next(batches) for _ in range(6)]
        finally:
            batches.close()


def test_evaluation_skips_and_counts_broken_records_only_if_it_may(folder):
    _flip(prepared_scenes.train_file(folder), 4)
    source = sources.TfdsSource(folder, "train")
    config = eval_loader.EvalLoaderConfig(batch_size=2, short_edge=48, max_size=64)
    with pytest.raises(RecordError, match=r"record 4: damaged .*hash mismatch"):
        list(eval_loader.eval_loader(source, config))
    config = dataclasses.replace(config, skip_broken=True)
    batches = eval_loader.eval_loader(source, config)
    seen = np.concatenate([batch["index"] for batch in batches])
    assert sorted(seen[seen >= 0]) == [0, 1, 2, 3, 5] and list(batches.broken) == [4]


def test_no_flipped_bit_changes_a_record_unnoticed(folder):
    path = prepared_scenes.train_file(folder)
    data, expected = path.read_bytes(), prepared_scenes.read_records(path)
    rng = random.Random(1)
    used = len(data.rstrip(b"\0"))
    noticed = 0
    for _ in range(100):
        damaged = bytearray(data)
        damaged[rng.randrange(used)] ^= 1 << rng.randrange(8)
        path.write_bytes(damaged)
        files = RecordFiles([str(path)], [COUNT])
        for index, record in enumerate(expected):
            try:
                assert files[index] == record
            except RecordError:
                noticed += 1
    assert noticed > 20  # the others hit padding
