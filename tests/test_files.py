"""Bounded reading, JSON by a schema, atomic writing, and words for lists."""

import json
import os
import tracemalloc

import msgspec
import pytest

from oneformer_jax import files


class Layer(msgspec.Struct):
    width: int


class Model(msgspec.Struct):
    layers: list[Layer]


def test_a_pipe_a_device_and_a_folder_are_refused_at_once(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    opened = len(os.listdir("/proc/self/fd"))
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(files.FileError, match=f"^{path} is not a regular file"):
            files.read_bytes(path, limit=10)
    assert len(os.listdir("/proc/self/fd")) == opened


def test_a_regular_file_is_opened_and_nothing_else(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    with files.open_regular(tmp_path / "a") as file:
        assert file.read() == b"abc"
    os.mkfifo(tmp_path / "pipe")
    for path in (tmp_path / "pipe", "/dev/zero", tmp_path):
        with pytest.raises(KeyError, match="is not a regular file"):
            files.open_regular(path, error=KeyError)
    with pytest.raises(files.FileError, match="is missing"):
        files.open_regular(tmp_path / "b")
    with pytest.raises(files.FileError, match=r"'a\\x00b' is no name of a file"):
        files.open_regular("a\0b")


def test_a_link_to_a_device_is_refused(tmp_path):
    (tmp_path / "index.json").symlink_to("/dev/zero")
    with pytest.raises(files.FileError, match="not a regular file"):
        files.read_json(tmp_path / "index.json")


def test_a_small_file_takes_little_memory_whatever_the_limit(tmp_path):
    (tmp_path / "a").write_bytes(b"x" * 10)
    tracemalloc.start()
    try:
        assert files.read_bytes(tmp_path / "a", limit=1 << 28) == b"x" * 10
        assert tracemalloc.get_traced_memory()[1] < 1 << 20
    finally:
        tracemalloc.stop()


def test_a_file_that_does_not_tell_its_size_is_read_whole():
    assert len(files.read_bytes("/proc/self/status", limit=1 << 20)) > 100


def test_no_more_than_the_limit_is_read(tmp_path):
    path = tmp_path / "a"
    path.write_bytes(b"x" * 10)
    assert files.read_bytes(path, limit=10) == b"x" * 10
    with pytest.raises(files.FileError, match="has more than 9 bytes"):
        files.read_bytes(path, limit=9)


def test_a_missing_file_is_named(tmp_path):
    with pytest.raises(KeyError, match="is missing"):
        files.read_bytes(tmp_path / "a", limit=9, error=KeyError)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ('{"layers": [{"width": 1}, {"width": "2"}]}', r"layers\[1\]\.width"),
        ('{"layers": [{"width": 1.5}]}', r"layers\[0\]\.width"),
        ('{"layers": [{"width": true}]}', r"layers\[0\]\.width"),
        ('{"layers": [{"width": NaN}]}', "damaged"),
        ('{"layers": [{"width": 1e999}]}', "layers|range"),
        ('{"layers": [{"width": ' + "9" * 5000 + "}]}", "layers|range"),
        ("{}", "layers"),
        ("[]", "object"),
        ("null", "object"),
        ('{"layers": [', "damaged"),
        ('{"layers": [{"width": 1, "x": ' + "[" * 100_000 + "]" * 100_000 + "}]}", "too deeply"),
        ("", "damaged"),
    ],
)
def test_json_of_another_form_is_one_error_that_names_file_and_place(tmp_path, text, message):
    path = tmp_path / "model.json"
    path.write_text(text)
    with pytest.raises(files.FileError, match=message) as error:
        files.read_json(path, Model)
    assert str(error.value).startswith(str(path)) and "\n" not in str(error.value)


def test_json_that_is_not_text_is_damaged(tmp_path):
    path = tmp_path / "a.json"
    path.write_bytes(b'{"a": "\xff"}')
    with pytest.raises(files.FileError, match="damaged"):
        files.read_json(path)


def test_json_by_the_schema_is_read(tmp_path):
    path = tmp_path / "model.json"
    path.write_text(json.dumps({"layers": [{"width": 3, "note": "kept by others"}]}))
    assert files.read_json(path, Model) == Model([Layer(3)])
    assert files.read_json(path) == {"layers": [{"width": 3, "note": "kept by others"}]}


def test_what_fails_while_it_is_written_leaves_the_old_file_alone(tmp_path):
    path = tmp_path / "a"
    files.write_atomically(path, "old")
    with pytest.raises(RuntimeError), files.replacing(path) as temporary:
        temporary.write_text("half")
        raise RuntimeError
    assert path.read_text() == "old" and [f.name for f in tmp_path.iterdir()] == ["a"]
    files.write_atomically(path, b"new")
    assert path.read_bytes() == b"new" and [f.name for f in tmp_path.iterdir()] == ["a"]


def test_a_folder_is_written_whole(tmp_path):
    with files.replacing(tmp_path / "folder") as temporary:
        temporary.mkdir()
        (temporary / "a").write_text("1")
    assert (tmp_path / "folder" / "a").read_text() == "1"
    with pytest.raises(RuntimeError), files.replacing(tmp_path / "other") as temporary:
        temporary.mkdir()
        raise RuntimeError
    assert [f.name for f in tmp_path.iterdir()] == ["folder"]


def test_lists_are_cut_and_counted():
    assert files.first_few("abc") == "a, b, c"
    assert files.first_few(range(1005), 2) == "0, 1 and 1,003 more"
    assert files.first_few("abcd", 2, "; ") == "a; b; and 2 more"


def test_the_nearest_words_are_suggested():
    assert files.nearest("swin", ["resnet", "swim", "swin"], 2) == ["swin", "swim"]
    assert files.did_you_mean("swn", ["swin", "resnet"]) == " (did you mean 'swin'?)"
    assert files.did_you_mean("zzz", ["swin", "resnet"]) == ""
