"""Checked bytes, loaded as code."""
from __future__ import annotations

import os
import tempfile
import weakref
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeVar

from . import liveness, system
from .folders import remove
from .owners import require_way
from .temporary import make_temporary
from .whole import write_new

T = TypeVar("T")


def load_privately(files: Mapping[str, bytes], load: Callable[[Path], T], near: Path, lasting: bool) -> T:
    """load(folder), folder being a fresh one of this user with these checked files; it goes when load returns. In near, which nobody else
    can write to, or where that cannot be (a full or read-only disk, no code runs from it) in the system's folder for temporary files.

    lasting: the result needs the files while it lives. Raises what load raised in near.
    """
    lasting = lasting or not system.IS_POSIX  # Windows keeps a loaded library's file
    first: Exception | None = None
    for place in dict.fromkeys(Path(os.path.abspath(place)) for place in (near, tempfile.gettempdir())):
        folder = None
        try:
            require_way(place / "folder")
            folder = make_temporary(place)
            for name, content in files.items():
                write_new(folder / name, content)
            result = load(folder)
            if lasting:
                liveness.HEART.hold(folder)
                weakref.finalize(result, _let_go, folder, os.getpid())
                folder = None
            return result
        except (OSError, RuntimeError) as error:
            first = first or error
        finally:
            if folder is not None:
                remove(folder)
    raise first


def _let_go(folder: Path, pid: int) -> None:
    if os.getpid() == pid:  # a fork ends with its parent's libraries still in use
        liveness.HEART.release(folder)
        remove(folder)
