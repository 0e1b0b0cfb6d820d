"""The command line: its errors, and what each mode hands to the library."""

import json
import os
import pathlib
import subprocess
import sys

import grain  # noqa: F401 - its flags must exist before flagsaver looks
import jax
import numpy as np
import pytest
from absl.testing import flagsaver
from ml_collections import ConfigDict
from PIL import Image

from oneformer_jax.app import cli, data, modes
from oneformer_jax.compile import compile
from oneformer_jax.configs import custom, synthetic
from oneformer_jax.train import checkpoint, sharding
from oneformer_jax.train import state as states

ROOT = pathlib.Path(__file__).resolve().parents[2]
CONFIG = "--config=configs/synthetic.py"
EXPORT = ("--mode=export", "--output=x", "--weights=y")


def run(*arguments, cwd=ROOT, **environment):
    return subprocess.run(
        [sys.executable, str(ROOT / "main.py"), *arguments],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        check=False,
    )


# ------------------------------------------------------------------ what the user types wrongly


@pytest.mark.parametrize(
    ("arguments", "code", "parts"),
    [
        ((CONFIG, "--config.optim.lrr=1"), 2, ("no key 'optim.lrr'", "--config.optim.lr")),
        ((CONFIG, "--config.train.steps=many"), 2, ("--config.train.steps=many",)),
        ((CONFIG, "--config.data.crop_size=big"), 2, ("data.crop_size", "multiple of 32")),
        ((CONFIG + ":large",), 2, ("configs/synthetic.py:large", "it has resnet | vit")),
        (("--config=configs/coco.py:swin_huge",), 2, ("has no variant 'swin_huge'", "swin_large")),
        (("--config=configs/ade20k.py:swin_large,res=896",), 2, ("--mode=train needs --workdir",)),
        (("--config=configs/nothing.py",), 2, ("configs/nothing.py", "shipped are ade20k")),
        (("--config.optim.lr=1",), 2, ("--config=FILE",)),
        (("--wrkdir=x",), 2, ("wrkdir", "workdir")),
        (("--mode=trian",), 2, ("trian", "|convert|export|prepare|import|inspect|compile|replay")),
        (("--mode=predict", "--task=panoptik"), 2, ("panoptik", "panoptic|instance|semantic|all")),
        ((CONFIG, "--mode=train"), 2, ("--mode=train needs --workdir",)),
        (("--mode=compile",), 2, ("--mode=compile needs --config",)),
        (
            (CONFIG, "--workdir=x", "--save=FILE"),
            2,
            ("--save belongs to --mode=compile, not to --mode=train",),
        ),
        ((CONFIG, "--mode=compile", "--compiled=FILE"), 2, ("--compiled belongs to --mode=train",)),
        (
            (CONFIG, "--mode=compile", "--config.mesh.topology=v9:1"),
            1,
            ("mesh.topology", "v5e:4x4"),
        ),
        (("--mode=eval", "--workdir=w"), 2, ("--mode=eval needs --config",)),
        (("--mode=predict", "--workdir=w"), 2, ("--mode=predict needs --image",)),
        (("--mode=report",), 2, ("--mode=report needs --workdir",)),
        (("--mode=report", "--workdir=tests"), 1, ("error: tests holds no run",)),
        ((CONFIG, "--workdir=w", "--compare=v"), 2, ("--compare belongs to --mode=report",)),
        (
            (CONFIG, "--workdir=w", "--threshold=0.5"),
            2,
            ("--threshold belongs to --mode=predict or demo, not to --mode=train",),
        ),
        (
            (CONFIG, "--mode=eval", "--workdir=w", "--output=x"),
            2,
            ("--output belongs to --mode=predict or inspect or convert or export or report",),
        ),
        ((CONFIG, "--mode=compile", "--license=x"), 2, ("to --mode=convert or export,",)),
        (("--mode=predict", "--image=x"), 2, ("needs --workdir=... or --weights=...",)),
        (("--mode=demo",), 2, ("--mode=demo needs --workdir=... or --weights=...",)),
        (("--mode=demo", "--weights=x", "--port=99999"), 2, ("--port=99999", "65535")),
        (("--mode=predict", "--image=x", "--workdir=w", "--weights=v"), 2, ("not both",)),
        (("--mode=predict", "--image=x", "--weights=v"), 2, ("needs --output=FOLDER",)),
        (("--mode=predict", "--image=x", "--workdir=main.py"), 2, ("needs --output=FOLDER",)),
        (
            ("--mode=predict", "--image=main.py", "--workdir=w", "--config.optim.lr=1"),
            1,
            ("--config.optim.lr does nothing in prediction", "eval., kernels."),
        ),
        (
            ("--mode=predict", "--image=main.py", "--workdir=w", "--config.eval.shortedge=1"),
            2,
            ("no key 'eval.shortedge'", "eval.short_edge"),
        ),
        (("--mode=prepare", "--dataset=coco"), 2, ("--mode=prepare needs --source",)),
        (("--mode=prepare", "--dataset=coc"), 2, ("coc", "coco|ade20k|cityscapes|mapillary")),
        (("--mode=export", "--size=1x1"), 2, ("--mode=export needs --output",)),
        (("--mode=export", "--output=x"), 2, ("--mode=export needs --size",)),
        (("--mode=export", "--output=x", "--size=64x64"), 2, ("needs --workdir=... or --w",)),
        ((*EXPORT, "--size=64x64"), 2, ("needs --format=stablehlo or onnx",)),
        ((*EXPORT, "--size=64x64", "--format=official"), 2, ("needs --format=stablehlo or onnx",)),
        ((*EXPORT, "--size=64", "--format=onnx"), 2, ("--size=64: it must be a height and a",)),
        ((*EXPORT, "--size=64x64", "--format=onnx"), 2, ("needs --task=panoptic, instance or",)),
        (
            ("--mode=convert", "--source=a", "--output=b", "--format=onnx"),
            2,
            ("--mode=convert needs --format=workdir or official or hugging_face",),
        ),
        (("--mode=import", "--source=a"), 2, ("--mode=import needs --format=labelme or cvat",)),
        (
            ("--mode=import", "--source=a", "--format=official"),
            2,
            ("needs --format=labelme or cvat",),
        ),
        (("--mode=inspect",), 2, ("--mode=inspect needs --config",)),
        (("--workdir=w", "stray"), 2, ("'stray' is not a flag",)),
    ],
)
def test_a_wrong_command_is_one_line(arguments, code, parts, monkeypatch, capsys):
    # A fresh parse in this process: a process of its own would cost seconds each time.
    argv = ["main.py", *arguments]
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(sys, "argv", argv)  # where ml_collections looks for overrides
    monkeypatch.setattr(compile, "spare_the_host", lambda: None)  # this process has other tests
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as exit_:
        cli.main(cli.parse_flags(argv))
    assert exit_.value.code == code
    error = capsys.readouterr().err
    assert error.startswith("error: ")
    assert error.count("\n") == 1
    for part in parts:
        assert part in error


def test_every_flag_of_some_modes_names_them_in_its_help():
    """Holds the check to the help: a flag whose help names no mode acts in all."""
    key_flags = cli.flags.FLAGS.get_key_flags_for_module(cli)
    everywhere = {flag.name for flag in key_flags if not cli.modes_of(flag)}
    assert everywhere == {
        *("config", "workdir", "mode", "debug", "version"),
        *("distributed", "coordinator", "num_processes", "process_id", "startup_timeout"),
    }


def test_home_is_expanded_in_every_path(monkeypatch):
    """No shell does that after the "=" of a flag."""
    monkeypatch.setenv("HOME", "/home/me")
    given = {}
    monkeypatch.setattr(modes, "report", lambda *args: given.update(report=args))
    monkeypatch.setattr(modes, "prepare", lambda *args: given.update(prepare=args))
    for argv in (
        ("--mode=report", "--workdir=~/a", "--compare=~/b", "--output=~/c"),
        ("--mode=prepare", "--dataset=coco", "--source=~/a", "--data_dir=~/b"),
    ):
        with flagsaver.flagsaver():
            cli.main(cli.parse_flags(["main.py", *argv]))
    assert given["report"] == ("/home/me/a", ["/home/me/b"], "/home/me/c")
    assert given["prepare"][1:3] == ("/home/me/a", "/home/me/b")


def test_ctrl_c_promises_only_what_is_so(monkeypatch, capsys):
    def stopped(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(modes, "convert", stopped)
    argv = ["main.py", "--mode=convert", "--source=a", "--output=b"]
    with flagsaver.flagsaver(), pytest.raises(SystemExit) as exit_:
        cli.main(cli.parse_flags(argv))
    assert exit_.value.code == 130
    assert capsys.readouterr().err.splitlines()[-1] == "error: stopped"


def test_the_program_itself_reports_and_exits(tmp_path):
    result = run(CONFIG, "--config.optim.lrr=1", f"--workdir={tmp_path}")
    assert result.returncode == 2
    assert result.stderr.startswith("error: the config has no key 'optim.lrr'")
    assert result.stderr.count("\n") == 1


def test_help_lists_every_mode_and_flag_and_is_no_error(capsys):
    with pytest.raises(SystemExit) as exit_:
        cli.parse_flags(["main.py", "--help"])
    assert exit_.value.code == 0
    shown = capsys.readouterr().out
    for name in cli._MODES:
        assert f"\n  {name} " in shown
    for flag in ("config", "workdir", "weights", "threshold", "version", "debug"):
        assert f"\n  --{flag}: " in shown
    assert max(map(len, shown.splitlines())) <= 100
    assert "absl" not in shown and ".;" not in shown


def test_an_error_of_the_library_is_short_unless_debugged(tmp_path):
    arguments = ("--mode=predict", f"--workdir={tmp_path / 'none'}", "--image=docs/images")
    result = run(*arguments)
    assert result.returncode == 1
    assert "Traceback" not in result.stderr
    (line,) = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert f"{tmp_path / 'none'} does not exist" in line


# ------------------------------------------------------------------ what the modes hand over


@pytest.fixture
def config(tmp_path):
    config = synthetic.get_config()
    config.dataset.data_dir = str(tmp_path / "data")
    config.dataset.options = {"size": 64, "train_examples": 6, "validation_examples": 3}
    config.data.crop_size = (64, 64)
    config.data.batch_size = 2
    config.eval.batch_size = 2
    config.eval.short_edge = config.eval.max_size = 64
    config.lock()
    return config


def test_train_gets_data_that_fits_the_model(config, monkeypatch):
    from oneformer_jax.train import loop

    def train(*given, metadata, text_table, train_batches, eval_batches, image_ids, compiled_step):
        assert (*given, compiled_step) == (config, "run", "FILE@SHA256")
        classes, slots = metadata.num_classes, config.data.num_slots
        assert metadata.dataset == "synthetic"
        assert text_table.shape[0] == classes + 3
        resumed, first = train_batches(2), train_batches(0)
        batch = next(resumed)
        one = sharding.make_mesh(devices=jax.devices()[:1])
        abstract = states.abstract_batch(config, one)  # what compile mode takes for a batch
        assert {name: (x.shape, x.dtype) for name, x in batch.items() if name != "index"} == {
            name: (x.shape, x.dtype) for name, x in abstract.items()
        }
        assert batch["segment_map"].max() <= slots
        assert batch["classes"].shape == batch["valid"].shape == (2, slots)
        texts = config.model.num_queries - config.model.num_context
        assert batch["text_ids"].shape == (2, texts)
        assert batch["text_ids"].max() < len(text_table)
        third = [next(first) for _ in range(3)][2]
        for key in batch:
            np.testing.assert_array_equal(batch[key], third[key])
        passes = [list(eval_batches(0)) for _ in range(2)]
        # A batch of 2, rounded up to one for each of the 8 devices of the tests.
        assert [len(p) for p in passes] == [1, 1]
        assert sorted(np.concatenate([b["index"] for b in passes[0]])) == [-1] * 5 + [0, 1, 2]
        assert len(set(image_ids([0, 5]))) == 2
        calls.append("train")
        resumed.close(), first.close()

    calls = []
    monkeypatch.setattr(loop, "train", train)
    modes.train(config, "run", "FILE@SHA256")
    assert calls == ["train"]


def test_train_says_which_classes_never_occur_before_it_starts(tmp_path, monkeypatch, caplog):
    from oneformer_jax.configs import custom
    from oneformer_jax.train import loop

    for split in ("train", "validation"):
        for folder, pixels in (("images", (32, 32, 3)), ("labels", (32, 32))):
            (tmp_path / folder / split).mkdir(parents=True)
            Image.fromarray(np.zeros(pixels, np.uint8)).save(tmp_path / folder / split / "a.png")
    (tmp_path / "classes.txt").write_text("0 ground\n4 tree\n")
    config = custom.get_config("small,data=semantic")
    config.dataset.data_dir = str(tmp_path)
    monkeypatch.setattr(loop, "train", lambda *_, **__: None)
    modes.train(config, "run")
    assert "1 of 2 classes occur in none of the 1 annotations looked at: tree" in caplog.text
    config.data.max_pixels = 32 * 32 - 1
    source, _ = data.open_split(config, "train")
    with pytest.raises(ValueError, match=r"data\.max_pixels, 1,023"):
        source[0]


@pytest.mark.parametrize(
    ("only_task", "expected"),
    [
        ("", (0.33, 0.33)),
        ("panoptic", (0.0, 0.0)),
        ("instance", (0.0, 1.0)),
        ("semantic", (1.0, 0.0)),
    ],
)
def test_one_task_alone_can_be_trained(config, only_task, expected):
    with config.unlocked():
        config.data.only_task = only_task
    settings = data.train_loader_config(config)
    assert (settings.semantic_prob, settings.instance_prob) == expected


def test_epochs_become_steps(config):
    source, _ = data.open_split(config, "train")
    assert data.with_steps(config, source) is config
    with config.unlocked():
        config.train.epochs = 5.0
    changed = data.with_steps(config, source)
    assert changed.train.steps == 15  # five times six images in batches of two
    assert config.train.steps != 15
    with config.unlocked():
        config.train.epochs = 0.01
    assert data.with_steps(config, source).train.steps == 1


def test_the_text_template_reaches_the_table_and_the_loader(config, monkeypatch):
    from oneformer_jax.train import loop

    def train(*_, metadata, text_table, train_batches, **__):
        batches = train_batches(0)
        highest.append((metadata.num_classes, len(text_table), next(batches)["text_ids"].max()))
        batches.close()

    highest = []
    monkeypatch.setattr(loop, "train", train)
    with config.unlocked():
        config.data.text_template = "{CLS} {TYPE}"
        config.data.only_task = "instance"
    modes.train(config, "run")
    ((classes, rows, top),) = highest
    assert rows == 2 * classes + 3
    assert classes + 3 <= top < rows


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("only_task", "all", r"data\.only_task is 'all'; it must be one of '', panoptic, instance"),
        ("text_template", "a photo", r"data\.text_template is 'a photo'"),
    ],
)
def test_bad_tasks_and_templates_are_refused(config, key, value, message):
    with config.unlocked():
        config.data[key] = value
    with pytest.raises(ValueError, match=message):
        data.train_loader_config(config)


def test_evaluation_batches_are_sampled_and_have_views(config):
    with config.unlocked():
        config.eval.tta.enabled = True
        config.eval.tta.short_edges = (32, 96)
    source, _ = data.open_split(config, "validation")
    batches = data.eval_batches(config, source)
    found = [batch for limit in (0, 2) for batch in batches(limit)]
    # A batch of 2, rounded up to one for each of the 8 devices of the tests.
    assert [b["index"].tolist() for b in found] == [[0, 1, 2] + [-1] * 5, [0, 1] + [-1] * 6]
    assert [v["image"].shape[1:3] for v in found[0]["views"]] == [(32, 32), (96, 96)]


def test_eval_gets_the_validation_split(config, monkeypatch):
    from oneformer_jax.train import loop

    def evaluate_workdir(given, workdir, *, metadata, eval_batches, which):
        assert (given, workdir, which) == (config, "run", 7)
        assert metadata.dataset == "synthetic"
        assert sum(int(b["valid"].sum()) for b in eval_batches(0)) == 3
        calls.append("eval")

    calls = []
    monkeypatch.setattr(loop, "evaluate_workdir", evaluate_workdir)
    monkeypatch.setattr(checkpoint, "find_checkpoint", lambda *_: calls.append("find"))
    modes.evaluate(config, "run", 7)
    assert calls == ["find", "eval"]


def test_eval_and_replay_find_what_is_missing_before_they_open_data(tmp_path, monkeypatch, config):
    monkeypatch.setattr(data, "open_split", lambda *_: pytest.fail("data was opened"))
    with pytest.raises(ValueError, match="does not exist; expected a workdir"):
        modes.evaluate(config, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="nowhere does not exist; expected the workdir of a run"):
        modes.replay(config, str(tmp_path / "nowhere"))
    with pytest.raises(ValueError, match="holds no recorded step"):
        modes.replay(config, str(tmp_path))


def test_inspect_draws_and_counts(config, tmp_path, capsys):
    modes.inspect_data(config, str(tmp_path / "sheet"), count=3)
    with Image.open(tmp_path / "sheet" / "samples.png") as picture:
        assert picture.height > picture.width / 2  # two rows of two
    printed = capsys.readouterr().out
    assert "6 images" in printed and "13 classes (7 things)" in printed
    assert str(tmp_path / "sheet" / "samples.png") in printed


@pytest.fixture
def spoiled(tmp_path):
    """The config of an instance JSON of two images; `write(rows)` sets its annotations."""
    (tmp_path / "images").mkdir()
    for i in (1, 2):
        Image.new("RGB", (64, 64)).save(tmp_path / "images" / f"{i}.jpg")
    images = [{"id": i, "file_name": f"{i}.jpg", "height": 64, "width": 64} for i in (1, 2)]
    categories = [{"id": 1, "name": "cat"}]

    def write(*rows):
        square = [[8, 8, 32, 8, 32, 32, 8, 32]]
        rows = [
            {"id": i, "image_id": 1, "category_id": 1, "segmentation": square, **row}
            for i, row in enumerate(rows)
        ]
        content = {"images": images, "categories": categories, "annotations": rows}
        (tmp_path / "instances_train.json").write_text(json.dumps(content))

    config = custom.get_config("small,data=instances")
    config.dataset.data_dir = str(tmp_path)
    config.data.crop_size = (64, 64)
    config.data.batch_size = 2
    config.lock()
    return config, write


def test_inspect_lists_every_fault_and_goes_on(spoiled, tmp_path, capsys):
    config, write = spoiled
    write({}, {"segmentation": [[5, 5, 5, 5]]}, {"category_id": 9}, {"segmentation": "x"}, {})
    modes.inspect_data(config, str(tmp_path / "sheet"), count=2)
    printed = capsys.readouterr().out
    assert "faults (3), which end a training without data.skip_broken=True" in printed
    assert "1 x polygon without three points" in printed and "odd, but read (1)" in printed
    listed = (tmp_path / "sheet" / "faults.txt").read_text()
    assert listed.startswith("faults: 3\n") and "annotation 2 has category_id 9" in listed
    assert (tmp_path / "sheet" / "samples.png").is_file()


def test_inspect_writes_the_faults_also_where_it_must_stop(spoiled, tmp_path):
    config, write = spoiled
    write({"iscrowd": 1}, {"iscrowd": 1})
    with pytest.raises(ValueError, match=r"CVAT(?s:.*)listed in .*faults\.txt"):
        modes.inspect_data(config, str(tmp_path / "sheet"), count=2)
    assert "2 of 2 annotations" in (tmp_path / "sheet" / "faults.txt").read_text()


def test_skip_broken_reaches_the_preparation_of_a_folder(config, monkeypatch):
    from oneformer_jax.input_pipeline import sources

    seen = []
    monkeypatch.setattr(sources, "open_source", lambda name, **rest: seen.append((name, rest)))
    data.open_split(config, "train")
    with config.unlocked():
        config.dataset.name, config.dataset.options = "coco_folder", {}
        config.data.skip_broken = True
    data.open_split(config, "validation")
    assert "skip_broken" not in seen[0][1]["options"]
    assert seen[1][1]["options"] == {"skip_broken": True}
    assert [rest["split"] for _, rest in seen] == ["train", "validation"]


# ------------------------------------------------------------------ start


def test_the_compilation_cache_is_chosen_in_order(tmp_path, monkeypatch):
    before = jax.config.jax_compilation_cache_dir
    try:
        cli.start_jax(ConfigDict({"compilation_cache": str(tmp_path / "own")}))
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
        cli.start_jax()  # JAX_COMPILATION_CACHE_DIR, or what is set already
        assert jax.config.jax_compilation_cache_dir == str(tmp_path / "own")
        jax.config.update("jax_compilation_cache_dir", None)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "user"))
        cli.start_jax()
        expected = str(tmp_path / "user" / "oneformer_jax")
        assert jax.config.jax_compilation_cache_dir == expected
    finally:
        jax.config.update("jax_compilation_cache_dir", before)


def test_distributed_flags_and_environment(monkeypatch):
    from oneformer_jax.train.runtime import distributed

    calls = []
    monkeypatch.setattr(distributed, "start", lambda *arguments: calls.append(arguments))
    cli.start_jax()
    with flagsaver.flagsaver(distributed=True):
        cli.start_jax()
        monkeypatch.setenv("JAX_NUM_PROCESSES", "4")
        monkeypatch.setenv("JAX_PROCESS_ID", "2")
        monkeypatch.setenv("JAX_COORDINATOR_ADDRESS", "here:80")
        cli.start_jax()
    with flagsaver.flagsaver(process_id=1, startup_timeout=9.0):
        cli.start_jax()
    (nothing, _, facts), (second, _, _), (third, timeout, _) = calls
    assert {"--mode", "--workdir", "source", "jax"} < facts.keys()
    assert nothing is None
    assert (second.process, second.count, second.coordinator) == (2, 4, "here:80")
    assert (third.process, third.count, timeout) == (1, 4, 9.0)
