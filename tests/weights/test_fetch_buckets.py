"""Weights by name: files of buckets."""

import os
from typing import ClassVar

import fsspec
import pytest
from fsspec.implementations.memory import MemoryFileSystem
from fsspec.registry import _registry

from oneformer_jax import remote
from oneformer_jax.weights import download, fetch
from tests.weights.test_fetch import CONTENT, one_line


@pytest.fixture
def bucket(server, monkeypatch):
    """A bucket in memory under gs://."""
    monkeypatch.setitem(_registry, "gs", Bucket)
    system = fsspec.filesystem("gs")
    system.pipe("/bucket/folder/model.pth", CONTENT)
    yield system
    system.store.clear()


class Bucket(MemoryFileSystem):
    protocol = "gs"
    store: ClassVar[dict] = {}

    @classmethod
    def _strip_protocol(cls, path):
        return "/" + path.removeprefix("gs://").strip("/")


def test_a_file_of_a_bucket_is_kept_until_it_changes(bucket, monkeypatch):
    path = fetch.local_path("gs://bucket/folder/model.pth")
    assert path.read_bytes() == CONTENT
    opened = []
    monkeypatch.setattr(Bucket, "_open", lambda *_, **__: opened.append(1))
    assert fetch.local_path("gs://bucket/folder/model.pth") == path and not opened
    monkeypatch.undo()


def test_a_bucket_that_breaks_goes_on_where_it_broke(bucket, monkeypatch):
    read = MemoryFileSystem._open
    seeks = []

    class Breaking:
        def __init__(self, file):
            self.file = file

        def __enter__(self):
            return self

        def __exit__(self, *_):
            pass

        def seek(self, place):
            seeks.append(place)
            self.file.seek(place)

        def read(self, _):
            if self.file.tell() >= 3000 and len(seeks) < 3:
                raise ConnectionResetError("reset")
            return self.file.read(1000)

    monkeypatch.setattr(Bucket, "_open", lambda *given, **named: Breaking(read(*given, **named)))
    monkeypatch.setattr(download, "_check_size", lambda *_: None)
    assert fetch.local_path("gs://bucket/folder/model.pth").read_bytes() == CONTENT
    assert seeks == [0, 3000, 3000]


def test_what_a_bucket_does_not_have_is_one_line(bucket):
    one_line(lambda: fetch.local_path("gs://bucket/no.pth"), "no such file in the bucket")
    # Without the ending of a file of weights it is a workdir, which is read where it is.
    found = fetch.local_path("gs://bucket/folder")
    assert os.fspath(found) == "gs://bucket/folder"
    assert fetch.local_path(found) == found  # a path that was found already
    for name in ("gs://bucket/a*b", "gs://bucket/a*b.pth", "gs://bucket/../b.pth"):
        one_line(lambda name=name: fetch.local_path(name), "characters that stand for something")
    for name in ("gs://", "gs://a::file:///etc/passwd", "gs://a::file:///etc/passwd.pth"):
        one_line(lambda name=name: fetch.local_path(name), "use gs://BUCKET/FOLDER")


def test_a_bucket_whose_package_is_missing_is_one_line(server, monkeypatch):
    monkeypatch.setattr(remote.importlib.util, "find_spec", lambda _: None)
    one_line(lambda: fetch.local_path("s3://bucket/a.pth"), '"oneformer-jax[s3]"')


def test_a_bucket_that_is_away_is_one_line_or_the_cache_serves(bucket, monkeypatch):
    path = fetch.local_path("gs://bucket/folder/model.pth")

    def away(*_, **__):
        raise RuntimeError("no credentials\nof any kind")

    monkeypatch.setattr(Bucket, "info", away)
    assert fetch.local_path("gs://bucket/folder/model.pth") == path
    one_line(lambda: fetch.local_path("gs://bucket/a.pth"), "RuntimeError", "no credentials")

    def refused(*_, **__):
        raise PermissionError("Forbidden, 403")

    monkeypatch.setattr(Bucket, "info", refused)
    one_line(lambda: fetch.local_path("gs://bucket/a.pth"), "ask its owner for the right to read")
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    monkeypatch.setattr(download.fsspec.core, "url_to_fs", away)
    assert fetch.local_path("gs://bucket/folder/model.pth") == path
    one_line(lambda: fetch.local_path("gs://bucket/a.pth"), "HF_HUB_OFFLINE")
