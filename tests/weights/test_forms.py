"""Honest files of every form that programs have written are read, with the numbers they hold."""

import argparse
import collections
import copyreg
import json
import pickle
import sys
import time
import types

import ml_collections
import numpy as np
import pytest
import safetensors.numpy

from oneformer_jax.weights import files, torch_pickle
from oneformer_jax.weights.files import FileError
from tests.weights import crafting as c

torch = pytest.importorskip(
    "torch", reason="PyTorch is missing: `make test-all` installs it (group parity)"
)


@pytest.mark.parametrize("protocol", range(2, 6))
@pytest.mark.parametrize("new", [True, False], ids=["zip", "stream"])
def test_a_training_state_of_pytorch(tmp_path, new, protocol):
    module = torch.nn.Sequential(torch.nn.Conv2d(3, 4, 3), torch.nn.BatchNorm2d(4))
    optimizer = torch.optim.AdamW(module.parameters(), lr=0.1)
    module(torch.ones(2, 3, 5, 5)).sum().backward()
    optimizer.step()
    base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
    state = module.state_dict()
    state |= {
        "parameter": torch.nn.Parameter(base * 2),
        "channels_last": torch.rand(2, 3, 4, 5).to(memory_format=torch.channels_last),
        "column": base[:, 2],
        "transposed": base.T,
        "one of many": base[3:, 5:].expand(1, 1),
        "half": base.half(),
        "brain": base.bfloat16(),
        "empty": torch.zeros(0, 3),
        "scalar": torch.tensor(7.5),
        "flags": base > 3,
        "bytes": base.byte(),
    }
    beside = {
        "optimizer": optimizer.state_dict(),
        "scheduler": {"milestones": collections.Counter([3, 4]), "last_lr": [np.float64(0.1)]},
        "args": argparse.Namespace(lr=0.1, layers=[module[0].weight], size=base.shape),
        "random": {"torch": torch.get_rng_state(), "numpy": np.random.get_state()},
        "device": torch.device("cuda:1"),
        "dtype": torch.bfloat16,
        "size": base.shape,
        "factory": collections.defaultdict(int, {1: 2}),
        "sets": ({1, "a"}, frozenset([2.5])),
        "binary": (b"", b"abc", bytearray(b"xyz"), b"n" * 5000),
        "numbers": (True, None, -1, 2**70, 1e300, 1 + 2j),
        "text": "Zürich\n",
    }
    path = tmp_path / "model.pth"
    torch.save(
        {"model": state, **beside},
        path,
        _use_new_zipfile_serialization=new,
        pickle_protocol=protocol,
    )
    found = files.open_tensors(path).tensors
    assert list(found) == list(state)
    for name, tensor in state.items():
        expected = tensor.detach()
        expected = (expected.float() if name == "brain" else expected).numpy()
        assert found[name].shape == expected.shape and found[name].dtype == expected.dtype
        np.testing.assert_array_equal(found[name].read(), expected, err_msg=name)
    loaded = torch_pickle.load(path)
    assert loaded["size"] == (4, 6) and loaded["device"] == "cuda:1"
    assert loaded["dtype"] == "bfloat16" and loaded["factory"] == {1: 2}
    assert loaded["sets"] == ({1, "a"}, {2.5}) and loaded["numbers"] == beside["numbers"]
    assert [bytes(x) for x in loaded["binary"]] == [bytes(x) for x in beside["binary"]]
    assert loaded["text"] == beside["text"] and loaded["args"] is None
    np.testing.assert_array_equal(loaded["random"]["numpy"][1].read(), beside["random"]["numpy"][1])


def test_a_storage_that_two_tensors_share_is_one_in_the_file(tmp_path):
    base = torch.rand(1000)
    torch.save({"whole": base, "tied": base, "half": base[500:]}, tmp_path / "a.pth")
    assert (tmp_path / "a.pth").stat().st_size < 8000
    found = files.open_tensors(tmp_path / "a.pth").tensors
    np.testing.assert_array_equal(found["half"].read(), found["tied"].read()[500:])


@pytest.mark.parametrize("new", [True, False], ids=["zip", "stream"])
def test_many_small_views_of_a_large_storage_are_read_in_no_time(tmp_path, new):
    base = torch.rand(8_000_000).bfloat16()
    state = {f"w{i}": base[i :: base.numel() // 2][:2] for i in range(2000)}
    torch.save(state, tmp_path / "a.pth", _use_new_zipfile_serialization=new)
    found = files.open_tensors(tmp_path / "a.pth").tensors
    begin = time.process_time()
    for name, tensor in state.items():
        np.testing.assert_array_equal(found[name].read(), tensor.float().numpy())
    assert time.process_time() - begin < 5  # the storage read for each of them takes minutes


ARRAYS = {
    "weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "by columns": np.asfortranarray(np.arange(12, dtype=np.float64).reshape(3, 4)),
    "other machines": np.arange(4, dtype=">f4"),
    "counts": np.int64([1, 2]),
    "empty": np.zeros((0, 5), np.float32),
    "scalar": np.array(7, np.float32),
    "flags": np.array([True, False]),
    "half": np.float16([0.5, -2]),
    "large": np.random.default_rng(0).normal(size=(40, 50)).astype(np.float32),
}


@pytest.mark.parametrize("core", [b"numpy.core", b"numpy._core"])
@pytest.mark.parametrize("protocol", range(6))
def test_numpy_arrays_of_every_protocol(tmp_path, protocol, core):
    content = {"model": ARRAYS, "lr": np.float32(0.5), "step": np.int64(3), "__author__": "a"}
    data = pickle.dumps(content, protocol=protocol)
    for name in (b"multiarray", b"numeric"):  # as NumPy 1 and 2 name their place
        if protocol < 4:  # later the names have their lengths before them
            data = data.replace(b"numpy._core." + name, core + b"." + name)
    path = tmp_path / "R-50.pkl"
    path.write_bytes(data)
    found = torch_pickle.load(path)
    assert (found["lr"], found["step"]) == (0.5, 3)
    for name, expected in ARRAYS.items():
        tensor = found["model"][name]
        assert tensor.shape == expected.shape and tensor.dtype == expected.dtype.newbyteorder("=")
        np.testing.assert_array_equal(tensor.read(), expected, err_msg=name)


def old_text(value: bytes) -> bytes:
    """A `str` of Python 2."""
    if len(value) < 256:
        return b"U" + bytes([len(value)]) + value
    return b"T" + len(value).to_bytes(4, "little") + value


@pytest.mark.parametrize("count", [3, 5000])
def test_a_pickle_of_python_2(tmp_path, count):
    # As Detectron's model zoo has them: text and bytes alike are `str`, arrays have five parts.
    values = np.linspace(-1, 1, count, dtype=np.float32)
    kind = c.call(c.name("numpy", "dtype"), old_text(b"f4"), b"K\x00", b"K\x01")
    kind += c.many(b"K\x03", old_text(b"<"), b"NNN", c.integer(-1), c.integer(-1), b"K\x00") + b"b"
    shell = c.call(
        c.name("numpy.core.multiarray", "_reconstruct"),
        c.name("numpy", "ndarray"),
        b"K\x00\x85" + old_text(b"b"),
    )
    array = shell + c.many(
        b"K\x01", c.numbers(count), kind, b"\x89", old_text(values.tobytes())
    ) + b"b"  # fmt: skip
    pairs = c.listed(c.listed(old_text(b"stem.conv1.weight"), array))
    body = b"}(" + old_text(b"model") + c.call(c.name("collections", "OrderedDict"), pairs) + b"u"
    path = tmp_path / "R-50.pkl"
    path.write_bytes(c.whole(body))
    (found,) = files.open_tensors(path).tensors.items()
    assert found[0] == "stem.conv1.weight"
    np.testing.assert_array_equal(found[1].read(), values)


def test_settings_of_other_programs_are_passed_over(tmp_path, monkeypatch):
    for name in ("yacs", "yacs.config"):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    node = type("CfgNode", (dict,), {"__module__": "yacs.config"})
    sys.modules["yacs.config"].CfgNode = node
    settings = node(MODEL=node(DEPTH=50, WEIGHTS=None))
    settings.__dict__["__immutable__"] = True
    for protocol in range(6):
        path = tmp_path / f"{protocol}.pkl"
        content = {"model": ARRAYS, "cfg": settings, "args": argparse.Namespace(a=[1])}
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        assert list(files.open_tensors(path).tensors) == list(ARRAYS)


def test_an_object_of_another_class_is_refused_under_every_protocol(tmp_path):
    for protocol in range(6):
        path = tmp_path / f"{protocol}.pkl"
        content = {"model": ARRAYS, "config": ml_collections.FrozenConfigDict({"a": 1})}
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        with pytest.raises(
            FileError, match=r"is not loaded: it (names ml_collections|makes an ob)"
        ):
            files.open_tensors(path)
    body = c.call(
        c.name("copy_reg", copyreg._reconstructor.__name__),
        c.name("collections", "Counter"),
        c.name("__builtin__", "object"),
        b"N",
    )
    (tmp_path / "a.pkl").write_bytes(c.model(body))
    with pytest.raises(FileError, match=r"makes an object of collections\.Counter"):
        files.open_tensors(tmp_path / "a.pkl")


def test_a_large_stride_of_a_single_row_has_no_meaning(tmp_path):
    body = c.tensor(c.storage(4), c.numbers(1, 4), c.numbers(1 << 62, 1))
    path = c.archive(tmp_path / "a.pth", c.model(body))
    assert files.open_tensors(path).tensors["w"].read().shape == (1, 4)


def test_an_archive_of_a_machine_with_the_other_byte_order(tmp_path):
    values = np.float32([1.5, -2, 3, 4])
    members = {"data/0": values.astype(">f4").tobytes(), "byteorder": b"big"}
    path = c.archive(tmp_path / "a.pth", c.model(c.vector(4)), members)
    np.testing.assert_array_equal(files.open_tensors(path).tensors["w"].read(), values)


def test_half_precision_of_safetensors(tmp_path):
    values = torch.linspace(-3, 3, 7)
    import safetensors.torch

    safetensors.torch.save_file(
        {"brain": values.bfloat16(), "half": values.half()}, tmp_path / "a.safetensors"
    )
    found = files.open_tensors(tmp_path / "a.safetensors").tensors
    np.testing.assert_array_equal(found["brain"].read(), values.bfloat16().float().numpy())
    np.testing.assert_array_equal(found["half"].read(), values.half().numpy())


def test_a_folder_of_the_hubs_cache_is_made_of_links(tmp_path):
    home = tmp_path / "models--owner--name"
    (home / "blobs").mkdir(parents=True)
    folder = home / "snapshots" / "0123abc"
    folder.mkdir(parents=True)
    safetensors.numpy.save_file(ARRAYS, home / "blobs" / "aa")
    (home / "blobs" / "bb").write_text(json.dumps({"model_type": "oneformer"}))
    (folder / "model.safetensors").symlink_to("../../blobs/aa")
    (folder / "config.json").symlink_to("../../blobs/bb")
    assert set(files.open_tensors(folder).tensors) == set(ARRAYS)
    (home / "blobs" / "aa").rename(tmp_path / "elsewhere")
    (folder / "model.safetensors").unlink()
    (folder / "model.safetensors").symlink_to(tmp_path / "elsewhere")
    with pytest.raises(FileError, match="is a link out of the folder"):
        files.open_tensors(folder)
