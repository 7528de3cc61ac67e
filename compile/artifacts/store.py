"""Compiled artifacts on disk. Plain Python: knows nothing of torch.

    <root>/v1/<signer>/<group>/<distribution>/<method>/<entry>/    manifest.json, the artifact, readable.py

An artifact is code that will run in this process. So an entry counts only if every folder from it up to / is this user's or root's and
no one else can write there, and its manifest is signed (HMAC-SHA256) with a key that lies outside the cache; the manifest has the SHA-256
of every file. What is checked are bytes in memory, which are loaded from a fresh folder: see int8/files/private_load.py.
Writers fill a folder of their own and rename it, so readers need no lock and a killed writer leaves nothing that is read. Locks and
folders that are being filled are touched while their process lives.
"""
from __future__ import annotations

import contextlib
import hashlib
import hmac
import json
import logging
import os
import secrets
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from ...int8.files import liveness
from ...int8.files.folders import make_folder, remove
from ...int8.files.liveness import held, here
from ...int8.files.owners import CacheError, read_own, require_own
from ...int8.files.signed import default_key_file, signing_key
from ...int8.files.temporary import TEMPORARY, Sweeper, temporary_folder
from ...int8.files.whole import flush, move, patiently
from .entry import MANIFEST, STORE_LAYOUT, TRANSIENT_ERRNOS, Damaged, Entry, canonical, digest

__all__ = ["CacheError", "CacheStore", "Damaged", "Entry", "canonical", "default_key_file", "digest", "require_own"]

logger = logging.getLogger(__name__)

GIB = 1 << 30
MOST_BYTES_OF_MANIFEST, MOST_BYTES_OF_LOCK = 256 << 20, 1 << 12
DEFAULT_LIMIT = 5 * GIB
QUARANTINE_PREFIX, LOCK = ".bad-", ".lock-"


class CacheStore:
    """root: made if absent, owner-only. key_file: of the signing key, made if absent; limit: bytes, above which the entries that were
    not used for longest go. Raises CacheError where root or the key cannot be trusted or made."""

    def __init__(self, root: Path, key_file: Path, limit: int = DEFAULT_LIMIT):
        self.limit = limit
        try:
            make_folder(root)
            self._key = signing_key(key_file, root)
        except OSError as error:
            raise CacheError(f"the compile cache {root} cannot be used ({error.strerror or error})") from None
        self.layout = Path(os.path.abspath(root)) / STORE_LAYOUT
        self.base = self.layout / hashlib.sha256(self._key).hexdigest()[:8]
        self._reported: set[tuple[Path, str]] = set()
        self._sweeper = Sweeper()
        self._sweep()

    def has(self, name: str = "") -> bool:
        """Whether there is anything in a group whose name begins so."""
        return any(not manifest.parent.name.startswith(".") for manifest in self.base.glob(f"{name}*/*/*/*/{MANIFEST}"))

    def entries(self, place: str) -> Iterator[Entry]:
        """The good entries below place ("group/distribution/method"), in order of their names. Damaged ones are set aside."""
        try:
            self._require_own_place(place)
            folders = sorted(f for f in (self.base / place).iterdir() if not f.name.startswith("."))
        except OSError:
            return
        except CacheError as error:
            if self._is_new(self.base / place, str(error)):
                logger.warning("compile cache: %s: nothing in it is used.", error)
            return
        for folder in folders:
            with contextlib.suppress(CacheError):
                yield self.entry(folder)

    def entry(self, folder: Path) -> Entry:
        """Raises CacheError for a damaged one, which is set aside, and for one that others could have written."""
        self._require_own_place(folder.parent.relative_to(self.base).as_posix())
        try:
            return Entry(folder, self._verified(folder))
        except (OSError, ValueError, KeyError, TypeError, CacheError, RecursionError) as error:
            if not os.path.lexists(folder):
                raise CacheError(f"{folder.name} has gone") from None
            reason = f"{MANIFEST} is missing" if isinstance(error, FileNotFoundError) else str(error)
            if not (isinstance(error, OSError) and error.errno in TRANSIENT_ERRNOS):
                self.set_aside(folder, reason)
            raise CacheError(reason) from None

    def whole(self, folder: Path) -> Entry:
        """An entry with all its files. Raises CacheError for a damaged one, which is set aside."""
        entry = self.entry(folder)
        try:
            for name in entry.body["files"]:
                entry.read(name)
        except Damaged as error:
            self.set_aside(folder, str(error))
            raise
        return entry

    def _require_own_place(self, place: str) -> None:
        """Raises CacheError where others can write into one of the folders from the layout to the place, where it is there."""
        folder = self.layout.parent
        for part in (STORE_LAYOUT, self.base.name, *place.split("/")):
            folder /= part
            with contextlib.suppress(FileNotFoundError):
                require_own(folder)

    def _verified(self, folder: Path) -> dict:
        require_own(folder)
        content = json.loads(read_own(folder / MANIFEST, MOST_BYTES_OF_MANIFEST))
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
        if self._is_new(folder, reason):
            logger.warning("compile cache: %s is damaged (%s) and was set aside; it is built again.", folder.name, reason)
        _put_aside(folder)

    def _is_new(self, folder: Path, reason: str) -> bool:
        """Whether this was not said yet."""
        known = (folder, reason) in self._reported
        self._reported.add((folder, reason))
        return not known

    def temporary(self) -> AbstractContextManager[Path]:
        """A fresh folder on the disk of the store, deleted at the end. Raises CacheError, OSError."""
        self._make_folders(STORE_LAYOUT)
        return temporary_folder(self.layout)

    @contextlib.contextmanager
    def writing(self, place: str, name: str, replace: bool = False,
                within_limit: bool = True) -> Iterator[tuple[Path, Callable[[dict], None]]]:
        """(a folder to put the files of an entry into, finish(body)): finish makes it the entry, unless there is one by then and replace
        is not asked for. Without it, and after an OSError, nothing stays. within_limit: the limit is seen to at the end."""
        parent = self._make(place)
        with temporary_folder(parent) as partial:

            def finish(body: dict) -> None:
                files = {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(partial.iterdir())}
                body = {**body, "files": files}
                (partial / MANIFEST).write_bytes(canonical({"body": body, "hmac": self._sign(parent / name, body)}))
                for path in partial.iterdir():
                    path.chmod(0o600)  # whatever the umask
                    flush(path)
                flush(partial)
                if replace:
                    _clear_way(parent / name)
                try:
                    move(partial, parent / name)
                except OSError:
                    if not (parent / name / MANIFEST).exists():
                        _clear_way(parent / name)  # no entry, and in the way of one
                        move(partial, parent / name)
                flush(parent)
            yield partial, finish
        if within_limit:
            self.evict()

    @contextlib.contextmanager
    def lock(self, place: str, name: str) -> Iterator[bool]:
        """Whether this process is now the only builder of that entry. A lock that nobody has touched for SILENT_SECONDS is taken over."""
        path = self._make(place) / f"{LOCK}{name}"
        if self._is_stale(path):
            _remove_lock(path)
        try:
            handle = patiently(lambda: os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o600))
        except FileExistsError:
            yield False
            return
        mark = f"{here()} {os.getpid()} {secrets.token_hex(8)}"
        try:
            with os.fdopen(handle, "w") as file:
                file.write(mark)
            with held(path):
                yield True
        finally:
            with contextlib.suppress(OSError, CacheError):
                if read_own(path, MOST_BYTES_OF_LOCK).decode() in (mark, ""):  # else it was taken over
                    patiently(path.unlink)

    def try_build(self, place: str, name: str, build: Callable[[Path], dict], replace: bool = False) -> bool:
        """Makes an entry with build(folder) -> body, unless it is there and not to be replaced. False: another process is at it."""
        if not replace and (self.base / place / name / MANIFEST).exists():
            return True
        with self.lock(place, name) as alone:
            if alone:
                with self.writing(place, name, replace) as (folder, finish):
                    finish(build(folder))
            return alone

    def build_once(self, place: str, name: str, build: Callable[[Path], dict], replace: bool = False) -> None:
        """try_build, waiting where another process is at it."""
        while not self.try_build(place, name, build, replace):
            time.sleep(0.5)

    def _make(self, place: str) -> Path:
        return self._make_folders(STORE_LAYOUT, self.base.name, *place.split("/"))

    def _make_folders(self, *parts: str) -> Path:
        folder = self.layout.parent
        if not folder.exists():
            make_folder(folder)
        for part in parts:
            folder /= part
            if os.path.lexists(folder) and not folder.is_dir():
                _clear_way(folder)  # no folder, and in the way of one
            folder.mkdir(exist_ok=True, mode=0o700)
            require_own(folder)
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
        """An entry, at once for readers, and for whoever ends this process meanwhile. Not where Windows refuses: somebody reads it."""
        if (aside := _put_aside(folder)) != folder:
            remove(aside)

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
        """What was set aside, and what dead processes have left."""
        self._sweeper.sweep(self.layout.glob(f"{TEMPORARY}*"))
        left = list(self.layout.glob("*/*/*/*/.*"))
        self._sweeper.sweep(left)
        for path in left:
            if path.name.startswith(QUARANTINE_PREFIX):
                remove(path)
            elif path.name.startswith(LOCK) and self._is_stale(path):
                _remove_lock(path)

    def _is_stale(self, lock: Path) -> bool:
        try:
            where, pid, *_ = f"{read_own(lock, MOST_BYTES_OF_LOCK).decode()}  ".split(" ")
        except (OSError, ValueError, CacheError):
            where = pid = ""
        return self._sweeper.is_abandoned(lock, where, pid, liveness.SILENT_SECONDS)


def _size(folder: Path) -> int:
    total = 0
    with contextlib.suppress(OSError):
        total = sum(path.lstat().st_size for path in folder.iterdir())
    return total


def _put_aside(path: Path) -> Path:
    """Its new path; the old one where that cannot be."""
    aside = path.with_name(f"{QUARANTINE_PREFIX}{path.name}-{secrets.token_hex(4)}")
    try:
        os.rename(path, aside)
    except OSError:
        return path
    return aside


def _clear_way(path: Path) -> None:
    """Raises OSError where what is there cannot be put aside, as on Windows while somebody has it open."""
    with contextlib.suppress(FileNotFoundError):
        move(path, path.with_name(f"{QUARANTINE_PREFIX}{path.name}-{secrets.token_hex(4)}"))


def _remove_lock(path: Path) -> None:
    """One that was found dead. By another name first: it may have been taken over, and locked again, a moment ago."""
    aside = _put_aside(path)
    if aside != path:
        remove(aside)
