"""Calibration of the real kernels, in Pallas' interpreter on this machine's processor.

On a machine with a TPU or an NVIDIA GPU, this tries every kernel there at a published call:

    JAX_PLATFORMS=cuda,cpu python -m pytest tests/kernels -k on_device      # or tpu,cpu
"""

import functools
import types

import jax
import jax.numpy as jnp
import pytest

from oneformer_jax.kernels import calibrate, choice, dispatch
from oneformer_jax.kernels.assignment import api as assignment_api
from oneformer_jax.kernels.assignment import linear_sum_assignment
from oneformer_jax.kernels.assignment import pallas_tpu as assignment_tpu
from oneformer_jax.kernels.bench import operation as bench
from oneformer_jax.kernels.calibrate import attempt, chooser
from oneformer_jax.kernels.ms_deform_attn import api as deform_api
from oneformer_jax.kernels.ms_deform_attn import ms_deform_attn, pallas_gpu, quad_rows
from oneformer_jax.kernels.ms_deform_attn import pallas_tpu as deform_tpu
from oneformer_jax.kernels.neighborhood_attention import api as neighborhood_api
from oneformer_jax.kernels.neighborhood_attention import neighborhood_attention
from oneformer_jax.kernels.neighborhood_attention import pallas_tpu as neighborhood_tpu
from oneformer_jax.kernels.point_sampling import api as points_api
from oneformer_jax.kernels.point_sampling import pallas_tpu as points_tpu
from oneformer_jax.kernels.point_sampling import sample_features

SHAPES = ((2, 3), (4, 5))


def _interpreted(run):
    return functools.partial(run, interpret=True)


# Operation -> its api, its kernels in the interpreter, a small "auto" call, the call's arrays.
OPERATIONS = {
    "ms_deform_attn": (
        deform_api,
        _interpreted(deform_tpu.ms_deform_attn),
        lambda value, *points: ms_deform_attn(value, SHAPES, *points),
        ((1, 26, 2, 3), (1, 5, 2, 2, 2, 2), (1, 5, 2, 2, 2)),
    ),
    "neighborhood_attention": (
        neighborhood_api,
        _interpreted(neighborhood_tpu.neighborhood_attention),
        functools.partial(neighborhood_attention, kernel_size=3),
        ((1, 5, 6, 1, 4),) * 3 + ((1, 5, 5),),
    ),
    "point_sampling": (
        points_api,
        types.SimpleNamespace(
            forward=_interpreted(points_tpu.forward), backward=_interpreted(points_tpu.backward)
        ),
        sample_features,
        ((1, 4, 5, 3), (1, 9, 2)),
    ),
    "assignment": (
        assignment_api,
        _interpreted(assignment_tpu.assign),
        linear_sum_assignment,
        ((3, 7, 5), (3, 5)),
    ),
}


def run(monkeypatch, folder, operation, times=None):
    """The lines of the table of a call by candidate, and the program that was traced with them."""
    api, kernel, call, shapes = OPERATIONS[operation]
    load, known = api.load, chooser.candidates
    monkeypatch.setattr(api, "load", lambda name: kernel if name == "pallas_tpu" else load(name))
    monkeypatch.setattr(chooser, "measures", lambda: True)
    monkeypatch.setattr(chooser, "candidates", lambda call: [*known(call), "pallas_tpu"])
    monkeypatch.setattr(choice, "TABLES", {True: {}, False: {}})
    monkeypatch.setattr(chooser, "_STORES", {})
    monkeypatch.setattr(chooser, "_BUDGET", [1000.0])
    monkeypatch.setattr(attempt, "COMPILE_SECONDS", 500.0)
    monkeypatch.setattr(attempt, "RUN_SECONDS", 500.0)
    if times is not None:
        monkeypatch.setattr(attempt, "time_call", lambda call, name, run: times.get(name, 9.0))
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes]
    program = jax.jit(lambda *x: call(*x))  # what JAX has traced before, it does not trace again
    if operation == "assignment":
        arrays[1] = jax.ShapeDtypeStruct(shapes[1], bool)
    else:
        program = jax.jit(jax.value_and_grad(lambda *x: call(*x).sum()))
    rows, lines = [], []
    calibrate.Chooser(
        folder, gradients=True, log=lines.append, report=lambda _, table: rows.extend(table)
    )(program, *arrays)
    (line,) = lines
    assert all(row["verdict"] in line for row in rows)
    return {row["candidate"]: row for row in rows}, program.trace(*arrays)


def kernels_in(traced):
    return "pallas_call" in str(traced.jaxpr)


EACH = [
    pytest.param(name, marks=() if name == "point_sampling" else pytest.mark.slow)
    for name in OPERATIONS
]


@pytest.mark.parametrize("operation", EACH)
def test_a_processor_takes_plain_jax_and_says_that_it_is_faster(monkeypatch, tmp_path, operation):
    rows, traced = run(monkeypatch, tmp_path, operation)
    (chosen,) = [name for name, row in rows.items() if row["verdict"] == "chosen"]
    assert chosen.startswith("xla") and not kernels_in(traced)
    kernel = rows["pallas_tpu"]
    assert kernel["verdict"] == "slower" and kernel["error"] < 1e-5
    assert kernel["milliseconds"] > rows[chosen]["milliseconds"]


@pytest.mark.parametrize("operation", EACH)
def test_a_kernel_is_chosen_where_the_clock_shows_that_it_is_faster(
    monkeypatch, tmp_path, operation
):
    rows, traced = run(monkeypatch, tmp_path, operation, times={"pallas_tpu": 1.0})
    assert rows["pallas_tpu"]["verdict"] == "chosen"
    assert kernels_in(traced)


@pytest.mark.parametrize(
    "corner", [0, *(pytest.param(n, marks=pytest.mark.slow) for n in (1, 2, 3))]
)
def test_a_kernel_with_one_wrong_corner_is_never_chosen(monkeypatch, tmp_path, corner):
    weights = quad_rows._corner_weights

    def spoiled(*arguments):
        found = list(weights(*arguments))
        found[corner] = 1.01 * found[corner]
        return found

    monkeypatch.setattr(quad_rows, "_corner_weights", spoiled)
    rows, traced = run(monkeypatch, tmp_path, "ms_deform_attn", times={"pallas_tpu": 1.0})
    assert rows["pallas_tpu"]["verdict"].startswith("wrong by ")
    assert not kernels_in(traced)


@pytest.mark.slow
@pytest.mark.parametrize("where", ["forward", "backward"])
def test_points_that_are_off_by_little_are_found(monkeypatch, tmp_path, where):
    kernels = OPERATIONS["point_sampling"][1]
    right = getattr(points_tpu, where)
    changed = lambda *x, **options: 1.001 * right(*x, **options)  # noqa: E731
    monkeypatch.setattr(kernels, where, _interpreted(changed))
    rows, _ = run(monkeypatch, tmp_path, "point_sampling", times={"pallas_tpu": 1.0})
    assert rows["pallas_tpu"]["verdict"] == "wrong by 1e-03"


@pytest.mark.slow
@pytest.mark.parametrize("fault", ["twice", "dear", "none", "far"])
def test_assignments_that_are_none_or_too_dear_are_found(monkeypatch, tmp_path, fault):
    api, kernel, *rest = OPERATIONS["assignment"]

    def spoiled(cost, order, count):
        owner = kernel(cost, order, count)  # the place in `order` of each row's column
        if fault == "dear":
            return owner[:, ::-1]
        if fault == "twice":
            return owner.at[:, 1].set(owner[:, 0])
        return owner * 0 - 1 if fault == "none" else jnp.where(owner == 0, 4, owner)

    monkeypatch.setitem(OPERATIONS, "assignment", (api, spoiled, *rest))
    rows, _ = run(monkeypatch, tmp_path, "assignment", times={"pallas_tpu": 1.0})
    assert rows["pallas_tpu"]["verdict"].startswith("wrong by ")


# ------------------------------------------------------------------ candidates and preferences


def device(platform, capability=None):
    return types.SimpleNamespace(platform=platform, compute_capability=capability)


def call_of(operation, **changes):
    """The "auto" call of `OPERATIONS`, as it is noted."""
    _, _, call, shapes = OPERATIONS[operation]
    arrays = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in changes.get("shapes", shapes)]
    if operation == "assignment":
        arrays[1] = jax.ShapeDtypeStruct(arrays[1].shape, bool)
    with choice.noting() as notes:
        jax.eval_shape(lambda *x: changes.get("call", call)(*x), *arrays)
    (found,) = notes.calls
    return found


@pytest.mark.parametrize(
    ("operation", "platform", "expected"),
    [
        ("ms_deform_attn", "tpu", ["pallas_tpu"]),
        ("neighborhood_attention", "tpu", ["pallas_tpu"]),
        ("neighborhood_attention", "gpu", []),
        ("point_sampling", "tpu", ["pallas_tpu"]),
        ("assignment", "gpu", ["pallas_gpu"]),
        ("assignment", "rocm", []),
    ],
)
def test_candidates_are_plain_jax_and_the_kernels_of_the_platform(operation, platform, expected):
    found = choice.load_trial(operation).candidates(call_of(operation), device(platform, "8.0"))
    assert found[0] == "xla"
    assert [name for name in found if not name.startswith("xla")] == expected


def test_candidates_of_deformable_attention_are_all_distinct_forms(monkeypatch):
    trial = choice.load_trial("ms_deform_attn")
    small = call_of("ms_deform_attn")
    assert trial.candidates(small, device("tpu")) == [
        *("xla", "pallas_tpu", "xla/chunks", "xla/gather")
    ]
    shapes = ((64, 64),)
    large = call_of(
        "ms_deform_attn",
        call=lambda value, *points: ms_deform_attn(value, shapes, *points),
        shapes=((1, 4096, 2, 3), (1, 5, 2, 1, 2, 2), (1, 5, 2, 1, 2)),
    )
    assert trial.candidates(large, device("cpu")) == ["xla", "xla/gather"]
    monkeypatch.setattr(pallas_gpu, "_has_mosaic", lambda _: True)
    for capability, others in (
        ("9.0", ["pallas_gpu/triton"]),
        *((old, []) for old in ("8.0", "7.5", "gfx942", None)),  # the last ones refuse it
    ):
        found = trial.candidates(large, device("gpu", capability))
        assert found[1:-1] == ["pallas_gpu", *others]
    assert deform_api.load("pallas_gpu/triton").keywords == {"backend": "triton"}
    assert deform_api.load("xla/gather") is deform_api.XLA_FORMS["gather"]


def test_a_call_is_noted_with_the_share_of_a_device(mesh8):
    features, points = (
        jax.ShapeDtypeStruct((16, *shape[1:]), jnp.float32)
        for shape in OPERATIONS["point_sampling"][3]
    )
    with choice.noting() as notes:
        jax.eval_shape(lambda f, p: sample_features(f, p, mesh=mesh8), features, points)
        for _ in range(2):
            jax.eval_shape(lambda *x: sample_features(*x), features, points)
    by_batch = {call.arrays[0][0][0]: count for call, count in notes.calls.items()}
    assert by_batch == {2: 1, 16: 2}
    for call in notes.calls:
        assert choice.Call.of_key(call.key(True)) == call
    call = call_of("ms_deform_attn")
    assert choice.Call.of_key(call.key(False)) == call and call.key(False) != call.key(True)


def test_a_batch_that_the_devices_do_not_divide_takes_plain_jax(mesh8):
    features, points = (jnp.zeros((3, *shape[1:])) for shape in OPERATIONS["point_sampling"][3])
    name = choice.choose("point_sampling", "auto", ("xla",), (features, points), mesh=mesh8)
    assert name == "xla"


@pytest.mark.parametrize(
    ("kind", "operation", "expected"),
    [
        ("TPU v5 lite", "point_sampling", "pallas_tpu"),
        ("TPU v5p", "neighborhood_attention", "pallas_tpu"),
        ("TPU v4", "neighborhood_attention", "xla"),  # no schedule is recorded
        ("TPU v4", "point_sampling", "pallas_tpu"),
        ("NVIDIA H100 80GB HBM3", "ms_deform_attn", "xla"),
        ("cpu", "point_sampling", "xla"),
        ("TPU v99", "point_sampling", "xla"),
    ],
)
def test_the_static_preference_is_kernels_where_schedules_are_recorded(
    monkeypatch, kind, operation, expected
):
    call = call_of(operation)
    monkeypatch.setattr(dispatch, "device_kind", lambda: kind)
    monkeypatch.setattr(choice, "_refused", lambda *_: False)
    assert choice.preferred(call) == expected
    monkeypatch.setattr(choice, "_refused", lambda *_: True)
    assert choice.preferred(call) == "xla"


def test_a_kernel_that_refuses_the_gradients_is_not_preferred(monkeypatch):
    call = call_of("point_sampling")
    assert choice._refused(call, "pallas_tpu", "here")  # this is no TPU
    kernels = OPERATIONS["point_sampling"][1]
    monkeypatch.setattr(points_api, "load", lambda name: kernels)
    assert not choice._refused(call, "pallas_tpu", "interpreted")

    def refuse(*_):
        raise NotImplementedError

    half = types.SimpleNamespace(forward=kernels.forward, backward=refuse)
    monkeypatch.setattr(points_api, "load", lambda name: half)
    assert choice._refused(call, "pallas_tpu", "half interpreted")


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("operation", OPERATIONS)
def test_tolerances_and_inputs_are_of_the_calls_dtypes(operation, dtype):
    trial = choice.load_trial(operation)
    call = call_of(operation)
    arrays = tuple(
        (shape, dtype if name == "float32" and operation != "assignment" else name)
        for shape, name in call.arrays
    )
    call = choice.Call(operation, arrays, call.static)
    drawn = trial.drawn_inputs(call)[1:]
    assert [(x.shape, str(x.dtype)) for x in drawn] == [(s, d) for s, d in call.arrays]
    half = any(name == "bfloat16" for _, name in call.arrays)
    assert trial.tolerance(call, "cpu") == (1e-2 if half else 1e-4)
    assert trial.tolerance(call, "tpu") == (1e-2 if half or trial.rounded else 1e-4)


# ------------------------------------------------------------------ on an accelerator


@pytest.mark.skipif(jax.devices()[0].platform == "cpu", reason="there is no accelerator")
@pytest.mark.parametrize("dtype", [0, 1])
@pytest.mark.parametrize("operation", choice.OPERATIONS)
def test_on_device_every_candidate_is_right_at_a_published_call(operation, dtype, tmp_path):
    published = bench.load(operation)
    if dtype >= len(published.dtypes):
        pytest.skip("it has one dtype")
    case = next(iter(published.cases.values()))
    call = published.call(case, 2, published.dtypes[dtype])
    known = calibrate.open_store(tmp_path, print)
    calibrate.try_calls([call], True, known, 500.0)
    for row in calibrate.known_rows(call, True, known):
        assert row["verdict"] in ("chosen", "slower"), row
