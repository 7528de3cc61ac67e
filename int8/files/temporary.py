"""Folders that their writer deletes, and what dead writers have left of them."""
from __future__ import annotations

import contextlib
import os
import tempfile
import threading
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

from . import liveness
from .folders import remove
from .liveness import has_ended, held, here

TEMPORARY = ".int8-tmp-"  # begins the name of what its writer deletes
ABANDONED_SECONDS = 1800.0  # a temporary folder that is older by the clock; clocks of two hosts may differ
MAX_DEPTH = 100  # of folders that are swept: more than a file's name here can have, and less than Python's os.walk can go


class Sweeper:
    """Tells what dead processes have left. A process is dead if its id is known to have ended, or if what it holds (see held) was not
    touched while this one looked for liveness.SILENT_SECONDS, whatever the clocks say."""

    def __init__(self):
        self._seen: dict[Path, tuple[int, float]] = {}  # when it was touched; since when it is known to be so, monotonic

    def is_abandoned(self, path: Path, where: str, pid: str, seconds: float) -> bool:
        """seconds: the age by the clock that is enough alone."""
        try:
            touched = path.lstat().st_mtime_ns
        except OSError:
            self._seen.pop(path, None)
            return False
        now = time.monotonic()
        before, since = self._seen.get(path, (0, 0.0))
        if before != touched:
            self._seen[path] = touched, (since := now)
        dead = has_ended(where, pid) or now - since >= liveness.SILENT_SECONDS or time.time() - touched / 1e9 > seconds
        if dead:
            self._seen.pop(path, None)
        return dead

    def sweep(self, paths: Iterable[Path]) -> None:
        """Deletes the temporary ones of dead processes."""
        for path in paths:
            if path.name.startswith(TEMPORARY):
                where, pid, *_ = f"{path.name.removeprefix(TEMPORARY)}--".split("-")
                if self.is_abandoned(path, where, pid, ABANDONED_SECONDS):
                    remove(path)


def sweep_below(root: Path) -> None:
    """Deletes the temporary folders of dead processes at any depth below root, and in the system's folder for such, in a thread: root may
    hold a hundred thousand images. Looks again after liveness.SILENT_SECONDS at those that may be of a living one."""
    threading.Thread(target=_sweep_below, args=(root,), name="int8-compile sweep", daemon=True).start()


def _sweep_below(root: Path) -> None:
    sweeper, left = Sweeper(), [*Path(tempfile.gettempdir()).glob(f"{TEMPORARY}*")]  # see load_privately
    for folder, names, _ in os.walk(root):
        left += [Path(folder, name) for name in names if name.startswith(TEMPORARY)]
        is_deep = len(Path(folder).parts) - len(root.parts) >= MAX_DEPTH
        names[:] = [name for name in names if not name.startswith(TEMPORARY) and not is_deep]
    sweeper.sweep(left)
    if any(map(os.path.lexists, left)):
        time.sleep(liveness.SILENT_SECONDS + 1)
        sweeper.sweep(left)


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A fresh folder of this user that is deleted at the end, by a later Sweeper.sweep of parent if this process is killed."""
    folder = make_temporary(parent)
    try:
        with held(folder):
            yield folder
    finally:
        remove(folder)


def make_temporary(parent: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{here()}-{os.getpid()}-", dir=parent))
