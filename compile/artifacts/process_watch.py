"""Whether a process, and the compilers that it has started, get on. Where there is no /proc only its signs of life count."""
from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterable
from pathlib import Path

IDLE_SECONDS = 0.5  # of processor time, which what only beats does not take while it is watched for long
_PROC = Path("/proc")
_WAITS = "RD"  # for a core, for a disk: states of Linux


class ProcessWatch:
    """Of the process that leads a group. clock: in seconds. silent: of these, after which it is taken to hang

    - without a sign of life, where it waits for nothing, or has computed all that time;
    - with signs of life, where no process of the group has done anything, nor waits for a core or a disk: its compiler hangs."""

    def __init__(self, leader: int, silent: float, clock: Callable[[], float] = time.monotonic):
        self._leader = leader
        self._silent = silent
        self._clock = clock
        self._beat = self._worked = clock()
        self._cpu_at_beat = self._cpu_at_work = self._cpu()[0]

    def beat(self) -> None:
        """It has given a sign of life."""
        self._beat, self._cpu_at_beat = self._clock(), self._cpu()[0]

    def hangs(self) -> bool:
        now = self._clock()
        cpu, waiting = self._cpu()
        if cpu - self._cpu_at_work > IDLE_SECONDS or waiting:
            self._worked, self._cpu_at_work = now, cpu
        if now - self._beat > self._silent and (not waits(self._leader) or cpu - self._cpu_at_beat > self._silent / 2):
            return True
        return _PROC.is_dir() and now - self._worked > self._silent

    def _cpu(self) -> tuple[float, bool]:
        """(seconds that the group has computed, with what has ended; whether one of it waits)."""
        ticks, waiting = 0, False
        for fields in _stats(_PROC.glob("[0-9]*")):
            if fields[2] == str(self._leader):
                ticks += sum(map(int, fields[11:15]))
                waiting = waiting or fields[0] in _WAITS
        return ticks / _TICKS, waiting


_TICKS = os.sysconf("SC_CLK_TCK") if hasattr(os, "sysconf") else 100


def waits(process: int) -> bool:
    """Whether a thread of it would run and gets no core (see worker._give_way), or no answer from a disk."""
    return any(fields[0] in _WAITS for fields in _stats(_PROC.glob(f"{process}/task/*")))


def _stats(folders: Iterable[Path]):
    """Of each process or thread what its stat says behind its name: state, parent, group, ... (man 5 proc)."""
    for folder in folders:
        with contextlib.suppress(OSError):  # it has ended
            yield (folder / "stat").read_text(errors="replace").rpartition(")")[2].split()
