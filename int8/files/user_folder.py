"""Where this user's files go: also where there is no home folder, as in containers that run with any user id."""
from __future__ import annotations

import atexit
import functools
import logging
import os
import shutil
import tempfile
import threading
from pathlib import Path

logger = logging.getLogger(__name__)

_LOCK = threading.Lock()


def user_folder(variable: str, below_home: str) -> Path:
    """What the environment variable (XDG_CACHE_HOME, ...) names, else below_home in the home folder. Without a home folder that can be
    written to: a folder in XDG_CACHE_HOME or beside INT8_COMPILE_CACHE_DIR; without these one of this process, which is said once."""
    if chosen := os.environ.get(variable):
        return Path(chosen)
    try:
        home = Path.home()
    except (RuntimeError, OSError):  # HOME is not set, and this user id is in no list of users
        home = None
    if home is not None and os.access(next(p for p in (home / below_home, home) if p == home or p.exists()), os.W_OK):
        return home / below_home
    if caches := os.environ.get("XDG_CACHE_HOME"):
        return Path(caches) / "int8-compile-home" / below_home
    if cache := os.environ.get("INT8_COMPILE_CACHE_DIR"):
        return Path(f"{cache.rstrip(os.sep)}-home") / below_home
    with _LOCK:
        return _temporary() / below_home


@functools.cache
def _temporary() -> Path:
    folder = Path(tempfile.mkdtemp(prefix="int8-compile-"))
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    logger.warning("INT8 Compile: this user has no home folder, so not all is kept for the next start. Set XDG_CACHE_HOME to a folder of "
                   "yours that stays.")
    return folder


def is_kept(path: Path) -> bool:
    """Whether path outlives this process: it is not in the folder that user_folder gives where there is no home folder."""
    return not _temporary.cache_info().currsize or not path.is_relative_to(_temporary())
