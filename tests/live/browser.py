"""Headless Chromium, controlled through its debugging protocol."""

import base64
import contextlib
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image
from websockets.sync.client import ClientConnection, connect

PROGRAMS = ("chromium", "chromium-browser", "google-chrome")


def find_browser() -> str | None:
    """Return the path of Chromium; None if it is not installed."""
    return next((path for name in PROGRAMS if (path := shutil.which(name))), None)


class Browser:
    """One tab. `errors` lists the errors of the page."""

    def __init__(self, socket: ClientConnection):
        self.socket, self.errors = socket, list[str]()
        self._numbers = itertools.count(1)
        for domain in ("Runtime", "Page", "Log"):
            self.call(f"{domain}.enable")

    def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        number = next(self._numbers)
        self.socket.send(json.dumps({"id": number, "method": method, "params": parameters}))
        while True:
            message = json.loads(self.socket.recv(timeout=30))
            if message.get("id") == number:
                assert "error" not in message, message
                return message["result"]
            if message.get("method") in ("Runtime.exceptionThrown", "Log.entryAdded"):
                self.errors.append(json.dumps(message["params"]))

    def record(self, seconds: float) -> list[tuple[float, bytes]]:
        """Return the JPEG pictures of the page for some seconds, each with its time in seconds."""
        pictures: list[tuple[float, bytes]] = []
        self.call("Page.startScreencast", format="jpeg", quality=90)
        end = time.monotonic() + seconds
        while (left := end - time.monotonic()) > 0:
            with contextlib.suppress(TimeoutError):
                message = json.loads(self.socket.recv(timeout=left))
                if message.get("method") == "Page.screencastFrame":
                    frame = message["params"]
                    pictures.append((frame["metadata"]["timestamp"], base64.b64decode(frame["data"])))
                    confirm = {"method": "Page.screencastFrameAck", "params": {"sessionId": frame["sessionId"]}}
                    self.socket.send(json.dumps({"id": next(self._numbers), **confirm}))
        self.call("Page.stopScreencast")
        return pictures

    def run(self, script: str) -> Any:
        """Return the value of a JavaScript expression."""
        result = self.call("Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in result, result
        return result["result"].get("value")

    def resize(self, width: int, height: int, theme: str = "dark") -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.call("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": theme}])

    def screenshot(self, element: str) -> np.ndarray:
        """Return the pixels of an element on the screen, uint8 [H, W, 3]."""
        box = self.run(f"document.getElementById('{element}').getBoundingClientRect().toJSON()")
        clip = {key: box[key] for key in ("x", "y", "width", "height")} | {"scale": 1}
        data = base64.b64decode(self.call("Page.captureScreenshot", format="png", clip=clip)["data"])
        return np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))


@contextlib.contextmanager
def open_browser(program: str, folder: Path) -> Iterator[Browser]:
    """Start Chromium with its profile in `folder` and yield a tab."""
    flags = ["--headless=new", "--no-sandbox", "--disable-gpu", "--remote-debugging-port=0", "--hide-scrollbars"]
    process = subprocess.Popen(
        [program, *flags, "--remote-allow-origins=*", f"--user-data-dir={folder}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        start_new_session=True,
    )
    try:
        deadline, file = time.monotonic() + 60, folder / "DevToolsActivePort"
        while not (file.exists() and file.read_text().count("\n")):
            assert time.monotonic() < deadline and process.poll() is None, "Chromium does not start"
            time.sleep(0.1)
        port = file.read_text().splitlines()[0]
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/json") as reply:
            [tab] = [tab for tab in json.load(reply) if tab["type"] == "page"]
        with connect(tab["webSocketDebuggerUrl"], max_size=None, close_timeout=0.2) as socket:
            yield Browser(socket)
    finally:
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
