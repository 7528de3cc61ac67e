"""Folders of this user: made, measured, deleted."""
from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from pathlib import Path

from .owners import require_own, require_way

_RESERVED = re.compile(r"(?:con|prn|aux|nul|com[\d¹²³]|lpt[\d¹²³])\s*(?:\.|$)", re.IGNORECASE)


def is_reserved(name: str) -> bool:
    """Whether Windows takes a file of that name for a device, or drops its end. Elsewhere too: files are carried."""
    return bool(_RESERVED.match(name)) or name.endswith((".", " "))


def make_folders(path: Path) -> None:
    """Makes it and what is missing above it, for this user only whatever the umask. Raises OSError where it cannot be made."""
    path = Path(os.path.abspath(path))
    for folder in (*reversed(path.parents), path):
        if not folder.exists():
            with contextlib.suppress(FileExistsError):
                folder.mkdir(mode=0o700)


def make_folder(path: Path) -> None:
    """make_folders. Raises CacheError, too, where others could write in it or replace it."""
    make_folders(path)
    require_way(path)
    require_own(path)
    if not path.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(path))


def remove(path: Path) -> None:
    """A file, link or folder, if that can be."""
    if path.is_dir() and not path.is_symlink():
        with contextlib.suppress(RecursionError):  # of Python before 3.13: any client may save deep below a folder of outputs
            shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


def folder_size(folder: Path) -> int:
    """Bytes of the files at any depth, 0 where there is no folder."""
    total = 0
    for place, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(place, name)).st_size
    return total
