"""The benchmark of topologies: what its table concludes from what was compiled."""

import pytest

from tests import bench_recipes
from tests.bench_recipes import cell

KEY = "0123456789ab"


def results(**found):
    """Of topologies such as v5e_4x4: GiB that fit, None for what does not, or an error."""
    made = {}
    for name, value in found.items():
        fits = {"fits": value is not None, "gib": value or 99.0}
        key = f"{KEY}@{name.replace('_', ':')}"
        made[key] = {"error": value} if isinstance(value, str) else fits
    return made


@pytest.mark.parametrize(
    ("kind", "found", "expected"),
    [
        ("v5e", {}, "not compiled"),
        ("v5e", {"v5e_4x4": 3.0}, "4x4 or smaller, 3.0 GiB"),
        ("v5e", {"v5e_4x4": 3.0, "v5e_2x4": None}, "4x4, 3.0 GiB"),
        ("v5e", {"v5e_4x4": 1.0, "v5e_2x4": 2.0, "v5e_2x2": 4.0, "v5e_1x1": 9.0}, "1x1, 9.0 GiB"),
        ("v5e", {"v5e_4x4": None}, "none"),
        ("v5e", {"v5e_4x4": "of the compiler"}, "fails to compile"),
        ("v5p", {"v5p_2x2x1": 20.0}, "2x2x1, 20.0 GiB"),
        ("v5p", {"v5p_2x2x1": None, "v5p_2x2x2": 60.0}, "2x2x2, 60.0 GiB"),
        ("v5p", {"v5p_2x2x1": None}, "not compiled"),
        # 4 devices need 20 GiB each: 4 of v6e hold it, of v5e it takes 8, 10 GiB each.
        ("v6e", {"v5p_2x2x1": 20.0}, "~ 2x2"),
        ("v5e", {"v5p_2x2x1": 20.0}, "~ 2x4"),
        ("tpu7x", {"v5p_2x2x1": 20.0}, "~ 2x2x1"),
        ("h100", {"v5p_2x2x1": 20.0}, "~ 4"),
        # Nothing is concluded for fewer devices, nor from what does not fit.
        ("v5p", {"v5e_4x4": 3.0}, "~ 2x2x4"),
        ("v5p", {"v5e_4x4": None}, "not compiled"),
        ("v5e", {"v5p_2x2x1": 90.0}, "not compiled"),
    ],
)
def test_the_smallest_topology(kind, found, expected):
    assert cell(results(**found), kind, KEY) == expected


def test_recipes_with_the_same_program_share_their_results():
    key, others = (
        bench_recipes.fingerprint(bench_recipes.load("cityscapes", name))
        for name in ("convnext_large", "convnext_xlarge")
    )
    name = "convnext_large,pretrain=mapillary"
    assert key == bench_recipes.fingerprint(bench_recipes.load("cityscapes", name)) != others
    table = bench_recipes.table(
        {f"{key}@v5p:2x2x1": {"fits": True, "gib": 8.0}},
        ["v5p"],
        [("cityscapes", "convnext_large", key), ("cityscapes", name, key)],
    )
    assert table.splitlines()[2:] == [
        "| cityscapes:convnext_large | 2x2x1, 8.0 GiB |",
        f"| cityscapes:{name} | 2x2x1, 8.0 GiB |",
    ]


@pytest.mark.parametrize(
    ("kind", "fits", "expected"),
    [
        ("v5p", ("2x2x1", "2x2x2", "2x2x4"), ["2x2x1"]),
        ("v5p", ("2x2x4",), ["2x2x1", "2x2x2", "2x2x4"]),
        ("v5e", (), ["4x4"]),
        ("v5e", ("4x4", "2x4"), ["4x4", "2x4", "2x2"]),
    ],
)
def test_nothing_is_compiled_that_cannot_change_the_table(
    kind, fits, expected, tmp_path, monkeypatch
):
    tried = []

    def run(dataset, variant, topology):
        del dataset, variant
        tried.append(topology.partition(":")[2])
        return {"fits": tried[-1] in fits, "gib": 1.0}

    monkeypatch.setattr(bench_recipes, "run", run)
    arguments = ["bench_recipes", f"--kinds={kind}", "--datasets=coco", "--only=swin_tiny"]
    monkeypatch.setattr("sys.argv", [*arguments, f"--output={tmp_path / 'found.json'}"])
    bench_recipes.main()
    bench_recipes.main()  # goes on where it was left: nothing to do
    assert tried == expected
