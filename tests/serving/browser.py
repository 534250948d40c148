"""Drives a headless Chromium over the DevTools protocol."""

import base64
import io
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import websocket
from PIL import Image

VARIABLE = "QWENVL_LIT_BROWSER"  # the path of a Chromium or Chrome, if it is not on the PATH
NAMES = ("chromium", "chromium-browser", "google-chrome", "chrome")
PATIENCE = 20  # seconds until an expected state is an error
KEYS = {"Enter": 13, "Escape": 27, "Tab": 9}
SHIFT = 8


def find_browser() -> str | None:
    if chosen := os.environ.get(VARIABLE):
        return chosen
    return next(filter(None, map(shutil.which, NAMES)), None)


class Connection:
    """One end of the protocol: commands and their results, and the events in between."""

    def __init__(self, address: str):
        self._socket = websocket.create_connection(address, timeout=PATIENCE, suppress_origin=True)
        self._last_id = 0
        self.events: list[dict] = []

    def send(self, method: str, **params) -> dict:
        self._last_id += 1
        self._socket.send(json.dumps({"id": self._last_id, "method": method, "params": params}))
        while True:
            message = json.loads(self._socket.recv())
            if message.get("id") != self._last_id:
                self.events.append(message)
            elif "error" in message:
                raise RuntimeError(f"{method}: {message['error']}")
            else:
                return message["result"]

    def close(self):
        self._socket.close()


class Browser:
    """A browser with a new profile in `folder`."""

    def __init__(self, program: str, folder: Path):
        options = ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage")
        quiet = ("--no-first-run", "--disable-background-networking", "--disable-component-update")
        ports = ("--remote-debugging-port=0", f"--user-data-dir={folder}")
        self._process = subprocess.Popen(
            [program, *options, *quiet, *ports, "about:blank"],
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        port_file = folder / "DevToolsActivePort"
        deadline = time.monotonic() + 3 * PATIENCE
        while not port_file.exists() or "\n" not in port_file.read_text():
            assert self._process.poll() is None, f"{program} ended at its start"
            assert time.monotonic() < deadline, f"{program} does not open its port"
            time.sleep(0.02)
        self._port, path = port_file.read_text().split()
        self._connection = Connection(f"ws://127.0.0.1:{self._port}{path}")

    def open_page(self) -> "Page":
        target = self._connection.send("Target.createTarget", url="about:blank")["targetId"]
        return Page(f"ws://127.0.0.1:{self._port}/devtools/page/{target}")

    def close(self):
        self._connection.close()
        os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()


class Page:
    """A tab, with what a person can do in it."""

    def __init__(self, address: str):
        self._connection = Connection(address)
        self.send = self._connection.send
        for domain in ("Page", "Runtime", "Network", "Log"):
            self.send(f"{domain}.enable")
        listener = "(event) => violations.push(event.violatedDirective)"
        script = f"violations = []; addEventListener('securitypolicyviolation', {listener})"
        self.send("Page.addScriptToEvaluateOnNewDocument", source=script)

    def reset(self, downloads: Path):
        """Forgets the events until now and what was set. Saved files go to `downloads`."""
        self._connection.events.clear()
        self.resize(1280, 900)
        self.prefer("light")
        folder = str(downloads)
        self.send("Browser.setDownloadBehavior", behavior="allow", downloadPath=folder)

    def open(self, address: str):
        self.send("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && document.getElementById('question')")

    def resize(self, width: int, height: int):
        size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": False}
        self.send("Emulation.setDeviceMetricsOverride", **size)

    def prefer(self, scheme: str):
        feature = {"name": "prefers-color-scheme", "value": scheme}
        self.send("Emulation.setEmulatedMedia", features=[feature])

    def value(self, expression: str):
        """Returns the value of JavaScript as plain data, after a promise is settled."""
        result = self.send(
            "Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True
        )
        assert "exceptionDetails" not in result, result["exceptionDetails"]
        return result["result"].get("value")

    def until(self, expression: str):
        """Waits until JavaScript is true."""
        deadline = time.monotonic() + PATIENCE
        while not self.value(f"Boolean({expression})"):
            assert time.monotonic() < deadline, f"never true: {expression}"
            time.sleep(0.02)

    def text(self, selector: str) -> str:
        return self.value(f"document.querySelector({selector!r})?.innerText")

    def click(self, selector: str):
        """Clicks on the middle of an element, as a mouse does."""
        self.point_at(selector)
        where = self._middle(selector)
        for kind in ("mousePressed", "mouseReleased"):
            self.send("Input.dispatchMouseEvent", type=kind, button="left", clickCount=1, **where)

    def point_at(self, selector: str):
        self.send("Input.dispatchMouseEvent", type="mouseMoved", **self._middle(selector))

    def _middle(self, selector: str) -> dict[str, float]:
        element = f"document.querySelector({selector!r})"
        self.value(f"{element}.scrollIntoView({{block: 'center', behavior: 'instant'}})")
        left, top, width, height = self.rectangle(selector)
        return {"x": left + width / 2, "y": top + height / 2}

    def rectangle(self, selector: str) -> tuple[float, float, float, float]:
        """Returns left, top, width and height of an element in the window."""
        script = f"document.querySelector({selector!r}).getBoundingClientRect().toJSON()"
        found = self.value(script)
        return found["x"], found["y"], found["width"], found["height"]

    def press(self, key: str, modifiers: int = 0):
        text = {"text": "\r"} if key == "Enter" else {}
        code = {"key": key, "code": key, "windowsVirtualKeyCode": KEYS[key]}
        self.send("Input.dispatchKeyEvent", type="keyDown", modifiers=modifiers, **code, **text)
        self.send("Input.dispatchKeyEvent", type="keyUp", modifiers=modifiers, **code)

    def type(self, selector: str, text: str):
        """Replaces the text of a field."""
        self.value(f"document.querySelector({selector!r}).select()")
        self.send("Input.insertText", text=text)

    def choose_files(self, selector: str, *files: Path):
        found = self.send("Runtime.evaluate", expression=f"document.querySelector({selector!r})")
        node = found["result"]["objectId"]
        self.send("DOM.setFileInputFiles", files=list(map(str, files)), objectId=node)

    def screenshot(self) -> Image.Image:
        data = self.send("Page.captureScreenshot")["data"]
        return Image.open(io.BytesIO(base64.b64decode(data))).convert("RGB")

    def requested(self) -> list[str]:
        """The addresses of all requests until now."""
        sent = (e for e in self._connection.events if e["method"] == "Network.requestWillBeSent")
        return [event["params"]["request"]["url"] for event in sent]

    def problems(self) -> list[str]:
        """Uncaught errors, and what the content security policy has refused."""
        found = [str(address) for address in self.value("window.violations")]
        for event in self._connection.events:
            if event["method"] == "Runtime.exceptionThrown":
                found.append(json.dumps(event["params"]["exceptionDetails"]))
        return found

    def close(self):
        self._connection.close()
