"""The process of a Builder, seen from the server."""
from __future__ import annotations

import contextlib
import os
import queue
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from typing import BinaryIO

from . import worker
from .process_watch import ProcessWatch

SILENT_SECONDS = 45.0  # without a sign of life, which it gives every worker.BEAT_SECONDS, or of work: the other process is taken to hang
LOOKS = 9  # at it, in that time
BUILD_SECONDS = 1800  # for one artifact
END_SECONDS = 0.8  # that its end is waited for: nobody waits longer for ComfyUI to close


# Linux ends a stopped group whose parent is gone where that was of the same session.
_CAN_HOLD = sys.platform == "linux" and sys.version_info >= (3, 11)


class Disturbed(Exception):
    """It was not built, for what need not be so another time, and why."""


@dataclass
class BuilderProcess:
    """The other process. orders: what is sent to it. frames: what it sent, None at its end. errors: what it printed. scope: what is of no
    use after it."""

    process: subprocess.Popen
    orders: queue.SimpleQueue
    frames: queue.SimpleQueue
    errors: BinaryIO
    scope: contextlib.ExitStack
    _held: float = 0.0  # seconds in which it stood still
    _held_since: float = 0.0

    def seconds(self) -> float:
        """On a clock that stands still while it does."""
        return (self._held_since or time.monotonic()) - self._held

    def hold(self) -> None:
        """It and its compilers stand still until release(), where the system can do that and ends what is stopped with this process."""
        if not self._held_since and _CAN_HOLD and self._signal("SIGSTOP"):
            self._held_since = time.monotonic()

    def release(self) -> None:
        if self._held_since:
            self._signal("SIGCONT")
            self._held += time.monotonic() - self._held_since
            self._held_since = 0.0

    def _signal(self, name: str) -> bool:
        if self.process.poll() is not None:
            return False
        with contextlib.suppress(OSError):
            os.killpg(self.process.pid, getattr(signal, name))
            return True
        return False

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

    def answer(self) -> bytes:
        """Of the other process. Raises EOFError where it has ended, Disturbed where it hangs or was killed, TimeoutError after
        BUILD_SECONDS."""
        start, watch = self.seconds(), ProcessWatch(self.process.pid, SILENT_SECONDS, self.seconds)
        while self.seconds() - start < BUILD_SECONDS:
            with contextlib.suppress(queue.Empty):
                frame = self.frames.get(timeout=SILENT_SECONDS / LOOKS)
                if frame is None:
                    self._require_own_end()
                    raise EOFError
                if frame:
                    return frame
                watch.beat()
            if watch.hangs():
                raise Disturbed(f"the builder process gave no sign of life or of work for {SILENT_SECONDS:.0f} s and was ended")
        raise TimeoutError

    def _require_own_end(self) -> None:
        with contextlib.suppress(subprocess.TimeoutExpired):
            if os.name == "posix" and self.process.wait(END_SECONDS) == -signal.SIGKILL:
                raise Disturbed("the builder process was killed, as Linux does when there is no memory left")


def send_orders(stream, orders: queue.SimpleQueue):
    """In a thread: what hangs takes no more than a pipe holds."""
    with contextlib.suppress(OSError, ValueError):  # it has ended: its frames say so
        while (content := orders.get()) is not None:
            worker.send(stream, content)
    with contextlib.suppress(OSError):
        stream.close()


def collect_frames(stream, frames: queue.SimpleQueue):
    with contextlib.suppress(EOFError, OSError, ValueError):
        while True:
            frames.put(worker.receive(stream))
    frames.put(None)
    stream.close()
