"""The lock of a working directory in a bucket: an object with a heartbeat.

WORKDIR/LOCK is made on the condition that there is none, and written anew every `BEAT` seconds on
the condition that nobody else has written it. A run that was killed leaves it behind: whoever sees
it unchanged for `EXPIRES` seconds takes it over. No clocks are compared. The conditions are those
of the bucket (generations of an object), through TensorStore.
"""

from __future__ import annotations

import json
import os
import pathlib
import socket
import threading
import time
import uuid
from collections.abc import Callable
from typing import Any

from absl import logging

from oneformer_jax import remote

BEAT = 10.0  # seconds between two heartbeats
EXPIRES = 60.0  # seconds without one after which the owner is taken for dead
_POLL = 1.0


def owner() -> dict[str, Any]:
    """Describes this process, in the lock that it holds."""
    return {"host": socket.gethostname(), "process": os.getpid(), "since": time.time()}


class Held(remote.RemoteError):
    """Another run has the lock; `text` is what it wrote there."""

    def __init__(self, text: str):
        self.text = text
        super().__init__(text)


class Lease:
    """Holds the lock `folder`/`name` until `release`.

    Args:
      folder: in a bucket.
      name: of the object.
      lost: called in the thread of the heartbeat if another run has taken the lock.

    Raises:
      Held: another run holds it.
      RemoteError: the bucket cannot be written.
    """

    def __init__(self, folder: pathlib.Path, name: str, lost: Callable[[], None]):
        import tensorstore as ts

        # Often enough that a server that comes back sees the heartbeat well before `EXPIRES`.
        retries = {"initial_delay": "0.5s", "max_delay": "5s", "max_retries": 1_000}
        context = ts.Context({"gcs_request_retries": retries})
        self._store = ts.KvStore.open(remote.tensorstore_spec(folder), context=context).result()
        self._folder, self._name, self._lost = folder, name, lost
        self._owner = owner() | {"token": uuid.uuid4().hex}
        self._beats = 0
        self._ended = threading.Event()
        with remote.reporting(folder):
            self._generation = self._take()
        self._thread = threading.Thread(target=self._beat, name="lock", daemon=True)
        self._thread.start()

    def _take(self) -> bytes:
        """Makes the lock, or takes over one that does not change; returns its generation."""
        found = self._store.read(self._name).result()
        seen, since = found.stamp.generation, time.monotonic()
        while found.state == "value" and not self._is_dead(found.value):
            if found.stamp.generation != seen:
                raise Held(found.value.decode(errors="replace"))
            if time.monotonic() - since > EXPIRES:
                break
            if time.monotonic() - since < _POLL:
                logging.warning(
                    "%s has the lock of another run; it is taken over unless that run shows a sign "
                    "of life within %.0f s",
                    *(self._folder, EXPIRES),
                )
            time.sleep(_POLL)
            found = self._store.read(self._name).result()
        if generation := self._write(found.stamp.generation):
            return generation
        raise Held(self._store.read(self._name).result().value.decode(errors="replace"))

    def _is_dead(self, text: bytes) -> bool:
        """Tells whether the owner was a process of this machine that has ended."""
        try:
            owner = json.loads(text)
            if owner["host"] != socket.gethostname() or owner["process"] == os.getpid():
                return False
            os.kill(owner["process"], 0)
        except ProcessLookupError:
            return True
        except (ValueError, KeyError, TypeError, OSError, OverflowError):
            pass
        return False

    def _write(self, generation: bytes) -> bytes:
        """Writes the lock if it has this generation; returns its new one, or b"" if it has not."""
        self._beats += 1
        text = json.dumps(self._owner | {"beats": self._beats}).encode()
        written = self._store.write(self._name, text, if_equal=generation).result().generation
        if written:
            return written
        # The answer to an attempt that succeeded may have been lost, and the next one refused.
        found = self._store.read(self._name).result()
        return found.stamp.generation if self._owner["token"].encode() in found.value else b""

    def _beat(self) -> None:
        while not self._ended.wait(BEAT):
            try:
                generation = self._write(self._generation)
            except Exception as error:
                logging.warning("The lock of %s could not be kept: %s", self._folder, error)
                continue
            if not generation:
                self._lost()
                return
            self._generation = generation

    def release(self) -> None:
        """Ends the heartbeat and removes the lock, unless another run has it."""
        self._ended.set()
        self._thread.join()
        try:
            self._store.write(self._name, None, if_equal=self._generation).result()
        except Exception as error:
            logging.warning("The lock of %s could not be removed: %s", self._folder, error)
