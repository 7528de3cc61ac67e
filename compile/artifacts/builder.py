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
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ...int8.files.folders import folder_size, make_folder, remove
from ...int8.kernels.native import cache_folder
from ...pack import PACKAGE, ROOT
from . import worker
from .builder_process import BUILD_SECONDS, END_SECONDS, BuilderProcess, Disturbed, collect_frames, send_orders
from .job import BuildSpec
from .store import CacheError, CacheStore

logger = logging.getLogger(__name__)

IDLE_SECONDS = 3.0
SHARE = 0.2  # of a step's time, which the other process gets after it where sampling takes all cores
INDUCTOR_LIMIT = 1 << 30  # bytes of inductor's own cache
GPU_MEMORY = 2 << 30  # bytes that must be free before the builder begins: a CUDA context takes about 0.5 GB
URGENT, LATE, WAITING = range(3)  # in this order


@dataclass
class BuildRequest:
    """A job and where its artifact goes. done: called in the builder's thread with the reason why there is none, empty for success.
    urgent: sampling waits for it; others are built when nothing samples. replaces: the sources of the entry that it is built in the place
    of, which was made of other code than this process runs. retried: it was tried already, and something else was at fault."""

    job: BuildSpec
    place: str
    entry: str
    done: Callable[[str], None]
    urgent: bool
    replaces: list | None = None
    retried: bool = False


class _Refused(Exception):
    """The other process could not build it, and why."""


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
        self._running: BuilderProcess | None = None
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
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._work, name="int8-compile builder", daemon=True)
                self._thread.start()

    def wait(self, check: Callable[[int], None]) -> None:
        """Until there is nothing left to build. check: called now and then with how many orders are left; may raise to give up."""
        while (unfinished := self._unfinished) and self._thread is not None and self._thread.is_alive():
            check(unfinished)
            time.sleep(0.1)

    @contextlib.contextmanager
    def sampling(self, device: torch.device):
        """While something samples on device: what is not urgent waits. Where that takes all cores the other process stands still (at lowest
        priority it still takes caches, and a core at each barrier), and gets its share between two steps for what is urgent, which would
        never be built while images follow one another."""
        takes_all = device.type == "cpu" and torch.get_num_threads() >= _cores()
        start = time.monotonic()
        with self._lock:
            outermost = self._busy == 0
            self._busy += 1
            if takes_all and outermost and (running := self._running):
                running.hold()
        try:
            yield
        finally:
            with self._lock:
                self._busy -= 1
                self._last = time.monotonic()
                if not self._busy and (running := self._running):
                    running.release()
        if takes_all and outermost and self._builds_urgent:
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
            reason = self._try(order)
            if self._closed:
                return
            if reason is None:
                self._builds_urgent = False
                self._put_back(order)
                continue
            if not reason:
                self.built.append((order.job.name, self.store.base / order.place / order.entry))
            try:
                order.done(reason)
            finally:
                self._builds_urgent = False
                with self._lock:
                    self._unfinished -= 1

    def _try(self, order: BuildRequest) -> str | None:
        """Why it cannot be built, empty where it was; None where that is to be seen another time."""
        try:
            return "" if self._build(order) else None
        except _Refused as refusal:
            return str(refusal)
        except Exception as error:  # a full disk, a job that cannot be pickled: sampling goes on without
            running = self._running
            reason = {
                EOFError: f"the builder process ended{running.last_words() if running else ''}",
                TimeoutError: f"the builder process was ended after {BUILD_SECONDS} s",
                Disturbed: str(error),
            }.get(type(error), f"{type(error).__name__}: {error}")
            self.stop()
            if not isinstance(error, Disturbed) or order.retried or self._closed:
                return reason
            order.retried = True
            logger.warning("compile cache: %s: %s. It is tried once more.", order.job.name, reason)
            return None

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
        try:
            return self.store.try_build(order.place, order.entry, functools.partial(self._ask, order), order.replaces is not None)
        except FileNotFoundError as error:  # this process stood still, and another has taken it for dead
            raise Disturbed(f"{type(error).__name__}: {error}") from error

    def _ask(self, order: BuildRequest, folder: Path) -> dict:
        start = time.monotonic()
        running = self._running
        if running is None or running.process.poll() is not None:
            self.stop()
            running = self._running = self._start()
        running.orders.put(pickle.dumps((order.job, str(folder))))
        answer = json.loads(running.answer())
        if "error" in answer and not folder.exists():
            raise Disturbed(answer["error"])
        if "error" in answer:
            raise _Refused(answer["error"])
        if answer["body"]["sources"] == order.replaces:
            raise _Refused("other code runs here than in a new process (another pack's patch?)")
        return {**answer["body"], "seconds": round(time.monotonic() - start, 1), "created": int(time.time())}

    def _start(self) -> BuilderProcess:
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
            for target, stream, items in ((collect_frames, process.stdout, frames), (send_orders, process.stdin, orders)):
                threading.Thread(target=target, args=(stream, items), name="int8-compile builder's pipe", daemon=True).start()
            orders.put(pickle.dumps(self._setup))
            return BuilderProcess(process, orders, frames, errors, scope.pop_all())


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


def _has_memory(device: str) -> bool:
    """Whether the other process may take what a CUDA context and a kernel's trial runs need."""
    return device != "cuda" or torch.cuda.mem_get_info()[0] > GPU_MEMORY
