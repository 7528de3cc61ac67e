"""Who may write to a file, and to the folders above it."""
from __future__ import annotations

import os
import stat
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

from . import system

FIRST_PERSON = 1000  # user id; those below are of services (useradd's UID_MIN)
MOST_BYTES = 2 << 30  # of a file that is read at once


class CacheError(RuntimeError):
    """Something on disk cannot be used, and why."""


def require_own(path: Path) -> None:
    """Raises CacheError for a link, for another user's file, and for what others can write; OSError where there is none."""
    _require_own(path, path.lstat())


def _require_own(path: Path, info: os.stat_result) -> None:
    if stat.S_ISLNK(info.st_mode):
        raise CacheError(f"{path.name} is a symbolic link")
    if _owner(path, info) not in _own_users():
        raise CacheError(f"{path} must be owned by the current user")
    if others_write(info):
        raise CacheError(f"{path} can be written by others: chmod go-w it")


def require_way(path: Path) -> None:
    """Raises CacheError where others than this user and root could put something else in the place of path: by owning or writing to one of
    the folders above it, those that links lead to included. A sticky folder (/tmp) keeps others' files from being replaced."""
    if not (folders := Path(os.path.abspath(path)).parts[:-1]):
        raise CacheError(f"{path} is no file")
    root, *left = folders
    at, links = Path(root), 0
    require_folder(at)
    while left:
        if (part := left.pop(0)) == "..":
            at = at.parent
            continue
        at /= part
        if require_folder(at):
            if (links := links + 1) > 40:
                raise CacheError(f"{path} is reached by too many links")
            target = Path(os.readlink(at))
            at = Path(target.anchor) if target.is_absolute() else at.parent
            left = [*target.parts[target.is_absolute():], *left]


def require_folder(path: Path) -> bool:
    """Whether it is a link. Raises CacheError where others than this user and root can put other files in the place of those in it."""
    info = path.lstat()
    if _owner(path, info) not in (0, *_own_users()):
        raise CacheError(f"{path} belongs to another user, who could put other files in the place of those below it")
    if not stat.S_ISLNK(info.st_mode) and others_write(info) and not info.st_mode & stat.S_ISVTX and not is_private_group(info):
        raise CacheError(f"{path} can be written by others, who could put other files in the place of those below it: chmod go-w it, or "
                         "keep the cache elsewhere (INT8_COMPILE_CACHE_DIR)")
    return stat.S_ISLNK(info.st_mode)


def is_of_others(path: Path, info: os.stat_result) -> bool:
    """Whether another user than this and root owns path or can write to it. info: of it."""
    return _owner(path, info) not in (0, *_own_users()) or others_write(info)


def others_write(info: os.stat_result) -> bool:
    """Whether its group or anybody may write. On Windows this is not asked."""
    return system.IS_POSIX and bool(info.st_mode & 0o022)


def is_private_group(info: os.stat_result) -> bool:
    """Whether only its group may write, and that is this user's own: with umask 002 (Debian, Fedora) every folder is so."""
    import grp
    import pwd

    if info.st_mode & 0o002:
        return False
    try:
        user, group = pwd.getpwuid(os.getuid()), grp.getgrgid(info.st_gid)
    except KeyError:
        return False
    # A group does not list those whose first group it is.
    return (group.gr_gid == user.pw_gid and group.gr_name == user.pw_name and set(group.gr_mem) <= {user.pw_name}
            and not any(other.pw_gid == group.gr_gid and other.pw_uid >= FIRST_PERSON and other.pw_uid != user.pw_uid
                        for other in pwd.getpwall()))


def _owner(path: Path, info: os.stat_result) -> int | str:
    return info.st_uid if system.IS_POSIX else system.windows_owner(path)


def _own_users() -> tuple:
    """As whom this process makes files. On Windows an elevated one makes them as the administrators."""
    return (os.getuid(),) if system.IS_POSIX else (system.windows_user(), *system.WINDOWS_ADMINISTRATORS)


def read_own(path: Path, most_bytes: int = MOST_BYTES) -> bytes:
    """The content of a regular file. Raises CacheError as require_own does, of the file that is read, and for a larger one; OSError where
    there is none."""
    info = path.lstat()
    _require_own(path, info)
    _require_regular(path, info)  # what cannot be opened is said, too
    # No link that is put there now is followed.
    return _read(path, most_bytes, getattr(os, "O_NOFOLLOW", 0), lambda info: _require_own(path, info))


def read_regular(path: Path, most_bytes: int) -> bytes:
    """The content of a file that is anybody's. Raises CacheError for what is no regular file, or larger; OSError where there is none."""
    _require_regular(path, path.stat())
    return _read(path, most_bytes)


def open_regular(path: Path, flags: int = 0) -> BinaryIO:
    """A regular file, to be read: nobody waits for the other end of a pipe that is put there now. Raises CacheError for anything else,
    OSError where there is none."""
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0) | flags)
    try:
        _require_regular(path, os.fstat(handle))
        return os.fdopen(handle, "rb")
    except BaseException:
        os.close(handle)
        raise


def _read(path: Path, most_bytes: int, flags: int = 0, require: Callable[[os.stat_result], None] = lambda info: None) -> bytes:
    with open_regular(path, flags) as file:
        info = os.fstat(file.fileno())
        require(info)
        if info.st_size > most_bytes:
            raise CacheError(f"{path.name} has {info.st_size} bytes; {most_bytes} are the limit")
        return file.read(info.st_size)


def _require_regular(path: Path, info: os.stat_result) -> None:
    if not stat.S_ISREG(info.st_mode):
        raise CacheError(f"{path.name} is no file")
