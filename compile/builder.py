"""The process that builds artefacts while this one samples.

It gets jobs through its standard input and ends when that is closed, so it never outlives this process, however that ends. It has no
weights: blocks come as their structure. Lowest priority, one compiler at a time.
"""
from __future__ import annotations

import atexit
import contextlib
import functools
import json
import logging
import os
import pickle
import queue
import signal
import struct
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import torch

from .aoti import Job
from .cache_store import LOCK_SECONDS, CacheStore

logger = logging.getLogger(__name__)

ROOT = Path(__file__).absolute().parent.parent
_PACK = __name__.rpartition(".compile.")[0]
IDLE_SECONDS = 3.0
GPU_MEMORY = 2 << 30  # bytes that must be free before the builder begins: a CUDA context takes about 0.5 GB
# This pack under the name that it has here (ComfyUI names packs by their path), so that what is pickled is found.
_BOOT = """
import importlib, importlib.util, sys
name, root, module = sys.argv[1:4]
spec = importlib.util.spec_from_file_location(name, root + "/__init__.py", submodule_search_locations=[root])
sys.modules[name] = importlib.util.module_from_spec(spec)
importlib.import_module(name + "." + module).main()
"""


@dataclass
class Order:
    """A job and where its artefact goes. done: called in the builder's thread with the reason why there is none, empty for success.
    urgent: sampling waits for it; others are built when nothing samples. replaces: the sources of the entry that it is built in the place
    of, which was made of other code than this process runs."""

    job: Job
    place: str
    entry: str
    done: Callable[[str], None]
    urgent: bool
    replaces: list | None = None


class _Refused(Exception):
    """The other process could not build it, and why."""


class Builder:
    """store: where artefacts go. setup: (module of this pack, function, arguments) that makes the other process able to import the
    classes of blocks; the arguments are pickled."""

    def __init__(self, store: CacheStore, setup: tuple[str, str, tuple] | None = None):
        self.store = store
        self._setup = setup
        self._orders: queue.PriorityQueue = queue.PriorityQueue()
        self._count = 0
        self._unfinished = 0
        self.built: list[tuple[str, Path]] = []  # (class, folder) of what it has made
        self._thread: threading.Thread | None = None
        self._process: subprocess.Popen | None = None
        self._errors: BinaryIO | None = None  # what it prints
        self._lock = threading.Lock()
        self._busy = 0
        self._last = 0.0
        atexit.register(self.stop)

    def submit(self, order: Order) -> None:
        with self._lock:
            self._count += 1
            self._unfinished += 1
            self._orders.put((not order.urgent, self._count, order))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="int8-compile builder", daemon=True)
                self._thread.start()

    def wait(self, check: Callable[[int], None]) -> None:
        """Until there is nothing left to build. check: called now and then with how many orders are left; may raise to give up."""
        while (unfinished := self._unfinished) and self._thread is not None and self._thread.is_alive():
            check(unfinished)
            time.sleep(0.1)

    @contextlib.contextmanager
    def sampling(self):
        """While something samples: what is not urgent waits."""
        with self._lock:
            self._busy += 1
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1
                self._last = time.monotonic()

    def stop(self) -> None:
        """Ends the process; what it was building is lost."""
        process, self._process = self._process, None
        if process is not None:
            _end(process)

    def _work(self):
        while True:
            try:
                late, count, order = self._orders.get(timeout=1)
            except queue.Empty:
                with self._lock:
                    if self._orders.empty():
                        self._thread = None
                        self._close()
                        return
                continue
            if (late and not self._is_idle()) or not _has_memory(order.job.device):
                self._orders.put((late, count, order))
                time.sleep(0.5)
                continue
            try:
                reason = self._build(order)
            except EOFError:
                reason = f"the builder process ended{self._last_words()}"
                self.stop()
            except Exception as error:  # a full disk, a job that cannot be pickled: sampling goes on without
                reason = f"{type(error).__name__}: {error}"
                self.stop()
            if not reason:
                self.built.append((order.job.name, self.store.base / order.place / order.entry))
            try:
                order.done(reason)
            finally:
                with self._lock:
                    self._unfinished -= 1

    def _is_idle(self) -> bool:
        with self._lock:
            return not self._busy and time.monotonic() - self._last > IDLE_SECONDS

    def _build(self, order: Order) -> str:
        try:
            self.store.build_once(order.place, order.entry, functools.partial(self._ask, order), order.replaces is not None)
        except _Refused as refusal:
            return str(refusal)
        return ""

    def _ask(self, order: Order, folder: Path) -> dict:
        start = time.monotonic()
        process = self._process
        if process is None or process.poll() is not None:
            process = self._process = self._start()
        _send(process.stdin, (order.job, str(folder)))
        timer = threading.Timer(LOCK_SECONDS, self.stop)
        timer.start()
        try:
            answer = json.loads(_receive(process.stdout))
        finally:
            timer.cancel()
        if "error" in answer:
            raise _Refused(answer["error"])
        if answer["body"]["sources"] == order.replaces:
            raise _Refused("other code runs here than in a new process (another pack's patch?)")
        return {**answer["body"], "seconds": round(time.monotonic() - start, 1), "created": int(time.time())}

    def _start(self) -> subprocess.Popen:
        environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1", "PYTHONUNBUFFERED": "1"}
        flags = {"creationflags": subprocess.BELOW_NORMAL_PRIORITY_CLASS} if os.name == "nt" else {"start_new_session": True}
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115 (read when the process has ended)
        process = subprocess.Popen([sys.executable, "-c", _BOOT, _PACK, str(ROOT), "compile.builder"], stdin=subprocess.PIPE,
                                   stdout=subprocess.PIPE, stderr=self._errors, env=environment, **flags)
        _send(process.stdin, list(sys.path))  # first: what follows is found by it
        _send(process.stdin, self._setup)
        return process

    def _last_words(self) -> str:
        """The last line that it wrote before it ended."""
        if self._errors is None:
            return ""
        self._errors.seek(max(0, self._errors.seek(0, os.SEEK_END) - 2000))
        lines = self._errors.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""

    def _close(self):
        if self._process is not None:
            with contextlib.suppress(OSError):
                self._process.stdin.close()
            self._process = None


def _has_memory(device: str) -> bool:
    """Whether the other process may take what a CUDA context and a kernel's trial runs need."""
    return device != "cuda" or torch.cuda.mem_get_info()[0] > GPU_MEMORY


def _end(process: subprocess.Popen) -> None:
    """It and the compilers that it has started."""
    with contextlib.suppress(OSError):
        process.stdin.close()
    with contextlib.suppress(OSError):
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    process.wait()


def _send(stream, value) -> None:
    content = pickle.dumps(value)
    stream.write(struct.pack("<Q", len(content)) + content)
    stream.flush()


def _receive(stream) -> bytes:
    header = stream.read(8)
    if len(header) < 8:
        raise EOFError("it closed its output")
    content = stream.read(size := struct.unpack("<Q", header)[0])
    if len(content) < size:
        raise EOFError("it closed its output")
    return content


def main() -> None:
    """The other process."""
    if os.name == "posix":
        os.nice(19)
    jobs: queue.Queue = queue.Queue()
    output = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what compilers print is no answer

    source = os.fdopen(os.dup(0), "rb")
    threading.Thread(target=_read, args=(source, jobs), daemon=True).start()
    sys.path[:] = pickle.loads(jobs.get())
    setup = pickle.loads(jobs.get())
    import importlib

    from . import warmup
    from .aoti import build

    failed = ""
    if setup is not None:
        module, function, arguments = setup
        try:
            getattr(importlib.import_module(f"{_PACK}.{module}"), function)(*arguments)
        except Exception as error:
            failed = f"{type(error).__name__}: {error}"
    while True:
        try:
            job, folder = pickle.loads(jobs.get())
            warmup.prepare(job.device)
            answer = {"error": failed} if failed else {"body": build(job, Path(folder))}
        except Exception as error:
            answer = {"error": f"{type(error).__name__}: {error}"[:2000]}
        content = json.dumps(answer).encode()
        output.write(struct.pack("<Q", len(content)) + content)
        output.flush()


def _read(source, jobs: queue.Queue):
    """Jobs, until the other end is closed: then this process and its compilers end at once."""
    with contextlib.suppress(EOFError, OSError):
        while True:
            jobs.put(_receive(source))
    if os.name == "posix":
        os.killpg(os.getpgid(0), signal.SIGKILL)
    os._exit(0)
