"""A live server in a thread, and clients for it."""

import json
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable
from contextlib import closing
from typing import Any

from fake_engine import EXAMPLES, FakeEngine
from websockets.sync.client import ClientConnection, connect

from live.server import LiveServer
from live.settings import Settings


class Running:
    """A server that runs in a thread."""

    def __init__(self, engine: FakeEngine, settings: Settings):
        self.engine, self.server = engine, LiveServer(engine, settings)
        self.thread = threading.Thread(target=self.server.run, daemon=True)
        self.thread.start()
        wait_until(lambda: self.server.started)
        self.url = f"http://127.0.0.1:{self.server.port}"

    def get(self, path: str, **headers: str) -> tuple[int, dict[str, str], bytes]:
        """Return the status, headers and body of a GET request."""
        try:
            with urllib.request.urlopen(urllib.request.Request(self.url + path, headers=headers)) as reply:
                return reply.status, dict(reply.headers), reply.read()
        except urllib.error.HTTPError as error:
            with closing(error):
                return error.code, dict(error.headers), error.read()

    def health(self) -> dict[str, Any]:
        return json.loads(self.get("/health")[2])

    def connect(self, query: str = "", **options: Any) -> ClientConnection:
        return connect(f"{self.url.replace('http', 'ws')}/ws{query}", close_timeout=0.2, **options)

    def stop(self) -> None:
        self.server.stop()
        self.thread.join(5)


def wait_until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    """Wait until a condition holds; fail after `seconds`."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "the condition does not hold"
        time.sleep(0.01)


def send(client: ClientConnection, kind: str, **fields: Any) -> None:
    client.send(json.dumps({"type": kind, **fields}))


def start(client: ClientConnection, **fields: Any) -> None:
    send(client, "start", **({"prompt": EXAMPLES[0]} | fields))


def receive(client: ClientConnection, kind: str, seconds: float = 10.0) -> dict[str, Any]:
    """Return the next message of a type; skip all others."""
    deadline = time.monotonic() + seconds
    while True:
        message = client.recv(timeout=max(0.01, deadline - time.monotonic()))
        if isinstance(message, str) and (content := json.loads(message))["type"] == kind:
            return content
