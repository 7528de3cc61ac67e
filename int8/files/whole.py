"""Files that are there whole, on the disk, or as they were."""
from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from . import system
from .temporary import TEMPORARY, Sweeper, temporary_folder

T = TypeVar("T")
RENAME_SECONDS = 2.0  # Windows renames nothing that somebody reads at this moment: a virus scanner, another server


def flush(path: Path) -> None:
    """To the disk: a power cut loses or cuts what was not."""
    if path.is_dir() and not system.IS_POSIX:
        return
    handle = os.open(path, os.O_RDONLY if system.IS_POSIX else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def move(source: Path, target: Path, operation: Callable[[Path, Path], None] = os.rename) -> None:
    """os.rename or os.replace, patiently. Raises OSError."""
    patiently(lambda: operation(source, target))


def patiently(operation: Callable[[], T]) -> T:
    """operation(), tried again for a while where Windows refuses because somebody has the file open. Raises OSError."""
    end = time.monotonic() + RENAME_SECONDS
    while True:
        try:
            return operation()
        except PermissionError:
            if system.IS_POSIX or time.monotonic() > end:
                raise
            time.sleep(0.05)


def write_whole(path: Path, content: bytes) -> None:
    """An owner-only file that is there whole, on the disk, or as it was. Raises OSError."""
    with _partial(path) as partial:
        write_new(partial, content)


@contextlib.contextmanager
def writing_whole(path: Path) -> Iterator[Path]:
    """Where to write a file that is then there whole, on the disk; or as it was after any error. Its folder is made; what killed writers
    have left there is deleted. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Sweeper().sweep(path.parent.glob(f"{TEMPORARY}*"))
    with _partial(path) as partial:
        yield partial


@contextlib.contextmanager
def _partial(path: Path) -> Iterator[Path]:
    with temporary_folder(path.parent) as folder:
        yield (partial := folder / path.name)
        flush(partial)
        move(partial, path, os.replace)
    flush(path.parent)


def write_new(path: Path, content: bytes) -> None:
    """A new file, owner-only whatever the umask."""
    path.touch(mode=0o600, exist_ok=False)
    path.write_bytes(content)
