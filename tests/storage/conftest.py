"""A bucket of a service of our own, one per test process, empty at the start of each test."""

import pytest
from etils import epath

from tests.storage import server


@pytest.fixture(scope="session")
def service():
    running = server.Server()
    yield running
    running.close()


@pytest.fixture
def gcs(service, monkeypatch):
    """The service behind `bucket`, to look at and to break."""
    with server.connected(service, monkeypatch):
        yield service


@pytest.fixture
def bucket(gcs):
    """A directory of a bucket."""
    return epath.Path(f"gs://{server.BUCKET}/models")
