"""Headless Chromium over its DevTools protocol, through a pipe: no port, no driver, no package."""

from __future__ import annotations

import base64
import json
import os
import queue
import shutil
import subprocess
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

WAIT_S = 60.0
FLAGS = (
    "--headless=new",
    "--no-sandbox",  # tests may run as root in a container
    "--disable-gpu",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--hide-scrollbars",
    "--force-color-profile=srgb",
    "--disable-background-networking",
    "--remote-debugging-pipe",
)
_KEYS = {
    "Enter": (13, "\r"),
    "Escape": (27, ""),
    "Tab": (9, ""),
    " ": (32, " "),
    "ArrowLeft": (37, ""),
    "ArrowUp": (38, ""),
    "ArrowRight": (39, ""),
    "ArrowDown": (40, ""),
}
CTRL, SHIFT = 2, 8
_REPORTS = """
window.reports = [];
addEventListener("securitypolicyviolation", ({ violatedDirective }) => reports.push(violatedDirective));
"""
# The middle of an element that a press would meet, or null while pictures above it still load and move it.
_STILL = """(async () => {
    const element = document.querySelector(SELECTOR);
    const middle = () => {
        const { left, top, width, height } = element.getBoundingClientRect();
        return [left + width / 2, top + height / 2];
    };
    element.scrollIntoView({ block: "center", behavior: "instant" });
    const before = middle();
    await new Promise((resolve) => setTimeout(resolve, 60));
    const now = middle();
    const met = document.elementFromPoint(...now);
    const meant = element.contains(met) || met?.closest("label")?.contains(element);
    return String(before) === String(now) && meant ? now : null;
})()"""


def find_chromium() -> str | None:
    """The browser's program."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


class Browser:
    """One browser; pages of it share nothing with each other."""

    def __init__(self, program: str, profile: Path) -> None:
        theirs_in, ours_out = os.pipe()
        ours_in, theirs_out = os.pipe()
        # The browser reads from 3 and writes to 4; a shell puts them there.
        command = f'exec "$0" "$@" 3<&{theirs_in} 4>&{theirs_out}'
        self._process = subprocess.Popen(
            ["bash", "-c", command, program, *FLAGS, f"--user-data-dir={profile}", "about:blank"],
            pass_fds=(theirs_in, theirs_out),
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        os.close(theirs_in)
        os.close(theirs_out)
        self._out, self._in = os.fdopen(ours_out, "wb"), os.fdopen(ours_in, "rb", buffering=0)
        self._lock = threading.Lock()
        self._asked = 0
        self._answers: dict[int, queue.Queue[dict[str, Any]]] = {}
        self._listeners: dict[str, Callable[[str, dict[str, Any]], None]] = {}
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        rest = b""
        while chunk := self._in.read(1 << 16):
            *messages, rest = (rest + chunk).split(b"\0")
            for message in map(json.loads, messages):
                if "id" in message:
                    self._answers.pop(message["id"]).put(message)
                elif listener := self._listeners.get(message.get("sessionId", "")):
                    listener(message["method"], message["params"])

    def ask(self, method: str, session: str | None = None, **params: Any) -> Any:
        """Call a method of the protocol."""
        answer: queue.Queue[dict[str, Any]] = queue.Queue()
        with self._lock:
            self._asked += 1
            message: dict[str, Any] = {"id": self._asked, "method": method, "params": params}
            if session:
                message["sessionId"] = session
            self._answers[self._asked] = answer
            self._out.write(json.dumps(message).encode() + b"\0")
            self._out.flush()
        found = answer.get(timeout=WAIT_S)
        assert "error" not in found, f"{method}: {found['error']}"
        return found["result"]

    @contextmanager
    def page(self, url: str, width: int = 1200, height: int = 800, **features: str) -> Generator[Page]:
        """A page with storage of its own; its errors are looked at by who opens it."""
        context = self.ask("Target.createBrowserContext")["browserContextId"]
        target = self.ask("Target.createTarget", url="about:blank", browserContextId=context)["targetId"]
        session = self.ask("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        page = Page(browser=self, session=session)
        self._listeners[session] = page.told
        for domain in ("Page", "Runtime", "Log", "Network", "DOM"):
            page.ask(f"{domain}.enable")
        page.ask("Page.addScriptToEvaluateOnNewDocument", source=_REPORTS)
        page.ask("Emulation.setFocusEmulationEnabled", enabled=True)
        page.resize(width, height)
        if features:
            media = [{"name": name.replace("_", "-"), "value": value} for name, value in features.items()]
            page.ask("Emulation.setEmulatedMedia", features=media)
        try:
            page.go(url)
            yield page
        finally:
            self._listeners.pop(session)
            self.ask("Target.disposeBrowserContext", browserContextId=context)

    def close(self) -> None:
        """End the process."""
        self.ask("Browser.close")
        self._process.wait(WAIT_S)
        self._reader.join(WAIT_S)
        self._out.close()
        self._in.close()


@dataclass
class Page:
    """A tab. `errors` has exceptions, and what the console says that is no warning."""

    browser: Browser
    session: str
    errors: list[str] = field(default_factory=list)
    posted: list[dict[str, Any]] = field(default_factory=list)

    def ask(self, method: str, **params: Any) -> Any:
        """Call a method of the protocol on this page."""
        return self.browser.ask(method, self.session, **params)

    def told(self, method: str, params: dict[str, Any]) -> None:
        """Take an event of the protocol."""
        if method == "Runtime.exceptionThrown":
            details = params["exceptionDetails"]
            self.errors.append(details.get("exception", {}).get("description", details["text"]))
        elif method == "Runtime.consoleAPICalled" and params["type"] in ("error", "assert"):
            self.errors.append(str([argument.get("value", argument) for argument in params["args"]]))
        elif method == "Log.entryAdded" and params["entry"]["level"] == "error":
            self.errors.append(f"{params['entry']['source']}: {params['entry']['text']}")
        elif method == "Network.requestWillBeSent" and params["request"]["method"] == "POST":
            self.posted.append(params)

    def go(self, url: str | None = None) -> None:
        """Load an address, or the same one again."""
        self.evaluate("window.leaving = true")
        if url is None:
            self.ask("Page.reload")
        else:
            self.ask("Page.navigate", url=url)
        self.until("!window.leaving && document.readyState === 'complete'")

    def evaluate(self, expression: str) -> Any:
        """The value of an expression, awaited."""
        found = self.ask("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        assert "exceptionDetails" not in found, f"{expression}: {found['exceptionDetails']}"
        return found["result"].get("value")

    def until(self, expression: str, timeout: float = WAIT_S) -> Any:
        """Wait for an expression to be true. Returns its value."""
        until = time.monotonic() + timeout
        while not (found := self._tried(expression)):
            assert time.monotonic() < until, f"never: {expression}; errors: {self.errors}"
            time.sleep(0.02)
        return found

    def _tried(self, expression: str) -> Any:
        try:
            return self.evaluate(expression)
        except AssertionError:  # between two documents
            return None

    def type(self, text: str) -> None:
        """Write where the focus is."""
        self.ask("Input.insertText", text=text)

    def press(self, key: str, modifiers: int = 0) -> None:
        """Press a key, and let it go."""
        code, text = _KEYS.get(key) or (ord(key.upper()), key)
        about = {"key": key, "windowsVirtualKeyCode": code, "modifiers": modifiers}
        self.ask("Input.dispatchKeyEvent", type="keyDown", **about, **({"text": text} if text else {}))
        self.ask("Input.dispatchKeyEvent", type="keyUp", **about)

    def click(self, selector: str) -> None:
        """Click the middle of an element, where it can be seen, once it lies still and nothing covers it."""
        x, y = self.until(_STILL.replace("SELECTOR", json.dumps(selector)))
        self.drag([(x, y)])

    def box(self, selector: str) -> tuple[float, float, float, float]:
        """Left, top, width and height of an element on the screen."""
        quoted = json.dumps(selector)
        found = self.evaluate(
            f"(({{left, top, width, height}}) => [left, top, width, height])"
            f"(document.querySelector({quoted}).getBoundingClientRect())"
        )
        left, top, width, height = found
        return left, top, width, height

    def drag(self, points: list[tuple[float, float]]) -> None:
        """Press the mouse's button at the first point, and let it go at the last."""
        for kind, (x, y) in (
            ("mousePressed", points[0]),
            *(("mouseMoved", point) for point in points[1:]),
            ("mouseReleased", points[-1]),
        ):
            count = int(kind != "mouseMoved")
            self.ask(
                "Input.dispatchMouseEvent", type=kind, x=x, y=y, button="left", buttons=1, clickCount=count
            )

    def choose(self, selector: str, file: Path) -> None:
        """Choose a file in an input."""
        root = self.ask("DOM.getDocument")["root"]["nodeId"]
        node = self.ask("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.ask("DOM.setFileInputFiles", files=[str(file)], nodeId=node)

    def sent(self) -> dict[str, Any]:
        """The body of the last POST."""
        name = self.posted[-1]["requestId"]
        return json.loads(self.ask("Network.getRequestPostData", requestId=name)["postData"])

    def resize(self, width: int, height: int, mobile: bool = False) -> None:
        """Make the window so large."""
        self.ask(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=height,
            deviceScaleFactor=1,
            mobile=mobile,
        )

    def screenshot(self, file: Path, whole: bool = False) -> None:
        """Write what is seen as PNG; `whole` also what is below."""
        found = self.ask("Page.captureScreenshot", format="png", captureBeyondViewport=whole)
        file.write_bytes(base64.b64decode(found["data"]))
