"""Compile mode: a report of real programs, the verdict on memory, the advice; TPUs by libtpu."""

import ctypes
import dataclasses
import functools
import importlib.util
import re
import subprocess
import sys
import threading
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oneformer_jax.compile import compile, hlo, topologies
from oneformer_jax.compile.topologies import Topology
from oneformer_jax.configs import coco
from oneformer_jax.kernels import chips
from oneformer_jax.kernels.bench import gpu
from oneformer_jax.kernels.point_sampling import sample_features
from oneformer_jax.models import functional, matcher
from oneformer_jax.train import compiled, settings, sharding
from oneformer_jax.train import state as states
from tests import tiny
from tests.kernels.common import check_nothing_travels
from tests.train.runs import make_config

needs_libtpu = pytest.mark.skipif(
    importlib.util.find_spec("libtpu") is None,
    reason='libtpu is not installed: pip install "jax[tpu]"',
)
# Sizes of images, features and points that no parameter and no table of texts has.
SMALL = {
    "data__batch_size": 8,
    "data__crop_size": (352, 160),
    "data__num_slots": 6,
    "model__num_queries": 9,
    "loss__num_points": 58,
    "optim__ema_decay": 0.0,
    "eval__short_edge": 160,
    "eval__max_size": 352,
    "eval__batch_size": 3,
    "mesh__fsdp": 4,
}
FEATURES = 9 * 32  # numbers of an image that the contrastive loss compares, of either kind
SIDES = [(352 // stride, 160 // stride) for stride in (1, 2, 4, 8, 16, 32)]
PIXELS = [h * w for h, w in SIDES]
# Sides, pixels, pixels of the three levels together; points: all, candidates, uncertain, fresh.
LARGE = {side for pair in SIDES[:5] for side in pair if side != 10} | set(PIXELS)
LARGE |= {sum(PIXELS[3:])} | {58, 174, 43, 15, 174 + 15}


def programs(config, topology):
    return compile.compile_programs(
        config, topology, num_classes=tiny.CLASSES, text_table=tiny.text_table()
    )


@pytest.fixture(scope="module")
def here():
    return topologies.open_topology("")


def patch_shardings(patch):
    shard = functools.partial(sharding.state_shardings, min_size=64)
    patch.setattr(sharding, "state_shardings", shard)


@pytest.fixture(scope="module")
def reports(here):
    with pytest.MonkeyPatch.context() as patch:
        patch_shardings(patch)
        return programs(make_config(**SMALL), here)


def test_the_steps_of_prediction_are_compiled_while_the_training_step_is_traced(here, monkeypatch):
    started = threading.Event()

    def trace(name, *_, **__):
        if name != "training step":
            return lambda: started.set() or name
        assert started.wait(60), "the training step is traced before the other is compiled"
        return lambda: name

    monkeypatch.setattr(compile, "_trace", trace)
    assert programs(make_config(**SMALL), here) == [
        "training step",
        "encoding step",
        "decoding step",
    ]


def parameter_bytes(config):
    model = settings.model_config(config, tiny.CLASSES)
    params = functional.abstract(model, training=True).params
    return 4 * sum(x.size for x in jax.tree.leaves(params))


def check_collectives(collectives, size, *, on_tpu=False):
    """Gradients, parameters, the features that the contrastive loss compares, and small sums.

    Args:
      collectives: of a training step.
      size: bytes of the parameters.
      on_tpu: whether they are those of a program for TPUs.

    Returns:
      Bytes that one device sends, without the contrastive features; within its slice.
    """
    collectives = [c for c in collectives if c.kind not in (hlo.HOST, hlo.SLICES)]
    contrast = [c for c in collectives if any(FEATURES in s.dims for s in c.shapes)]
    rest = [c for c in collectives if c not in contrast]
    assert 0 < len(contrast) < 8
    for collective in rest:
        dims = {side for shape in collective.shapes for side in shape.dims}
        assert not dims & LARGE, collective
        assert collective.times <= 3, collective  # none for each point or slot
    sent = {kind: amount for kind, (_, amount) in hlo.sent_by_kind(rest).items()}
    # On a TPU steps of permutations may stand for a reduce-scatter.
    kinds = {"all-gather", "all-reduce", "reduce-scatter"}
    if on_tpu:
        kinds.add("collective-permute")
    assert set(sent) <= kinds, sent
    gathered = sent.pop("all-gather")
    assert gathered < 2.1 * size  # for the forward and for the backward pass
    assert sum(sent.values()) < 2.1 * size, sent
    return gathered + sum(sent.values())


def test_no_mask_feature_map_or_point_travels(reports):
    """Only gradients, parameters, contrastive features and small sums do."""
    assert check_collectives(reports[0].collectives, parameter_bytes(make_config(**SMALL))) > 0


def test_the_report_of_all_steps(reports, here):
    train, encode, decode = reports
    assert train.fits and encode.fits and decode.fits
    assert train.limit is None  # nobody knows how much of a CPU's memory is to be had
    assert (train.images, encode.images, decode.images) == (8, 8, 8)  # 3 rounded up
    config = make_config(**SMALL)
    size = parameter_bytes(config)
    assert size / 4 < train.memory["parameters"] < 0.3 * size
    assert train.memory["optimizer"] == pytest.approx(2 * train.memory["parameters"], rel=0.01)
    assert train.memory["activations and temporaries"] > 0
    assert sum(train.memory.values()) == train.peak
    # The images of prediction are larger.
    assert 1 < train.flops / (encode.flops + decode.flops) < 4
    for one, other in ((encode, decode), (decode, encode)):
        assert one.memory["activations and temporaries"] > 0
        assert one.memory["rest of the state"] > other.memory["parameters"]
        assert sum(one.memory.values()) == one.peak
    assert train.sent["all-reduce"][1] > 0
    for predict in (encode, decode):
        assert {c.kind for c in predict.collectives} == {"all-gather"}  # of sharded parameters
    assert train.buffers[0].bytes >= train.buffers[-1].bytes > 0
    assert any(b.source.startswith(("oneformer_jax/", "kernels/")) for b in train.buffers)
    text = compile.describe(config, here, reports)
    for part in (
        "training step: compiled",
        "encoding step",
        "decoding step",
        "FLOP",
        "all-reduce",
        "fsdp 4",
        "kernels: ms_deform_attn xla, point_sampling xla. This is the static preference",
    ):
        assert part in text
    assert "at most 21" in text  # one side 160 and the other to 352, or 352 and to 160, by 32


def test_the_training_step_is_saved_for_a_training_on_these_devices(
    reports, here, monkeypatch, tmp_path
):
    patch_shardings(monkeypatch)
    monkeypatch.setattr(compile, "compile_programs", lambda *_, **__: reports)
    config, path, lines = make_config(**SMALL), tmp_path / "step", []
    settings_of_classes = dict(num_classes=tiny.CLASSES, text_table=tiny.text_table())
    made = dict(topology=here, save=str(path), log=lines.append)
    assert compile.run(config, **settings_of_classes, **made)
    (name,) = re.findall(rf"takes it with\n  --compiled=({path}@[0-9a-f]{{64}})$", lines[-1])
    config, mesh = settings.checked(config), sharding.make_mesh(-1, 4)
    training = states.make_training(config, tiny.CLASSES, tiny.text_table(), mesh)
    taken = compiled.take(name, training, config, mesh, tiny.text_table())
    assert taken.flops == reports[0].flops
    assert taken.step.args_info == reports[0].program.args_info


def test_what_does_not_fit_is_a_verdict_with_advice(reports, here, monkeypatch):
    small = Topology("small", here.devices, reports[0].peak - 1)
    tight = [dataclasses.replace(r, limit=small.memory) for r in reports]
    tight[0] = dataclasses.replace(tight[0], fits=False)
    monkeypatch.setattr(compile, "compile_programs", lambda *_, **__: tight)
    lines = []
    settings = dict(num_classes=5, text_table=None, topology=small, log=lines.append)
    assert not compile.run(make_config(**SMALL), **settings)
    text = "\n".join(lines)
    assert "DOES NOT FIT" in text and "too much" in text
    assert "--config.model.remat=True" in text
    assert "encoding step: fits" in text and "decoding step: fits" in text
    quick = dataclasses.replace(tight[0], quick=True)
    assert "MAY NOT FIT" in compile.verdict(quick) and "without --quick" in compile.verdict(quick)
    quick = dataclasses.replace(tight[1], quick=True)
    assert compile.verdict(quick).startswith("fits as compiled with --quick, ")


def test_suggestions_are_compiled_until_one_fits(here, monkeypatch):
    tried = []

    def compile_programs(config, *_, **__):
        tried.append((config.mesh.fsdp, config.model.remat, config.optim.accumulate))
        fits = config.model.remat and config.optim.accumulate == 2
        return [
            compile.Report("training step", fits, {}, 2, 3 if fits else 1, 1, 1, {}, (), (), 0.0)
        ]

    monkeypatch.setattr(compile, "compile_programs", compile_programs)
    config = make_config(**SMALL | {"mesh__fsdp": 1, "data__batch_size": 32})
    lines = []
    settings = dict(num_classes=5, text_table=None, log=lines.append)
    found = compile.suggest(config, here, **settings)
    assert found == {
        "mesh.data": -1,
        "mesh.fsdp": 8,
        "model.remat": True,
        "optim.accumulate": 2,
    }
    assert tried == [(8, False, 1), (1, True, 1), (8, True, 1), (8, True, 2)]
    assert config.mesh.fsdp == 1
    lines.clear()
    settings |= {"topology": here, "try_others": True}
    assert not compile.run(config, **settings)
    assert "fits with --config.mesh.data=-1 --config.mesh.fsdp=8" in lines[-1]
    config = make_config(**SMALL | {"mesh__fsdp": 8, "model__remat": True})
    assert list(compile.candidates(config, 8)) == []
    assert "use more or larger" in compile.advice(config, here)


@pytest.mark.parametrize("name", ["v5e", "v9:2x2", "v5e:four", "v5e:0x4", "h100:0", "h100:2x4"])
def test_a_wrong_topology_is_named(name):
    with pytest.raises(ValueError, match=rf"mesh\.topology is '{name}'.*KIND:"):
        topologies.open_topology(name)


@pytest.mark.parametrize(
    ("name", "largest"),
    [
        ("v5e:4x4x4", "v5e has up to 2 sides of up to 16 chips"),
        ("v5e:16x32", "v5e has up to 2 sides of up to 16 chips"),
        ("v5p:2x2x9999", "v5p has up to 3 sides of up to 28 chips"),
    ],
)
def test_a_slice_that_would_end_the_process_is_refused(name, largest):
    with pytest.raises(ValueError, match=f"is '{name}'; a slice of {largest}, as in v4:2x2x1"):
        topologies.open_topology(name)


def test_sizes_in_the_compilers_refusals():
    def sizes(text):
        return topologies.out_of_memory(jax.errors.JaxRuntimeError(text))

    assert sizes(
        "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (92.81G) exceeds available HBM (15.75G)."
    ) == (int(92.81 * 2**30), int(15.75 * 2**30))
    assert sizes(
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 16.5G of 15.75G hbm."
    ) == (int(16.5 * 2**30), int(15.75 * 2**30))
    assert sizes("RESOURCE_EXHAUSTED: out") == (0, 0)
    assert sizes("INVALID_ARGUMENT: no such option") is None


@needs_libtpu
@pytest.mark.parametrize(
    ("name", "slices", "devices", "gib"),
    [
        ("v4:2x2x1", 1, 4, 30),
        ("v5e:4x4", 2, 32, 15),
        ("v5e:1x1", 1, 1, 15),
        ("v5p:2x2x1", 1, 4, 95),
    ],
)
def test_tpu_topologies(name, slices, devices, gib):
    found = topologies.open_topology(name, slices)
    assert len(found.devices) == devices
    assert gib < found.memory / 2**30 < gib + 1
    assert chips.peak_flops(found.devices[0]) > 1e14


@needs_libtpu
def test_a_topology_that_does_not_exist():
    with pytest.raises(ValueError, match=r"'v5e:3x3' cannot be compiled for here: .*v5e:4x4"):
        topologies.open_topology("v5e:3x3")


@needs_libtpu
def test_the_memory_is_what_a_tpus_compiler_compares():
    """Not all temporary arrays together, which with arguments and results would be 384 MiB."""
    topology = topologies.open_topology("v5e:1x1")
    place = jax.sharding.SingleDeviceSharding(topology.devices[0])
    x = jax.ShapeDtypeStruct((2048, 2048), jnp.float32, sharding=place)

    def loop(x):
        return jax.lax.scan(lambda x, _: (jnp.sin(x @ x), None), x, length=9)[0].sum()

    def report(mebibytes):
        options = {"xla_tpu_max_hbm_size_mib": str(mebibytes)}
        limited = dataclasses.replace(topology, options=options)
        return compile._trace("loop", jax.jit(jax.grad(loop)), (x,), {}, limited, 1, quick=True)()

    free = report(1000)
    size = free.peak - free.memory["program"]
    assert report(size // 2**20 + 1).memory == free.memory
    refused = report(size // 2**20 - 1)
    assert free.fits and not refused.fits
    assert refused.peak == pytest.approx(size, abs=2**20)


@needs_libtpu
def test_the_training_step_compiles_for_a_tpu(capsys):
    topology = topologies.open_topology("v5e:2x2")
    config = make_config(**SMALL | {"data__batch_size": 4, "kernels__assignment": "scipy"})
    settings = dict(num_classes=tiny.CLASSES, text_table=tiny.text_table())
    assert compile.run(config, topology=topology, **settings)
    text = capsys.readouterr().out
    assert "training step: fits" in text and "of 15.75 GiB" in text
    assert "host transfer" in text  # of the matcher
    assert "kernels: ms_deform_attn pallas_tpu, point_sampling pallas_tpu. This is" in text
    tight = dataclasses.replace(topology, memory=2**20)
    train, *prediction = compile.compile_programs(config, tight, quick=True, **settings)
    assert not train.fits and train.quick and all(report.quick for report in prediction)


@pytest.mark.skipif(gpu.missing() is not None, reason=f"not installed: {gpu.missing()}")
def test_the_training_step_compiles_for_gpus(capsys):
    topology = topologies.open_topology("h100:4")
    settings = dict(num_classes=tiny.CLASSES, text_table=tiny.text_table(), topology=topology)
    config = make_config(**SMALL | {"data__batch_size": 4, "kernels__assignment": "xla"})
    assert compile.run(config, **settings)
    text = capsys.readouterr().out
    assert "training step: fits" in text and "of 55.88 GiB" in text
    assert "NVIDIA H100" in text and "all-reduce" in text


def test_a_callback_cannot_be_compiled_for_gpus_that_are_not_here():
    topology = Topology("h100:4", (types.SimpleNamespace(platform="gpu"),), None)
    config = make_config(**SMALL | {"kernels__assignment": "scipy"})
    with pytest.raises(ValueError, match=r"h100:4.*--config\.kernels\.assignment=auto"):
        programs(config, topology)


GIVES_BACK = """
import gc, time, jax
from oneformer_jax.compile import compile

def resident():
    return next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmRSS"))

compile.TRIM_SECONDS = {seconds}
compile.spare_the_host()
assert not jax.config.jax_enable_compilation_cache
held = [bytes(2000) for _ in range(200_000)]
most = resident()
last = held.pop()  # the end of the heap stays in use
held.clear()
gc.collect()
end = time.monotonic() + 2
while resident() > most - 300_000 and time.monotonic() < end:
    time.sleep(0.05)
print("given back" if resident() < most - 300_000 else "kept")
"""


@pytest.mark.skipif(not hasattr(ctypes.CDLL(None), "malloc_trim"), reason="needs glibc's allocator")
@pytest.mark.parametrize(("seconds", "expected"), [(0.1, "given back"), (1000.0, "kept")])
def test_free_memory_goes_back_to_the_system(seconds, expected):
    done = subprocess.run(
        [sys.executable, "-c", GIVES_BACK.format(seconds=seconds)],
        capture_output=True,
        text=True,
        cwd=hlo.ROOT,
    )
    assert done.stdout.strip() == expected, done.stderr


@needs_libtpu
def test_the_matchers_kernel_compiles_for_a_topology():
    """With it, nothing of the matching calls the host, and devices need nothing of each other."""
    mesh = sharding.make_mesh(-1, 2, topologies.open_topology("v5e:2x2").devices)
    split = jax.sharding.PartitionSpec(("data", "fsdp"))
    cost, valid = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=jax.sharding.NamedSharding(mesh, spec))
        for shape, dtype, spec in (
            ((10, 8, 150, 100), jnp.float32, jax.sharding.PartitionSpec(None, *split)),
            ((8, 100), bool, split),
        )
    )

    def match(cost, valid):
        return matcher.match(cost, valid, assignment="pallas_tpu", mesh=mesh)[:2]

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = jax.jit(match).trace(cost, valid).lower().compile()
    text = program.as_text()
    assert "tpu_custom_call" in text and "callback" not in text
    check_nothing_travels(program)


@needs_libtpu
def test_the_kernel_of_points_compiles_for_a_topology():
    """Reading and its gradient: devices need nothing of each other."""
    mesh = sharding.make_mesh(-1, 2, topologies.open_topology("v5e:2x2").devices)
    split = sharding.batch_sharding(mesh)
    features, points = (
        jax.ShapeDtypeStruct(shape, dtype, sharding=split)
        for shape, dtype in (((8, 32, 40, 256), jnp.bfloat16), ((8, 1000, 2), jnp.float32))
    )

    def total(features, points):
        out = sample_features(features, points, implementation="pallas_tpu", mesh=mesh)
        return jnp.sum(out * out, axis=(1, 2))

    def gradient(features, points):
        return jax.grad(lambda f: total(f, points).sum())(features)

    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        program = jax.jit(gradient).trace(features, points).lower().compile()
    text = program.as_text()
    assert "point_sampling_forward" in text and "point_sampling_backward" in text
    check_nothing_travels(program)


@needs_libtpu
def test_a_mesh_of_two_slices_keeps_parameters_within_each():
    devices = topologies.open_topology("v5e:4x4", slices=2).devices
    mesh = sharding.make_mesh(-1, 8, devices)
    assert dict(mesh.shape) == {"data": 4, "fsdp": 8}
    slices = [{device.slice_index for device in row} for row in mesh.devices]
    assert slices == [{0}, {0}, {1}, {1}]
    with pytest.raises(
        ValueError, match=r"mesh\.fsdp 32 does not divide the 16 devices of a slice"
    ):
        sharding.make_mesh(-1, 32, devices)


@needs_libtpu
@pytest.mark.slow
def test_a_published_model_fits():
    """Swin-L COCO, 16 images of 1024 x 1024 on 16 chips of 16 GB; minutes of compilation."""
    config = coco.get_config("swin_large")
    config.mesh.fsdp = 16
    config.model.remat = True
    config.model.dtype = "bfloat16"
    topology = topologies.open_topology("v5e:4x4")
    table = np.zeros((136, 12), np.int32)
    train, *prediction = compile.compile_programs(
        config, topology, num_classes=133, text_table=table, quick=True
    )
    assert train.fits and all(part.fits for part in prediction)
    # The published 891 GFLOP of a forward pass are multiply-adds; twice that backward, and once
    # more to recompute.
    assert 4 < train.flops / 16 / (2 * 891e9) < 4.5
