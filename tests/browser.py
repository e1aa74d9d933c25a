"""Headless Chromium, controlled through a pipe with the DevTools protocol."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
_FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--hide-scrollbars",
    "--remote-debugging-pipe",
)
_TIMEOUT_S = 60.0


class Tab:
    """One browser tab, with its console messages, exceptions and requests."""

    def __init__(self, to_browser: int, from_browser: int) -> None:
        self._to, self._from = to_browser, from_browser
        self._buffer = b""
        self._id = 0
        self._session: str | None = None
        self._events: list[dict[str, Any]] = []
        self._url = "about:blank"
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self._session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a DevTools method and return its result."""
        self._id += 1
        message: dict[str, Any] = {"id": self._id, "method": method, "params": params}
        if self._session is not None:
            message["sessionId"] = self._session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._read()
            if answer.get("id") == self._id:
                if "error" in answer:
                    raise RuntimeError(f"{method}: {answer['error']['message']}")
                return answer["result"]

    def _read(self) -> dict[str, Any]:
        end = time.monotonic() + _TIMEOUT_S
        while b"\0" not in self._buffer:
            if not select.select([self._from], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"no response from the browser within {_TIMEOUT_S:.0f} s")
            chunk = os.read(self._from, 2**16)
            if not chunk:
                raise RuntimeError("the browser closed the connection")
            self._buffer += chunk
        text, _, self._buffer = self._buffer.partition(b"\0")
        message = json.loads(text)
        if "method" in message:
            self._events.append(message)
        return message

    def open(self, page: Path | str, *, width: int = 1280, height: int = 900, scheme: str = "light") -> None:
        """Open a file or an address in a window of the given size and color scheme, and wait until it is drawn."""
        self._events.clear()
        self._url = page if isinstance(page, str) else page.as_uri()
        self.send(
            "Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 600
        )
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
        self.send("Page.navigate", url=self._url)
        while not any(event["method"] == "Page.loadEventFired" for event in self._events):
            self._read()
        self.run("new Promise((done) => requestAnimationFrame(() => requestAnimationFrame(done)))")

    def run(self, expression: str) -> Any:
        """Return the awaited value of a JavaScript expression."""
        result = self.send("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in result:
            raise RuntimeError(json.dumps(result["exceptionDetails"]))
        return result["result"].get("value")

    def wait_for(self, condition: str) -> None:
        """Wait until a JavaScript expression is true.

        Raises:
            TimeoutError: If it does not become true.
        """
        end = time.monotonic() + _TIMEOUT_S
        while not self.run(f"Boolean({condition})"):
            if time.monotonic() > end:
                raise TimeoutError(f"not true within {_TIMEOUT_S:.0f} s: {condition}")
            time.sleep(0.02)

    def press(self, key: str) -> None:
        """Press a key."""
        for event_type in ("rawKeyDown", "keyUp"):
            self.send("Input.dispatchKeyEvent", type=event_type, key=key, code=key)

    def screenshot(self, path: Path, *, whole_page: bool = False) -> None:
        """Save a PNG of the window or of the whole page."""
        picture = self.send("Page.captureScreenshot", format="png", captureBeyondViewport=whole_page)
        path.write_bytes(base64.b64decode(picture["data"]))

    @property
    def problems(self) -> list[str]:
        """Console errors and warnings, exceptions, and requests other than for the document and to its own server."""
        self.run("0")  # wait for pending events
        found = []
        for event in self._events:
            params = event["params"]
            if event["method"] == "Runtime.exceptionThrown":
                found.append(f"exception: {json.dumps(params['exceptionDetails'])}")
            elif event["method"] == "Runtime.consoleAPICalled" and params["type"] in ("error", "warning", "assert"):
                found.append(f"console: {json.dumps(params['args'])}")
            elif event["method"] == "Log.entryAdded":
                found.append(f"log: {params['entry']['text']}")
            elif event["method"] == "Network.requestWillBeSent" and params["type"] != "Document":
                if self._url.startswith("http") and params["request"]["url"].startswith(self._url):
                    continue
                found.append(f"request: {params['request']['url']}")
        return found


@contextmanager
def chromium_tab() -> Iterator[Tab]:
    """Open a browser with one tab, and close it at the end of the block."""
    assert CHROMIUM is not None
    child_read, to_browser = os.pipe()
    from_browser, child_write = os.pipe()

    def set_up_pipes() -> None:  # the browser reads from file descriptor 3 and writes to 4
        read, write = os.dup(child_read), os.dup(child_write)
        os.dup2(read, 3)
        os.dup2(write, 4)

    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        browser = subprocess.Popen(
            [CHROMIUM, *_FLAGS, f"--user-data-dir={profile}", "about:blank"],
            preexec_fn=set_up_pipes,
            close_fds=False,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(child_read)
        os.close(child_write)
        try:
            yield Tab(to_browser, from_browser)
        finally:
            browser.kill()
            browser.wait()
            os.close(to_browser)
            os.close(from_browser)
