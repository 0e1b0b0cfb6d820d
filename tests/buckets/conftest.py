"""A bucket for each test, on a server of this process."""

import itertools
import logging

import pytest

from tests.buckets.server import Server

_numbers = itertools.count()


@pytest.fixture(scope="session")
def server():
    """The server, which the libraries of this process and of its children find."""
    logging.getLogger("gcp_storage_emulator").setLevel(logging.CRITICAL)
    server = Server()
    with pytest.MonkeyPatch.context() as patch:
        for name, value in server.environment.items():
            patch.setenv(name, value)
        yield server
        server.close()


@pytest.fixture
def bucket(server):
    """The name of an empty bucket."""
    name = f"bucket-{next(_numbers)}"
    server.make_bucket(name)
    yield name
    server.refused.clear()


@pytest.fixture
def url(bucket):
    """The URL of a folder in it."""
    return f"gs://{bucket}/runs/one"
