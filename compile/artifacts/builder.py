"""The process that builds artifacts while this one samples.

It gets jobs through its standard input and ends when that is closed, so it never outlives this process, however that ends; when it gives
no sign of life it is ended. It has no weights: blocks come as their structure. Lowest priority, one compiler at a time.
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

from ...int8.files.folders import folder_size, make_folder, remove
from ...int8.kernels.native import cache_folder
from ...pack import PACKAGE, ROOT
from . import worker
from .job import BuildSpec
from .store import CacheError, CacheStore

logger = logging.getLogger(__name__)

IDLE_SECONDS = 3.0
SHARE = 0.2  # of a step's time, which the other process gets after it where sampling takes all cores
SILENT_SECONDS = 45.0  # without a sign of life, which it gives every worker.BEAT_SECONDS, the other process is taken to hang
BUILD_SECONDS = 1800  # for one artifact
INDUCTOR_LIMIT = 1 << 30  # bytes of inductor's own cache
END_SECONDS = 0.8  # that its end is waited for: nobody waits longer for ComfyUI to close
GPU_MEMORY = 2 << 30  # bytes that must be free before the builder begins: a CUDA context takes about 0.5 GB
URGENT, LATE, WAITING = range(3)  # in this order


@dataclass
class BuildRequest:
    """A job and where its artifact goes. done: called in the builder's thread with the reason why there is none, empty for success.
    urgent: sampling waits for it; others are built when nothing samples. replaces: the sources of the entry that it is built in the place
    of, which was made of other code than this process runs."""

    job: BuildSpec
    place: str
    entry: str
    done: Callable[[str], None]
    urgent: bool
    replaces: list | None = None


class _Refused(Exception):
    """The other process could not build it, and why."""


@dataclass
class _Running:
    """The other process. orders: what is sent to it. frames: what it sent, None at its end. errors: what it printed. scope: what is of no
    use after it."""

    process: subprocess.Popen
    orders: queue.SimpleQueue
    frames: queue.SimpleQueue
    errors: BinaryIO
    scope: contextlib.ExitStack

    def end(self) -> None:
        """It and the compilers that it has started."""
        with contextlib.suppress(OSError):
            if os.name == "posix":
                os.killpg(self.process.pid, signal.SIGKILL)
            else:
                self.process.kill()
        with contextlib.suppress(subprocess.TimeoutExpired):
            self.process.wait(END_SECONDS)
        self.orders.put(None)
        self.scope.close()

    def last_words(self) -> str:
        """The last line that it wrote before it ended."""
        self.errors.seek(max(0, self.errors.seek(0, os.SEEK_END) - 2000))
        lines = self.errors.read().decode(errors="replace").strip().splitlines()
        return f": {lines[-1]}" if lines else ""


class Builder:
    """store: where artifacts go. setup: (module of this pack, function, arguments) that makes the other process able to import the
    classes of blocks; the arguments are pickled."""

    def __init__(self, store: CacheStore, setup: tuple[str, str, tuple] | None = None):
        self.store = store
        self._setup = setup
        self._orders: queue.PriorityQueue = queue.PriorityQueue()
        self._count = 0
        self._unfinished = 0
        self.built: list[tuple[str, Path]] = []  # (class, folder) of what it has made
        self._thread: threading.Thread | None = None
        self._running: _Running | None = None
        self._closed = False
        self._lock = threading.Lock()
        self._busy = 0
        self._builds_urgent = False
        self._last = 0.0
        atexit.register(self._close)

    @property
    def _process(self) -> subprocess.Popen | None:
        return self._running.process if self._running else None

    def submit(self, order: BuildRequest) -> None:
        with self._lock:
            self._count += 1
            self._unfinished += 1
            self._orders.put((URGENT if order.urgent else LATE, self._count, order))
            if self._thread is None:
                self._thread = threading.Thread(target=self._work, name="int8-compile builder", daemon=True)
                self._thread.start()

    def wait(self, check: Callable[[int], None]) -> None:
        """Until there is nothing left to build. check: called now and then with how many orders are left; may raise to give up."""
        while (unfinished := self._unfinished) and self._thread is not None and self._thread.is_alive():
            check(unfinished)
            time.sleep(0.1)

    @contextlib.contextmanager
    def sampling(self, device: torch.device):
        """While something samples on device: what is not urgent waits. Where that takes all cores, what is urgent would never be built
        while images follow one another: it gets its share between two steps."""
        with self._lock:
            self._busy += 1
        start = time.monotonic()
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1
                self._last = time.monotonic()
            if self._builds_urgent and device.type == "cpu" and torch.get_num_threads() >= _cores():
                time.sleep(SHARE * (self._last - start))

    def stop(self) -> None:
        """Ends the process; what it was building is lost."""
        running, self._running = self._running, None
        if running is not None:
            running.end()

    def _close(self) -> None:
        self._closed = True
        self.stop()
        if (thread := self._thread) is not None:
            thread.join(END_SECONDS)

    def _work(self):
        while not self._closed:
            try:
                _, _, order = self._orders.get(timeout=1)
            except queue.Empty:
                self.stop()
                with self._lock:
                    if self._orders.empty():
                        self._thread = None
                        return
                continue
            if (not order.urgent and not self._is_idle()) or not _has_memory(order.job.device):
                self._put_back(order)
                continue
            self._builds_urgent = order.urgent
            try:
                if not self._build(order):
                    self._builds_urgent = False
                    self._put_back(order)
                    continue
                reason = ""
            except _Refused as refusal:
                reason = str(refusal)
            except (EOFError, queue.Empty, TimeoutError) as error:
                running = self._running
                reason = {
                    EOFError: f"the builder process ended{running.last_words() if running else ''}",
                    queue.Empty: f"the builder process gave no sign of life for {SILENT_SECONDS:.0f} s and was ended",
                }.get(type(error), f"the builder process was ended after {BUILD_SECONDS} s")
                self.stop()
            except Exception as error:  # a full disk, a job that cannot be pickled: sampling goes on without
                reason = f"{type(error).__name__}: {error}"
                self.stop()
            if not reason:
                self.built.append((order.job.name, self.store.base / order.place / order.entry))
            try:
                order.done(reason)
            finally:
                self._builds_urgent = False
                with self._lock:
                    self._unfinished -= 1

    def _put_back(self, order: BuildRequest):
        """Behind the others: it is not their fault that it cannot be built yet."""
        with self._lock:
            self._count += 1
            self._orders.put((WAITING, self._count, order))
        time.sleep(0.5)

    def _is_idle(self) -> bool:
        with self._lock:
            return not self._busy and time.monotonic() - self._last > IDLE_SECONDS

    def _build(self, order: BuildRequest) -> bool:
        """False: another server is building it."""
        return self.store.try_build(order.place, order.entry, functools.partial(self._ask, order), order.replaces is not None)

    def _ask(self, order: BuildRequest, folder: Path) -> dict:
        start = time.monotonic()
        running = self._running
        if running is None or running.process.poll() is not None:
            self.stop()
            running = self._running = self._start()
        running.orders.put(pickle.dumps((order.job, str(folder))))
        while not (frame := self._frame(running)):
            if frame is None:
                raise EOFError
            if time.monotonic() - start > BUILD_SECONDS:
                raise TimeoutError
        answer = json.loads(frame)
        if "error" in answer:
            raise _Refused(answer["error"])
        if answer["body"]["sources"] == order.replaces:
            raise _Refused("other code runs here than in a new process (another pack's patch?)")
        return {**answer["body"], "seconds": round(time.monotonic() - start, 1), "created": int(time.time())}

    def _frame(self, running: _Running) -> bytes | None:
        """What the other process has sent. Raises queue.Empty where it gives no sign of life, unless it waits for a core."""
        while True:
            try:
                return running.frames.get(timeout=SILENT_SECONDS)
            except queue.Empty:
                if not worker.waits_for_a_core(running.process.pid):
                    raise

    def _start(self) -> _Running:
        if self._closed:
            raise EOFError
        with contextlib.ExitStack() as scope:
            folder = scope.enter_context(self.store.temporary())
            inductor = inductor_folder(folder)
            environment = {**os.environ, "OMP_NUM_THREADS": "1", "TORCHINDUCTOR_COMPILE_THREADS": "1",
                           "TORCHINDUCTOR_CACHE_DIR": str(inductor), "TRITON_CACHE_DIR": str(inductor / "triton"),
                           **dict.fromkeys(worker.TEMPORARY, str(inductor))}
            errors = scope.enter_context(tempfile.TemporaryFile(dir=folder))
            process = subprocess.Popen(worker.command(PACKAGE, ROOT, folder), env=environment, stdin=subprocess.PIPE,
                                       stdout=subprocess.PIPE, stderr=errors, **_apart())
            orders: queue.SimpleQueue = queue.SimpleQueue()
            frames: queue.SimpleQueue = queue.SimpleQueue()
            for target, stream, items in ((_collect, process.stdout, frames), (_send, process.stdin, orders)):
                threading.Thread(target=target, args=(stream, items), name="int8-compile builder's pipe", daemon=True).start()
            orders.put(pickle.dumps(self._setup))
            return _Running(process, orders, frames, errors, scope.pop_all())


def _cores() -> int:
    """That this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _apart() -> dict:
    """How the other process is started: as a group, to end with its compilers, and not with a terminal's Ctrl+C. Not as a session, where
    Python can do without: Linux shares the cores out evenly among sessions (autogroup), whatever the priorities of their processes."""
    if os.name == "nt":
        return {"creationflags": subprocess.BELOW_NORMAL_PRIORITY_CLASS}
    return {"process_group": 0} if sys.version_info >= (3, 11) else {"start_new_session": True}


def inductor_folder(otherwise: Path) -> Path:
    """For inductor's own cache in the other process: of this user alone, where torch's default below /tmp may be another's. Emptied when
    it has grown too large."""
    folder = cache_folder() / "inductor"
    try:
        make_folder(folder)
        if folder_size(folder) > INDUCTOR_LIMIT:
            remove(folder)
            make_folder(folder)
    except (CacheError, OSError):
        return otherwise
    return folder


def _send(stream, orders: queue.SimpleQueue):
    """In a thread: what hangs takes no more than a pipe holds."""
    with contextlib.suppress(OSError, ValueError):  # it has ended: its frames say so
        while (content := orders.get()) is not None:
            worker.send(stream, content)
    with contextlib.suppress(OSError):
        stream.close()


def _collect(stream, frames: queue.SimpleQueue):
    with contextlib.suppress(EOFError, OSError, ValueError):
        while True:
            frames.put(worker.receive(stream))
    frames.put(None)
    stream.close()


def _has_memory(device: str) -> bool:
    """Whether the other process may take what a CUDA context and a kernel's trial runs need."""
    return device != "cuda" or torch.cuda.mem_get_info()[0] > GPU_MEMORY
