"""A headless Chromium, driven through chromedriver's own protocol: no package needed."""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

FLAGS = (
    "--headless", "--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--hide-scrollbars",
    "--disable-background-networking", "--disable-component-update", "--disable-sync", "--disable-dev-shm-usage",
)  # fmt: skip


class Page:
    """One browser window."""

    def __init__(self, address: str) -> None:
        self.address = address

    def send(self, path: str, body: dict[str, Any] | None = None) -> Any:
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(f"{self.address}{path}", data, {"Content-Type": "application/json"})
        with urllib.request.urlopen(request, timeout=60) as answer:
            return json.load(answer)["value"]

    def open(self, page: Path) -> None:
        self.send("/url", {"url": page.absolute().as_uri()})

    def run(self, script: str, *args: Any) -> Any:
        return self.send("/execute/sync", {"script": script, "args": list(args)})

    def resize(self, width: int, height: int) -> None:
        self.send("/window/rect", {"width": width, "height": height})

    def devtools(self, command: str, **params: Any) -> Any:
        return self.send("/goog/cdp/execute", {"cmd": command, "params": params})

    def point(self, x: float, y: float, click: bool = False) -> None:
        """Move the mouse to a place in the window, and press it there."""
        press = [{"type": "pointerDown", "button": 0}, {"type": "pointerUp", "button": 0}] if click else []
        move = {"type": "pointerMove", "duration": 0, "x": round(x), "y": round(y)}
        mouse = {"type": "pointer", "id": "mouse", "parameters": {"pointerType": "mouse"}, "actions": [move, *press]}
        self.send("/actions", {"actions": [mouse]})

    def key(self, code: str) -> None:
        keys = [{"type": "keyDown", "value": code}, {"type": "keyUp", "value": code}]
        self.send("/actions", {"actions": [{"type": "key", "id": "keys", "actions": keys}]})

    def picture(self) -> bytes:
        return base64.b64decode(self.send("/screenshot"))


_started = contextlib.ExitStack()  # ends what was started: see `close`
_window: list[Page] = []


@contextlib.contextmanager
def browser() -> Iterator[Page]:
    """The window of the one browser of this process, as if it were new; a skipped test says what is missing."""
    if not _window:
        _window.append(_started.enter_context(_browser()))
    (window,) = _window
    window.send("/url", {"url": "about:blank"})
    window.devtools("Emulation.clearDeviceMetricsOverride")
    window.devtools("Emulation.setEmulatedMedia", media="", features=[])
    window.resize(1100, 900)
    window.send("/se/log", {"type": "browser"})  # what was logged before is not said again
    yield window


def close() -> None:
    """End the browser, if there is one."""
    _window.clear()
    _started.close()


@contextlib.contextmanager
def _browser() -> Iterator[Page]:
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    driver = shutil.which("chromedriver")
    if not chromium or not driver:
        pytest.skip("no chromium with chromedriver here (apt-get install chromium chromium-driver)")
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = subprocess.Popen([driver, f"--port={port}"], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        try:
            options = {"binary": chromium, "args": [*FLAGS, f"--user-data-dir={profile}"]}
            wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "ALL"}}
            page = Page(f"http://127.0.0.1:{port}")
            session = _patiently(page, {"capabilities": {"alwaysMatch": wanted}})
            page.address += f"/session/{session['sessionId']}"
            yield page
            urllib.request.urlopen(urllib.request.Request(page.address, method="DELETE"), timeout=30).close()
        finally:
            process.terminate()
            process.wait(20)


def _patiently(page: Page, wanted: dict[str, Any]) -> Any:
    for _ in range(100):
        with contextlib.suppress(urllib.error.URLError, ConnectionError):
            return page.send("/session", wanted)
        time.sleep(0.2)
    raise AssertionError("chromedriver does not answer")
