"""A headless Chromium over its debugging pipe: no driver, no port, no package."""

from __future__ import annotations

import base64
import json
import os
import select
import shutil
import subprocess
import time
from pathlib import Path
from typing import Any

#: Where distributions put it.
NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--remote-debugging-pipe",
    "--hide-scrollbars",
)


def chromium() -> str | None:
    """Return the path of a Chromium, None where none is installed."""
    return next((path for name in NAMES if (path := shutil.which(name))), None)


class Browser:
    """One browser with one page. Use as a context manager; `problems` are its console's errors."""

    def __init__(self, profile: Path, width: int = 1280, height: int = 900, scale: float = 1.0) -> None:
        self.problems: list[str] = []
        self.requests: list[str] = []
        self._profile, self._size, self._scale = profile, (width, height), scale
        self._n = 0
        self._left = b""

    def __enter__(self) -> Browser:
        to_read, self._to = os.pipe()
        self._from, from_write = os.pipe()

        def wire() -> None:  # the browser reads from descriptor 3 and writes to 4
            os.dup2(to_read, 103)
            os.dup2(from_write, 104)
            os.dup2(103, 3)
            os.dup2(104, 4)

        path = chromium()
        assert path is not None
        self._process = subprocess.Popen(
            [path, *FLAGS, f"--user-data-dir={self._profile}", "about:blank"],
            preexec_fn=wire,  # noqa: PLW1509 (the one way to two fixed descriptors)
            pass_fds=(3, 4),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            close_fds=True,
        )
        os.close(to_read)
        os.close(from_write)
        self.tab()
        return self

    def __exit__(self, *_: object) -> None:
        try:
            self._call("Browser.close")
        except (OSError, AssertionError):
            self._process.kill()
        self._process.wait(timeout=30)
        os.close(self._to)
        os.close(self._from)

    def tab(self) -> str:
        """Open another page, which calls go to from now on; return what `use` takes."""
        target = self._call("Target.createTarget", url="about:blank")["targetId"]
        self._session = self._call("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Runtime", "Log", "Network"):
            self.call(f"{domain}.enable")
        self.resize(*self._size, self._scale)
        return self._session

    def use(self, tab: str) -> None:
        """Let calls go to an open page, and bring it to the front."""
        self._session = tab
        self.call("Page.bringToFront")

    def resize(self, width: int, height: int, scale: float = 1.0) -> None:
        self.call(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=scale,
            mobile=width < 600,
        )

    def open(self, where: Path | str) -> None:
        """Open a file or an address and wait until it is loaded."""
        self.call("Page.navigate", url=where if isinstance(where, str) else where.resolve().as_uri())
        self.wait_for("document.readyState === 'complete'")

    def eval(self, expression: str) -> Any:
        """Return the value of an expression, a promise's when it settles."""
        found = self.call(
            "Runtime.evaluate", expression=expression, returnByValue=True, awaitPromise=True, userGesture=True
        )
        assert "exceptionDetails" not in found, found["exceptionDetails"]
        return found["result"].get("value")

    def wait_for(self, expression: str, seconds: float = 60) -> Any:
        """Return the value of an expression once it is true."""
        until = time.monotonic() + seconds
        while not (value := self.eval(expression)):
            assert time.monotonic() < until, f"{expression} did not become true"
        return value

    def mouse(self, kind: str, x: float, y: float, **more: Any) -> None:
        self.call("Input.dispatchMouseEvent", type=kind, x=x, y=y, **more)

    def press(self, key: str, code: int = 0, text: str = "", modifiers: int = 0) -> None:
        """Press and release a key: "Tab", 9; "Enter", 13, "\\r"; " ", 32, " "."""
        about = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        down = {"type": "keyDown", "text": text} if text else {"type": "rawKeyDown"}
        self.call("Input.dispatchKeyEvent", **about, **down)
        self.call("Input.dispatchKeyEvent", type="keyUp", **about)

    def write(self, text: str) -> None:
        """Write a text where the focus is."""
        self.call("Input.insertText", text=text)

    def screenshot(self) -> bytes:
        return base64.b64decode(self.call("Page.captureScreenshot", format="png")["data"])

    def call(self, method: str, **params: Any) -> dict[str, Any]:
        """Call a method of the page's."""
        return self._call(method, self._session, **params)

    def _call(self, method: str, session: str | None = None, **params: Any) -> dict[str, Any]:
        self._n += 1
        message = {"id": self._n, "method": method, "params": params}
        if session is not None:
            message["sessionId"] = session
        os.write(self._to, json.dumps(message).encode() + b"\0")
        while True:
            answer = self._receive()
            if answer.get("id") == self._n:
                assert "error" not in answer, f"{method}: {answer['error']}"
                return answer["result"]
            self._note(answer)

    def _receive(self) -> dict[str, Any]:
        while b"\0" not in self._left:
            ready, _, _ = select.select([self._from], [], [], 60)
            assert ready, "the browser does not answer"
            got = os.read(self._from, 1 << 20)
            assert got, "the browser has gone"
            self._left += got
        message, _, self._left = self._left.partition(b"\0")
        return json.loads(message)

    def _note(self, event: dict[str, Any]) -> None:
        method, params = event.get("method"), event.get("params", {})
        if method == "Runtime.exceptionThrown":
            self.problems.append(str(params["exceptionDetails"]))
        elif method == "Runtime.consoleAPICalled":
            self.problems.append(f"console.{params['type']}: {params['args']}")
        elif method == "Log.entryAdded":
            self.problems.append(f"{params['entry']['level']}: {params['entry']['text']}")
        elif method == "Network.requestWillBeSent":
            self.requests.append(params["request"]["url"])
