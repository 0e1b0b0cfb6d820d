"""Models of the hub by name, and pushing one: the real client against a server on loopback."""

import hashlib
import json
import logging
import os
import pathlib
import re
import subprocess
import sys

import numpy as np
import pytest
import safetensors.numpy
from ml_collections import ConfigDict

import oneformer_jax
from oneformer_jax.app import modes
from oneformer_jax.configs import common
from oneformer_jax.files import FileError
from oneformer_jax.models import functional
from oneformer_jax.train import checkpoint, start
from oneformer_jax.weights import convert, fetch, files, hub
from tests import tiny
from tests.weights.hub_server import Model
from tests.weights.test_fetch import one_line

ROOT = pathlib.Path(__file__).resolve().parents[2]
NAME = "shi-labs/oneformer_tiny"


@pytest.fixture(scope="module")
def model():
    config = tiny.model_config(encoder_points=4)
    return config, tiny.random_model(config)


@pytest.fixture(scope="module")
def folder(tmp_path_factory, model):
    """A Hugging Face folder of the smallest model."""
    config, weights = model
    path = tmp_path_factory.mktemp("model") / "folder"
    settings = {"short_edge": 64, "max_size": 96, "topk": 5}
    convert.write_model(
        path,
        "hugging_face",
        config,
        weights.params,
        weights.stats,
        metadata=tiny.metadata(),
        settings=settings,
    )
    return path


@pytest.fixture
def content(folder):
    """The files of a model on the hub: what is needed, and what must not come."""
    found = {path.name: path.read_bytes() for path in folder.iterdir()}
    return found | {
        "pytorch_model.bin": b"a pickle",
        "modeling_oneformer.py": b"raise SystemExit",
        "preprocessor_config.json": b"{}",
        "model.pth": b"official",
    }


def sharded(content):
    """The same with its tensors in two files."""
    content = {name: value for name, value in content.items() if not name.startswith("pytorch")}
    tensors = safetensors.numpy.load(content.pop("model.safetensors"))
    names = sorted(tensors)
    parts = {"a.safetensors": names[::2], "b.safetensors": names[1::2]}
    for file, part in parts.items():
        content[file] = safetensors.numpy.save({name: tensors[name] for name in part})
    index = {"weight_map": {name: file for file, part in parts.items() for name in part}}
    return content | {"model.safetensors.index.json": json.dumps(index).encode()}


def fetched(server):
    """Names of the files that were downloaded."""
    names = {
        path.rsplit("/", 1)[1]
        for how, path, _ in server.asked
        if how == "GET" and "/resolve/" in path
    }
    stored = {
        path.rsplit("/", 1)[1] for how, path, _ in server.asked if how == "GET" and "/cdn/" in path
    }
    for each in server.models.values():
        for contents in each.revisions.values():
            names |= {n for n, c in contents.items() if hashlib.sha256(c).hexdigest() in stored}
    return names


# ------------------------------------------------------------------ fetching


def test_a_name_of_the_hub_loads_and_computes(server, content, model, caplog):
    server.models[NAME] = Model({"main": content})
    with caplog.at_level(logging.INFO, logger="absl"):
        segmenter = oneformer_jax.load(NAME)
    assert fetched(server) == {"config.json", "oneformer_jax.json", "model.safetensors"}
    assert hashlib.sha256(content["model.safetensors"]).hexdigest() in caplog.text
    assert segmenter.metadata == tiny.metadata()
    read = convert.read_model(fetch.local_path(NAME))
    assert read.config == model[0]


def test_what_is_there_is_not_fetched_again(server, content):
    server.models[NAME] = Model({"main": content})
    path = fetch.local_path(NAME)
    before = len([1 for how, *_ in server.asked if how == "GET"])
    assert fetch.local_path(NAME) == path
    assert len([1 for how, *_ in server.asked if how == "GET"]) == before


def test_a_revision_is_taken_as_it_is_named(server, content):
    old = {name: value for name, value in content.items() if name != "oneformer_jax.json"}
    server.models[NAME] = Model({"main": content, "v1": old, "refs/pr/1": old})
    commit = server.models[NAME].commit("v1")
    for revision in ("v1", commit):
        path = fetch.local_path(f"{NAME}@{revision}")
        assert path.name == commit and not (path / "oneformer_jax.json").exists()
    assert (fetch.local_path(NAME) / "oneformer_jax.json").exists()
    one_line(lambda: fetch.local_path(f"{NAME}@v2"), "no revision 'v2'")


def test_shards_come_as_their_index_names_them(server, content):
    server.models[NAME] = Model({"main": sharded(content)})
    path = fetch.local_path(NAME)
    whole = safetensors.numpy.load(content["model.safetensors"])
    tensors = files.open_tensors(path).tensors
    assert sorted(tensors) == sorted(whole)
    name = next(iter(whole))
    np.testing.assert_array_equal(tensors[name].read(), whole[name])


@pytest.mark.parametrize("file", ["../../secret", "/etc/passwd", "a/b", "", "x\n", "c.safetensors"])
def test_an_index_reaches_no_other_file(server, content, file):
    content = sharded(content)
    index = json.loads(content["model.safetensors.index.json"])
    index["weight_map"]["one"] = file
    content["model.safetensors.index.json"] = json.dumps(index).encode()
    server.models[NAME] = Model({"main": content})
    with pytest.raises(FileError):
        fetch.local_path(NAME)
    assert not any("secret" in path or "passwd" in path for _, path, _ in server.asked)


def test_safetensors_go_before_pickles_which_are_taken_where_they_are_alone(server, content):
    del content["model.safetensors"]
    server.models[NAME] = Model({"main": content})
    path = fetch.local_path(NAME)
    assert (path / "pytorch_model.bin").exists()
    with pytest.raises(FileError, match=r"pytorch_model\.bin"):
        oneformer_jax.load(NAME)  # read by the interpreter that runs nothing


def test_a_model_without_weights_or_config_is_one_line(server, content):
    server.models[NAME] = Model({"main": {"config.json": b"{}", "model.pth": b""}})
    one_line(lambda: fetch.local_path(NAME), "has none of model.safetensors")
    server.models["a/b"] = Model({"main": {"model.pth": b""}})
    one_line(lambda: fetch.local_path("a/b"), "has no config.json", "/a/b/resolve/main/FILE")


def test_a_connection_that_breaks_is_taken_up(server, content, monkeypatch):
    monkeypatch.setattr("huggingface_hub.file_download.time.sleep", lambda _: None)
    monkeypatch.setattr("huggingface_hub.constants.DOWNLOAD_CHUNK_SIZE", 10_000)
    server.models[NAME] = Model({"main": content})
    server.cdn_breaks = [25_000]
    path = fetch.local_path(NAME)
    assert (path / "model.safetensors").read_bytes() == content["model.safetensors"]
    starts = [headers.get("Range") for headers in server.requests("GET", "/cdn/")]
    assert starts[0] is None and re.fullmatch(r"bytes=\d+-", starts[1])


def test_a_wrong_checksum_is_refused_and_not_kept(server, content):
    server.models[NAME] = Model({"main": content})
    digest = hashlib.sha256(content["model.safetensors"]).hexdigest()
    server.spoilt.add(digest)
    for _ in range(2):  # not taken from the cache the second time
        one_line(lambda: fetch.local_path(NAME), "model.safetensors", digest, "not kept")
    server.spoilt.clear()
    assert (fetch.local_path(NAME) / "model.safetensors").exists()


def test_a_model_that_is_not_shown_is_one_line(server, content, monkeypatch):
    one_line(lambda: fetch.local_path(NAME), "no such model, or it is private", "HF_TOKEN")
    server.models[NAME] = Model({"main": content}, private=True)
    one_line(lambda: fetch.local_path(NAME), "no such model, or it is private", "OWNER/NAME")
    server.models["a/gated"] = Model({"main": content}, gated=True)
    one_line(lambda: fetch.local_path("a/gated"), "is gated", f"{server.url}/a/gated", "HF_TOKEN")
    monkeypatch.setenv("HF_TOKEN", server.token)
    assert fetch.local_path(NAME).exists()
    assert fetch.local_path("a/gated").exists()
    assert server.requests("GET", "/cdn/")[0].get("Authorization") in (
        None,
        f"Bearer {server.token}",
    )


def offline(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)


@pytest.mark.parametrize("form", ["safetensors", "pickle", "shards"])
def test_offline_the_cache_serves(server, content, monkeypatch, form):
    if form == "pickle":
        del content["model.safetensors"]
    server.models[NAME] = Model({"main": sharded(content) if form == "shards" else content})
    path = fetch.local_path(NAME)
    asked = len(server.asked)
    offline(monkeypatch)
    assert fetch.local_path(NAME) == path
    one_line(lambda: fetch.local_path("a/b"), "HF_HUB_OFFLINE")
    one_line(lambda: fetch.local_path(f"{NAME}@v1"), "HF_HUB_OFFLINE")
    assert len(server.asked) == asked


def test_without_a_network_the_cache_serves_or_one_line_says_so(server, content, monkeypatch):
    server.models[NAME] = Model({"main": content})
    path = fetch.local_path(NAME)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    dead = "http://127.0.0.1:9"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", dead)
    monkeypatch.setattr(
        "huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE",
        dead + "/{repo_id}/resolve/{revision}/{filename}",
    )
    assert fetch.local_path(NAME) == path
    one_line(
        lambda: fetch.local_path("a/b"), "neither a path", "the hub does not answer as it should ("
    )


def test_weights_that_the_hub_did_not_deny_are_not_replaced_by_a_pickle(
    server, content, monkeypatch
):
    server.models[NAME] = Model({"main": content})
    file = hub._file

    def broken(client, name, wanted, *rest):
        if wanted == "model.safetensors":
            raise client.errors.LocalEntryNotFoundError("the network went away")
        return file(client, name, wanted, *rest)

    monkeypatch.setattr(hub, "_file", broken)
    one_line(lambda: fetch.local_path(NAME), "does not answer")
    assert "pytorch_model.bin" not in fetched(server)


def test_a_busy_hub_is_one_line(server, monkeypatch):
    def busy(handler, *_):
        handler._error(503, "", "maintenance\nuntil noon")

    monkeypatch.setattr("tests.weights.hub_server._Handler._resolve", busy)
    one_line(lambda: fetch.local_path(NAME), "does not answer")


# ------------------------------------------------------------------ the doors


@pytest.fixture
def published(server, content):
    server.models[NAME] = Model({"main": content})
    return server


def test_conversion_takes_a_name(published, tmp_path, capsys):
    modes.convert(NAME, str(tmp_path / "run"))
    assert f"{NAME} is converted to" in capsys.readouterr().out
    assert checkpoint.load_for_inference(tmp_path / "run").metadata == tiny.metadata()


@pytest.mark.parametrize("key", ["checkpoint", "backbone"])
def test_a_run_starts_from_a_name(published, model, key):
    config, _ = model
    trees = functional.abstract(config, training=True)[1:]
    init = ConfigDict({"checkpoint": "", "backbone": ""} | {key: NAME})
    found = start.read_start(init, *trees, config.backbone)
    name = "backbone.stem.conv1.kernel"
    assert found.arrays[name]().shape == dict(convert.leaves(trees))[name].shape


def test_a_run_takes_the_architecture_of_a_name(published, model):
    config = common.get_base()
    config.init.checkpoint = NAME
    taken = start.take_architecture(config, common.get_base())
    assert taken.model.hidden_dim == model[0].hidden_dim
    assert taken.model.num_queries == model[0].num_queries


@pytest.mark.slow
def test_the_command_line_takes_a_name_and_its_errors_are_one_line(published, tmp_path):
    # The client reads its settings when it is imported, so only a program of its own shows them.
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith("HF_")},
        "HF_ENDPOINT": published.url,
        "HF_HOME": str(tmp_path / "home"),
        "JAX_PLATFORMS": "cpu",
    }

    def run(*arguments, **more):
        return subprocess.run(
            [sys.executable, "main.py", "--mode=convert", *arguments],
            cwd=ROOT,
            env=environment | more,
            capture_output=True,
            text=True,
            timeout=120,
        )

    done = run(f"--source={NAME}@main", f"--output={tmp_path / 'run'}")
    assert done.returncode == 0, done.stderr
    assert "SHA-256" in done.stderr and (tmp_path / "run" / "model.json").exists()
    failed = run("--source=a/b", f"--output={tmp_path / 'other'}", HF_HUB_OFFLINE="1")
    assert failed.returncode == 1
    (line,) = [line for line in failed.stderr.splitlines() if line.startswith("error: ")]
    assert "HF_HUB_OFFLINE" in line and "Traceback" not in failed.stderr


# ------------------------------------------------------------------ pushing


@pytest.fixture
def workdir(tmp_path, model):
    """A run of the smallest model with scores."""
    config, weights = model
    settings = {
        "eval": {"short_edge": 64, "max_size": 96, "topk": 5, "instance_json": "/secret/x.json"},
        "optim": {"lr": 1e-3},
        "init": {"backbone": "", "checkpoint": "https://me:SECRET@host/a.pth?key=SECRET"},
        "dataset": {"data_dir": "/home/secret"},
    }
    trained = checkpoint.Trained(
        config.to_dict(), weights.params, weights.stats, tiny.metadata(), settings, 0
    )
    checkpoint.write_converted(tmp_path / "run", trained)
    results = dict(
        dataset="tiny",
        token=None,
        images=3,
        metrics={"panoptic/PQ": 51.26, "instance/AP": None},
        reasons={},
        per_class=[],
        counts={},
        seconds={},
    )
    path = tmp_path / "run" / "eval" / "0" / "results.json"
    path.parent.mkdir(parents=True)
    path.write_text(json.dumps(results))
    return tmp_path / "run"


def push(workdir, name="me/mine", **more):
    output = workdir.parent / f"hf{len(list(workdir.parent.iterdir()))}"
    modes.convert(str(workdir), str(output), "hugging_face", push=name, **more)
    return output


def test_a_run_is_pushed_with_its_card_and_loads_again(server, workdir, model, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", server.token)
    output = push(workdir, "mine", license="apache-2.0")
    pushed = server.models["me/mine"]
    assert pushed.private and len(server.commits) == 1
    told = capsys.readouterr().out
    assert f"{server.url}/me/mine and is private" in told and "/me/mine/settings" in told
    there = pushed.revisions["main"]
    assert set(there) == {"README.md", *(path.name for path in output.iterdir())}
    assert there["model.safetensors"] == (output / "model.safetensors").read_bytes()
    card = there["README.md"].decode()
    assert card.startswith("---\nlicense: apache-2.0\n")
    assert "| panoptic/PQ | 51.3 |" in card and "instance/AP" not in card
    assert 'oneformer_jax.load("me/mine")' in card and '"lr": 0.001' in card
    assert "secret" not in card.lower()
    assert oneformer_jax.load("me/mine").metadata == tiny.metadata()
    assert convert.read_model(fetch.local_path("me/mine")).config == model[0]


def test_a_second_push_keeps_visibility_and_card(server, workdir, monkeypatch, capsys):
    monkeypatch.setenv("HF_TOKEN", server.token)
    server.models["me/mine"] = Model({"main": {"README.md": b"my own words"}})
    push(workdir)
    assert (
        "is public: everybody sees it; its README.md was there and is kept"
        in capsys.readouterr().out
    )
    assert server.models["me/mine"].revisions["main"]["README.md"] == b"my own words"
    assert "model.safetensors" in server.models["me/mine"].revisions["main"]


def test_a_model_without_scores_and_licence_says_so(server, workdir, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", server.token)
    (workdir / "eval" / "0" / "results.json").unlink()
    push(workdir)
    card = server.models["me/mine"].revisions["main"]["README.md"].decode()
    assert "## Scores" not in card and "license:" not in card
    assert "has not stated a licence" in card


@pytest.mark.parametrize(
    ("token", "name", "parts"),
    [
        (None, "me/mine", ("--push=me/mine needs a token", "hf auth login", "HF_TOKEN")),
        ("hf_wrong", "me/mine", ("HTTP 401", "hf auth login")),
        ("hf_right", "a/b/c", ("no name of a model",)),
        ("hf_right", "me/ä", ("no name of a model",)),
        ("hf_right", "others/theirs", ("HTTP 403", "don't have the rights", "hf auth login")),
    ],
)
def test_a_push_that_is_refused_is_one_line(server, workdir, monkeypatch, token, name, parts):
    if token:
        monkeypatch.setenv("HF_TOKEN", token)
    one_line(lambda: push(workdir, name), *parts)
    assert not server.commits


def test_a_push_is_refused_before_anything_is_written(server, workdir, monkeypatch):
    before = sorted(workdir.parent.iterdir())
    one_line(lambda: push(workdir), "needs a token")
    offline(monkeypatch)
    one_line(lambda: push(workdir), "HF_HUB_OFFLINE")
    assert sorted(workdir.parent.iterdir()) == before
    with pytest.raises(ValueError, match="--push needs --format=hugging_face"):
        modes.convert(str(workdir), str(workdir.parent / "x"), "official", push="me/mine")


@pytest.mark.parametrize("licence", ["MIT licence", "mit\nevil: 1", "x" * 60])
def test_a_licence_is_an_identifier(server, workdir, monkeypatch, licence):
    monkeypatch.setenv("HF_TOKEN", server.token)
    with pytest.raises(ValueError, match="is no identifier of the hub"):
        push(workdir, license=licence)
    assert not server.commits


def test_an_upload_that_breaks_leaves_no_commit(server, workdir, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", server.token)
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda _: None)
    monkeypatch.setattr(
        "tests.weights.hub_server._Handler.do_PUT",
        lambda handler: handler._answer(413, b"too large"),
    )
    one_line(lambda: push(workdir), "me/mine")
    assert not server.commits
