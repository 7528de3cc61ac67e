"""Files of this user alone: folders that nobody else can write to, the signing key, signed files, what a dead process has left behind.

Plain Python. What is loaded as code is read once, checked, and loaded from a fresh folder that the checked bytes were written to; so what
is loaded is what was checked, whatever happens to the file meanwhile.
"""
from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import hmac
import os
import re
import secrets
import shutil
import socket
import stat
import tempfile
import threading
import time
import weakref
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from typing import TypeVar

from .files.user_folder import user_folder

T = TypeVar("T")

IS_POSIX = os.name == "posix"
# The system, its administrators, the installer of Windows.
_WINDOWS_ADMINISTRATORS = ("S-1-5-18", "S-1-5-32-544", "S-1-5-80-956008885-3418522649-1831038044-1853292631-2271478464")
_RESERVED = re.compile(r"(?:con|prn|aux|nul|com[\d¹²³]|lpt[\d¹²³])\s*(?:\.|$)", re.IGNORECASE)
KEY_BYTES = 32
TEMPORARY = ".int8-tmp-"  # begins the name of what its writer deletes
BEAT_SECONDS = 10.0  # between two signs of life of a process that holds a lock or a temporary folder
SILENT_SECONDS = 45.0  # without one it is taken for dead
ABANDONED_SECONDS = 1800.0  # a temporary folder that is older by the clock; clocks of two hosts may differ
FIRST_PERSON = 1000  # user id; those below are of services (useradd's UID_MIN)
MAX_DEPTH = 100  # of folders that are swept: more than a file's name here can have, and less than Python's os.walk can go
RENAME_SECONDS = 2.0  # Windows renames nothing that somebody reads at this moment: a virus scanner, another server


class CacheError(RuntimeError):
    """Something on disk cannot be used, and why."""


# Who may write


def require_own(path: Path) -> None:
    """Raises CacheError for a link, for another user's file, and for what others can write; OSError where there is none."""
    _require_own(path, path.lstat())


def _require_own(path: Path, info: os.stat_result) -> None:
    if stat.S_ISLNK(info.st_mode):
        raise CacheError(f"{path.name} is a symbolic link")
    if _owner(path, info) not in _own_users():
        raise CacheError(f"{path} must be owned by the current user")
    if _others_write(info):
        raise CacheError(f"{path} can be written by others: chmod go-w it")


def require_way(path: Path) -> None:
    """Raises CacheError where others than this user and root could put something else in the place of path: by owning or writing to one of
    the folders above it, those that links lead to included. A sticky folder (/tmp) keeps others' files from being replaced."""
    root, *left = Path(os.path.abspath(path)).parts[:-1]
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
    if not stat.S_ISLNK(info.st_mode) and _others_write(info) and not info.st_mode & stat.S_ISVTX and not _is_private_group(info):
        raise CacheError(f"{path} can be written by others, who could put other files in the place of those below it: chmod go-w it, or "
                         "keep the cache elsewhere (INT8_COMPILE_CACHE_DIR)")
    return stat.S_ISLNK(info.st_mode)


def is_of_others(path: Path, info: os.stat_result) -> bool:
    """Whether another user than this and root owns path or can write to it. info: of it."""
    return _owner(path, info) not in (0, *_own_users()) or _others_write(info)


def _others_write(info: os.stat_result) -> bool:
    return IS_POSIX and bool(info.st_mode & 0o022)


def _is_private_group(info: os.stat_result) -> bool:
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
    return info.st_uid if IS_POSIX else windows_owner(path)


def _own_users() -> tuple:
    """As whom this process makes files. On Windows an elevated one makes them as the administrators."""
    return (os.getuid(),) if IS_POSIX else (windows_user(), *_WINDOWS_ADMINISTRATORS)


def windows_owner(path: Path) -> str:
    """The SID of a file's owner. Who else an access list lets write is not looked at: folders of a user are that user's by default, those
    that this pack makes are by os.mkdir's mode 0700 (Python 3.12.4, 3.11.10, 3.10.15), and C:\\folder or a network share may not be."""
    import ctypes
    from ctypes import wintypes

    api = ctypes.WinDLL("advapi32", use_last_error=True)
    owner, descriptor = ctypes.c_void_p(), ctypes.c_void_p()
    api.GetNamedSecurityInfoW.argtypes = [wintypes.LPCWSTR, ctypes.c_int, wintypes.DWORD, *[ctypes.c_void_p] * 5]
    api.GetNamedSecurityInfoW.restype = wintypes.DWORD
    file, owner_only = 1, 1  # SE_FILE_OBJECT, OWNER_SECURITY_INFORMATION
    error = api.GetNamedSecurityInfoW(str(path), file, owner_only, ctypes.byref(owner), None, None, None, ctypes.byref(descriptor))
    if error:
        raise ctypes.WinError(error)
    try:
        return _windows_sid(owner)
    finally:
        _windows_free(descriptor)


@functools.cache
def windows_user() -> str:
    """The SID of the user of this process."""
    import ctypes
    from ctypes import wintypes

    api, kernel = ctypes.WinDLL("advapi32", use_last_error=True), ctypes.WinDLL("kernel32", use_last_error=True)
    kernel.GetCurrentProcess.restype = wintypes.HANDLE
    kernel.CloseHandle.argtypes = [wintypes.HANDLE]
    api.OpenProcessToken.argtypes = [wintypes.HANDLE, wintypes.DWORD, ctypes.POINTER(wintypes.HANDLE)]
    api.GetTokenInformation.argtypes = [wintypes.HANDLE, ctypes.c_int, ctypes.c_void_p, wintypes.DWORD, ctypes.POINTER(wintypes.DWORD)]
    token, size, query, user = wintypes.HANDLE(), wintypes.DWORD(), 8, 1  # TOKEN_QUERY, TokenUser
    if not api.OpenProcessToken(kernel.GetCurrentProcess(), query, ctypes.byref(token)):
        raise ctypes.WinError(ctypes.get_last_error())
    try:
        content = ctypes.create_string_buffer(256)  # a pointer to the SID, its attributes, and the SID: 84 bytes at most
        if not api.GetTokenInformation(token, user, content, len(content), ctypes.byref(size)):
            raise ctypes.WinError(ctypes.get_last_error())
        return _windows_sid(ctypes.c_void_p.from_buffer(content))
    finally:
        kernel.CloseHandle(token)


def _windows_sid(sid) -> str:
    import ctypes

    api, text = ctypes.WinDLL("advapi32", use_last_error=True), ctypes.c_void_p()
    api.ConvertSidToStringSidW.argtypes = [ctypes.c_void_p, ctypes.c_void_p]
    if not api.ConvertSidToStringSidW(sid, ctypes.byref(text)):
        raise ctypes.WinError(ctypes.get_last_error())
    try:
        return ctypes.wstring_at(text.value)
    finally:
        _windows_free(text)


def windows_has_ended(pid: int) -> bool:
    """Whether this is known of a process."""
    import ctypes
    from ctypes import wintypes

    synchronize, no_such_process, ended = 0x00100000, 87, 0  # SYNCHRONIZE, ERROR_INVALID_PARAMETER, WAIT_OBJECT_0
    kernel = ctypes.WinDLL("kernel32", use_last_error=True)
    kernel.OpenProcess.argtypes = [wintypes.DWORD, wintypes.BOOL, wintypes.DWORD]
    kernel.OpenProcess.restype = wintypes.HANDLE
    kernel.WaitForSingleObject.argtypes = [wintypes.HANDLE, wintypes.DWORD]
    kernel.WaitForSingleObject.restype = wintypes.DWORD
    kernel.CloseHandle.argtypes = [wintypes.HANDLE]
    if pid >> 32:
        return False
    if not (process := kernel.OpenProcess(synchronize, False, pid)):
        return ctypes.get_last_error() == no_such_process  # otherwise it is another user's, and lives
    try:
        return kernel.WaitForSingleObject(process, 0) == ended  # somebody still has a handle of it
    finally:
        kernel.CloseHandle(process)


def _windows_free(pointer) -> None:
    import ctypes

    kernel = ctypes.WinDLL("kernel32")
    kernel.LocalFree.argtypes = [ctypes.c_void_p]
    kernel.LocalFree(pointer)


# Folders and files


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


def read_own(path: Path) -> bytes:
    """The content of a regular file. Raises CacheError as require_own does, of the file that is read; OSError where there is none."""
    require_own(path)
    # No link that is put there now is followed, and nobody waits for the other end of a pipe.
    handle = os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    try:
        info = os.fstat(handle)
        _require_own(path, info)
        if not stat.S_ISREG(info.st_mode):
            raise CacheError(f"{path.name} is no file")
        with os.fdopen(handle, "rb", closefd=False) as file:
            return file.read()
    finally:
        os.close(handle)


def flush(path: Path) -> None:
    """To the disk: a power cut loses or cuts what was not."""
    if path.is_dir() and not IS_POSIX:
        return
    handle = os.open(path, os.O_RDONLY if IS_POSIX else os.O_RDWR)
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
            if IS_POSIX or time.monotonic() > end:
                raise
            time.sleep(0.05)


def write_whole(path: Path, content: bytes) -> None:
    """An owner-only file that is there whole, on the disk, or as it was. Raises OSError."""
    with _partial(path) as partial:
        _write(partial, content)


@contextlib.contextmanager
def writing_whole(path: Path) -> Iterator[Path]:
    """Where to write a file that is then there whole, on the disk; or as it was after any error. Its folder is made; what killed writers
    have left there is deleted. Raises OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    Watch().sweep(path.parent.glob(f"{TEMPORARY}*"))
    with _partial(path) as partial:
        yield partial


@contextlib.contextmanager
def _partial(path: Path) -> Iterator[Path]:
    with temporary_folder(path.parent) as folder:
        yield (partial := folder / path.name)
        flush(partial)
        move(partial, path, os.replace)
    flush(path.parent)


def _write(path: Path, content: bytes) -> None:
    """A new file, owner-only whatever the umask."""
    path.touch(mode=0o600, exist_ok=False)
    path.write_bytes(content)


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


# The key


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
        if path.is_relative_to(os.path.abspath(cache)) or path.resolve().is_relative_to(cache.resolve()):
            raise CacheError(f"the key {path} must not be in the cache that it signs ({cache}): move it (INT8_COMPILE_CACHE_KEY_FILE)")
    make_folders(path.parent)
    require_way(path)
    info = path.parent.stat()
    if _others_write(info) and not _is_private_group(info):  # sticky or not
        raise CacheError(f"the key {path} is in a folder that others can write to: move it to one of your own")
    Watch().sweep(path.parent.glob(f"{TEMPORARY}*"))
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
    key = read_own(path)
    if IS_POSIX and path.stat().st_mode & 0o077:
        raise CacheError(f"the key {path} can be read by others: chmod 600 it")
    if len(key) < KEY_BYTES and time.time() - path.stat().st_mtime < 2:  # another process may be writing it, see _make_key
        time.sleep(1)
        return read_own(path)
    return key


def _make_key(path: Path) -> None:
    """Unless there is one by now: of several processes the first wins, and all read what it wrote."""
    with temporary_folder(path.parent) as folder:
        made = folder / "key"
        _write(made, secrets.token_bytes(KEY_BYTES))  # raises where the disk is full
        flush(made)
        try:
            # Atomic, and refused where there is a file by now.
            os.link(made, path) if IS_POSIX else os.rename(made, path)
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


# What a process holds while it lives


class _Heart:
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


_HEART = _Heart()
if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_HEART.forget)


@contextlib.contextmanager
def held(path: Path) -> Iterator[None]:
    """While others are to see that this process, which has made path, lives."""
    _HEART.hold(path)
    try:
        yield
    finally:
        _HEART.release(path)


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
    if where != here() or not pid.isdecimal():
        return False
    if not IS_POSIX:  # os.kill(pid, 0) would end it there
        return windows_has_ended(int(pid))
    try:
        os.kill(int(pid), 0)
    except ProcessLookupError:
        return True
    except (PermissionError, OverflowError):
        pass
    return False


class Watch:
    """Tells what dead processes have left. A process is dead if its id is known to have ended, or if what it holds (see held) was not
    touched while this one looked for SILENT_SECONDS, whatever the clocks say."""

    def __init__(self):
        self._seen: dict[Path, tuple[int, float]] = {}  # when it was touched; since when it is known to be so, monotonic

    def is_abandoned(self, path: Path, where: str, pid: str, seconds: float) -> bool:
        """seconds: the age by the clock that is enough alone."""
        try:
            touched = path.lstat().st_mtime_ns
        except OSError:
            self._seen.pop(path, None)
            return False
        now = time.monotonic()
        before, since = self._seen.get(path, (0, 0.0))
        if before != touched:
            self._seen[path] = touched, (since := now)
        dead = has_ended(where, pid) or now - since >= SILENT_SECONDS or time.time() - touched / 1e9 > seconds
        if dead:
            self._seen.pop(path, None)
        return dead

    def sweep(self, paths: Iterable[Path]) -> None:
        """Deletes the temporary ones of dead processes."""
        for path in paths:
            if path.name.startswith(TEMPORARY):
                where, pid, *_ = f"{path.name.removeprefix(TEMPORARY)}--".split("-")
                if self.is_abandoned(path, where, pid, ABANDONED_SECONDS):
                    remove(path)


def sweep_below(root: Path) -> None:
    """Deletes the temporary folders of dead processes at any depth below root, and in the system's folder for such, in a thread: root may
    hold a hundred thousand images. Looks again after SILENT_SECONDS at those that may be of a living one."""
    threading.Thread(target=_sweep_below, args=(root,), name="int8-compile sweep", daemon=True).start()


def _sweep_below(root: Path) -> None:
    watch, left = Watch(), [*Path(tempfile.gettempdir()).glob(f"{TEMPORARY}*")]  # see load_privately
    for folder, names, _ in os.walk(root):
        left += [Path(folder, name) for name in names if name.startswith(TEMPORARY)]
        is_deep = len(Path(folder).parts) - len(root.parts) >= MAX_DEPTH
        names[:] = [name for name in names if not name.startswith(TEMPORARY) and not is_deep]
    watch.sweep(left)
    if any(map(os.path.lexists, left)):
        time.sleep(SILENT_SECONDS + 1)
        watch.sweep(left)


@contextlib.contextmanager
def temporary_folder(parent: Path) -> Iterator[Path]:
    """A fresh folder of this user that is deleted at the end, by a later Watch.sweep of parent if this process is killed."""
    folder = _make_temporary(parent)
    try:
        with held(folder):
            yield folder
    finally:
        remove(folder)


def _make_temporary(parent: Path) -> Path:
    return Path(tempfile.mkdtemp(prefix=f"{TEMPORARY}{here()}-{os.getpid()}-", dir=parent))


def remove(path: Path) -> None:
    """A file, link or folder, if that can be."""
    if path.is_dir() and not path.is_symlink():
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


def load_privately(files: Mapping[str, bytes], load: Callable[[Path], T], near: Path, lasting: bool) -> T:
    """load(folder), folder being a fresh one of this user with these checked files; it goes when load returns. In near, which nobody else
    can write to, or where that cannot be (a full or read-only disk, no code runs from it) in the system's folder for temporary files.

    lasting: the result needs the files while it lives. Raises what load raised in near.
    """
    lasting = lasting or not IS_POSIX  # Windows keeps a loaded library's file
    first: Exception | None = None
    for place in dict.fromkeys(Path(os.path.abspath(place)) for place in (near, tempfile.gettempdir())):
        folder = None
        try:
            require_way(place / "folder")
            folder = _make_temporary(place)
            for name, content in files.items():
                _write(folder / name, content)
            result = load(folder)
            if lasting:
                _HEART.hold(folder)
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
        _HEART.release(folder)
        remove(folder)
