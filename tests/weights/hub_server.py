"""A server on loopback, shaped as the Hugging Face hub is, that can misbehave as the web does."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import http.server
import json
import re
import threading
import urllib.parse
from collections.abc import Iterator

LARGE = (".safetensors", ".bin")  # of the hub's large-file storage


@dataclasses.dataclass
class Model:
    """A model on the hub: its files by revision; the commit of a revision is its digest."""

    revisions: dict[str, dict[str, bytes]]
    private: bool = False
    gated: bool = False

    def commit(self, revision: str) -> str | None:
        commits = {name: hashlib.sha1(name.encode()).hexdigest() for name in self.revisions}
        return commits.get(revision) or (revision if revision in commits.values() else None)

    def files(self, revision: str) -> dict[str, bytes]:
        return next(
            files
            for name, files in self.revisions.items()
            if self.commit(name) == self.commit(revision)
        )


@dataclasses.dataclass
class File:
    """A file of the web, and how it is sent.

    Attributes:
      breaks: bytes after which the connection ends, one answer each.
      answer: the first answers: (status, headers).
      headers: beside the usual ones.
    """

    content: bytes
    etag: str = '"one"'
    ranges: bool = True
    breaks: list[int] = dataclasses.field(default_factory=list)
    answer: list[tuple[int, dict[str, str]]] = dataclasses.field(default_factory=list)
    headers: dict[str, str] = dataclasses.field(default_factory=dict)
    lengths: bool = True


class Server:
    """Models that are served, and the requests for them."""

    def __init__(self) -> None:
        self.models: dict[str, Model] = {}
        self.web: dict[str, File | list[File]] = {}
        self.token = "hf_right"
        self.asked: list[tuple[str, str, dict[str, str]]] = []  # method, path, headers
        self.stored: dict[str, bytes] = {}  # large files by SHA-256
        self.commits: list[list[dict]] = []
        self.cdn_breaks: list[int] = []
        self.spoilt: set[str] = set()  # SHA-256 of large files that are sent with a wrong byte
        self.url = self.cdn = ""  # the hub, and another host for large files

    def requests(self, method: str, part: str) -> list[dict[str, str]]:
        """Headers of the requests whose path has `part`."""
        return [headers for how, path, headers in self.asked if how == method and part in path]


@contextlib.contextmanager
def serving() -> Iterator[Server]:
    state = Server()

    class Handler(_Handler):
        server_state = state

    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        server.daemon_threads = True
        state.url = f"http://127.0.0.1:{server.server_address[1]}"
        state.cdn = f"http://localhost:{server.server_address[1]}"
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        yield state
        server.shutdown()


class _Handler(http.server.BaseHTTPRequestHandler):
    server_state: Server
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self._serve()

    def do_GET(self) -> None:
        self._serve()

    def do_POST(self) -> None:
        self._serve()

    def do_PUT(self) -> None:
        self._serve()

    def _serve(self) -> None:
        state = self.server_state
        path = urllib.parse.unquote(urllib.parse.urlsplit(self.path).path)
        state.asked.append((self.command, self.path, dict(self.headers)))
        self.body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if path.startswith("/web/") and path in state.web:
            file = state.web[path]
            if isinstance(file, list):  # one for each request, the last for all that follow
                file = file.pop(0) if len(file) > 1 else file[0]
            return self._web(file)
        if path.startswith("/cdn/"):
            digest = path.rsplit("/", 1)[1]
            content = state.stored[digest]
            if digest in state.spoilt:
                content = content[:-1] + bytes([content[-1] ^ 1])
            file = File(content, f'"{digest}"', breaks=state.cdn_breaks)
            return self._web(file)
        if match := re.fullmatch(r"/([^/]+/[^/]+)/resolve/(.+)/([^/]+)", path):
            return self._resolve(*match.groups())
        return self._api(path)

    # -------------------------------------------------------------- answers

    def _answer(self, status: int, content: bytes = b"", **headers: str) -> None:
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name.replace("_", "-"), value)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _json(self, value: object, status: int = 200, **headers: str) -> None:
        self._answer(status, json.dumps(value).encode(), Content_Type="application/json", **headers)

    def _error(self, status: int, code: str, text: str = "no") -> None:
        self._json({"error": text}, status, X_Error_Code=code, X_Error_Message=text)

    def _web(self, file: File) -> None:
        if file.answer:
            status, headers = file.answer.pop(0)
            return self._answer(status, **{k.replace("-", "_"): v for k, v in headers.items()})
        if file.etag and self.headers.get("If-None-Match") == file.etag:
            return self._answer(304)
        content, status, start = file.content, 200, 0
        headers = {"ETag": file.etag} if file.etag else {}
        headers |= file.headers
        match = re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", ""))
        if match and file.ranges and self.headers.get("If-Range", file.etag) == file.etag:
            start = int(match[1])
            if start >= len(content):
                return self._answer(416, Content_Range=f"bytes */{len(content)}")
            status = 206
            headers["Content-Range"] = f"bytes {start}-{len(content) - 1}/{len(content)}"
        content = content[start:]
        if file.lengths:
            headers["Content-Length"] = str(len(content))
        else:
            headers["Connection"] = "close"
        self.send_response(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command == "HEAD":
            return
        if file.breaks:
            self.wfile.write(content[: file.breaks.pop(0)])
            self.close_connection = True
            return
        self.wfile.write(content)
        self.close_connection = not file.lengths

    # -------------------------------------------------------------- the hub

    def _may(self, model: Model | None) -> bool:
        """Tells if the user may see a model; answers if not."""
        known = self.headers.get("Authorization") == f"Bearer {self.server_state.token}"
        if model is None or (model.private and not known):
            self._error(404 if known else 401, "RepoNotFound")
        elif model.gated and not known:
            self._error(403, "GatedRepo")
        else:
            return True
        return False

    def _resolve(self, name: str, revision: str, file: str) -> None:
        state = self.server_state
        model = state.models.get(name)
        if not self._may(model):
            return None
        commit = model.commit(revision)
        if commit is None:
            return self._error(404, "RevisionNotFound")
        content = model.files(revision).get(file)
        if content is None:
            return self._json({}, 404, X_Error_Code="EntryNotFound", X_Repo_Commit=commit)
        if not file.endswith(LARGE):
            etag = f'"{hashlib.sha1(content).hexdigest()}"'
            return self._answer(200, content, ETag=etag, X_Repo_Commit=commit)
        digest = hashlib.sha256(content).hexdigest()
        state.stored[digest] = content
        return self._answer(
            302,
            Location=f"{state.cdn}/cdn/{digest}",
            X_Repo_Commit=commit,
            X_Linked_Etag=f'"{digest}"',
            X_Linked_Size=str(len(content)),
        )

    def _api(self, path: str) -> None:
        state = self.server_state
        known = self.headers.get("Authorization") == f"Bearer {state.token}"
        sent = json.loads(self.body) if self.command == "POST" and "/commit/" not in path else {}
        if path == "/api/validate-yaml":
            return self._json({"warnings": [], "errors": []})
        if path.startswith("/put/"):
            state.stored[path.removeprefix("/put/")] = self.body
            return self._answer(200)
        if not known and (path == "/api/whoami-v2" or path == "/api/repos/create"):
            return self._error(401, "", "Invalid credentials in Authorization header")
        if path == "/api/whoami-v2":
            return self._json({"name": "me", "type": "user", "orgs": [], "auth": {}})
        if path == "/api/repos/create":
            name = f"{sent.get('organization') or 'me'}/{sent['name']}"
            if name.startswith("others/"):
                return self._error(403, "", "You don't have the rights to create a model there")
            if name in state.models:
                return self._json({"url": f"{state.url}/{name}"}, 409)
            private = sent.get("private", sent.get("visibility") == "private")
            state.models[name] = Model({"main": {}}, private=private)
            return self._json({"url": f"{state.url}/{name}", "name": name})
        if match := re.fullmatch(r"/([^/]+/[^/]+)\.git/info/lfs/objects/batch", path):
            objects = [
                one | {"actions": {"upload": {"href": f"{state.url}/put/{one['oid']}"}}}
                for one in sent["objects"]
            ]
            return self._json({"transfer": "basic", "objects": objects})
        match = re.fullmatch(r"/api/models/([^/]+/[^/]+?)(/.*)?", path)
        model = state.models.get(match[1]) if match else None
        if not self._may(model):
            return None
        rest = match[2] or ""
        if rest.startswith("/preupload/"):
            modes = [
                {
                    "path": one["path"],
                    "uploadMode": "lfs" if one["path"].endswith(LARGE) else "regular",
                    "shouldIgnore": False,
                }
                for one in sent["files"]
            ]
            return self._json({"files": modes})
        if rest.startswith("/commit/"):
            return self._commit(match[1], model)
        return self._json({"id": match[1], "private": model.private, "siblings": [], "tags": []})

    def _commit(self, name: str, model: Model) -> None:
        lines = [json.loads(line) for line in self.body.splitlines()]
        self.server_state.commits.append(lines)
        for line in lines:
            value = line["value"]
            if line["key"] == "file":
                model.revisions["main"][value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                content = self.server_state.stored[value["oid"]]
                model.revisions["main"][value["path"]] = content
        oid = "0" * 40
        url = f"{self.server_state.url}/{name}/commit/{oid}"
        self._json({"commitUrl": url, "commitOid": oid, "success": True})
