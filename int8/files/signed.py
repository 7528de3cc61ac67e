"""The user's signing key, and files that are signed with it."""
from __future__ import annotations

import hmac
import os
import secrets
import time
from pathlib import Path

from . import system
from .folders import make_folders
from .owners import CacheError, is_private_group, others_write, read_own, require_way
from .temporary import TEMPORARY, Sweeper, temporary_folder
from .user_folder import user_folder
from .whole import flush, write_new, write_whole

KEY_BYTES = 32
MOST_BYTES_OF_KEY = 1 << 16


def write_signed(path: Path, content: bytes, key: bytes) -> None:
    """See read_signed."""
    write_whole(path, _signature(path, content, key) + content)


def read_signed(path: Path, key: bytes) -> bytes:
    """The content of a file that write_signed made with this key under this name. Raises CacheError for any other, OSError."""
    stored = read_own(path)
    signature, content = stored[:32], stored[32:]
    if not hmac.compare_digest(signature, _signature(path, content, key)):
        raise CacheError(f"the signature of {path.name} does not hold")
    return content


def _signature(path: Path, content: bytes, key: bytes) -> bytes:
    return hmac.new(key, path.name.encode() + b"\0" + content, "sha256").digest()


def default_key_file() -> Path:
    """Of this user's signing key: INT8_COMPILE_CACHE_KEY_FILE, else in the user's configuration, outside every cache."""
    if chosen := os.environ.get("INT8_COMPILE_CACHE_KEY_FILE"):
        return Path(chosen)
    return user_folder("APPDATA" if os.name == "nt" else "XDG_CONFIG_HOME", ".config") / "int8-compile" / "cache.key"


def signing_key(path: Path, *caches: Path) -> bytes:
    """The key in that file, made if there is none, never overwritten. caches: folders that it must not be in, beside
    INT8_COMPILE_CACHE_DIR. Raises CacheError for one that others could know or have written, OSError."""
    if chosen := os.environ.get("INT8_COMPILE_CACHE_DIR"):
        caches = (*caches, Path(chosen))
    path = Path(os.path.abspath(path))
    for cache in caches:
        if path.is_relative_to(os.path.abspath(cache)) or Path(os.path.realpath(path)).is_relative_to(os.path.realpath(cache)):
            raise CacheError(f"the key {path} must not be in the cache that it signs ({cache}): move it (INT8_COMPILE_CACHE_KEY_FILE)")
    make_folders(path.parent)
    require_way(path)
    info = path.parent.stat()
    if others_write(info) and not is_private_group(info):  # sticky or not
        raise CacheError(f"the key {path} is in a folder that others can write to: move it to one of your own")
    Sweeper().sweep(path.parent.glob(f"{TEMPORARY}*"))
    if not os.path.lexists(path):
        _make_key(path)
    key = _read_key(path)
    if len(key) < KEY_BYTES:
        raise CacheError(f"the key {path} has {len(key)} bytes; {KEY_BYTES} are needed. Delete it, and a new one is made, or make one: "
                         f"head -c {KEY_BYTES} /dev/urandom")
    if not any(key):
        raise CacheError(f"the key {path} is all zeros: delete it, and a new one is made")
    return key


def _read_key(path: Path) -> bytes:
    key = read_own(path, MOST_BYTES_OF_KEY)
    if system.IS_POSIX and path.stat().st_mode & 0o077:
        raise CacheError(f"the key {path} can be read by others: chmod 600 it")
    if len(key) < KEY_BYTES and time.time() - path.stat().st_mtime < 2:  # another process may be writing it, see _make_key
        time.sleep(1)
        return read_own(path, MOST_BYTES_OF_KEY)
    return key


def _make_key(path: Path) -> None:
    """Unless there is one by now: of several processes the first wins, and all read what it wrote."""
    with temporary_folder(path.parent) as folder:
        made = folder / "key"
        write_new(made, secrets.token_bytes(KEY_BYTES))  # raises where the disk is full
        flush(made)
        try:
            # Atomic, and refused where there is a file by now.
            os.link(made, path) if system.IS_POSIX else os.rename(made, path)
        except FileExistsError:
            return
        except OSError:  # a file system without hard links
            _make_key_in_place(path, made.read_bytes())
    flush(path.parent)


def _make_key_in_place(path: Path, key: bytes) -> None:
    try:
        handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY | getattr(os, "O_BINARY", 0), 0o600)
    except FileExistsError:
        return
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(key)
            file.flush()
            os.fsync(file.fileno())
    except OSError:
        path.unlink(missing_ok=True)
        raise
