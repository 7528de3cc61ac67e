"""A headless Chromium, driven over its DevTools protocol with what ComfyUI's environment has."""
from __future__ import annotations

import asyncio
import os
import shutil
import subprocess
from pathlib import Path

import aiohttp

CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)
START_TIMEOUT = 60


async def _page(profile: Path, session: aiohttp.ClientSession) -> str:
    """The DevTools address of the first page of the browser that uses profile."""
    for _ in range(START_TIMEOUT * 2):
        await asyncio.sleep(0.5)
        port_file = profile / "DevToolsActivePort"
        if port_file.exists() and (lines := port_file.read_text().splitlines()):
            async with session.get(f"http://127.0.0.1:{lines[0]}/json") as answer:
                pages = [page for page in await answer.json() if page["type"] == "page"]
            if pages:
                return pages[0]["webSocketDebuggerUrl"]
    raise RuntimeError(f"{CHROMIUM} did not start within {START_TIMEOUT} s")


async def _evaluate(url: str, expressions: list[str], profile: Path) -> list:
    options = ["--headless=new", "--no-sandbox", "--disable-gpu", "--window-size=1600,1000", "--remote-debugging-port=0",
               f"--user-data-dir={profile}", "about:blank"]
    # Its own temporary folder: it leaves files behind when it is stopped.
    process = subprocess.Popen([CHROMIUM, *options], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
                               env={**os.environ, "TMPDIR": str(profile.parent)})
    try:
        async with aiohttp.ClientSession() as session, session.ws_connect(await _page(profile, session), max_msg_size=0) as socket:
            results = []
            for number, (method, parameters) in enumerate([("Page.navigate", {"url": url})] + [
                    ("Runtime.evaluate", {"expression": text, "awaitPromise": True, "returnByValue": True}) for text in expressions]):
                await socket.send_json({"id": number, "method": method, "params": parameters})
                while (answer := await socket.receive_json()).get("id") != number:
                    pass
                if method == "Page.navigate":
                    await asyncio.sleep(1)  # until the old page's scripts are gone
                    continue
                if "exceptionDetails" in answer["result"]:
                    raise RuntimeError(str(answer["result"]["exceptionDetails"])[:2000])
                results.append(answer["result"]["result"].get("value"))
            return results
    finally:
        process.terminate()
        process.wait()


def evaluate(url: str, expressions: list[str], profile: Path) -> list:
    """Values of JavaScript expressions, promises awaited, one after the other in a page at url."""
    return asyncio.run(_evaluate(url, expressions, profile))
