"""The benchmark of the kernels: its cases, records and options, and the recorded cycles."""

import dataclasses
import fnmatch
import functools
import json
import pathlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from oneformer_jax.kernels import choice, dispatch
from oneformer_jax.kernels.assignment import bench as assignment_bench
from oneformer_jax.kernels.assignment import linear_sum_assignment
from oneformer_jax.kernels.assignment.shapes import Case
from oneformer_jax.kernels.bench import cli, gpu, operation, process, records, tpu
from oneformer_jax.kernels.ms_deform_attn import ms_deform_attn
from oneformer_jax.kernels.ms_deform_attn import shapes as ms_shapes
from oneformer_jax.kernels.neighborhood_attention import neighborhood_attention
from oneformer_jax.kernels.neighborhood_attention import shapes as na_shapes
from oneformer_jax.kernels.point_sampling import sample_features
from oneformer_jax.kernels.point_sampling import shapes as point_shapes

OPERATIONS = {name: operation.load(name) for name in choice.OPERATIONS}
SMALL = {
    "ms_deform_attn": ms_shapes.CallShape("test", (32, 64), heads=1, head_dim=4, points=1),
    "neighborhood_attention": na_shapes.CallShape(6, 7, heads=1, kernel_size=3, dilation=1),
    "point_sampling": point_shapes.CallShape("test", 20, (4, 5), 3),
    "assignment": Case("test", rows=5, columns=4, valid=2, problems=3),
}


@pytest.mark.parametrize("name", OPERATIONS)
class TestEveryOperation:
    def test_measured_records_and_refusals(self, name):
        op, options = OPERATIONS[name], dict(batch=2, dtype=OPERATIONS[name].dtypes[0], repeats=1)
        found = operation.measure(op, SMALL[name], "xla", **options)
        passes = ["forward", "forward and backward"][: len(found)]
        assert [record["pass"] for record in found] == passes
        assert len(found) == 1 + bool(op.trial.differentiated)
        assert all(record["milliseconds"] > 0 and record["batch"] == 2 for record in found)
        refused = operation.measure(op, SMALL[name], "pallas_tpu", **options)
        assert all("runs on TPUs, and this program is for 'cpu'" in r["error"] for r in refused)
        lines = records.table([*found, *refused]).splitlines()
        assert len(lines) == 2 + len(found) + len(refused)
        assert len({line.count("|") for line in lines}) == 1

    def test_labels_and_recorded_fields_tell_every_case_apart(self, name):
        op = OPERATIONS[name]
        labels = [str(op.labels(case, dtype)) for case in op.cases.values() for dtype in op.dtypes]
        assert set(op.key) <= set(op.labels(next(iter(op.cases.values())), op.dtypes[0]))
        if name != "neighborhood_attention":  # models share maps
            assert len(set(labels)) == len(labels)

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (["--cases", "33x32"], "use any of "),
            (["--record"], "--record needs"),
            (["--target=v3"], "invalid choice"),
            (["--dtype=float16"], "use one of"),
            (["--implementations", "cuda"], "use any of xla"),
            (["--implementations", "scipy", "--target=v5e"], "use any of xla"),
            (["--no-memory"], "--no-memory needs"),
            (["--no-memory", "--target=h200"], "--no-memory needs"),
            (["--batch=0"], "'0' is no whole number of at least 1"),
            (["--repeats=-1"], "'-1' is no whole number of at least 0"),
        ],
    )
    def test_options_that_do_not_fit(self, name, arguments, message, capsys):
        with pytest.raises(SystemExit):
            cli.main([name, *arguments])
        assert message in capsys.readouterr().err

    def test_a_missing_compiler_is_named(self, name, monkeypatch, capsys):
        monkeypatch.setattr(tpu.importlib.util, "find_spec", lambda name: None)
        first = next(iter(OPERATIONS[name].cases))
        assert cli.main([name, "--target=v5e", "--cases", first]) == 1
        assert 'pip install "jax[tpu]"' in capsys.readouterr().err

    def test_recorded_cycles_are_of_published_cases(self, name):
        op = OPERATIONS[name]
        published = {
            tuple(str(op.labels(case, dtype).get(key)) for key in op.key)
            for case in op.cases.values()
            for dtype in op.dtypes
        }
        recorded = json.loads(op.recorded.read_text("utf-8"))
        assert recorded
        for record in recorded:
            found = tuple(str(record[key]) for key in op.key)
            assert found in published and record["target"] in tpu.TARGETS
            assert record["implementation"] in op.trial.implementations


class TestTables:
    def test_records_are_kept_by_their_key(self, tmp_path):
        path = tmp_path / "cycles.json"
        records.keep(path, [dict(a=1, b=1, c=5), dict(a=0, b=1)], "ab")
        records.keep(path, [dict(a=1, b=1, d=6)], "ab")
        assert json.loads(path.read_text()) == [dict(a=0, b=1), dict(a=1, b=1, c=5, d=6)]

    def test_the_table_is_printed_and_written(self, tmp_path, capsys, monkeypatch):
        op = dataclasses.replace(
            OPERATIONS["point_sampling"], cases={"one": SMALL["point_sampling"]}
        )
        monkeypatch.setattr(operation, "load", {"point_sampling": op}.get)
        arguments = ["point_sampling", "--repeats=1", "--json", str(tmp_path / "found.json")]
        assert cli.main([*arguments, "--implementations", "xla", "--cases", "o*"]) == 0
        assert "| test |" in capsys.readouterr().out
        assert len(json.loads((tmp_path / "found.json").read_text())) == 2

    def test_a_file_that_cannot_be_written_is_named(self, tmp_path, capsys, monkeypatch):
        monkeypatch.setattr(operation, "measure", lambda *_, **__: [{"milliseconds": 1.0}])
        path = tmp_path / "none" / "found.json"
        assert cli.main(["point_sampling", "--json", str(path)]) == 1
        output, errors = capsys.readouterr()
        assert "| milliseconds |" in output and str(path) in errors

    def test_a_record_of_another_implementation_stands_beside_the_kernels(
        self, tmp_path, monkeypatch
    ):
        op = OPERATIONS["assignment"]
        name = next(iter(op.cases))
        labels = op.labels(op.cases[name], "float32")
        known = {"libtpu": "1", "target": "v5e", "implementation": "pallas_tpu", **labels}
        monkeypatch.setattr(operation, "ROOT", tmp_path)
        op.recorded.parent.mkdir()
        records.write(op.recorded, [known | {"step_cycles": 5, "temporary_bytes": 7}])
        found = known | {"implementation": "xla", "temporary_bytes": 8}
        monkeypatch.setattr(operation, "compile_for_tpu", lambda *_, **__: [found])
        options = ["--target=v5e", f"--cases={name}", "--implementations=xla", "--record"]
        assert cli.main(["assignment", *options]) == 0
        kernel, plain = json.loads(op.recorded.read_text("utf-8"))
        assert (kernel["step_cycles"], kernel["temporary_bytes"]) == (5, 7)
        assert plain["temporary_bytes"] == 8

    def test_a_record_is_a_line_for_each_pass(self):
        record = dict(target="v5e", temporary_bytes=2e6, forward=dict(cycles=1), backward={})
        rows = OPERATIONS["ms_deform_attn"].predict(record, SMALL["ms_deform_attn"])
        shared = dict(target="v5e", temporary_megabytes=2.0)
        assert rows == [shared | {"pass": "forward", "cycles": 1}, shared | {"pass": "backward"}]


class TestDeformableAttention:
    def test_least_traffic(self):
        # 2 + 8 + 32 pixels, 4 channels, and 3 points of x, y and weight for each.
        value, points = 42 * 4 * 4, 42 * 3 * 12
        found = OPERATIONS["ms_deform_attn"].least_bytes(SMALL["ms_deform_attn"], 1, "float32")
        assert found == {
            "forward": 2 * value + points,
            "forward and backward": 5 * value + 3 * points,
        }

    def test_points_lie_around_their_query(self):
        op, case = OPERATIONS["ms_deform_attn"], SMALL["ms_deform_attn"]
        _, value, locations, weights = op.inputs(case, 2, "bfloat16")
        assert value.dtype == jnp.bfloat16 and locations.shape == (2, 42, 1, 3, 1, 2)
        assert np.abs(locations - 0.5).max() < 20 and weights.shape == (2, 42, 1, 3, 1)


class TestNeighborhoodAttention:
    def test_calls_of_a_model(self):
        calls = na_shapes.ModelShape("test", (640, 640)).calls()
        assert sum(call.blocks for call in calls) == 3 + 4 + 18 + 5
        # Maps smaller than the neighbourhood are padded to it.
        assert na_shapes.CallShape(220, 220, 6, 11, 20, 1) in calls
        assert na_shapes.CallShape(40, 40, 24, 11, 3, 2) in calls
        names = [shape.name for shape in na_shapes.PUBLISHED]
        assert len(set(names)) == len(names)

    def test_the_sum_counts_every_block(self):
        op = OPERATIONS["neighborhood_attention"]
        names = fnmatch.filter(op.cases, "1024x1024-6-*")
        found = {
            "target": "v5e",
            "implementation": "pallas_tpu",
            "forward": dict(milliseconds=1.0),
            "backward": dict(milliseconds=2.0),
            "xla_milliseconds": 0.5,
            "temporary_bytes": 1e6,
        }
        some = found | {"forward": {"kernels": 2}}  # equal kernels, of which one is counted
        (row,) = op.predict(some | op.labels(op.cases[names[0]], "bfloat16"), op.cases[names[0]])
        assert row["XLA ms"] == 0.5 and "milliseconds" not in row
        rows = []
        for name in names:
            labels = op.labels(op.cases[name], "bfloat16")
            rows += op.predict(found | labels, op.cases[name])
        assert op.summary(rows) == "pallas_tpu: 10.5 ms for all of these blocks"


class TestAssignment:
    def test_costs_of_every_kind_are_the_same_every_time(self):
        for kind in ("random", "places", "alike"):
            case = dataclasses.replace(SMALL["assignment"], kind=kind)
            assert case.costs().shape == (3, 5, 4) and case.costs().dtype == np.float32
            assert np.array_equal(case.costs(), case.costs())
        with pytest.raises(ValueError, match="unknown kind 'equal' of costs; use one of random"):
            dataclasses.replace(SMALL["assignment"], kind="equal").costs()

    def test_steps(self):
        def steps(kind, valid):
            case = dataclasses.replace(SMALL["assignment"], kind=kind, valid=valid)
            return assignment_bench.count_steps(case)

        assert steps("random", 0) == 0
        assert steps("random", 1) == 1
        assert steps("alike", 4) >= 4 + 3 + 2 + 1

    def test_scipy_is_timed_on_the_host(self):
        options = dict(batch=1, dtype="float32", repeats=1)
        op = OPERATIONS["assignment"]
        (found,) = operation.measure(op, SMALL["assignment"], "scipy", **options)
        assert found["device"] == "host" and found["milliseconds"] > 0

    def test_the_prediction_counts_the_steps(self):
        case = dataclasses.replace(SMALL["assignment"], kind="random", valid=1)
        record = dict(target="v5e", step_cycles=100, other_cycles=50, temporary_bytes=10**6)
        (row,) = OPERATIONS["assignment"].predict(record, case)
        assert row["steps"] == 1 and row["milliseconds"] == pytest.approx(1e3 * 150 / 1.5e9)

    def test_plain_jax_has_no_kernel_whose_cycles_count(self, tmp_path):
        op, case = OPERATIONS["assignment"], SMALL["assignment"]
        assert op.count("v5e", case, "", tmp_path) == {}
        (row,) = op.predict(dict(target="v5e", temporary_bytes=10**6), case)
        assert row == dict(target="v5e", temporary_megabytes=1.0)


def test_a_compilers_process_runs_in_the_folder_of_its_parent(tmp_path, monkeypatch):
    """It finds the modules that its parent finds, and its errors are told."""
    (tmp_path / "probe.py").write_text(
        "import os\n"
        "from oneformer_jax.kernels.bench import process\n"
        "request = process.request()\n"
        "process.answer(request, [os.getcwd(), os.environ['A_FOLDER'], request['a']])\n"
        "if request['a'] == 0:\n"
        "    raise SystemExit('no such chip')\n"
    )
    monkeypatch.chdir(tmp_path)
    run = functools.partial(process.run, "probe", variables=lambda folder: {"A_FOLDER": folder})
    where, folder, number = run({"target": "v5e", "a": 7})
    assert (where, number) == (str(tmp_path), 7) and not pathlib.Path(folder).exists()
    with pytest.raises(RuntimeError, match=r"compiling for v5e failed \(exit code 1\):\nno such"):
        run({"target": "v5e", "a": 0})


@pytest.mark.parametrize(
    ("name", "api"),
    [
        (
            "ms_deform_attn",
            lambda case: lambda value, *points: ms_deform_attn(value, case.spatial_shapes, *points),
        ),
        (
            "neighborhood_attention",
            lambda case: functools.partial(
                neighborhood_attention, kernel_size=case.kernel_size, dilation=case.dilation
            ),
        ),
        ("point_sampling", lambda case: sample_features),
        ("assignment", lambda case: linear_sum_assignment),
    ],
)
def test_a_published_call_is_what_the_api_is_asked_for(name, api):
    op, case = OPERATIONS[name], SMALL[name]
    with choice.noting() as notes:
        jax.eval_shape(lambda *x: api(case)(*x), *op.arguments(case, 2, op.dtypes[0]))
    assert list(notes.calls) == [op.call(case, 2, op.dtypes[0])]


class TestGpus:
    def test_unknown_targets_and_missing_kernels_are_refused(self):
        with pytest.raises(ValueError, match=r"unknown target 'v100'; use one of a100"):
            operation.compile_for_gpu(OPERATIONS["ms_deform_attn"], "v100", "512x512", "xla")
        with pytest.raises(NotImplementedError, match="has no kernel for GPUs"):
            operation.compile_for_gpu(OPERATIONS["point_sampling"], "h200", "losses", "pallas_gpu")

    @pytest.mark.parametrize("name", ["ms_deform_attn", "assignment"])
    def test_both_implementations_are_compiled(self, name, monkeypatch):
        """The compiler is left out: what it would be given must trace."""
        traced = {}

        def compile_(label, function, arguments):
            traced[label] = jax.eval_shape(function, *arguments)
            return dict(
                kernels=[dict(registers=8, spill_bytes=0)], temp_bytes=1e6, compile_seconds=1
            )

        def run(module, target, request):
            return {"target": target, **operation.gpu_report(request, compile_)}

        monkeypatch.setattr(gpu, "run", run)
        op = OPERATIONS[name]
        first = next(iter(op.cases))
        for implementation in ("xla", "pallas_gpu"):
            traced.clear()
            with dispatch.tracing_for("gpu", "NVIDIA H200"):  # as in the process of its own
                report = operation.compile_for_gpu(op, "h200", first, implementation)
        assert set(traced) == set(operation.PASSES[: 1 + bool(op.trial.differentiated)])
        rows = operation.gpu_rows(report, {})
        assert [row["registers"] for row in rows] == [8] * len(traced)
