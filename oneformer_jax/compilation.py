"""Compiles programs: says what takes long, keeps what was made, and gives the memory back."""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import importlib.metadata
import os
import pathlib
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
from absl import logging

from oneformer_jax import files

# A compilation that takes longer is announced, and its time is told.
QUIET_SECONDS = 5.0
# Packages that trace and compile a program, and environment variables that the compilers read.
_PACKAGES = ("jax", "jaxlib", "flax", "optax", "numpy", "libtpu")
_PACKAGES += ("jax-cuda12-pjrt", "jax-cuda13-pjrt")
_VARIABLES = ("XLA_FLAGS", "LIBTPU_INIT_ARGS")
_SETTINGS = ("jax_enable_x64", "jax_default_matmul_precision", "jax_default_prng_impl")


def keep_programs(folder: str = "") -> None:
    """Keeps compiled programs on disk, so that the next process finds them.

    Args:
      folder: the place. "" leaves one that JAX has been given already, or else takes
        `oneformer_jax` in the user's folder of caches.
    """
    if folder or not jax.config.jax_compilation_cache_dir:
        path = pathlib.Path(folder).expanduser() if folder else files.user_cache()
        jax.config.update("jax_compilation_cache_dir", str(path))


def compile_now(function: Any, *arguments: Any, name: str) -> Any:
    """Compiles a jitted function for arguments like these; a later call with such does not.

    Args:
      function: a result of `jax.jit`.
      arguments: arrays; nothing is donated here.
      name: the program's, for the log, such as "the training step".

    Returns:
      The compiled program, a `jax.stages.Compiled`.
    """
    start = time.perf_counter()
    with _announced(name):
        compiled = function.lower(*arguments).compile()
    seconds = time.perf_counter() - start
    if seconds > QUIET_SECONDS:
        logging.info("Compiled %s in %.0f s.", name, seconds)
    if seconds > 1:
        release_memory()
    return compiled


def ingredients() -> dict[str, str]:
    """Names what makes a program out of a config: source, versions, flags of the compilers."""
    found = {"version": sys.modules[__package__].__version__, "source": source_digest()}
    for package in _PACKAGES:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[package] = importlib.metadata.version(package)
    found |= {name: os.environ.get(name, "").strip() for name in _VARIABLES}
    return found | {name: str(getattr(jax.config, name)) for name in _SETTINGS}


def source_digest() -> str:
    """SHA-256 of the modules and tables of the package, the same in a clone as installed.

    It is cut to 16 hexadecimal digits: it tells versions apart, and protects from nobody.
    """
    root, digest = os.path.dirname(__file__), hashlib.sha256()
    paths = (
        os.path.join(folder, file)
        for folder, _, names in os.walk(root, followlinks=True)
        for file in names
        if file.endswith((".py", ".json"))
    )
    for path in sorted(paths):
        with open(path, "rb") as file:
            content = hashlib.sha256(file.read()).hexdigest()
        digest.update(f"{os.path.relpath(path, root)} {content}\n".encode())
    return digest.hexdigest()[:16]


class Program:
    """A jitted function that compiles itself with word of it for each new kind of arguments."""

    def __init__(
        self,
        function: Any,
        name: str,
        *,
        looks_at: slice = slice(None),
        prepare: Callable[..., Any] | None = None,
    ):
        """Wraps a function.

        Args:
          function: a result of `jax.jit`.
          name: what the log calls it.
          looks_at: the arguments whose shapes vary from call to call.
          prepare: called with the function and its arguments before it is compiled for them.
        """
        self.jitted = function
        self._name = name
        self._looks_at = looks_at
        self.prepare = prepare
        self._known: dict[Any, Any] = {}
        self._lock = threading.Lock()

    def __call__(self, *arguments: Any) -> Any:
        self.compile(*arguments)
        return self.jitted(*arguments)

    def compile(self, *arguments: Any) -> Any:
        """Compiles for arguments like these, arrays or `jax.ShapeDtypeStruct`, if it is new.

        Any thread may call it; another that needs the same program waits for it.

        Returns:
          The compiled program, a `jax.stages.Compiled`.
        """
        shapes = tuple(x.shape for x in jax.tree.leaves(arguments[self._looks_at]))
        if shapes not in self._known:
            with self._lock:
                if shapes not in self._known:
                    if self.prepare is not None:
                        self.prepare(self.jitted, *arguments)
                    name = f"{self._name} for {_text(shapes[0])}"
                    self._known[shapes] = compile_now(self.jitted, *arguments, name=name)
        return self._known[shapes]

    def __len__(self) -> int:
        """Counts the kinds of arguments so far."""
        return len(self._known)

    def lower(self, *arguments: Any) -> Any:
        """Lowers the function, as `jax.jit` does."""
        return self.jitted.lower(*arguments)


def release_memory() -> None:
    """Gives memory that this process has freed back to the system, where glibc holds on to it.

    After the compilation of a large training step it is some gigabytes.
    """
    libc = ctypes.CDLL(None) if os.name == "posix" else None
    if hasattr(libc, "malloc_trim"):
        libc.malloc_trim(0)


def _announced(name: str) -> contextlib.AbstractContextManager:
    """Logs what is compiled once it takes long."""
    kept = jax.config.jax_compilation_cache_dir
    place = f"it is kept in {kept}" if kept else "it is not kept (no compilation cache)"
    text = f"Compiling {name}, which can take minutes the first time; {place} ..."
    return said_after(QUIET_SECONDS, logging.info, text)


@contextlib.contextmanager
def said_after(seconds: float, log: Callable[..., Any], message: str) -> Iterator[None]:
    """Logs a message if what happens in the context has not ended after so many seconds."""
    timer = threading.Timer(seconds, log, ["%s", message])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def _text(shape: tuple[int, ...]) -> str:
    return " x ".join(map(str, shape))
