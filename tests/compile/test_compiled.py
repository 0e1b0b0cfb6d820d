"""Training steps in files: the same bits as those compiled here, and what is refused."""

import contextlib
import dataclasses
import hashlib
import pickle
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.compilation_cache import compilation_cache
from ml_collections import ConfigDict

from oneformer_jax import compilation
from oneformer_jax.compile import compile, topologies
from oneformer_jax.models.execution import Execution
from oneformer_jax.train import compiled, settings, sharding
from oneformer_jax.train import state as states
from oneformer_jax.train.compiled import CompiledError
from tests import tiny
from tests.compile.test_compile import needs_libtpu
from tests.train.runs import BATCH, make_config
from tests.train.runtime import test_distributed as jobs

CLASSES = dict(num_classes=tiny.CLASSES, text_table=tiny.text_table())


@dataclasses.dataclass
class Saved:
    """A step in a file, and what it was compiled for."""

    name: str  # FILE@SHA256
    path: str
    config: ConfigDict
    mesh: jax.sharding.Mesh
    training: states.Training
    program: jax.stages.Compiled

    def take(self, name=None, **others):
        given = {name: getattr(self, name) for name in ("training", "config", "mesh")}
        given["text_table"] = tiny.text_table()
        return compiled.take(name or self.name, **(given | others))


@contextlib.contextmanager
def without_cache():
    """A program that JAX read from its cache cannot be saved again, so compile mode has none."""
    for enabled in (False, True):
        jax.config.update("jax_enable_compilation_cache", enabled)
        compilation_cache.reset_cache()
        if not enabled:
            yield


def toy_training(mesh):
    """A step that compiles in no time: it splits and sums its weights, and donates the state."""

    def step(state, batch, key):
        images = batch["image"].astype(jnp.float32).mean((1, 2))
        noise = jax.random.normal(jax.random.fold_in(key, state["step"]), (3, 64))
        out = jnp.sin(images @ (state["params"]["w"] + noise))
        new = {"step": state["step"] + 1, "params": {"w": state["params"]["w"] + out.mean(0)}}
        return new, {"loss": out.sum(), "norm": jnp.linalg.norm(new["params"]["w"])}

    arrays = {
        "step": jax.ShapeDtypeStruct((), jnp.int32),
        "params": {"w": jax.ShapeDtypeStruct((3, 64), jnp.float32)},
    }
    split = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(None, "fsdp"))
    shardings = {"step": sharding.replicated(mesh), "params": {"w": split}}
    jitted = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    state = sharding.with_shardings(arrays, shardings)
    return states.Training(tiny.model_config(), Execution(), None, state, jitted)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A toy step on 4 x 2 devices in another order than theirs, as slices have it."""
    config = make_config(mesh__fsdp=2, data__crop_size=(64, 64), data__num_slots=6)
    config, path = settings.checked(config), str(tmp_path_factory.mktemp("saved") / "step")
    mesh = sharding.make_mesh(-1, 2, [jax.devices()[i] for i in (0, 1, 3, 2, 6, 7, 5, 4)])
    training = toy_training(mesh)
    arguments = (training.state, states.abstract_batch(config, mesh), states.abstract_key(mesh))
    with without_cache():
        program = training.step.lower(*arguments).compile()
    compiled.check_target(path, config)
    made = (training, config, mesh, tiny.text_table())
    digest = compiled.save(path, program, *made, flops=7e6, seconds=3.0)
    return Saved(f"{path}@{digest}", path, config, mesh, training, program)


def run(step, saved):
    """The results of three steps and the state after them, as bytes."""
    zeros = jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), saved.training.state)
    state = sharding.put_state(zeros, saved.training.shardings)
    key = sharding.put_key(jax.random.key(1), saved.mesh)
    found = []
    for number in range(3):
        batch = sharding.put_batch(tiny.batch(seed=number, size=BATCH), saved.mesh)
        before, (state, metrics) = state, step(state, batch, key)
        assert before["params"]["w"].is_deleted(), "the state was not donated"
        found.append({name: np.asarray(value).tobytes() for name, value in metrics.items()})
    return found, {name: np.asarray(x).tobytes() for name, x in tiny.leaves(state).items()}


def test_the_step_of_the_file_computes_the_same_bits(saved, caplog):
    caplog.set_level("INFO")
    taken = saved.take()
    assert taken.flops == 7e6
    assert "compiling it took 3 s" in caplog.text
    assert run(taken.step, saved) == run(saved.program, saved) == run(saved.training.step, saved)


def test_a_step_is_not_saved_for_a_number_of_epochs(saved):
    """Their number of steps, and so the schedule, follows from the images."""
    config = saved.config.copy_and_resolve_references()
    config.train.epochs = 2.0
    with pytest.raises(compiled.CompiledError, match=r"train\.epochs counts images.*train\.steps"):
        compiled.check_target(saved.path, config)


def test_the_digest_is_that_of_sha256sum(saved):
    with open(saved.path, "rb") as file:
        assert saved.name == f"{saved.path}@{hashlib.sha256(file.read()).hexdigest()}"


# ------------------------------------------------------------------ other programs


@pytest.mark.parametrize(
    ("key", "value", "named"),
    [
        ("optim.lr", 0.5, r"config\.optim\.lr \(there 0\.001, here 0\.5\)"),
        ("train.steps", 99, r"config\.train\.steps \(there 6, here 99\)"),
        ("train.on_nonfinite", "skip", r"config\.train\.on_nonfinite "),
        ("data.crop_size", (64, 96), r"config\.data\.crop_size .*arguments\.batch\.image "),
        ("model.dtype", "bfloat16", r"config\.model\.dtype "),
        ("loss.mask_weight", 1.0, r"config\.loss\.mask_weight "),
        ("matcher.dice_cost", 1.0, r"config\.matcher\.dice_cost "),
        ("kernels.assignment", "scipy", r"config\.kernels\.assignment \(there \"xla\", here \"sc"),
    ],
)
def test_a_step_for_another_config_is_refused(saved, key, value, named):
    config = saved.config.copy_and_resolve_references()
    config.update_from_flattened_dict({key: value})
    with pytest.raises(CompiledError, match=rf"which differs in {named}"):
        saved.take(config=config)


@pytest.mark.parametrize(
    "changes",
    [
        {"eval.short_edge": 96, "eval.batch_size": 4, "train.log_every": 5, "seed": 3},
        {"dataset.data_dir": "elsewhere", "data.workers": 1, "compilation_cache": "elsewhere"},
    ],
)
def test_what_does_not_enter_the_step_may_differ(saved, changes):
    config = saved.config.copy_and_resolve_references()
    config.update_from_flattened_dict(changes)
    saved.take(config=config)
    for read in (settings.execution, settings.optim_config, settings.loss_config):
        assert read(config) == read(saved.config)
    assert settings.model_config(config, 5) == settings.model_config(saved.config, 5)


def test_a_step_for_other_devices_classes_or_arrays_is_refused(saved, monkeypatch):
    other = tiny.text_table()
    other[0, 1] += 1
    with pytest.raises(CompiledError, match=r"differs in texts \(there"):
        saved.take(text_table=other)
    for mesh, named in (
        (sharding.make_mesh(-1, 2, jax.devices()[:4]), r"devices\.count \(there 8, here 4\)"),
        (sharding.make_mesh(-1, 4, saved.mesh.devices.flat), r"devices\.mesh\.data"),
        (sharding.make_mesh(-1, 2), r"devices\.order \(there \[\[0\], \[1\], \[3\]"),
    ):
        with pytest.raises(CompiledError, match=f"differs in {named}"):
            saved.take(mesh=mesh)
    state = saved.training.state
    for key, value, text in (
        ("ema", state["params"], r"arguments\.state\.ema\.w \(there null, here \"float32\[3, 64\]"),
        ("step", state["params"]["w"], r"arguments\.state\.step \(there \"int32\[\] "),
    ):
        training = dataclasses.replace(saved.training, state=state | {key: value})
        with pytest.raises(CompiledError, match=f"differs in {text}"):
            saved.take(training=training)
    training = dataclasses.replace(saved.training, model=tiny.model_config(num_classes=6))
    with pytest.raises(CompiledError, match=r"differs in classes \(there 5, here 6\)"):
        saved.take(training=training)
    monkeypatch.setattr(compiled, "_processor", lambda: "another")
    with pytest.raises(CompiledError, match=r"devices\.kind \(there .*, here \"another\"\)"):
        saved.take()


@pytest.mark.parametrize("name", ["source", "version", "jax", "jaxlib", "flax", "XLA_FLAGS"])
def test_a_step_of_another_source_or_compiler_is_refused(saved, name, monkeypatch):
    found = compilation.ingredients() | {name: "another"}
    monkeypatch.setattr(compilation, "ingredients", lambda: found)
    with pytest.raises(CompiledError, match=rf'differs in {name} \(there .*, here "another"\)'):
        saved.take()


def test_a_plugin_that_only_one_side_has_is_named(saved, monkeypatch):
    found = compilation.ingredients() | {"a-plugin": "9.9"}
    monkeypatch.setattr(compilation, "ingredients", lambda: found)
    with pytest.raises(CompiledError, match=r'a-plugin \(there null, here "9\.9"\)'):
        saved.take()


# ------------------------------------------------------------------ other files


class Evil:
    """Writes a file when it is unpickled."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (self.path, "w")


def test_nothing_of_a_changed_file_is_unpickled(saved, tmp_path):
    with open(saved.path, "rb") as file:
        content = file.read()
    path, trace = tmp_path / "step", tmp_path / "trace"
    digest = saved.name.rpartition("@")[2]
    end = content.index(b"x\x01", 100)  # zlib's first bytes, after the header
    middle = len(content) // 2
    changed = {
        "evil": content[:end] + compiled.zlib.compress(pickle.dumps(Evil(str(trace)))),
        "short": content[:-1],
        "long": content + b"\0",
        "flipped": content[:middle] + bytes([content[middle] ^ 1]) + content[middle + 1 :],
        "header": content.replace(b'"metrics"', b'"metrisc"', 1),
    }
    for name, data in changed.items():
        path.write_bytes(data)
        with pytest.raises(CompiledError, match=r"its SHA-256 begins with .* damaged or"):
            saved.take(f"{path}@{digest}")
        assert not trace.exists(), name
    # The trace would be there if the digest were not looked at.
    with pytest.raises(Exception):  # noqa: B017
        path.write_bytes(changed["evil"])
        saved.take(f"{path}@{hashlib.sha256(changed['evil']).hexdigest()}")
    assert trace.exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04", compiled.MAGIC[:-1]])
def test_another_kind_of_file_is_named(saved, tmp_path, content):
    path = tmp_path / "file"
    path.write_bytes(content)
    with pytest.raises(CompiledError, match=f"{path} is not a training step"):
        saved.take(f"{path}@{'0' * 64}")


def test_a_file_without_its_digest_is_refused(saved, tmp_path):
    for name in (saved.path, f"{saved.path}@", f"{saved.path}@{'0' * 63}", "@" + "0" * 64):
        with pytest.raises(CompiledError, match=r"lacks the file's SHA-256: give FILE@SHA256"):
            saved.take(name)
    with pytest.raises(CompiledError, match="none is missing"):
        saved.take(f"{tmp_path / 'none'}@{'0' * 64}")


# ------------------------------------------------------------------ compile mode


@pytest.mark.parametrize(
    ("changes", "options", "message"),
    [
        ({"kernels__assignment": "scipy"}, {}, r"'scipy', a callback.*assignment=auto"),
        ({}, {"quick": True}, "save without it"),
        ({}, {"save": "no/such/folder/step"}, "no/such/folder is no folder for writing"),
    ],
)
def test_what_cannot_be_saved_is_said_before_compiling(
    tmp_path, monkeypatch, changes, options, message
):
    monkeypatch.setattr(compile, "compile_programs", lambda *_, **__: pytest.fail("compiled"))
    options = {"save": str(tmp_path / "step"), "topology": None} | CLASSES | options
    with pytest.raises(ValueError, match=message):
        compile.run(make_config(**changes), **options)
    assert list(tmp_path.iterdir()) == []


def test_a_step_that_does_not_fit_is_not_saved(tmp_path, monkeypatch):
    report = compile.Report("training step", False, {}, 2, 1, 1, 1, {}, (), (), 0.0)
    monkeypatch.setattr(compile, "compile_programs", lambda *_, **__: [report])
    path, lines = tmp_path / "step", []
    options = {"topology": topologies.open_topology(""), "log": lines.append} | CLASSES
    assert not compile.run(make_config(), save=str(path), **options)
    assert f"not saved in {path}, since it does not fit" in "\n".join(lines)
    assert not path.exists()


@needs_libtpu
def test_a_step_for_a_tpu_is_saved_and_refused_elsewhere(saved, tmp_path):
    config = settings.checked(make_config(data__crop_size=(64, 64), mesh__fsdp=4))
    mesh = sharding.make_mesh(-1, 4, topologies.open_topology("v5e:2x4").devices)
    training, path = toy_training(mesh), str(tmp_path / "step")
    arguments = (training.state, states.abstract_batch(config, mesh), states.abstract_key(mesh))
    with without_cache():
        program = training.step.lower(*arguments).compile()
    made = (training, config, mesh, tiny.text_table())
    digest = compiled.save(path, program, *made, flops=7e6, seconds=3.0)
    with pytest.raises(CompiledError, match="cannot be loaded on these devices"):
        compiled.take(f"{path}@{digest}", *made)  # all is as it was, but the chips are not there
    here = sharding.make_mesh(-1, 4)
    with pytest.raises(CompiledError, match=r'devices\.kind \(there "TPU v5 lite", here "cpu'):
        compiled.take(f"{path}@{digest}", toy_training(here), config, here, tiny.text_table())


# ------------------------------------------------------------------ whole jobs


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_jobs_with_the_step_of_a_file_compute_the_same_bits(tmp_path, processes):
    """Saved by one job, taken by another of as many processes, beside one that compiles it."""
    path, data = tmp_path / "step", tmp_path / "data"
    cache = f"--config.compilation_cache={tmp_path / 'cache'}"
    jobs.run(tmp_path / "plain", data, processes, cache)
    outputs = jobs.run(tmp_path / "none", data, processes, "--mode=compile", f"--save={path}")
    (name,) = re.findall(r"--compiled=(\S+)$", "\n".join(outputs), re.M)
    outputs = jobs.run(tmp_path / "taken", data, processes, cache, f"--compiled={name}")
    for output in outputs:
        assert "Took the training step from" in output
        assert "Compiling the training step" not in output
        print(re.findall(r".*Took the.*|.*Step 1 begins.*", output))
    jobs.assert_equal(tmp_path / "taken", tmp_path / "plain")
    wrong = jobs.start_job(tmp_path / "wrong", data, 4, f"--compiled={name}")
    refused = wrong.communicate(timeout=300)[0]
    assert wrong.returncode == 1 and "differs in devices." in refused.splitlines()[-1]
    assert not (tmp_path / "wrong").exists(), "nothing is written before the step is refused"
