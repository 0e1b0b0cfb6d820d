"""The commands of docs/custom_dataset.md, followed to the letter on a small export."""

import json
import os
import pathlib
import re
import subprocess
import sys

import pytest

from tests.input_pipeline import exports

ROOT = pathlib.Path(__file__).resolve().parents[2]
# Added to every command with a config: a small model, and few steps of small images.
SMALL = {
    "data.batch_size": 2,
    "data.crop_size": "64,64",
    "data.workers": 0,
    "data.num_slots": 8,
    "eval.short_edge": 64,
    "eval.max_size": 64,
    "eval.bucket_multiple": 64,
    "eval.batch_size": 2,
    "loss.num_points": 64,
    "model.backbone.overrides.stem_width": 8,
    "model.hidden_dim": 32,
    "model.mask_dim": 32,
    "model.num_heads": 4,
    "model.num_queries": 24,
    "model.encoder_layers": 1,
    "model.query_init_layers": 1,
    "model.decoder_layers": 1,
    "model.text_width": 32,
    "model.text_layers": 1,
    "optim.warmup_steps": 0,
    "train.steps": 3,
    "train.eval_every": 2,
}


def commands():
    """The variable and the commands of the page's first block."""
    text = (ROOT / "docs" / "custom_dataset.md").read_text("utf-8")
    block = re.search(r"(?:^ {4}[^\n]*\n)+", text, re.MULTILINE)[0]
    variable, *lines = re.sub(r"\\\n\s*", "", block).splitlines()
    assert all(line.startswith("    python main.py ") for line in lines)
    return variable.strip(), [line.strip() for line in lines]


def test_the_page_begins_with_the_whole_way():
    _, lines = commands()
    modes = [re.search(r"--mode=(\w+)", line) for line in lines]
    assert [m and m[1] for m in modes] == ["import", "inspect", None, "eval", "predict"]


@pytest.mark.slow
def test_from_an_export_to_segmented_images(tmp_path):
    export, names = tmp_path / "export", [f"photo_{i:02d}" for i in range(20)]
    for i, name in enumerate(names):
        exports.image(export / f"{name}.jpg", seed=i)
        shapes = [exports.shape("cat", exports.CAT), exports.shape("dog", exports.DOG)]
        exports.labelme_json(export / f"{name}.json", f"{name}.jpg", shapes)
    (tmp_path / "main.py").symlink_to(ROOT / "main.py")
    for name in ("new_1.jpg", "new_2.jpg"):
        exports.image(tmp_path / "new" / name)
    variable, lines = commands()
    words = {"EXPORT": "export", "DIR": "data", "FILE_OR_FOLDER": "new"}
    path = f"{pathlib.Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    printed = []
    for line in lines:
        if "$DATA" in line:
            line += "".join(f" --config.{key}={value}" for key, value in SMALL.items())
        script = f"{variable}\n{line}\n"
        for word, value in words.items():
            script = re.sub(rf"\b{word}\b", value, script)
        done = subprocess.run(
            ["bash", "-euc", script],
            cwd=tmp_path,
            env=os.environ | {"PATH": path, "JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            timeout=500,
        )
        assert done.returncode == 0, f"{line}\n{done.stderr[-3000:]}"
        printed.append(done.stdout)
    imported, inspected, trained, evaluated, predicted = printed
    assert "2 classes: cat, dog" in imported and "20 images" in imported
    held_back = 20 - int(re.match(r"(\d+) images", inspected)[1])
    assert 0 < held_back < 10
    assert (tmp_path / "runs" / "inspection" / "samples.png").is_file()
    for text in (trained, evaluated):
        assert "runs/mine/eval/3/results.json" in text
    assert (tmp_path / "runs" / "mine" / "report.html").is_file()
    results = json.loads((tmp_path / "runs/mine/eval/3/results.json").read_text())
    assert results["images"] == held_back and "instance/AP" in results["metrics"]
    assert "2 of 2 images segmented" in predicted
    assert len(list((tmp_path / "runs" / "mine" / "predictions").rglob("*.png"))) >= 2
