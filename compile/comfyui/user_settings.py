"""What the user has set in ComfyUI's settings dialog. Every client of its HTTP API can write there."""
from __future__ import annotations

import functools
import json
import logging
from pathlib import Path

import folder_paths

from ...int8.echo import echo
from ...int8.files.owners import CacheError, read_regular

logger = logging.getLogger(__name__)

MAX_SETTINGS = 4 << 20  # bytes of ComfyUI's settings file
OWN = "INT8Compile."  # what this pack's settings begin with


def settings() -> dict:
    """Those of this pack, of ComfyUI's default user; anybody may have written them."""
    path = Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json"
    try:
        info = path.stat()
    except OSError:
        return _read(path, ())
    return _read(path, (info.st_ino, info.st_size, info.st_mtime_ns, info.st_ctime_ns))


@functools.lru_cache(1)
def _read(path: Path, state: tuple[int, ...]) -> dict:
    """state: of the file, which takes 0.3 s to read where it is as large as it may be."""
    try:
        found = json.loads(read_regular(path, MAX_SETTINGS))
        if not isinstance(found, dict):
            raise ValueError("not an object")
        return {name: value for name, value in found.items() if name.startswith(OWN)}
    except FileNotFoundError:
        pass
    except (CacheError, OSError, ValueError, RecursionError) as error:
        if is_first("settings"):
            logger.warning("INT8 Compile: ComfyUI's settings cannot be read (%s): the defaults are used.", echo(str(error)))
    return {}


_said: set[str] = set()


def is_first(what: str) -> bool:
    """Whether nothing was said of it: settings are read at every prompt."""
    first = what not in _said
    _said.add(what)
    return first
