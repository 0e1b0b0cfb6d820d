"""The description of a prepared dataset: what damaged and hostile ones lead to."""

import json
import os
import shutil
import subprocess
import sys

import pytest

from oneformer_jax.files import FileError
from oneformer_jax.input_pipeline import prepared, sources
from oneformer_jax.input_pipeline.builders import preparation
from tests.input_pipeline import prepared_scenes
from tests.input_pipeline.prepared_scenes import COUNT, OPTIONS

INFO, FEATURES, METADATA = "dataset_info.json", "features.json", "metadata.json"


@pytest.fixture(scope="module")
def original(tmp_path_factory):
    return prepared_scenes.make(tmp_path_factory.mktemp("data"))


@pytest.fixture
def folder(original, tmp_path):
    return prepared_scenes.copy(original, tmp_path)


def test_the_description_is_read(folder):
    found = prepared.read(folder)
    assert (found.name, found.version) == ("synthetic_panoptic", "1.0.0")
    assert not found.dense and not found.semantic and found.info.num_classes == 13
    assert set(found.splits) == {"train", "validation"}
    train = found.splits["train"]
    assert train.lengths == (COUNT,) and train.num_bytes > 1000 and not train.missing()
    assert train.paths == (str(prepared_scenes.train_file(folder)),)
    assert train.sizes.tolist() == [[48, 48]] * COUNT and len(train.has_things) == COUNT


@pytest.mark.parametrize("dense", [False, True])
@pytest.mark.parametrize("semantic", [False, True])
def test_the_form_of_the_records_is_told_by_the_features(folder, dense, semantic):
    from oneformer_jax.input_pipeline.builders import schema

    schema.features(dense=dense, semantic=semantic).save_config(folder)
    found = prepared.read(folder)
    assert (found.dense, found.semantic) == (dense, semantic)


def _split(content):
    return content["splits"][0]


def _objects(content):
    return content["featuresDict"]["features"]["panoptic_objects"]["sequence"]["feature"]


BAD = {
    # dataset_info.json
    "no name": (INFO, lambda c: c.pop("name"), "`name`"),
    "path as name": (INFO, lambda c: c.update(name="../../etc/x"), r"regex.*`\$\.name`"),
    "absolute name": (INFO, lambda c: c.update(name="/etc/passwd"), r"`\$\.name`"),
    "number as name": (INFO, lambda c: c.update(name=3), r"`\$\.name`"),
    "path as version": (INFO, lambda c: c.update(version="1/../../2"), r"`\$\.version`"),
    "other format": (INFO, lambda c: c.update(fileFormat="tfrecord"), "fileFormat"),
    "no format": (INFO, lambda c: c.pop("fileFormat"), "`fileFormat`"),
    "list of texts": (INFO, lambda c: c.update(splits=["train"]), r"`\$\.splits\[0\]`"),
    "path as split": (INFO, lambda c: _split(c).update(name="../train"), r"splits\[0\]\.name"),
    "template": (
        INFO,
        lambda c: _split(c).update(filepathTemplate="../{SPLIT}-{SHARD_X_OF_Y}"),
        "filepathTemplate",
    ),
    "negative length": (INFO, lambda c: _split(c).update(shardLengths=["-1"]), "shardLengths"),
    "huge length": (INFO, lambda c: _split(c).update(shardLengths=[10**12]), "shardLengths"),
    "absurd length": (
        INFO,
        lambda c: _split(c).update(shardLengths=["2000000000"]),
        r"2,000,000,000 records in dataset_info\.json",
    ),
    "other length": (INFO, lambda c: _split(c).update(shardLengths=["5"]), "6 heights.*5 records"),
    "fraction": (INFO, lambda c: _split(c).update(shardLengths=[5.5]), "shardLengths"),
    "twice": (INFO, lambda c: c["splits"].append(_split(c)), "lists the split 'train' twice"),
    # features.json
    "class of another program": (
        FEATURES,
        lambda c: (c.clear(), c.update(pythonClassName="trap.Trap", content={})),
        "does not describe the records of a builder",
    ),
    "other features": (
        FEATURES,
        lambda c: c["featuresDict"]["features"].pop("panoptic_image"),
        "it has image, image/filename",
    ),
    "other dtype": (
        FEATURES,
        lambda c: _objects(c)["featuresDict"]["features"]["id"]["tensor"].update(dtype="string"),
        "does not describe",
    ),
    "further feature": (
        FEATURES,
        lambda c: c["featuresDict"]["features"].update(x={"pythonClassName": "trap.Trap"}),
        "does not describe",
    ),
    # metadata.json
    "no classes": (METADATA, lambda c: c["info"].update(class_names=[]), "class table.*no classes"),
    "no table": (METADATA, lambda c: c.pop("info"), "`info`"),
    "flags as texts": (METADATA, lambda c: c["info"].update(is_thing=["no"] * 13), "is_thing"),
    "class twice": (
        METADATA,
        lambda c: c["info"]["class_names"].__setitem__(0, "sky"),
        "repeats class_names sky",
    ),
    "colour": (METADATA, lambda c: c["info"]["colors"][0].append(3), r"colors\[0\]"),
    "no facts": (METADATA, lambda c: c.pop("records"), "`records`"),
    "no facts of a split": (METADATA, lambda c: c["records"].pop("train"), 'no entry "records"'),
    "fewer facts": (
        METADATA,
        lambda c: c["records"]["train"]["width"].pop(),
        "6 heights, 5 widths and 6 has_things",
    ),
    "height 0": (
        METADATA,
        lambda c: c["records"]["train"]["height"].__setitem__(2, 0),
        r"height\[",
    ),
    "huge width": (
        METADATA,
        lambda c: c["records"]["train"]["width"].__setitem__(2, 10**9),
        r"width\[",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_a_wrong_value_is_one_error_that_names_the_file_and_the_way_out(folder, case):
    name, change, message = BAD[case]
    prepared_scenes.edit(folder, name, change)
    with pytest.raises(FileError, match=message) as error:
        sources.TfdsSource(folder, "train")
    text = str(error.value)
    # Where two files disagree, either may be the wrong one.
    assert str(folder / name) in text or (name in text and str(folder) in text)
    assert "prepare it" in text and "\n" not in text


def _deep(path):
    path.write_text('{"splits": ' + "[" * 100_000 + "]" * 100_000 + "}")


def _fifo(path):
    path.unlink()
    os.mkfifo(path)


def _large(path):
    path.write_bytes(b" " * (prepared._METADATA_LIMIT + 1))


def _folder(path):
    path.unlink()
    path.mkdir()


def _endless(path):
    path.unlink()
    path.symlink_to("/dev/zero")


DAMAGE = [
    lambda path: path.write_bytes(b""),
    lambda path: path.write_bytes(path.read_bytes()[:-20]),
    lambda path: path.write_bytes(path.read_bytes().replace(b":", b"\xff", 1)),
    lambda path: path.write_text("<html>404</html>"),
    lambda path: path.write_text('{"a": NaN}'),
    lambda path: path.write_text("null"),
    lambda path: path.write_text("[]"),
    _deep, _fifo, _large, _folder, _endless,
]  # fmt: skip


@pytest.mark.parametrize("name", [INFO, FEATURES, METADATA])
@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_file_is_one_error_that_names_it_and_the_way_out(folder, name, damage):
    damage(folder / name)
    for use in (prepared.read, sources.is_prepared):
        with pytest.raises(FileError, match="prepare it") as error:
            use(folder)
        assert str(folder / name) in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("name", [FEATURES, METADATA])
def test_a_missing_part_of_the_description_is_named(folder, name):
    (folder / name).unlink()
    with pytest.raises(FileError, match=f"{name} is missing"):
        prepared.read(folder)


def test_a_damaged_description_is_told_by_every_way_to_open_it(folder, tmp_path):
    (folder / INFO).write_text("{")
    with pytest.raises(FileError, match=r"dataset_info\.json is damaged"):
        sources.open_source("synthetic", data_dir=tmp_path, split="train", options=OPTIONS)


def test_preparing_anew_tells_of_a_damaged_description(folder, tmp_path):
    target = tmp_path / "coco_panoptic" / "1.0.0"
    folder.rename(target.parent.parent / "moved")
    target.parent.mkdir()
    (tmp_path / "moved").rename(target)
    (target / INFO).write_text('{"name": 3}')
    with pytest.raises(FileError, match=r"dataset_info\.json holds an unexpected value"):
        preparation.prepare("coco", tmp_path, tmp_path)


ATTACK = """
import sys
from oneformer_jax.input_pipeline import sources
for folder in sys.argv[1:]:
    try:
        sources.TfdsSource(folder, "train")
    except ValueError as error:
        print("refused", error)
loaded = {"tensorflow", "trap"} & set(sys.modules)
assert not loaded, loaded
"""


def test_no_class_that_features_json_names_is_imported(folder, tmp_path):
    (tmp_path / "trap.py").write_text("open(__file__ + '.sprung', 'w')\nclass Trap: pass")
    trap = {"pythonClassName": "trap.Trap", "content": {}, "type": "trap.Trap"}

    places = {
        "top": lambda content: content,
        "feature": lambda content: content["featuresDict"]["features"]["image"],
    }
    for where, part in places.items():
        shutil.copytree(folder, tmp_path / where)
        prepared_scenes.edit(tmp_path / where, FEATURES, lambda c, part=part: part(c).update(trap))
    traps = tmp_path / "tensorflow"
    traps.mkdir()
    (traps / "__init__.py").write_text("raise AssertionError('tensorflow was imported')")
    result = subprocess.run(
        [sys.executable, "-c", ATTACK, *(str(tmp_path / where) for where in places)],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.getcwd()}"},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0, result.stderr
    assert not (tmp_path / "trap.py.sprung").exists()


def test_the_files_are_as_tfds_writes_them(folder):
    # What `read` requires of the description is what TFDS puts there.
    content = json.loads((folder / INFO).read_text())
    assert (
        content["splits"][0]["filepathTemplate"] == "{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
    )
