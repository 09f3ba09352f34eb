"""A headless Chromium for tests, driven through its debugging pipe: no driver, no port, no package."""
import base64
import contextlib
import fcntl
import json
import os
import shutil
import subprocess
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

import pytest


class Tab:
    """One page of the browser, and the errors it has complained of."""

    def __init__(self, commands: int, events: int):
        self.commands, self.events, self.unread = commands, events, b""
        self.number, self.session, self.complaints = 0, None, []
        target = self.send("Target.createTarget", url="about:blank")["targetId"]
        self.session = self.send("Target.attachToTarget", targetId=target, flatten=True)["sessionId"]
        for domain in ("Page", "Log", "Runtime", "DOM"):
            self.send(f"{domain}.enable")

    def send(self, method: str, **parameters) -> dict:
        self.number += 1
        message = {"id": self.number, "method": method, "params": parameters} | ({"sessionId": self.session} if self.session else {})
        os.write(self.commands, json.dumps(message).encode() + b"\0")
        while True:
            reply = self.receive()
            if reply.get("method") == "Runtime.exceptionThrown":
                self.complaints.append(reply["params"]["exceptionDetails"]["text"])
            if reply.get("method") == "Log.entryAdded" and reply["params"]["entry"]["level"] == "error":
                self.complaints.append(reply["params"]["entry"]["text"])
            if reply.get("id") == self.number:
                assert "error" not in reply, reply
                return reply["result"]

    def receive(self) -> dict:
        """The browser's next message; they end with a zero byte."""
        parts = [self.unread]
        while b"\0" not in parts[-1]:
            parts.append(os.read(self.events, 1 << 20))
            assert parts[-1], "the browser has gone"
        text, _, self.unread = b"".join(parts).partition(b"\0")
        return json.loads(text)

    def open(self, address: str) -> None:
        self.send("Page.navigate", url=address)
        self.until("document.readyState === 'complete' && location.href !== 'about:blank'")

    def run(self, script: str):
        """The value of an expression in the page."""
        reply = self.send("Runtime.evaluate", expression=script, returnByValue=True, awaitPromise=True)
        assert "exceptionDetails" not in reply, reply
        return reply["result"].get("value")

    def until(self, script: str, seconds: float = 30):
        """The expression's value as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.run(script)):
            assert time.monotonic() < end, (script, self.run("document.body.innerText"), self.complaints)
            time.sleep(0.05)
        return value

    def choose(self, selector: str, file: Path) -> None:
        """Put a file into a form's field."""
        root = self.send("DOM.getDocument")["root"]["nodeId"]
        field = self.send("DOM.querySelector", nodeId=root, selector=selector)["nodeId"]
        self.send("DOM.setFileInputFiles", nodeId=field, files=[str(file)])

    def show(self, width: int, dark: bool = False, height: int = 900) -> None:
        self.send("Emulation.setDeviceMetricsOverride", width=width, height=height, deviceScaleFactor=1, mobile=width < 500)
        self.send("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": "dark" if dark else "light"}])

    def picture(self, file: Path) -> None:
        data = self.send("Page.captureScreenshot", captureBeyondViewport=True)["data"]
        file.write_bytes(base64.b64decode(data))


@contextlib.contextmanager
def browser() -> Iterator[Tab]:
    if not (chromium := shutil.which("chromium") or shutil.which("google-chrome")):
        pytest.skip("needs chromium")
    ours, theirs = [], []
    for ends in (os.pipe(), os.pipe()):
        theirs.append(fcntl.fcntl(ends[len(ours)], fcntl.F_DUPFD, 10))  # it reads from 3 and writes to 4
        ours.append(ends[1 - len(ours)])
        os.close(ends[len(ours) - 1])
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        command = (f"exec {chromium} --headless=new --no-sandbox --disable-gpu --disable-background-networking "
                   f"--user-data-dir={profile} --remote-debugging-pipe 3<&{theirs[0]} 4>&{theirs[1]}")
        running = subprocess.Popen(["bash", "-c", command], pass_fds=theirs, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        for end in theirs:
            os.close(end)
        tab = Tab(*ours)
        try:
            yield tab
        finally:
            running.terminate()
            running.wait()
            for end in ours:
                os.close(end)
