"""The benchmark of deformable attention: its records and its options."""

import jax.numpy as jnp
import pytest

from kernels import records as records_of
from kernels import tpu_aot
from kernels.ms_deform_attn import bench
from kernels.ms_deform_attn.shapes import CallShape

SMALL = CallShape("test", (32, 64), heads=1, head_dim=4, points=1)


def test_least_traffic():
    # 2 + 8 + 32 pixels, 4 channels, and 3 points of x, y and weight for each.
    value, points = 42 * 4 * 4, 42 * 3 * 12
    found = bench.least_bytes(SMALL, 1, jnp.float32)
    assert found == {
        "forward": 2 * value + points,
        "forward and backward": 5 * value + 3 * points,
    }


def test_measured_records_and_refusals():
    options = dict(batch=2, dtype=jnp.float32, repeats=1)
    records = bench.measure(SMALL, "xla", **options)
    assert [record["pass"] for record in records] == ["forward", "forward and backward"]
    assert all(record["milliseconds"] > 0 and record["batch"] == 2 for record in records)
    refused = bench.measure(SMALL, "pallas_tpu", **options)
    assert all("runs on TPUs" in record["error"] for record in refused)
    lines = records_of.table([*records, *refused]).splitlines()
    assert len(lines) == 6 and len({line.count("|") for line in lines}) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--images", "33x32"], "use any of 512x512"),
        (["--record"], "--record needs"),
        (["--compile-seconds"], "--compile-seconds needs"),
        (["--target=v3"], "invalid choice"),
    ],
)
def test_options_that_do_not_fit(arguments, message, capsys):
    with pytest.raises(SystemExit):
        bench.main(arguments)
    assert message in capsys.readouterr().err


def test_missing_compiler_is_named(monkeypatch, capsys):
    monkeypatch.setattr(tpu_aot.importlib.util, "find_spec", lambda name: None)
    assert bench.main(["--target=v5e", "--images", "512x512"]) == 1
    assert 'pip install "jax[tpu]"' in capsys.readouterr().err
