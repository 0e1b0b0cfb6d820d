"""A server of Google Cloud Storage on the loopback, with its buckets in memory.

  python -m tests.buckets.server --port=9023 --bucket=b

The emulator of PyPI (gcp-storage-emulator) answers; three things that a real bucket has are added
here: conditional requests (ifGenerationMatch), requests at the same time, and going away.
"""

import argparse
import contextlib
import functools
import http.server
import json
import threading
import time
from collections.abc import Iterator
from urllib import parse

from gcp_storage_emulator import server as emulator
from gcp_storage_emulator.handlers import buckets
from gcp_storage_emulator.storage import Storage


class _Storage(Storage):
    """Buckets in memory alone: the emulator would write all of its index at each change."""

    def _write_config_to_file(self):
        pass


class _Handler(emulator.RequestHandler):
    protocol_version = "HTTP/1.1"  # one connection for many requests
    disable_nagle_algorithm = True

    _found: dict | None = None

    def __init__(self, owner: "Server", *arguments):
        self._owner = owner
        super().__init__(owner.storage, *arguments)

    def parse_request(self):
        return super().parse_request() and self._may_go_on()

    def _may_go_on(self) -> bool:
        owner, path = self._owner, parse.unquote(self.path)
        owner.requests += 1
        if owner.is_away:  # the client sees a connection that was cut
            self.close_connection = True
            return False
        for start, status in owner.refused.items():
            if start in path:
                self._answer(status, {"error": {"code": status, "message": f"refused {start}"}})
                return False
        return True

    def _answer(self, status: int, content: dict) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        self.rfile.read(length)
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def _handle(self, method: str) -> None:
        with self._owner.lock:
            self._found = self._find()
            if self._is_met(method):
                emulator.Router(self).handle(method)
            else:
                self._answer(412, {"error": {"code": 412, "message": "conditionNotMet"}})

    def _is_met(self, method: str) -> bool:
        """Tells whether the object has the generation that the request names (0: none)."""
        query = dict(parse.parse_qsl(parse.urlparse(self.path).query))
        there = self._found["generation"] if self._found else "0"
        return method == "GET" or query.get("ifGenerationMatch", there) == there

    def _find(self) -> dict | None:
        """The object that the request is about."""
        url = parse.urlparse(self.path)
        query = dict(parse.parse_qsl(url.query))
        parts = url.path.partition("/b/")[2].split("/")
        name = query.get("name") or parse.unquote("/".join(parts[2:]))
        return self.storage.objects.get(parts[0], {}).get(name)

    def end_headers(self):
        if self.command == "GET" and self._found:
            self.send_header("x-goog-generation", self._found["generation"])
        super().end_headers()

    def do_GET(self):
        self._handle("GET")

    def do_POST(self):
        self._handle("POST")

    def do_PUT(self):
        self._handle("PUT")

    def do_DELETE(self):
        self._handle("DELETE")

    def do_PATCH(self):
        self._handle("PATCH")

    def log_message(self, *unused):
        pass


class _Threads(http.server.ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request, client_address):
        """A client that was killed is no error."""


class Server:
    """A server; `environment` tells the libraries where it is.

    Attributes:
      refused: part of a path -> status of the answer to requests with it.
      is_away: cut all connections.
      requests: number of requests so far.
    """

    def __init__(self, *bucket_names: str, port: int = 0):
        self.storage = _Storage(use_memory_fs=True)
        for name in bucket_names:
            self.make_bucket(name)
        self.lock = threading.Lock()
        self.refused: dict[str, int] = {}
        self.is_away = False
        self.requests = 0
        handler = functools.partial(_Handler, self)
        self._server = _Threads(("127.0.0.1", port), handler)
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        """Variables that send Google's clients to this server: gcsfs, TensorStore, ArrayRecord."""
        return {
            "STORAGE_EMULATOR_HOST": self.url,
            "TENSORSTORE_GCS_HTTP_URL": self.url,
            "CLOUD_STORAGE_EMULATOR_ENDPOINT": self.url,
            "GOOGLE_AUTH_TOKEN_FOR_TESTING": "anybody",  # or TensorStore asks the metadata server
        }

    def make_bucket(self, name: str) -> None:
        buckets.create_bucket(name, self.storage)
        self.storage.buckets[name]["softDeletePolicy"] = {"retentionDurationSeconds": 0}

    def objects(self, bucket: str, prefix: str = "") -> list[str]:
        """Names of the objects in a bucket."""
        return sorted(
            name for name in self.storage.objects.get(bucket, {}) if name.startswith(prefix)
        )

    @contextlib.contextmanager
    def away(self, seconds: float) -> Iterator[None]:
        """The server is gone for that long, from the beginning of the block on."""
        self.is_away = True
        timer = threading.Timer(seconds, self.come_back)
        timer.start()
        try:
            yield
        finally:
            timer.join()

    def come_back(self) -> None:
        self.is_away = False

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--port", type=int, default=9023)
    parser.add_argument("--bucket", action="append", default=[])
    arguments = parser.parse_args()
    server = Server(*(arguments.bucket or ["b"]), port=arguments.port)
    for name, value in server.environment.items():
        print(f"export {name}={value}", flush=True)
    while True:
        time.sleep(3600)


if __name__ == "__main__":
    main()
