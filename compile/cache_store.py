"""Compiled artefacts on disk. Plain Python: knows nothing of torch.

    <root>/v1/<signer>/<group>/<distribution>/<method>/<entry>/    manifest.json, the artefact, readable.py

An artefact is code that will run in this process. So an entry counts only if the folder belongs to this user, no one else can write
there, and its manifest is signed (HMAC-SHA256) with a key that lies outside the cache; the manifest has the SHA-256 of every file.
Writers fill a folder of their own and rename it, so readers need no lock and a killed writer leaves nothing that is read.
"""
from __future__ import annotations

import contextlib
import errno
import functools
import hashlib
import hmac
import json
import logging
import os
import secrets
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from ..int8.kernels.user_folder import user_folder

logger = logging.getLogger(__name__)

LAYOUT = "v1"
MANIFEST = "manifest.json"
GIB = 1 << 30
DEFAULT_LIMIT = 5 * GIB
LOCK_SECONDS = 1800  # a builder that has been at it longer is taken for dead
ASIDE, PARTIAL, LOCK = ".bad-", ".tmp-", ".lock-"
# Of this process or of a network, not of what is read.
PASSING = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, getattr(errno, "ESTALE", 0), errno.ETIMEDOUT)


class CacheError(RuntimeError):
    """The cache cannot be used, and why."""


@dataclass(frozen=True)
class Entry:
    """A verified entry. body: what the writer said of it."""

    folder: Path
    body: dict

    def read(self, name: str) -> Path:
        """The path of one of its files. Raises CacheError unless its content is what was signed."""
        path = self.folder / name
        try:
            require_own(path)
            digest = hashlib.sha256(path.read_bytes()).hexdigest()
        except OSError as error:
            raise CacheError(f"{path.name}: {error.strerror or error}") from None
        if not hmac.compare_digest(digest, self.body["files"].get(name, "")):
            raise CacheError(f"{path.name} was changed after it was signed")
        return path


class CacheStore:
    """root: made if absent, owner-only. key_file: of the signing key, made if absent; limit: bytes, above which the entries that were
    not used for longest go. Raises CacheError where root cannot be trusted or made."""

    def __init__(self, root: Path, key_file: Path, limit: int = DEFAULT_LIMIT):
        self.limit = limit
        try:
            root.mkdir(parents=True, exist_ok=True, mode=0o700)
            require_own(root)
            self._key = _signing_key(key_file)
        except OSError as error:
            raise CacheError(f"the compile cache {root} cannot be used ({error.strerror or error})") from None
        self.layout = root / LAYOUT
        self.base = self.layout / hashlib.sha256(self._key).hexdigest()[:8]
        self._reported: set[tuple[Path, str]] = set()

    def has(self, name: str = "") -> bool:
        """Whether there is anything in a group whose name begins so."""
        return any(not manifest.parent.name.startswith(".") for manifest in self.base.glob(f"{name}*/*/*/*/{MANIFEST}"))

    def entries(self, place: str) -> Iterator[Entry]:
        """The good entries below place ("group/distribution/method"), in order of their names. Damaged ones are set aside."""
        try:
            folders = sorted(f for f in (self.base / place).iterdir() if not f.name.startswith("."))
        except OSError:
            return
        for folder in folders:
            with contextlib.suppress(CacheError):
                yield self.entry(folder)

    def entry(self, folder: Path) -> Entry:
        """Raises CacheError for a damaged one, which is set aside."""
        try:
            return Entry(folder, self._verified(folder))
        except (OSError, ValueError, KeyError, TypeError, CacheError, RecursionError) as error:
            if not os.path.lexists(folder):
                raise CacheError(f"{folder.name} has gone") from None
            reason = f"{MANIFEST} is missing" if isinstance(error, FileNotFoundError) else str(error)
            if not (isinstance(error, OSError) and error.errno in PASSING):
                self.set_aside(folder, reason)
            raise CacheError(reason) from None

    def whole(self, folder: Path) -> Entry:
        """An entry with all its files. Raises CacheError for a damaged one, which is set aside."""
        entry = self.entry(folder)
        try:
            for name in entry.body["files"]:
                entry.read(name)
        except CacheError as error:
            self.set_aside(folder, str(error))
            raise
        return entry

    def _verified(self, folder: Path) -> dict:
        require_own(folder)
        require_own(folder / MANIFEST)
        content = json.loads((folder / MANIFEST).read_bytes())
        if not hmac.compare_digest(self._sign(folder, content["body"]), content["hmac"]):
            raise CacheError("its signature does not hold")
        return content["body"]

    def _sign(self, folder: Path, body: dict) -> str:
        """With its place: moved to another group, an entry would be served for what it was not made of."""
        return hmac.new(self._key, canonical([folder.relative_to(self.base).as_posix(), body]), "sha256").hexdigest()

    def touch(self, entry: Entry) -> None:
        """It was used now."""
        with contextlib.suppress(OSError):
            os.utime(entry.folder / MANIFEST)

    def set_aside(self, folder: Path, reason: str) -> None:
        """Out of the way of a new one; said once, also where the disk is read-only and it stays."""
        if not os.path.lexists(folder):
            return  # deleted meanwhile
        if (folder, reason) not in self._reported:
            self._reported.add((folder, reason))
            logger.warning("compile cache: %s is damaged (%s) and was set aside; it is built again.", folder.name, reason)
        _put_aside(folder)

    @contextlib.contextmanager
    def writing(self, place: str, name: str, replace: bool = False) -> Iterator[tuple[Path, Callable[[dict], None]]]:
        """(a folder to put the files of an entry into, finish(body)): finish makes it the entry, unless there is one by then and replace
        is not asked for. Without it, and after an OSError, nothing stays."""
        parent = self._make(place)
        partial = Path(tempfile.mkdtemp(prefix=f"{PARTIAL}{_here()}-{os.getpid()}-", dir=parent))

        def finish(body: dict) -> None:
            files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(partial.iterdir())}
            body = {**body, "files": files}
            (partial / MANIFEST).write_bytes(canonical({"body": body, "hmac": self._sign(parent / name, body)}))
            for path in partial.iterdir():
                path.chmod(0o600)  # whatever the umask
                _flush(path)
            _flush(partial)
            if replace:
                _put_aside(parent / name)
            try:
                os.rename(partial, parent / name)
            except OSError:
                if not (parent / name / MANIFEST).exists():
                    _put_aside(parent / name)  # no entry, and in the way of one
                    os.rename(partial, parent / name)
            _flush(parent)
        try:
            yield partial, finish
        finally:
            shutil.rmtree(partial, ignore_errors=True)
        self.evict()

    @contextlib.contextmanager
    def lock(self, place: str, name: str) -> Iterator[bool]:
        """Whether this process is now the only builder of that entry."""
        path = self._make(place) / f"{LOCK}{name}"
        if _is_stale(path):
            path.unlink(missing_ok=True)
        try:
            handle = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600)
        except FileExistsError:
            yield False
            return
        try:
            with os.fdopen(handle, "w") as file:
                file.write(f"{_here()} {os.getpid()}")
            yield True
        finally:
            path.unlink(missing_ok=True)

    def build_once(self, place: str, name: str, build: Callable[[Path], dict], replace: bool = False) -> None:
        """Makes an entry with build(folder) -> body, unless it is there and not to be replaced; waits where another process is at it."""
        while replace or not (self.base / place / name / MANIFEST).exists():
            with self.lock(place, name) as alone:
                if alone:
                    with self.writing(place, name, replace) as (folder, finish):
                        finish(build(folder))
                    return
            time.sleep(0.5)

    def _make(self, place: str) -> Path:
        self.layout.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        folder = self.layout.parent
        for part in (LAYOUT, self.base.name, *place.split("/")):
            folder /= part
            folder.mkdir(exist_ok=True, mode=0o700)
        return folder

    def all(self, signer: str = "*") -> list[Path]:
        """The folders of all entries, of other signers too."""
        found = self.layout.glob(f"{signer}/*/*/*/*/{MANIFEST}")
        return sorted(manifest.parent for manifest in found if not manifest.parent.name.startswith("."))

    def own(self) -> list[Path]:
        """The folders of the entries that this key has signed."""
        return self.all(self.base.name)

    def size(self) -> int:
        """Bytes of all entries."""
        return sum(_size(folder) for folder in self.all())

    def delete(self, folder: Path) -> None:
        """An entry, at once for readers, and for whoever ends this process meanwhile."""
        _remove(_put_aside(folder))

    def clear(self) -> tuple[int, int]:
        """(entries, bytes) that were deleted. What is being built stays."""
        sizes = {folder: _size(folder) for folder in self.all()}
        for folder in sizes:
            self.delete(folder)
        self._sweep()
        for folder in sorted((path for path in self.layout.rglob("*") if path.is_dir() and not path.name.startswith(".")), reverse=True):
            with contextlib.suppress(OSError):
                folder.rmdir()
        gone = [size for folder, size in sizes.items() if not os.path.lexists(folder)]
        return len(gone), sum(gone)

    def evict(self) -> None:
        """Deletes what is damaged or left over, and what was not used for longest, until the limit is kept."""
        self._sweep()
        used = []
        for folder in self.all():
            with contextlib.suppress(OSError):
                used.append(((folder / MANIFEST).stat().st_mtime, _size(folder), folder))
        total = sum(size for _, size, _ in used)
        for _, size, folder in sorted(used):
            if total <= self.limit:
                break
            self.delete(folder)
            total -= size

    def _sweep(self) -> None:
        for left in self.layout.glob("*/*/*/*/.*"):
            if (left.name.startswith(ASIDE) or (left.name.startswith(PARTIAL) and _is_abandoned(left))
                    or (left.name.startswith(LOCK) and _is_stale(left))):
                _remove(left)


def default_key_file() -> Path:
    """Of this user's signing key: INT8_COMPILE_CACHE_KEY_FILE, else in the user's configuration, outside every cache."""
    if chosen := os.environ.get("INT8_COMPILE_CACHE_KEY_FILE"):
        return Path(chosen)
    return user_folder("APPDATA" if os.name == "nt" else "XDG_CONFIG_HOME", ".config") / "int8-compile" / "cache.key"


def canonical(value) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest(value, length: int = 16) -> str:
    """Of a JSON value."""
    return hashlib.sha256(canonical(value)).hexdigest()[:length]


def require_own(path: Path) -> None:
    """Raises CacheError for a link, for another user's file, and for what others can write. Windows keeps user folders to their user."""
    info = path.lstat()
    if stat.S_ISLNK(info.st_mode):
        raise CacheError(f"{path.name} is a symbolic link")
    if os.name == "posix":
        if info.st_uid != os.getuid():
            raise CacheError(f"{path} must be owned by the current user")
        if info.st_mode & 0o022:
            raise CacheError(f"{path} can be written by others: chmod go-w it")


def _signing_key(path: Path) -> bytes:
    path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
    with contextlib.suppress(FileNotFoundError):
        require_own(path)
        if len(key := path.read_bytes()) >= 32:
            return key
        path.unlink()
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=".key-")
    try:
        with os.fdopen(handle, "wb") as file:
            file.write(secrets.token_bytes(32))
        with contextlib.suppress(FileExistsError):
            os.link(name, path)  # atomic, and the first of two processes wins
    except OSError:  # a file system without hard links
        os.replace(name, path)
    finally:
        Path(name).unlink(missing_ok=True)
    return path.read_bytes()


def _flush(path: Path) -> None:
    if path.is_dir() and os.name != "posix":
        return
    handle = os.open(path, os.O_RDONLY if os.name == "posix" else os.O_RDWR)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _size(folder: Path) -> int:
    total = 0
    with contextlib.suppress(OSError):
        total = sum(path.lstat().st_size for path in folder.iterdir())
    return total


def _put_aside(path: Path) -> Path:
    """Its new path; the old one where that cannot be."""
    aside = path.with_name(f"{ASIDE}{path.name}-{secrets.token_hex(4)}")
    try:
        os.rename(path, aside)
    except OSError:
        return path
    return aside


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with contextlib.suppress(OSError):
            path.unlink()


@functools.cache
def _here() -> str:
    """Where process ids mean something: this host, and this container of it."""
    try:
        container = os.stat("/proc/self/ns/pid").st_ino
    except OSError:
        container = 0
    return digest([socket.gethostname(), container], 8)


def _is_stale(lock: Path) -> bool:
    try:
        here, _, pid = lock.read_text().partition(" ")
        age = time.time() - lock.stat().st_mtime
    except OSError:
        return False
    return age > LOCK_SECONDS or (not pid and age > 10) or _has_ended(here, pid)


def _is_abandoned(partial: Path) -> bool:
    """Of a writer that is no more. One on another host is given time."""
    here, pid, *_ = f"{partial.name.removeprefix(PARTIAL)}--".split("-")
    try:
        return _has_ended(here, pid) or time.time() - partial.stat().st_mtime > LOCK_SECONDS
    except OSError:
        return False


def _has_ended(here: str, pid: str) -> bool:
    return here == _here() and pid.isdecimal() and not _is_alive(int(pid))


def _is_alive(pid: int) -> bool:
    if os.name != "posix":
        return True  # os.kill(pid, 0) would end it
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        pass
    return True
