"""What the attacks and the fuzz need: a server that is watched, a bundle, generated values."""
from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from int8_compile.int8.files.liveness import here
from int8_compile.int8.files.temporary import TEMPORARY

from benchmarks.comfy_server import ComfyServer, find_comfyui

# In every Python that the server starts: what it starts and where it writes, a line each.
WATCH = '''
import os, sys
_log = os.open(os.environ["SECURITY_LOG"], os.O_WRONLY | os.O_APPEND | os.O_CREAT)
_starts = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.spawn", "os.fork", "os.forkpty")
def _hook(event, args):
    if event in _starts or (event == "open" and isinstance(args[0], (str, bytes)) and args[2] is not None and args[2] & 3):
        what = args[1] if event == "subprocess.Popen" else args[0]
        os.write(_log, f"{event} {what!r}\\n".encode(errors="replace"))
sys.addaudithook(_hook)
'''


class Watched:
    """A server, and what it has started and written since it was asked last."""

    def __init__(self, server: ComfyServer, log: Path):
        self.server = server
        self.log = log
        self._read = log.stat().st_size

    def events(self) -> list[tuple[str, str]]:
        with self.log.open(errors="replace") as file:
            file.seek(self._read)
            text = file.read()
        self._read = self.log.stat().st_size
        return [tuple(line.split(" ", 1)) for line in text.splitlines()]

    def outside(self) -> list[tuple[str, str]]:
        """Programs started, and files written outside the server's folders, since the last call."""
        own = (repr(str(self.server.base_dir))[1:-1], "/dev/", "/proc/")
        return [(event, what) for event, what in self.events()
                if event != "open" or not any(what.lstrip("b'\"").startswith(folder) for folder in own)]


def request(server: ComfyServer, path: str, body: bytes | None = None, kind: str = "application/json") -> tuple[int, bytes]:
    """(HTTP status, answer)"""
    asked = urllib.request.Request(server.url + path, body, {"Content-Type": kind})
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(asked, timeout=60) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        return error.code, error.read()


def upload(server: ComfyServer, name: str, content: bytes, subfolder: str, kind: str = "output") -> int:
    """What anybody may do: POST /upload/image."""
    fields = {"type": kind, "subfolder": subfolder, "overwrite": "true"}
    parts = [f'--x\r\nContent-Disposition: form-data; name="{key}"\r\n\r\n{value}\r\n'.encode() for key, value in fields.items()]
    parts += [f'--x\r\nContent-Disposition: form-data; name="image"; filename="{name}"\r\n\r\n'.encode(), content, b"\r\n--x--\r\n"]
    return request(server, "/upload/image", b"".join(parts), "multipart/form-data; boundary=x")[0]


@pytest.fixture(scope="session")
def watched(models_dir, tmp_path_factory):
    """A server with the compile cache on as it is by default, whose every program and file is written down."""
    base, hooks = tmp_path_factory.mktemp("comfyui"), tmp_path_factory.mktemp("hooks")
    (hooks / "sitecustomize.py").write_text(WATCH)
    log = hooks / "events.log"
    log.touch()
    ended = subprocess.Popen([sys.executable, "-c", ""])
    ended.wait()
    # What a server that was killed within Save INT8 Model has left.
    half = base / "output" / "diffusion_models" / f"{TEMPORARY}{here()}-{ended.pid}-abc"
    half.mkdir(parents=True)
    (half / "int8_00001_.safetensors").write_bytes(b"half")
    environment = {"INT8_COMPILE_CACHE": "", "INT8_COMPILE_CACHE_KEY_FILE": str(base / "key" / "cache.key"), "PYTHONPATH": str(hooks),
                   "SECURITY_LOG": str(log)}
    with ComfyServer(find_comfyui(), base, models=models_dir, env=environment) as server:
        yield Watched(server, log)


@pytest.fixture
def server(watched):
    return watched.server


@pytest.fixture(scope="session")
def inputs() -> int:
    """How many inputs are generated in all; nox -s fuzz sets more."""
    return int(os.environ.get("INT8_COMPILE_FUZZ", "10000"))


class Audit:
    """Programs started and files written by this process while it is entered. Audit hooks stay for good: there is one."""

    def __init__(self):
        self.allowed: tuple[str, ...] = ()
        self.found: list[tuple[str, str]] = []
        self._thread = None
        sys.addaudithook(self._hook)

    def _hook(self, event, args):
        if self._thread != threading.get_ident():
            return
        if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "socket.connect"):
            self.found.append((event, str(args[0])[:200]))
        elif event == "open" and isinstance(args[0], (str, bytes)) and isinstance(args[2], int) and args[2] & 3:
            path = os.fsdecode(args[0])
            if not os.path.abspath(path).startswith(self.allowed):
                self.found.append((event, path))

    def __enter__(self):
        self.found, self._thread = [], threading.get_ident()
        return self

    def __exit__(self, *_):
        self._thread = None


_audit: list[Audit] = []


@pytest.fixture
def audit(tmp_path):
    if not _audit:
        _audit.append(Audit())
    _audit[0].allowed = (str(tmp_path), "/dev/null")
    return _audit[0]


TEXTS = ("", " ", "a", "true", "null", "NaN", "../..", "/etc/passwd", "C:\\Windows", "\0", "\n", "\x1b[2J", "\ud800", "é" * 5, "x" * 10_000,
         "*" * 300, "[!", "__class__", "__globals__", "int8", "compile", "convrot", "export", "$(touch pwned)",
         "off -wrapper /bin/sh,-c,'touch pwned'",
         "`touch pwned`", "; touch pwned", "os.system", "{}", "[]", '{"a": 1}', "inductor", "cudagraphs", "%s%s%n", "CON", "a" * 300)
NUMBERS = (0, 1, -1, 2, 3, 16, 256, 65536, 2**31, -2**63, 2**64, 10**400, 0.5, 1e308, float("inf"), float("-inf"), float("nan"))


def value(random: random.Random, depth: int = 3):
    """Any JSON value, and some that only Python's JSON has."""
    kind = random.randrange(8 if depth else 5)
    if kind < 2:
        return random.choice(TEXTS)
    if kind < 4:
        return random.choice(NUMBERS)
    if kind == 4:
        return random.choice((True, False, None))
    if kind < 7:
        return {random.choice(TEXTS[:30]): value(random, depth - 1) for _ in range(random.randrange(4))}
    return [value(random, depth - 1) for _ in range(random.randrange(4))]


def mutated(random: random.Random, good, depth: int = 0):
    """good with some of it replaced by any value."""
    if random.random() < 0.12 + 0.1 * (depth > 2):
        return value(random, 2)
    if isinstance(good, dict):
        changed = {(random.choice(TEXTS[:30]) if random.random() < 0.03 else key): mutated(random, item, depth + 1)
                   for key, item in good.items()}
        if changed and random.random() < 0.08:
            changed.pop(random.choice(list(changed)))
        return changed
    if isinstance(good, list):
        return [mutated(random, item, depth + 1) for item in good] * random.choice((1, 1, 1, 1, 0, 2))
    return good


def text_of(random: random.Random, found) -> str:
    """found as JSON text, sometimes cut, doubled or nested deep."""
    text = json.dumps(found)
    kind = random.randrange(20)
    if kind == 0:
        return text[:random.randrange(len(text) + 1)]
    if kind == 1:
        return "[" * 5000 + text + "]" * 5000
    if kind == 2:
        return text * 2
    return text


@pytest.fixture
def within(audit):
    """within(count, ask, known): ask(number) count times. What it may raise is known; each answer takes a second of this process at most,
    names nothing longer than a message may be, starts no program and writes nothing outside the test's folder."""
    def within(count, ask, known: tuple = (), longest: int = 8000):
        slow, refused = [], 0
        with audit:
            for number in range(count):
                started = time.thread_time()
                try:
                    ask(number)
                except known as error:
                    refused += 1
                    assert len(str(error)) < longest, (number, str(error)[:300])
                    assert str(error).encode(), number  # a console can write it
                if (seconds := time.thread_time() - started) > 1:
                    slow.append((number, seconds))
        assert not slow
        assert not audit.found
        return refused
    return within
