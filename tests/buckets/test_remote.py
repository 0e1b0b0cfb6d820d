"""Objects of a bucket: named, listed, read, written, removed; and what is said if that fails."""

import importlib.util

import pytest

from oneformer_jax import files, remote
from oneformer_jax.remote import RemoteError


def test_a_path_is_local_or_a_url(tmp_path, url):
    assert remote.path_of(tmp_path / "a") == tmp_path / "a"
    assert not remote.is_remote("runs/http://a")
    found = remote.path_of(url) / "a" / "b.txt"
    assert remote.is_remote(found) and str(found) == f"{url}/a/b.txt"
    assert (found.name, str(found.parent)) == ("b.txt", f"{url}/a")


@pytest.mark.parametrize(
    "text",
    [
        *("http://host/run", "az://bucket/run", "file:///tmp/run", "gs://", "gs:///run"),
        *("gs://B/run", "gs://-a/run", "gs://bucket?x/run", "gs://a b/run"),
    ],
)
def test_another_url_is_refused(text):
    with pytest.raises(RemoteError, match=r"is no URL that this program reads; use gs://BUCKET/"):
        remote.path_of(text)


@pytest.mark.parametrize(
    "key", ["a*", "a[1]", "a?b", "a#b", "{a}", "a\\b", "a\nb", "a/../b", "%2e"]
)
def test_characters_that_mean_something_else_are_refused(key):
    with pytest.raises(RemoteError, match="has characters that stand for something else") as error:
        remote.path_of(f"gs://bucket/{key}")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(("scheme", "extra"), [("gs", "gcs"), ("s3", "s3")])
def test_a_missing_library_names_its_extra(monkeypatch, scheme, extra):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(RemoteError, match=rf'pip install "oneformer-jax\[{extra}\]"'):
        remote.path_of(f"{scheme}://bucket/run")


def test_objects_are_written_listed_read_moved_and_removed(url):
    folder = remote.path_of(url)
    assert remote.names(folder) == [] and remote.sizes(folder) == {} and not folder.exists()
    remote.check(folder, writing=True)
    assert not folder.exists()  # the check leaves nothing
    contents = {"a/b.txt": "one", "a/c/d.txt": "", "ab.txt": "three"}
    for name, text in contents.items():
        files.write_atomically(folder / name, text)
    assert sorted(remote.names(folder)) == ["a", "ab.txt"]
    assert remote.sizes(folder) == {name: len(text) for name, text in contents.items()}
    for name, text in contents.items():
        assert files.read_bytes(folder / name, limit=5) == text.encode()
        with files.open_regular(f"{url}/{name}") as file:
            assert file.read() == text.encode()
    with pytest.raises(files.FileError, match=r"ab.txt has more than 4 bytes"):
        files.read_bytes(f"{url}/ab.txt", limit=4)
    with pytest.raises(files.FileError, match=r"/x.txt is missing"):
        files.read_bytes(f"{url}/x.txt", limit=4)
    files.write_atomically(folder / "a/b.txt", "another")
    assert remote.names(folder / "a") == ["b.txt", "c"]  # nothing is remembered of earlier requests
    remote.move(folder / "a", folder / "z")
    assert remote.sizes(folder) == {"z/b.txt": 7, "z/c/d.txt": 0, "ab.txt": 5}
    remote.remove(folder / "z")
    assert remote.sizes(folder) == {"ab.txt": 5}  # and not what begins alike
    remote.remove(folder / "ab.txt")
    remote.remove(folder / "ab.txt")
    assert not folder.exists()


def test_a_growing_object_is_stored_whole_and_goes_on_from_what_it_held(server, bucket, url):
    with remote.Growing(f"{url}/log") as log:
        log.write(b"one\n")
        log.flush()
        assert server.objects(bucket) == []
        log.store()
        assert remote.path_of(f"{url}/log").read_text() == "one\n"
        before = server.requests
        log.store()
        assert server.requests == before
        log.write(b"two\n")
    with remote.Growing(f"{url}/log", append=True) as log:
        log.write(b"three\n")
    assert remote.path_of(f"{url}/log").read_text() == "one\ntwo\nthree\n"


FAULTS = {
    401: r"there are no valid credentials .*; run `gcloud auth application-default login`",
    403: r"permission is denied .*; ask its owner for the right to read and write",
}


@pytest.mark.parametrize("status", FAULTS)
def test_what_a_bucket_refuses_is_one_line_with_the_way_out(server, bucket, url, status):
    server.refused[f"/b/{bucket}/"] = status
    uses = (
        lambda: remote.check(url),
        lambda: files.read_bytes(f"{url}/a", limit=9),
        lambda: files.write_atomically(f"{url}/a", "text"),
        lambda: remote.Growing(f"{url}/a").store(),
    )
    for use in uses:
        with pytest.raises((RemoteError, files.FileError), match=FAULTS[status]) as error:
            use()
        assert url in str(error.value) and "\n" not in str(error.value)


def test_reading_may_be_allowed_and_writing_not(server, bucket, url):
    server.refused[f"/upload/storage/v1/b/{bucket}/"] = 403
    remote.check(url)
    with pytest.raises(RemoteError, match="permission is denied"):
        remote.check(url, writing=True)


def test_a_bucket_that_is_not_there(server):
    for writing in (False, True):
        with pytest.raises(RemoteError, match="there is no bucket 'nobodys'; make it, or mend its"):
            remote.check("gs://nobodys/run", writing=writing)


def test_what_must_be_local_says_so(url):
    with (
        pytest.raises(RemoteError, match=r"this output cannot be in a bucket .* use a folder"),
        files.replacing(f"{url}/a"),
    ):
        pass
