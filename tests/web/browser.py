"""A headless Chromium, driven over its DevTools protocol with what ComfyUI's environment has."""
from __future__ import annotations

import asyncio
import base64
import os
import shutil
import subprocess
import time
from pathlib import Path

import aiohttp

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
START_TIMEOUT = 60


class Browser:
    """A browser with one page, in whose window (pixels) ComfyUI is opened. profile: an empty folder. errors: what the page has reported
    as an error so far: console, uncaught exceptions, failed requests."""

    def __init__(self, profile: Path, window: tuple[int, int] = (1600, 1000)):
        self._profile = profile
        self._window = window
        self._number = 0
        self.errors: list[str] = []

    def __enter__(self) -> Browser:
        self._loop = asyncio.new_event_loop()
        options = ["--headless=new", "--no-sandbox", "--disable-gpu", f"--window-size={self._window[0]},{self._window[1]}",
                   "--remote-debugging-port=0", f"--user-data-dir={self._profile}", "about:blank"]
        # Its own temporary folder: it leaves files behind when it is stopped.
        self._process = subprocess.Popen([CHROMIUM, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                                         env={**os.environ, "TMPDIR": str(self._profile.parent)})
        try:
            self._loop.run_until_complete(self._connect())
            for domain in ("Page", "Runtime", "Log"):
                self.command(f"{domain}.enable")
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_):
        self._process.terminate()
        self._process.wait()
        if hasattr(self, "_session"):
            self._loop.run_until_complete(self._session.close())
        self._loop.close()

    async def _connect(self):
        self._session = aiohttp.ClientSession()
        for _ in range(START_TIMEOUT * 2):
            await asyncio.sleep(0.5)
            port_file = self._profile / "DevToolsActivePort"
            if port_file.exists() and (lines := port_file.read_text().splitlines()):
                async with self._session.get(f"http://127.0.0.1:{lines[0]}/json") as answer:
                    pages = [page for page in await answer.json() if page["type"] == "page"]
                if pages:
                    self._socket = await self._session.ws_connect(pages[0]["webSocketDebuggerUrl"], max_msg_size=0)
                    return
        raise RuntimeError(f"{CHROMIUM} did not start within {START_TIMEOUT} s")

    def command(self, method: str, **parameters) -> dict:
        """The result of a command of the DevTools protocol."""
        return self._loop.run_until_complete(self._command(method, parameters))

    async def _command(self, method, parameters):
        self._number += 1
        await self._socket.send_json({"id": self._number, "method": method, "params": parameters})
        while (answer := await self._socket.receive_json()).get("id") != self._number:
            self._note(answer.get("method"), answer.get("params", {}))
        if "error" in answer:
            raise RuntimeError(f"{method}: {answer['error']}")
        return answer["result"]

    def _note(self, event: str | None, parameters: dict):
        if event == "Runtime.exceptionThrown":
            self.errors.append(str(parameters["exceptionDetails"])[:500])
        elif event == "Runtime.consoleAPICalled" and parameters["type"] == "error":
            self.errors.append(str([value.get("value", value.get("description")) for value in parameters["args"]])[:500])
        elif event == "Log.entryAdded" and parameters["entry"]["level"] == "error":
            self.errors.append(f"{parameters['entry']['text']} {parameters['entry'].get('url', '')}")

    def open(self, url: str):
        self.command("Page.navigate", url=url)
        time.sleep(1)  # until the old page's scripts are gone

    def reload(self):
        self.command("Page.reload")
        time.sleep(2)  # until the old page is gone

    def evaluate(self, expression: str):
        """The value of a JavaScript expression, a promise awaited."""
        answer = self.command("Runtime.evaluate", expression=expression, awaitPromise=True, returnByValue=True)
        if "exceptionDetails" in answer:
            raise RuntimeError(str(answer["exceptionDetails"])[:2000])
        return answer["result"].get("value")

    def until(self, expression: str, seconds: float = 60):
        """The value of an expression as soon as it is true."""
        end = time.monotonic() + seconds
        while not (value := self.evaluate(expression)):
            if time.monotonic() > end:
                raise TimeoutError(f"not true within {seconds:g} s: {expression}\n{self.errors}")
            time.sleep(0.1)
        return value

    def screenshot(self, path: Path, clip: dict | None = None):
        """path: .png or .jpg."""
        form = {"format": "png"} if path.suffix == ".png" else {"format": "jpeg", "quality": 85}
        path.write_bytes(base64.b64decode(self.command("Page.captureScreenshot", **form, **({"clip": clip} if clip else {}))["data"]))
