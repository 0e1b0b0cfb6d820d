"""The benchmark of neighbourhood attention: its records and its options."""

import jax.numpy as jnp
import pytest

from kernels import tpu_aot as compiler
from kernels.neighborhood_attention import bench
from kernels.neighborhood_attention.shapes import PUBLISHED, CallShape, ModelShape


def test_calls_of_a_model():
    calls = ModelShape("test", (640, 640)).calls()
    assert sum(call.blocks for call in calls) == 3 + 4 + 18 + 5
    # Maps smaller than the neighbourhood are padded to it.
    assert CallShape(220, 220, 6, 11, 20, 1) in calls
    assert CallShape(40, 40, 24, 11, 3, 2) in calls
    assert len({shape.name for shape in PUBLISHED}) == len(PUBLISHED)


def test_measured_records_and_refusals():
    call = CallShape(6, 7, heads=1, kernel_size=3, dilation=1)
    options = dict(batch=2, dtype=jnp.float32, repeats=1)
    found = bench.measure(call, "xla", **options)
    assert [record["pass"] for record in found] == ["forward", "forward and backward"]
    assert all(record["milliseconds"] > 0 and record["batch"] == 2 for record in found)
    refused = bench.measure(call, "pallas_tpu", **options)
    assert all("runs on TPUs" in record["error"] for record in refused)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--image", "33x32"], "invalid choice: '33x32'"),
        (["--record"], "--record needs a --target"),
        (["--target=h200"], "invalid choice"),
    ],
)
def test_options_that_do_not_fit(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err


def test_missing_compiler_is_named(monkeypatch, capsys):
    monkeypatch.setattr(compiler.importlib.util, "find_spec", lambda name: None)
    assert bench.main(["--target=v5e", "--stages", "1"]) == 1
    assert 'pip install "jax[tpu]"' in capsys.readouterr().err
