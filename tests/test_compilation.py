"""Compilation with word of it."""

import logging
import pathlib
import time

import jax
import jax.numpy as jnp
import pytest

from oneformer_jax import compilation


@pytest.fixture
def said(caplog):
    caplog.set_level(logging.INFO, logger="absl")
    return caplog


class Slow:
    """A jitted function whose compilation takes a while."""

    def __init__(self, function, seconds):
        self.jitted, self.seconds = jax.jit(function), seconds

    def lower(self, *arguments):
        time.sleep(self.seconds)
        return self.jitted.lower(*arguments)


def test_a_long_compilation_is_announced_and_its_time_told(said, monkeypatch):
    monkeypatch.setattr(compilation, "QUIET_SECONDS", 0.05)
    compilation.compile_now(Slow(jnp.sin, 0.4), jnp.ones(3), name="the sine")
    first, second = (record.getMessage() for record in said.records)
    assert first.startswith("Compiling the sine, which can take minutes")
    assert second.startswith("Compiled the sine in ")


def test_a_short_compilation_is_silent(said):
    compilation.compile_now(jax.jit(jnp.sin), jnp.ones(3), name="the sine")
    assert not said.records


def test_a_failed_compilation_is_not_announced_later(said, monkeypatch):
    monkeypatch.setattr(compilation, "QUIET_SECONDS", 0.2)
    with pytest.raises(AttributeError):
        compilation.compile_now("no function", name="nonsense")
    time.sleep(0.3)
    assert not said.records


def test_a_program_compiles_once_for_each_shape(monkeypatch):
    names = []
    monkeypatch.setattr(compilation, "compile_now", lambda *_, name: names.append(name))
    program = compilation.Program(jax.jit(lambda a, x: a * x), "the product", looks_at=slice(1, 2))
    for size in (2, 3, 2):
        program(jnp.float32(2), jnp.ones((size, 4)))
    assert names == ["the product for 2 x 4", "the product for 3 x 4"]
    assert len(program) == 2


def test_a_program_is_prepared_before_it_is_compiled():
    told = []
    jitted = jax.jit(lambda x: 2 * x)
    program = compilation.Program(jitted, "the double", prepare=lambda *x: told.append(x))
    array = jnp.ones(3)
    for _ in range(2):
        assert float(program(array)[0]) == 2
    assert len(told) == 1 and told[0][0] is jitted and told[0][1] is array


def test_what_was_compiled_beforehand_is_not_compiled_again():
    traced = []

    def function(x):
        traced.append(x)
        return x + 1

    jitted = jax.jit(function)
    compilation.compile_now(jitted, jnp.ones(5), name="the sum")
    jitted(jnp.ones(5))
    assert len(traced) == 1


@pytest.mark.parametrize(
    ("given", "caches", "told", "place"),
    [
        ([], "/x", None, "/x/oneformer_jax"),
        ([], "/x", "/y", "/y"),  # as JAX_COMPILATION_CACHE_DIR tells it
        (["/z"], "/x", "/y", "/z"),
        ([], "", None, str(pathlib.Path("~/.cache/oneformer_jax").expanduser())),
    ],
)
def test_programs_are_kept_where_jax_was_told_or_in_the_users_caches(
    given, caches, told, place, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", caches)
    before = jax.config.jax_compilation_cache_dir
    try:
        jax.config.update("jax_compilation_cache_dir", told)
        compilation.keep_programs(*given)
        assert jax.config.jax_compilation_cache_dir == place
    finally:
        jax.config.update("jax_compilation_cache_dir", before)
