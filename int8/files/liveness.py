"""What a process holds while it lives: it touches it, so that others on this host and elsewhere see that it does."""
from __future__ import annotations

import contextlib
import functools
import hashlib
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path

from . import system

BEAT_SECONDS = 10.0  # between two signs of life of a process that holds a lock or a temporary folder
MOST_DIGITS = 20  # of a process id
SILENT_SECONDS = 45.0  # without one it is taken for dead


class Heart:
    """Touches the files of this process that others wait for, so that they see that it lives."""

    def __init__(self):
        self._held: set[Path] = set()
        self._lock = threading.Lock()
        self._thread: threading.Thread | None = None

    def hold(self, path: Path) -> None:
        with self._lock:
            self._held.add(path)
            if self._thread is None or not self._thread.is_alive():
                self._thread = threading.Thread(target=self._beat, name="int8-compile heartbeat", daemon=True)
                self._thread.start()

    def release(self, path: Path) -> None:
        with self._lock:
            self._held.discard(path)

    def forget(self) -> None:
        """In a fork: what the parent holds is the parent's."""
        self.__init__()  # type: ignore[misc]

    def _beat(self):
        while True:
            time.sleep(BEAT_SECONDS)
            with self._lock:
                if not self._held:
                    self._thread = None
                    return
                held = list(self._held)
            for path in held:
                with contextlib.suppress(OSError):
                    os.utime(path)


HEART = Heart()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=HEART.forget)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """While others are to see that this process, which has made path, lives."""
    HEART.hold(path)
    try:
        yield
    finally:
        HEART.release(path)


@functools.cache
def here() -> str:
    """Where process ids mean something: this host, and this container of it."""
    try:
        container = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        container = 0
    return hashlib.sha256(f"{socket.gethostname()} {container}".encode()).hexdigest()[:8]


def has_ended(where: str, pid: str) -> bool:
    """Whether this is known of a process. A process id is used again, so that it is there says nothing."""
    if where != here() or not pid.isdecimal() or len(pid) > MOST_DIGITS:
        return False
    if not system.IS_POSIX:  # os.kill(pid, 0) would end it there
        return system.windows_has_ended(int(pid))
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False
