"""Which of several implementations runs: measured where it will run, within a budget, and kept on disk.

All candidates compute the same, so a choice changes the time and nothing else.
"""
from __future__ import annotations

import contextlib
import functools
import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path

from ..files.folders import make_folders
from ..files.owners import CacheError, read_regular
from ..files.temporary import TEMPORARY, Sweeper
from ..files.whole import write_whole

logger = logging.getLogger(__name__)

# A new resolution rarely meets a bucket that was not measured; half steps, since the best tile of a bucket's end can be slow at its start.
BUCKETS = (16, 32, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048, 3072, 4096, 6144, 8192, 12288, 16384)
TILE_RUNS = 5
# Seconds a process may spend on measuring, compiling the candidates included; then the first candidate, the heuristic one, runs.
BUDGET = 30.0
# A candidate must be this much faster than the heuristic one: less is noise, and neighbouring buckets should agree.
MARGIN = 0.03
MAX_BYTES = 1 << 24  # of the file of choices: nobody measures as much


class NotNow(Exception):
    """A candidate could not be measured, which says nothing about it: why."""


@functools.lru_cache(4096)
def bucket(rows: int) -> int:
    """The bucket that rows fall into: the next larger one, the largest for more."""
    return next((b for b in BUCKETS if rows <= b), BUCKETS[-1])


class Choices:
    """What was chosen, by key. Thread-safe. path: a JSON file, read at the first question, written after each measurement; a file that
    cannot be read or written is as good as none."""

    def __init__(self, path: Path | None, shipped: Mapping[str, str] | None = None, budget: float = BUDGET):
        self.path = path
        self.spent = 0.0
        self.budget = budget
        self._shipped = shipped or {}
        self._known: dict[str, str] | None = None
        self._lock = threading.Lock()

    def get(self, key: str) -> str | None:
        """The name that was chosen for key, None where nothing was."""
        with self._lock:
            if self._known is None:
                self._known = {**self._shipped, **self._read()}
            return self._known.get(key)

    @contextlib.contextmanager
    def without_budget(self) -> Iterator[None]:
        """A context in which all is measured and nothing counts: for somebody who asked for the measuring and waits for it."""
        budget, spent, self.budget = self.budget, self.spent, float("inf")
        try:
            yield
        finally:
            self.budget, self.spent = budget, spent

    def choose(self, key: str, candidates: Mapping[str, Callable[[], object]], seconds: Callable[[Callable[[], object]], float],
               budget: float | None = None) -> str:
        """The name of the fastest candidate: as known, else as measured now with seconds(candidate). A candidate that raises is out. With
        no budget left it is the first, and stays open; with none left midway, or where seconds raises NotNow, it is the fastest of those
        measured, for this time only. budget: seconds, in the place of this process's own."""
        known = self.get(key)
        if known in candidates:
            return known
        first = next(iter(candidates))
        left = self.budget - self.spent if budget is None else budget
        if left <= 0:
            return first
        start, complete = time.perf_counter(), False
        measured = {}
        for name, candidate in candidates.items():
            try:
                measured[name] = seconds(candidate)
            except NotNow as reason:
                logger.info("INT8: %s is measured later: %s.", key, reason)
                break
            except Exception as error:
                logger.debug("INT8: %s cannot run %s: %s", name, key, error)
            if time.perf_counter() - start > left:
                break
        else:
            complete = True
        if budget is None:
            self.spent += time.perf_counter() - start
        if not measured:
            return first
        best = min(measured, key=measured.get)
        if first in measured and measured[best] > (1 - MARGIN) * measured[first]:
            best = first
        logger.debug("INT8: %s: %s of %s", key, best, {name: f"{s * 1e3:.3f} ms" for name, s in measured.items()})
        if complete:
            with self._lock:
                self._known[key] = best
                self._write()
        return best

    def _read(self) -> dict[str, str]:
        try:
            if self.path:
                Sweeper().sweep(self.path.parent.glob(f"{TEMPORARY}*"))
            stored = json.loads(read_regular(self.path, MAX_BYTES)) if self.path else {}
        except (CacheError, OSError, ValueError, RecursionError):
            return {}
        return {k: v for k, v in stored.items() if isinstance(v, str)} if isinstance(stored, dict) else {}

    def _write(self):
        if self.path is None:
            return
        # Another process may have measured other shapes meanwhile.
        content = {**self._read(), **{k: v for k, v in self._known.items() if k not in self._shipped}}
        try:
            make_folders(self.path.parent)
            write_whole(self.path, json.dumps(content, indent=0).encode())
        except OSError as error:
            logger.debug("INT8: choices were not saved: %s", error)


def wall_seconds(candidate: Callable[[], object], synchronize: Callable[[], object]) -> float:
    """The best of TILE_RUNS after one that warms up (and compiles)."""
    candidate()
    synchronize()
    best = float("inf")
    for _ in range(TILE_RUNS):
        start = time.perf_counter()
        candidate()
        synchronize()
        best = min(best, time.perf_counter() - start)
    return best
