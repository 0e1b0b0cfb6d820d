"""Weights by name: what a name means, and files from the web."""

import base64
import hashlib
import logging
import os
import pathlib
import re
import threading

import hypothesis.strategies
import pytest
from hypothesis import given

import oneformer_jax
from oneformer_jax.files import FileError
from oneformer_jax.weights import download, fetch, hub
from tests.weights.hub_server import File

CONTENT = bytes(range(256)) * 4096  # 1 MiB
PIECE = download._PIECE
SHA = hashlib.sha256(CONTENT).hexdigest()


def one_line(call, *parts):
    """The message of a FileError of one line that has all of the parts."""
    with pytest.raises(FileError) as caught:
        call()
    message = str(caught.value)
    assert "\n" not in message
    for part in parts:
        assert part in message, message
    return message


def serve(server, name="model.pth", **fields):
    server.web[f"/web/{name}"] = File(CONTENT, **fields)
    return f"{server.url}/web/{name}"


def gets(server):
    return server.requests("GET", "/web/")


# ------------------------------------------------------------------ names


def test_what_is_there_goes_before_all_else(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(hub, "fetch", lambda *_: pytest.fail("the hub was asked"))
    (tmp_path / "owner" / "name@v1").mkdir(parents=True)
    for folder in ("owner", "owner/name@v1"):
        (tmp_path / folder / "model.json").touch()
    assert fetch.local_path("owner/name@v1") == fetch.local_path(
        tmp_path / "owner/name@v1"
    ).relative_to(tmp_path)
    (tmp_path / "https:").mkdir()
    (tmp_path / "https:" / "file").touch()
    assert os.path.samefile(fetch.local_path("https://file"), tmp_path / "https:" / "file")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert fetch.local_path("~/owner") == tmp_path / "owner"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("shi-labs/oneformer_coco_swin_large", ("shi-labs/oneformer_coco_swin_large", None)),
        ("a/b@main", ("a/b", "main")),
        ("a/b@refs/pr/1", ("a/b", "refs/pr/1")),
        ("hf://here/b@v1.0", ("here/b", "v1.0")),
    ],
)
def test_names_of_the_hub(name, expected, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "here").mkdir()
    monkeypatch.setattr(hub, "fetch", lambda *given: given)
    assert fetch.local_path(name) == expected


@pytest.mark.parametrize(
    "name",
    [
        *("nowhere", "", "a/b/c", "/no/where", "./a/b", "../a", "runs/synthetik", "a/b.pth"),
        *("a b/c", "a/b@", "a/b@x y", "x" * 5000, "a\0b", "a/\n", "@v1", "ftp://host/file"),
        *("file:///etc/passwd", "memory://x", "gcs://bucket/a.pth", "C:\\weights"),
        *("hf://a", "hf://a/b/c", "://", "a/b\n", "x\ny"),
    ],
)
def test_any_other_text_is_one_line_with_all_forms(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "synthetic").mkdir(parents=True)
    monkeypatch.setattr(hub, "fetch", lambda *_: pytest.fail("the hub was asked"))
    with pytest.raises(FileError) as caught:
        fetch.local_path(name)
    assert "\n" not in str(caught.value)
    for form in ("workdir", ".pth", "Hugging Face folder", "OWNER/NAME@REVISION", "https://", "gs"):
        assert form in str(caught.value)
    if name.startswith("runs/"):
        assert "(hf://runs/synthetik is that of the hub)" in str(caught.value)
        assert "did you mean 'synthetic'" in str(caught.value)


@given(
    hypothesis.strategies.sampled_from(["https://", "http://", "gs://", "hf://", ""]),
    hypothesis.strategies.text(),
)
def test_any_text_at_all_is_a_path_or_one_line(scheme, text):
    def refused(*_, **__):
        raise download.requests.ConnectionError("secret")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(download.requests.Session, "send", refused)
        patch.setattr(download, "from_bucket", lambda address: pathlib.Path(address))
        patch.setattr(download, "pause", lambda _: None)
        patch.setattr(hub, "fetch", lambda *given: pathlib.Path(given[0]))
        try:
            assert isinstance(fetch.local_path(scheme + text), os.PathLike)
        except FileError as error:
            assert "secret" not in str(error)
            assert "\n" not in str(error) and len(str(error)) < 1500


def test_a_file_or_folder_of_something_else_names_all_forms(tmp_path):
    (tmp_path / "notes.txt").write_text("a text")
    (tmp_path / "folder" / "sub").mkdir(parents=True)
    for name, part in (("notes.txt", "neither"), ("folder", "folder holds no weights")):
        one_line(
            lambda name=name: oneformer_jax.load(str(tmp_path / name)), part, "OWNER/NAME", "s3://"
        )


@pytest.mark.parametrize("name", ["model.pth", "model.stablehlo"])
def test_a_checkpoint_of_what_has_none_is_refused(tmp_path, name):
    (tmp_path / name).touch()
    with pytest.raises(ValueError, match=rf"{name} is .*; leave .*(it out|checkpoint)"):
        oneformer_jax.load(tmp_path / name, checkpoint=5)


def test_the_public_load_names_all_forms(tmp_path):
    one_line(lambda: oneformer_jax.load(str(tmp_path / "no")), "does not exist", "OWNER/NAME")


def test_without_the_extra_one_line_names_it(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    one_line(lambda: fetch.local_path("owner/name"), 'pip install "oneformer-jax[hub]"')


# ------------------------------------------------------------------ the web


def test_a_file_of_the_web_is_kept_and_asked_for_again_only_if_it_changed(server, caplog):
    url = serve(server)
    with caplog.at_level(logging.INFO, logger="absl"):
        path = fetch.local_path(url)
    assert path.read_bytes() == CONTENT and path.name == "model.pth"
    assert SHA in caplog.text and f"{len(CONTENT):,}" in caplog.text
    assert path.is_relative_to(os.path.join(os.environ["XDG_CACHE_HOME"], "oneformer_jax"))
    assert fetch.local_path(url) == path
    assert gets(server)[1]["If-None-Match"] == '"one"'
    server.web["/web/model.pth"] = File(b"new", '"two"')
    assert fetch.local_path(url).read_bytes() == b"new"
    assert sorted(os.listdir(path.parent)) == ["model.pth", "model.pth.json"]


def test_a_broken_connection_goes_on_where_it_broke(server):
    url = serve(server, breaks=[PIECE + 9, 0, 2 * PIECE])
    assert fetch.local_path(url).read_bytes() == CONTENT
    starts = [headers.get("Range") for headers in gets(server)]
    assert starts == [None, *(f"bytes={n * PIECE}-" for n in (1, 1, 3))]
    assert all(headers.get("If-Range", '"one"') == '"one"' for headers in gets(server))


def test_the_next_start_goes_on_where_the_last_one_broke(server):
    url = serve(server, breaks=[PIECE] + [0] * download.ATTEMPTS)
    one_line(lambda: fetch.local_path(url), "goes on", f"tried {download.ATTEMPTS} times")
    server.web["/web/model.pth"].breaks.clear()
    assert fetch.local_path(url).read_bytes() == CONTENT
    assert gets(server)[-1]["Range"] == f"bytes={PIECE}-"


@pytest.mark.parametrize("how", ["another content", "no ranges", "no tag"])
def test_a_rest_of_something_else_is_never_joined(server, how):
    url = serve(
        server, breaks=[PIECE] + [0] * download.ATTEMPTS, etag="" if how == "no tag" else '"a"'
    )
    one_line(lambda: fetch.local_path(url))
    file = server.web["/web/model.pth"] = File(CONTENT[::-1], '"b"')
    if how == "no ranges":
        file.ranges, file.etag = False, '"a"'
    assert fetch.local_path(url).read_bytes() == CONTENT[::-1]


@pytest.mark.parametrize(
    "answer",
    [
        (206, {"Content-Range": "bytes 0-9/10", "ETag": '"one"'}),
        (206, {"ETag": '"one"'}),
        (416, {"Content-Range": "bytes */7"}),
        (206, {"Content-Range": f"bytes {PIECE}-9/{len(CONTENT)}", "ETag": '"two"'}),
    ],
)
def test_a_server_that_sends_another_part_is_asked_for_the_whole(server, answer):
    url = serve(server, breaks=[PIECE] + [0] * download.ATTEMPTS)
    one_line(lambda: fetch.local_path(url))
    server.web["/web/model.pth"] = File(CONTENT, answer=[answer])
    assert fetch.local_path(url).read_bytes() == CONTENT


VERSIONS = (CONTENT[:300_000], CONTENT[50_000:200_000], CONTENT[7:300_007])


def any_file(version, tag, ranges, lengths, end):
    etag = {"none": "", "weak": f'W/"{version}"', "strong": f'"{version}"'}[tag]
    content = VERSIONS[version]
    file = File(content, etag, ranges=ranges, lengths=lengths)
    if isinstance(end, int):
        file.breaks = [min(end, len(content) - 1)]
    elif end == "busy":
        file.answer = [(503, {})]
    elif end == "other part":
        part = f"bytes 10-19/{len(content)}"
        file.answer = [(206, {"Content-Range": part, "ETag": etag} if etag else {})]
    return file


FILES = hypothesis.strategies.builds(
    any_file,
    hypothesis.strategies.sampled_from(range(len(VERSIONS))),
    hypothesis.strategies.sampled_from(["strong", "strong", "weak", "none"]),
    hypothesis.strategies.booleans(),
    hypothesis.strategies.just(True),
    hypothesis.strategies.one_of(
        hypothesis.strategies.integers(0, 300_000),
        hypothesis.strategies.sampled_from(["whole", "busy", "other part"]),
    ),
)


@hypothesis.settings(
    max_examples=60,
    deadline=None,
    suppress_health_check=[hypothesis.HealthCheck.function_scoped_fixture],
)
@given(hypothesis.strategies.lists(FILES, min_size=1, max_size=6), hypothesis.strategies.data())
def test_whatever_the_server_does_a_file_is_whole_and_of_one_version(server, plan, data):
    number = len(server.web)
    last = data.draw(hypothesis.strategies.sampled_from(range(len(VERSIONS))))
    server.web[f"/web/{number}.pth"] = [*plan, File(VERSIONS[last], f'"{last}"')]
    try:
        path = fetch.local_path(f"{server.url}/web/{number}.pth")
    except FileError:  # tried too often; the next start goes on
        path = fetch.local_path(f"{server.url}/web/{number}.pth")
    assert path.read_bytes() in VERSIONS


def test_what_came_whole_before_a_stop_is_not_fetched_again(server):
    url = serve(server)
    path = fetch.local_path(url)
    for name in ("model.pth", "model.pth.json"):
        (path.parent / name).rename(path.parent / name.replace(".pth", ".pth.part"))
    assert fetch.local_path(url).read_bytes() == CONTENT
    assert gets(server)[-1]["Range"] == f"bytes={len(CONTENT)}-"


@pytest.mark.parametrize(
    ("header", "value"),
    [
        ("Repr-Digest", f"sha-256=:{base64.b64encode(bytes(32)).decode()}:"),
        ("Digest", f"SHA-256={base64.b64encode(bytes(32)).decode()}"),
        ("x-amz-checksum-sha256", base64.b64encode(bytes(32)).decode()),
        ("X-Linked-ETag", f'"{bytes(32).hex()}"'),
        (None, None),
    ],
)
def test_another_checksum_is_refused_and_nothing_is_kept(server, header, value):
    url = serve(server, headers={header: value} if header else {})
    url += "" if header else f"#sha256={'0' * 64}"
    one_line(lambda: fetch.local_path(url), f"has SHA-256 {SHA}", "0" * 64, "not kept")
    kept = [path.name for path in download.files.user_cache().rglob("*")]
    assert "model.pth" not in kept and "model.pth.part" not in kept


def test_a_checksum_of_a_redirect_counts(server):
    url = serve(server, "there.pth")
    server.web["/web/here.pth"] = File(
        b"", answer=[(302, {"Location": url, "X-Linked-ETag": bytes(32).hex()})]
    )
    one_line(lambda: fetch.local_path(f"{server.url}/web/here.pth"), "the server says 000")


def test_a_checksum_of_the_redirects_own_content_does_not_count(server):
    url = serve(server, "there.pth")
    own = base64.b64encode(hashlib.sha256(b"moved").digest()).decode()
    headers = {"Repr-Digest": f"sha-256=:{own}:", "Digest": f"SHA-256={own}"}
    server.web["/web/here.pth"] = File(b"", answer=[(302, {"Location": url} | headers)])
    assert fetch.local_path(f"{server.url}/web/here.pth").read_bytes() == CONTENT


def test_a_known_checksum_needs_no_network(server):
    url = serve(server) + f"#sha256={SHA.upper()}"
    path = fetch.local_path(url)
    assert fetch.local_path(url) == path and len(gets(server)) == 1


@pytest.mark.parametrize("digest", ["sha256=12", "md5=" + "0" * 32, "x", "sha256=" + "g" * 64])
def test_a_fragment_that_is_no_checksum_is_refused(server, digest):
    one_line(lambda: fetch.local_path(f"{serve(server)}#{digest}"), "after # only sha256=")
    assert not gets(server)


@pytest.mark.parametrize(
    ("code", "part"),
    [
        *((401, "wants a login"), (403, "wants a login"), (404, "no such file")),
        *((410, "no such file"), (400, "HTTP 400"), (204, "HTTP 204"), (501, "HTTP 501")),
        *((300, "HTTP 300"), (200, "is a web page")),
    ],
)
def test_an_answer_without_the_file_is_one_line(server, code, part):
    url = serve(server, answer=[(code, {"Content-Type": "text/html; charset=utf-8"})])
    one_line(lambda: fetch.local_path(url), part)
    assert len(gets(server)) == 1


@pytest.mark.parametrize("code", [429, 500, 503])
def test_a_busy_server_is_asked_again(server, code):
    url = serve(server, answer=[(code, {})] * 2)
    assert fetch.local_path(url).read_bytes() == CONTENT
    serve(server, answer=[(code, {})] * 9)
    assert fetch.local_path(url).read_bytes() == CONTENT  # the kept one
    one_line(lambda: fetch.local_path(f"{url}?"), f"busy (HTTP {code})")


def test_redirects_are_followed_to_safe_places_only(server):
    url = serve(server)
    go = f"{server.url}/web/go"

    def leads_to(target):
        server.web["/web/go"] = File(b"", answer=[(302, {"Location": target})])
        return fetch.local_path(go)

    assert leads_to("/web/model.pth").read_bytes() == CONTENT
    for target in ("http://example.com/a?key=SECRET", "file:///etc/passwd", "ftp://example.com/a"):
        message = one_line(lambda target=target: leads_to(target), "leads to")
        assert "SECRET" not in message
    server.web["/web/go"] = File(b"", answer=[(302, {"Location": "/web/go"})] * 99)
    one_line(lambda: fetch.local_path(go), "TooManyRedirects")
    assert url


def test_a_redirect_from_https_never_leads_to_http():
    session = download._Session(True)
    response = download.requests.Response()
    response.status_code, response.url = 302, "https://example.com/a"
    response.headers["Location"] = "http://127.0.0.1/b"
    one_line(lambda: session.get_redirect_target(response), "which is not encrypted")
    response.headers["Location"] = "//example.org/b"
    assert session.get_redirect_target(response) == "//example.org/b"


def test_an_address_without_encryption_needs_a_checksum():
    one_line(lambda: fetch.local_path("http://example.com/model.pth"), "use https, or add #sha256=")
    assert not download._Session(True).unsafe("http://example.com/model.pth")


def test_nothing_secret_of_an_address_is_told(server, caplog, capfd):
    url = serve(server, breaks=[0] * 20)
    secret = url.replace("http://", "http://me:SECRET@")
    one_line(lambda: fetch.local_path(secret), "~/.netrc")
    with caplog.at_level(logging.DEBUG, logger="absl"):
        one_line(lambda: fetch.local_path(f"{url}?token=SECRET"), "model.pth?...")
        server.web["/web/model.pth"].breaks.clear()
        path = fetch.local_path(f"{url}?token=SECRET")
    told = caplog.text + "".join(capfd.readouterr()) + (path.parent / "model.pth.json").read_text()
    assert "SECRET" not in told
    assert "token=SECRET" in server.asked[-1][1]


def test_without_a_network_the_cache_serves(server, monkeypatch):
    url = serve(server)
    path = fetch.local_path(url)
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    assert fetch.local_path(url) == path and len(gets(server)) == 1
    one_line(lambda: fetch.local_path(f"{url}x"), "HF_HUB_OFFLINE")
    one_line(lambda: fetch.local_path(f"{url}#sha256={'0' * 64}"), "HF_HUB_OFFLINE")
    monkeypatch.delenv("HF_HUB_OFFLINE")
    monkeypatch.setattr(download, "_open_web", refusing)
    assert fetch.local_path(url) == path
    one_line(lambda: fetch.local_path(f"{url}x"), "no connection")


def refusing(*_):
    raise download._Passing("there was no connection")


def test_no_network_at_all_is_one_line(server):
    port = re.sub(r"\D", "", server.url.rpartition(":")[2])
    message = one_line(
        lambda: fetch.local_path(f"http://localhost:{int(port) % 1000 + 1}/a.pth?t=SECRET"),
        "there was no connection",
    )
    assert "SECRET" not in message


@pytest.mark.parametrize("lengths", [True, False])
def test_a_file_that_is_too_large_is_refused(server, monkeypatch, lengths):
    monkeypatch.setattr(download, "MOST_BYTES", 1000)
    url = serve(server, lengths=lengths)
    one_line(lambda: fetch.local_path(url), "1,000")


def test_a_full_disk_is_told_before_or_while_the_file_comes(server, monkeypatch):
    url = serve(server)
    usage = type("Usage", (), {"free": len(CONTENT) - 1})
    with monkeypatch.context() as patch:
        patch.setattr(download.shutil, "disk_usage", lambda _: usage)
        one_line(lambda: fetch.local_path(url), "free; free some space", "XDG_CACHE_HOME")

    def full(*_):
        raise OSError(download.errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(download, "_receive", full)
        one_line(lambda: fetch.local_path(url), "is full", "XDG_CACHE_HOME")
    assert fetch.local_path(url).read_bytes() == CONTENT


@pytest.mark.parametrize(
    ("end", "name"),
    [
        ("..%2F..%2Fetc%2Fpasswd", "_.._etc_passwd"),
        (".hidden.pth", "hidden.pth"),
        ("a%00b%0A.bin", "a_b_.bin"),
        ("x" * 300 + ".safetensors", "x" * 88 + ".safetensors"),
    ],
)
def test_the_name_of_a_file_is_harmless(server, end, name):
    server.web[f"/web/{download.urllib.parse.unquote(end)}"] = File(CONTENT)
    assert fetch.local_path(f"{server.url}/web/{end}").name == name


def test_an_address_without_a_file_is_refused(server):
    one_line(lambda: fetch.local_path(f"{server.url}/"), "names no file")


def test_a_changed_or_damaged_cache_is_fetched_again(server):
    url = serve(server)
    path = fetch.local_path(url)
    path.write_bytes(b"short")
    assert fetch.local_path(url).read_bytes() == CONTENT
    (path.parent / "model.pth.json").write_text("[")
    assert fetch.local_path(url).read_bytes() == CONTENT


def test_a_stop_before_the_record_is_written_leaves_no_record_of_other_content(server, monkeypatch):
    url = serve(server)
    pinned = f"{url}#sha256={SHA}"
    path = fetch.local_path(pinned)
    server.web["/web/model.pth"] = File(CONTENT[::-1], '"two"')
    written = download._write_record

    def stopped(file, record):
        if file == path:
            raise KeyboardInterrupt
        written(file, record)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(download, "_write_record", stopped)
        fetch.local_path(url)
    server.web["/web/model.pth"] = File(CONTENT)
    assert fetch.local_path(pinned).read_bytes() == CONTENT


def test_a_server_without_versions_is_asked_once(server):
    url = serve(server, etag="")
    fetch.local_path(url)
    assert fetch.local_path(url).read_bytes() == CONTENT and len(gets(server)) == 1


def test_processes_fetch_a_file_once(server):
    url = serve(server) + f"#sha256={SHA}"
    threads = [threading.Thread(target=fetch.local_path, args=(url,)) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(gets(server)) == 1


def test_what_came_from_the_web_is_read_as_any_file(server):
    url = serve(server)
    with pytest.raises(FileError, match=r"model\.pth"):
        oneformer_jax.load(url)
