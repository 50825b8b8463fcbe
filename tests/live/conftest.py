"""Live servers in threads, with sessions that need no network."""

from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fake_engine import FakeEngine
from live_clients import Running

from live.settings import Settings


@pytest.fixture
def run_server(tmp_path) -> Iterator[Callable[..., Running]]:
    """run_server(engine=FakeEngine(), **settings) starts a server."""
    servers: list[Running] = []

    def run(engine: FakeEngine | None = None, **settings: Any) -> Running:
        folder = str(tmp_path / f"server{len(servers)}")
        servers.append(Running(engine or FakeEngine(), Settings(port=0, folder=folder, **settings)))
        return servers[-1]

    yield run
    for server in servers:
        server.stop()


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Running]:
    """A server that the tests of a module share; each leaves it idle."""
    running = Running(FakeEngine(), Settings(port=0, folder=str(tmp_path_factory.mktemp("live"))))
    yield running
    running.stop()
