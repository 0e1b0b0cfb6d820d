"""Files of tensors: what is read, what is refused, and that nothing in a file is run."""

import collections
import json
import os
import pickle
import subprocess
import sys
import zipfile

import numpy as np
import pytest
import safetensors.numpy

from oneformer_jax.weights import files
from oneformer_jax.weights.files import FileError

TENSORS = {
    "a.weight": np.arange(12, dtype=np.float32).reshape(3, 4),
    "a.bias": np.float32([1.5, -2.0, 0.25]),
    "scalar": np.array(7, np.float32),
    "count": np.int64([3, 4]),
    "empty": np.zeros((0, 5), np.float32),
}


def values(file: files.TensorFile) -> dict[str, np.ndarray]:
    return {name: tensor.read() for name, tensor in file.tensors.items()}


def assert_same(found, expected=TENSORS):
    assert list(found) == list(expected)
    for name, value in expected.items():
        assert found[name].dtype == value.dtype, name
        np.testing.assert_array_equal(found[name], value, err_msg=name)


@pytest.fixture
def official(tmp_path):
    path = tmp_path / "model.pth"
    files.save_official(path, TENSORS, {"note": [1, "two"]})
    return path


# ------------------------------------------------------------------ PyTorch's formats


def test_what_is_written_is_read_again(official):
    file = files.open_tensors(official)
    assert_same(values(file))
    assert file.own == {"note": [1, "two"]}
    assert file.tensors["a.weight"].shape == (3, 4)


def test_a_pickle_of_numpy_arrays(tmp_path):
    path = tmp_path / "R-50.pkl"
    for protocol in (2, 5):
        content = {"model": TENSORS, "__author__": "torchvision", "matching_heuristics": True}
        path.write_bytes(pickle.dumps(content, protocol=protocol))
        assert_same(values(files.open_tensors(path)))


def test_reading_needs_no_pytorch(official):
    code = (
        "import sys; sys.modules['torch'] = None\n"
        "from oneformer_jax.weights import files\n"
        f"print(files.open_tensors({str(official)!r}).tensors['a.bias'].read().tolist())"
    )
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert run.stdout.strip() == "[1.5, -2.0, 0.25]"


class TestAgainstPyTorch:
    @pytest.fixture
    def torch(self):
        return pytest.importorskip(
            "torch", reason="PyTorch is missing: `make test-all` installs it (group parity)"
        )

    @pytest.mark.parametrize("new", [True, False], ids=["zip", "stream"])
    def test_reading(self, torch, tmp_path, new):
        base = torch.arange(24, dtype=torch.float32).reshape(4, 6)
        state = collections.OrderedDict(
            whole=base,
            column=base[:, 2],  # views of one storage
            transposed=base.T,
            late=base[2:, 1:4],
            half=base.half(),
            brain=base.bfloat16(),
            double=base.double(),
            long=torch.tensor(5),
            flags=base > 3,
            parameter=torch.nn.Parameter(base * 2),
        )
        state._metadata = collections.OrderedDict({"": {"version": 1}})
        optimizer = torch.optim.AdamW([state["parameter"]], lr=0.1)
        content = {
            "model": state,
            "optimizer": optimizer.state_dict(),
            "scheduler": {"milestones": collections.Counter([3, 4])},
            "iteration": 9,
            "author": "somebody",
        }
        path = tmp_path / "model.pth"
        torch.save(content, path, _use_new_zipfile_serialization=new)
        found = values(files.open_tensors(path))
        assert list(found) == list(state)
        for name, tensor in state.items():
            expected = tensor.detach()
            if name == "brain":  # NumPy has no bfloat16; float32 holds its values exactly
                expected = expected.float()
            np.testing.assert_array_equal(found[name], expected.numpy(), err_msg=name)

    def test_a_flat_state_dict_of_a_wrapped_module(self, torch, tmp_path):
        module = torch.nn.Linear(2, 3)
        path = tmp_path / "flat.pth"
        torch.save(module.state_dict(), path)
        found = values(files.open_tensors(path))
        np.testing.assert_array_equal(found["weight"], module.weight.detach().numpy())

    def test_writing(self, torch, official):
        found = torch.load(official, weights_only=True)
        assert json.loads(found["oneformer_jax"]) == {"note": [1, "two"]}
        assert found["model"]._metadata["sem_seg_head"] == {"version": 2}
        assert_same({name: tensor.numpy() for name, tensor in found["model"].items()})


# ------------------------------------------------------------------ nothing is run


class Evil:
    """Runs a command when an ordinary unpickler loads it."""

    def __init__(self, function, *args):
        self.call = (function, args)

    def __reduce__(self):
        return self.call


@pytest.mark.parametrize(
    ("function", "args", "name"),
    [
        (os.system, ("touch {}",), "posix.system|nt.system"),
        (eval, ("open('{}', 'w')",), "builtins.eval"),
        (getattr, ("", "format"), "builtins.getattr"),
        (np.load, ("{}",), "numpy.load"),
    ],
)
@pytest.mark.parametrize("place", ["model", "beside"])
def test_a_forbidden_global_is_named_and_not_called(tmp_path, function, args, name, place):
    victim = tmp_path / "victim"
    bad = Evil(function, *(a.format(victim) if isinstance(a, str) else a for a in args))
    content = {"model": dict(TENSORS), "other": 1}
    content["model" if place == "model" else "other"] = {"x": bad}
    data = pickle.dumps(content, protocol=2)
    plain = tmp_path / "model.pkl"
    plain.write_bytes(data)
    zipped = tmp_path / "model.pth"
    with zipfile.ZipFile(zipped, "w") as archive:
        archive.writestr("archive/data.pkl", data)
    for path in (plain, zipped):
        with pytest.raises(FileError, match=f"{path.name} is not loaded: it names ({name})"):
            files.open_tensors(path)
    assert not victim.exists()


def test_arrays_of_objects_are_refused(tmp_path):
    path = tmp_path / "objects.pkl"
    path.write_bytes(pickle.dumps({"x": np.array([{"a": 1}, None], object)}))
    with pytest.raises(FileError, match="a NumPy array of the type O8, which is none of numbers"):
        files.open_tensors(path)


# ------------------------------------------------------------------ damage


@pytest.mark.parametrize("share", [0.0, 0.02, 0.3, 0.7, 0.98])
def test_a_truncated_checkpoint(official, share):
    data = official.read_bytes()
    official.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(FileError, match=r"model\.pth"):
        values(files.open_tensors(official))


@pytest.mark.parametrize("share", [0.1, 0.5, 0.95])
def test_a_truncated_pickle(tmp_path, share):
    path = tmp_path / "model.pkl"
    data = pickle.dumps({"model": TENSORS})
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(FileError, match=r"model\.pkl is truncated or damaged"):
        files.open_tensors(path)


def test_a_flipped_byte_is_noticed(official):
    data = bytearray(official.read_bytes())
    data[data.index(TENSORS["a.weight"].tobytes()) + 5] ^= 1
    official.write_bytes(data)
    file = files.open_tensors(official)
    file.tensors["a.bias"].read()
    with pytest.raises(FileError, match="is damaged: archive/data/0"):
        file.tensors["a.weight"].read()


@pytest.mark.parametrize("share", [0.0, 0.3, 0.9])
def test_half_a_safetensors_file(tmp_path, share):
    path = tmp_path / "model.safetensors"
    safetensors.numpy.save_file(TENSORS, path)
    data = path.read_bytes()
    path.write_bytes(data[: int(len(data) * share)])
    with pytest.raises(FileError, match=r"model\.safetensors is truncated or damaged"):
        files.open_tensors(path)


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("text.pth", b"hello", "neither a PyTorch file nor a pickle"),
        ("list.pkl", pickle.dumps([1, 2]), "holds a list, not a dict of tensors"),
        ("none.pkl", pickle.dumps({"lr": 1}), r"holds no tensors \(its keys are lr\)"),
    ],
)
def test_files_of_something_else(tmp_path, name, data, message):
    path = tmp_path / name
    path.write_bytes(data)
    with pytest.raises(FileError, match=message):
        files.open_tensors(path)


def test_an_archive_of_something_else(tmp_path):
    path = tmp_path / "photos.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("a.txt", "hello")
    with pytest.raises(FileError, match="not one of PyTorch"):
        files.open_tensors(path)


# ------------------------------------------------------------------ folders


def test_a_folder_is_written_and_read(tmp_path):
    folder = tmp_path / "hf"
    files.save_hugging_face(folder, TENSORS, {"model_type": "oneformer"}, {"note": 1})
    file = files.open_tensors(folder)
    assert_same(dict(sorted(values(file).items())), dict(sorted(TENSORS.items())))
    assert file.config == {"model_type": "oneformer"}
    assert file.own == {"note": 1}
    with pytest.raises(FileError, match="not an empty folder"):
        files.save_hugging_face(folder, TENSORS, {}, {})


def test_shards_and_their_index(tmp_path):
    names = ["a.weight", "a.bias"]
    for i, name in enumerate(names):
        safetensors.numpy.save_file({name: TENSORS[name]}, tmp_path / f"part{i}.safetensors")
    index = {"weight_map": {name: f"part{i}.safetensors" for i, name in enumerate(names)}}
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps(index))
    (tmp_path / "config.json").write_text("{}")
    assert_same(values(files.open_tensors(tmp_path)), {name: TENSORS[name] for name in names})
    (tmp_path / "part1.safetensors").unlink()
    with pytest.raises(FileError, match=r"lacks part1\.safetensors"):
        files.open_tensors(tmp_path)


def test_a_folder_of_something_else(tmp_path):
    with pytest.raises(FileError, match="expected a Hugging Face folder, or a workdir"):
        files.open_tensors(tmp_path)
    safetensors.numpy.save_file(TENSORS, tmp_path / "model.safetensors")
    with pytest.raises(FileError, match=r"config\.json is missing"):
        files.open_tensors(tmp_path)
    (tmp_path / "config.json").write_text('{"a": ')
    with pytest.raises(FileError, match=r"config\.json is damaged"):
        files.open_tensors(tmp_path)
    with pytest.raises(FileError, match="does not exist"):
        files.open_tensors(tmp_path / "nowhere")


def test_a_failed_write_leaves_nothing(tmp_path):
    path = tmp_path / "model.pth"
    path.write_bytes(b"before")
    with pytest.raises(KeyError):
        files.save_official(path, {"x": np.zeros(2, np.complex64)}, {})
    assert path.read_bytes() == b"before"
    assert [p.name for p in tmp_path.iterdir()] == ["model.pth"]
