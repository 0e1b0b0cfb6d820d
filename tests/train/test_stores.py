"""Array stores of strangers: nothing but arrays comes out, and no size is believed unseen."""

import json
import os
import pathlib
import shutil
import struct

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tensorstore as ts

from oneformer_jax.train import checkpoint, descriptions, seals, stores
from oneformer_jax.train.checkpoint import CheckpointError, Checkpoints
from tests import tiny

VALUES = {"w": np.arange(24, dtype=np.float32).reshape(4, 6), "b": np.ones(3, jnp.bfloat16)}


@pytest.fixture(scope="module")
def honest(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("honest")
    descriptions.claim_workdir(workdir, tiny.model_config().to_dict(), "{}", tiny.metadata())
    with Checkpoints(workdir) as checkpoints:
        checkpoints.save(1, {"params": VALUES, "stats": {"empty": {}}}, {"step": 1})
    return workdir


@pytest.fixture
def workdir(honest, tmp_path):
    """A copy without digests, which a stranger could make anew."""
    shutil.copytree(honest, tmp_path / "run")
    (tmp_path / "run" / "checkpoints" / "1" / seals.SEAL_FILE).unlink()
    return tmp_path / "run"


def store_of(workdir) -> pathlib.Path:
    return workdir / "checkpoints" / "1" / "state"


def put(workdir, key: str, value: bytes | None) -> None:
    """Writes or deletes a key of the store."""
    spec = {"driver": "ocdbt", "base": {"driver": "file", "path": f"{store_of(workdir)}/"}}
    ts.KvStore.open(spec).result().write(key, value).result()


def zarray(**changes) -> bytes:
    fields = {
        "zarr_format": 2,
        "shape": [4, 6],
        "chunks": [4, 6],
        "dtype": "<f4",
        "compressor": {"id": "zstd", "level": 1},
        "fill_value": None,
        "filters": None,
        "order": "C",
        "dimension_separator": ".",
    }
    return json.dumps(fields | changes).encode()


def assert_refused(workdir, reason: str) -> None:
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_for_inference(workdir)
    first, *rest = str(error.value).splitlines()
    assert str(workdir) in first
    assert reason in first
    assert len(rest) <= 1  # the way out


def test_what_was_written_is_read(honest, workdir):
    for place in (honest, workdir):
        found = checkpoint.load_for_inference(place)
        assert found.params.keys() == VALUES.keys()
        for name, value in VALUES.items():
            assert found.params[name].dtype == value.dtype
            np.testing.assert_array_equal(found.params[name], value)
        assert found.stats == {"empty": {}}
    put(workdir, "params.w/.zarray", zarray())  # the texts below differ from this one
    checkpoint.load_for_inference(workdir)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        (zarray(shape=[10**12, 6]), "more than 1,048,576 chunks"),
        (zarray(shape=[10**12, 6], chunks=[10**12, 6]), "says arrays of 24,000,000,000"),
        (zarray(shape=[10**9, 1], chunks=[1, 1]), "more than 1,048,576 chunks"),
        (zarray(shape=[2**40, 6], chunks=[2**40, 6]), "says arrays of"),
        (zarray(shape=[2**60, 6]), "$.shape[0]"),
        (zarray(shape=[-1, 6]), "$.shape[0]"),
        (zarray(shape=[4.5, 6]), "$.shape[0]"),
        (zarray(shape=["4", 6]), "$.shape[0]"),
        (zarray(shape=[1] * 17, chunks=[1] * 17), "$.shape"),
        (zarray(shape=[4]), "says shape [4] in chunks of [4, 6]"),
        (zarray(chunks=[0, 6]), "in chunks of [0, 6]"),
        (zarray(chunks=[5, 6]), "in chunks of [5, 6]"),
        (zarray(chunks=[10**9, 6]), "in chunks of"),
        (zarray(chunks=[2, 6]), "chunk 0.0, is no single zstandard frame of 48 bytes"),
        (zarray(dtype="|O"), "$.dtype"),
        (zarray(dtype="|S1000000000"), "$.dtype"),
        (zarray(dtype="<f8"), "chunk 0.0, is no single zstandard frame of 192 bytes"),
        (zarray(dtype=[["a", "<f4"]]), "$.dtype"),
        (zarray(compressor={"id": "blosc"}), "$.compressor"),
        (zarray(compressor={"id": "zstd", "level": 1, "x": 1}), "$.compressor"),
        (zarray(compressor=None), "chunk 0.0, has"),
        (zarray(filters=[{"id": "pickle"}]), "$.filters"),
        (zarray(order="F"), "$.order"),
        (zarray(fill_value=0), "$.fill_value"),
        (zarray(dimension_separator="/"), "$.dimension_separator"),
        (zarray(zarr_format=3), "$.zarr_format"),
        (zarray(kvstore="file:///etc/"), "kvstore"),
        (zarray(driver="http"), "driver"),
        (b'{"shape":' + b"[" * 50_000, "$.shape[0]"),
        (b'{"x":' * 10_000, "unknown field"),
        (b" " * 70_000, "it may have 65,536"),
        (b"\xff\xfe", "is damaged"),
        (b"", "is damaged"),
        (None, "params.w/.zarray is missing"),
    ],
)
def test_an_array_of_this_description_is_refused(workdir, text, reason):
    put(workdir, "params.w/.zarray", text)
    assert_refused(workdir, reason)


def frame(content: list[bytes], stated: int, checksum: bool = False) -> bytes:
    """A zstandard frame (RFC 8878) of these blocks that says `stated` bytes."""
    head = b"\x28\xb5\x2f\xfd" + bytes([0xA0 | 4 * checksum]) + struct.pack("<I", stated)
    return head + b"".join(content) + b"\0\0\0\0" * checksum


def block(kind: int, size: int, data: bytes, last: bool = False) -> bytes:
    return (size << 3 | kind << 1 | last).to_bytes(3, "little") + data


BOMB = frame([block(1, 131072, b"\0")] * 200_000 + [block(1, 1, b"\0", True)], 96)  # 24 GiB


@pytest.mark.parametrize(
    ("chunk", "reason"),
    [
        (BOMB, "unpacks to up to 26,214,400,001 bytes instead of 96"),
        (frame([block(1, 96, b"\0", True)], 2**31), "is no single zstandard frame of 96 bytes"),
        (frame([block(1, 96, b"\0", True)], 96)[:-2], "is cut short"),
        (frame([block(1, 96, b"\0", True)], 96) * 2, "is no single zstandard frame"),
        (frame([block(3, 96, b"\0" * 96, True)], 96) + b"x", "is no single zstandard frame"),
        (frame([block(2, 96, b"\xff" * 96, True)], 96), "is damaged"),
        (b"\x50\x2a\x4d\x18" + struct.pack("<I", 2**31), "is no single zstandard frame"),
        (b"\x28\xb5\x2f\xfd", "is cut short"),
        (b"", "is no single zstandard frame"),
        (None, "lacks its chunk 0.0"),
    ],
    ids=range(10),
)
def test_a_chunk_of_this_kind_is_refused(workdir, chunk, reason):
    put(workdir, "params.w/0.0", chunk)
    assert_refused(workdir, reason)


def test_an_honest_frame_in_every_form_is_read(workdir):
    for chunk in (
        frame([block(1, 96, b"\0", True)], 96),
        frame([block(0, 96, b"\0" * 96, True)], 96),
        frame([block(0, 40, b"\0" * 40), block(1, 56, b"\0", True)], 96),
    ):
        put(workdir, "params.w/0.0", chunk)
        assert not checkpoint.load_for_inference(workdir).params["w"].any()


# ------------------------------------------------------------------ names


def change_tree(workdir, change) -> None:
    path = store_of(workdir) / stores.TREE_FILE
    tree = json.loads(path.read_text())
    change(tree, next(e for name, e in tree["tree_metadata"].items() if "'w'" in name))
    path.write_text(json.dumps(tree))


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda tree, w: tree.update(use_zarr3=True), "$.use_zarr3"),
        (lambda tree, w: tree.update(use_ocdbt=False), "$.use_ocdbt"),
        (lambda tree, w: tree.pop("use_ocdbt"), "`use_ocdbt`"),
        (lambda tree, w: tree.pop("tree_metadata"), "`tree_metadata`"),
        (lambda tree, w: tree.update(tree_metadata=[]), "$.tree_metadata"),
        (lambda tree, w: w["value_metadata"].update(value_type="os.system"), "value_type"),
        (lambda tree, w: w["value_metadata"].update(skip_deserialize=0), "skip_deserialize"),
        (lambda tree, w: w.update(key_metadata=[]), "key_metadata"),
        (lambda tree, w: w.update(key_metadata=w["key_metadata"] * 40), "key_metadata"),
        (lambda tree, w: w["key_metadata"][1].update(key="x" * 300), "key"),
        (lambda tree, w: w["key_metadata"][1].update(key="../../../etc/passwd"), "is missing"),
        (lambda tree, w: w["key_metadata"][1].update(key="b"), "names params.b twice"),
        (lambda tree, w: w["key_metadata"][1].update(key_type=3), "key_type"),
        (lambda tree, w: w["key_metadata"].append({"key": "x", "key_type": 2}), "is missing"),
    ],
)
def test_a_tree_of_this_kind_is_refused(workdir, change, reason):
    change_tree(workdir, change)
    assert_refused(workdir, reason)


def test_an_array_that_holds_arrays_is_refused(workdir):
    put(workdir, "params.w.x/.zarray", zarray())
    put(workdir, "params.x/.zarray", zarray())
    change_tree(
        workdir,
        lambda tree, w: tree["tree_metadata"].update(
            x={**w, "key_metadata": [*w["key_metadata"], {"key": "x", "key_type": 2}]}
        ),
    )
    assert_refused(workdir, "array")


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt", "d"])
@pytest.mark.parametrize("kind", ["pipe", "link to zeros", "gone"])
def test_what_is_no_file_is_refused_and_not_waited_for(workdir, name, kind):
    path = store_of(workdir) / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link to zeros":
        path.symlink_to("/dev/zero")
    assert_refused(workdir, "is damaged" if kind == "gone" else f"{name} is not a regular file")


def test_a_tree_of_any_length_is_refused(workdir):
    with open(store_of(workdir) / stores.TREE_FILE, "wb") as file:
        file.truncate(1 << 40)
    assert_refused(workdir, "has more than 16,777,216 bytes")


@pytest.mark.parametrize(
    "place", ["../secret", "d/../../secret", "/../secret", "%2e%2e/secret", "./../secret"]
)
def test_an_index_that_points_out_of_the_folder_is_not_followed(workdir, place):
    store = store_of(workdir)
    base = ts.KvStore.open({"driver": "file", "path": f"{store}/"}).result()
    manifest = ts.ocdbt.dump(base).result()
    root = manifest["versions"][-1]["root"]
    _, _, name, start, length = root["location"].split(":")
    shutil.copy(store / name, store.parent / "secret")
    shutil.copy(store / name, store / "inside")
    for target in ("inside", place):
        root["location"] = f"btreenode::{target}:{start}:{length}"
        (store / "manifest.ocdbt").write_bytes(ts.ocdbt.undump_manifest(manifest))
        if target == "inside":  # the forged index is one that is read
            assert stores.describe(store)["params"].keys() == VALUES.keys()
    assert_refused(workdir, "Invalid key")


# ------------------------------------------------------------------ what describes the run


@pytest.mark.parametrize(
    ("name", "text", "reason"),
    [
        ("model.json", '{"num_classes": 5}', "describes no model"),
        ("model.json", '{"num_classes": 5, "backbone": {"kind": "os"}}', "describes no model"),
        ("model.json", "[]", "Expected `object`"),
        ("model.json", '{"a":' * 100_000, "nested too deeply"),
        ("model.json", '{"a":' * 300 + "1" + "}" * 300, "describes no model"),
        ("model.json", '{"num_classes": NaN}', "is damaged"),
        ("config.json", '{"eval": 3}', "eval is 3"),
        ("config.json", "{", "is damaged"),
        ("metadata.json", '{"dataset": 1}', "$.dataset"),
        ("metadata.json", "null", "Expected `object`"),
    ],
)
def test_a_description_of_this_kind_is_refused(workdir, name, text, reason):
    (workdir / name).write_text(text)
    with pytest.raises(CheckpointError) as error:
        checkpoint.load_for_inference(workdir)
    assert str(workdir / name) in str(error.value)
    assert reason in str(error.value)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("encoder_layers", 10**9),
        ("decoder_layers", 5000),
        ("num_queries", 10**12),
        ("hidden_dim", -32),
        ("hidden_dim", "32"),
        ("num_heads", 0),
        ("num_heads", 4.0),
        ("text_width", None),
        ("queries", "mine"),
        ("backbone", []),
        ("backbone", {"kind": "resnet", "depths": [1, 1, 1, 10**9]}),
        ("backbone", {"kind": "resnet", "depths": [1] * 5000}),
        ("backbone", {"kind": "resnet", "depths": [1, 1, 1, "x"]}),
        ("surprise", 1),
    ],
)
def test_a_model_without_sense_is_refused(workdir, key, value):
    model = tiny.model_config().to_dict() | {key: value}
    (workdir / "model.json").write_text(json.dumps(model))
    with pytest.raises(CheckpointError, match=r"model\.json") as error:
        checkpoint.load_for_inference(workdir)
    assert "\n" not in str(error.value)


def test_metadata_whose_lengths_differ_are_refused(workdir):
    fields = json.loads((workdir / "metadata.json").read_text())
    fields["is_thing"].append(True)
    (workdir / "metadata.json").write_text(json.dumps(fields))
    with pytest.raises(CheckpointError, match=r"metadata\.json .*class names, 6 is_thing"):
        checkpoint.load_for_inference(workdir)


def test_sizes_are_compared_with_the_disk(workdir):
    tree = {"w": jax.ShapeDtypeStruct((1 << 28,), jnp.float32)}
    stores.check_sizes(store_of(workdir), tree)  # a GiB is never too much
    tree["v"] = jax.ShapeDtypeStruct((1,), jnp.float32)
    with pytest.raises(stores.StoreError, match=r"says arrays of 1,073,741,828 bytes"):
        stores.check_sizes(store_of(workdir), tree)
