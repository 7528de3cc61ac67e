"""Cache entries in one file, to carry to other machines of the same kind. Plain Python: knows nothing of torch.

A zip of <group>/<distribution>/<method>/<entry>/<file>; the manifest.json of an entry holds the SHA-256 of its other files. There is no
signature that another machine could check: whoever loads a bundle has made sure that its digest is one that the machine's owner trusts
(trusted_bundles.py). Loading signs the entries with the key of the machine. Their group says what they were built for, so what does not
fit a machine is never run.
"""
from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import stat
import struct
import tempfile
import time
import zipfile
import zlib
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO

from ...int8.echo import echo
from ...int8.files.folders import is_reserved, make_folders
from ...int8.files.whole import move
from .entry import MANIFEST, canonical
from .store import CacheError, CacheStore

try:
    import fcntl
except ImportError:  # Windows, which does not delete a file that is open
    fcntl = None

MIB = 1 << 20
MAX_BYTES = 4096 * MIB  # of a bundle, packed and unpacked
MAX_FILE_BYTES = 1024 * MIB
MAX_MANIFEST_BYTES = MIB  # they have 10 kB
MAX_MANIFESTS_BYTES = 64 * MIB  # of all of a bundle: 6 s of a core, for what is written to take long
MAX_DIRECTORY_BYTES = 4 * MIB  # Python reads all of a zip's before anything can be asked of it: a second, 100 MB
MAX_ENTRIES = 4096
MAX_FILES = 16  # of an entry, its manifest included
MAX_LINES = 10  # of what is shown of it
PREFIX = ".bundle-"  # of what is being written
YOUNG = 2.0  # seconds in which what is being written may not be locked yet
LABELS = "name", "device", "torch"  # of a manifest, for a person
_DEPTH = 5
_NAME, MAX_NAME = re.compile(r"\w(?:[\w.+-]*\w)?"), 200  # bytes
_LABEL = re.compile(r"[\w .+:()/@-]{1,100}")  # shown to a person
_DAMAGE = (OSError, ValueError, KeyError, RuntimeError, EOFError, struct.error, zipfile.BadZipFile, zlib.error)


@dataclass(frozen=True)
class BundleEntry:
    """An entry in a bundle. place: "group/distribution/method". labels: what its manifest says of name, device and torch. size: bytes of
    its files. The manifest itself is read again when it is unpacked: as Python has it, it may take twenty times its size."""

    place: str
    name: str
    labels: tuple[str, str, str]
    size: int


@dataclass(frozen=True)
class Bundle:
    """A checked bundle. path: where it was read. digest: SHA-256 of the file, in hex. copy: the content that both are of, which nobody
    else can change: an unnamed file of this process."""

    path: Path
    digest: str
    held: tuple[BundleEntry, ...]
    copy: IO[bytes] = field(repr=False, compare=False)

    @property
    def size(self) -> int:
        return sum(held.size for held in self.held)

    def contents(self) -> str:
        """For a person: a line for each class, device and torch version."""
        counts: Counter = Counter()
        sizes: Counter = Counter()
        for held in self.held:
            counts[held.labels] += 1
            sizes[held.labels] += held.size
        lines = [f"{name[:60]} for {device[:60]}, torch {torch[:40]}: {counts[name, device, torch]} compiled, "
                 f"{sizes[name, device, torch] / 1e6:.1f} MB" for name, device, torch in sorted(counts)]
        more = [f"and {len(lines) - MAX_LINES} more"] if len(lines) > MAX_LINES else []
        return "\n".join(lines[:MAX_LINES] + more)


def save_bundle(store: CacheStore, entries: list[Path], path: Path, limit: int = MAX_BYTES) -> str:
    """Writes the good ones of entries, which are this store's own, to path, on the store's disk: -> its digest. The file appears whole or
    not at all.

    Raises ValueError where there is none or the file would have more than limit bytes, OSError where it cannot be written.
    """
    make_folders(path.parent)
    sweep(path.parent)  # of a version before, which wrote there
    with store.temporary() as folder, (folder / path.name).open("w+b") as file:
        os.chmod(file.name, 0o600)
        with zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED) as archive:
            for entry in sorted(entries):
                with contextlib.suppress(CacheError):  # damaged, which the store has said, or deleted meanwhile
                    _pack(store, entry, archive)
                if file.tell() > limit:
                    raise ValueError(f"the bundle would be larger than the {limit / 1e6:.1f} MB that bundles may still take of the "
                                     "compile cache's limit. Delete some from its bundles folder, or raise the limit")
            if not archive.infolist():
                raise ValueError("there is nothing compiled to save")
        file.flush()
        os.fsync(file.fileno())
        digest = _digest_of(file)
        file.close()  # Windows renames no open file
        move(folder / path.name, path, os.replace)
    return digest


def sweep(folder: Path) -> None:
    """Deletes what writers that are no more have left in folder."""
    with contextlib.suppress(OSError):
        for left in folder.glob(f"{PREFIX}*"):
            with contextlib.suppress(OSError):  # locked: its writer is at it
                handle = os.open(left, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0))
                try:
                    _lock(handle)
                    is_young = time.time() - os.fstat(handle).st_mtime < YOUNG
                finally:
                    os.close(handle)
                if not is_young:
                    left.unlink()


def _lock(handle: int) -> None:
    """Until it is closed. Raises OSError where another process has it."""
    if fcntl is not None:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _pack(store: CacheStore, folder: Path, archive: zipfile.ZipFile):
    entry = store.whole(folder)
    prefix = folder.relative_to(store.base).as_posix()
    contents = {name: entry.read(name) for name in sorted(entry.body["files"])}
    for name, content in ((MANIFEST, canonical({"body": entry.body})), *contents.items()):
        archive.writestr(zipfile.ZipInfo(f"{prefix}/{name}"), content, zipfile.ZIP_DEFLATED)


def read_bundle(path: Path, scratch: Path | None = None, tick: Callable[[], object] = lambda: None) -> Bundle:
    """Copies it, into the folder scratch or that of path, and checks all of the copy; runs nothing. tick: called now and then; what it
    raises, as an interrupt does, ends it.

    Raises ValueError for what is damaged or no bundle, OSError where there is no room for the copy."""
    with _open(path) as file, contextlib.ExitStack() as stack:
        with _named(path):
            _require_small_directory(file)  # before a large file of something else is copied
        copy = stack.enter_context(tempfile.TemporaryFile(dir=scratch or path.parent, prefix=PREFIX))
        digest = _copy(file, copy, tick)
        with _named(path):
            _require_small_directory(copy)
            with zipfile.ZipFile(copy) as archive:
                if archive.comment:  # any bytes: room to look for another file of a wanted digest
                    raise ValueError("it has a comment")
                held = tuple(_check(archive, place, files, tick) for place, files in sorted(_folders(archive).items()))
        stack.pop_all()  # the copy stays open for as long as the bundle lives
        return Bundle(path, digest, held, copy)


@contextlib.contextmanager
def _named(path: Path) -> Iterator[None]:
    """Errors of the content say which file it is of."""
    try:
        yield
    except _DAMAGE as error:
        raise ValueError(f"{echo(path.name)} is damaged or no bundle of compiled code ({echo(str(error))}): copy it again from where "
                         "it was saved") from None


def _open(path: Path) -> IO[bytes]:
    name = echo(path.name)
    refusal = f"{name} is a link or a folder: put the bundle itself there"
    if not stat.S_ISREG(path.lstat().st_mode):
        raise ValueError(refusal)
    # Swapped meanwhile, a link is not followed and a pipe not waited for.
    file = os.fdopen(os.open(path, os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0)),
                     "rb")
    info = os.fstat(file.fileno())
    if stat.S_ISREG(info.st_mode) and info.st_size <= MAX_BYTES:
        return file
    file.close()
    raise ValueError(f"{name} is larger than a bundle can be ({MAX_BYTES // MIB} MiB)" if stat.S_ISREG(info.st_mode) else refusal)


def _require_small_directory(file: IO[bytes]) -> None:
    """Asks as ZipFile does, before it does."""
    end = zipfile._EndRecData(file)  # type: ignore[attr-defined]
    if not end:
        raise ValueError("it is no zip file")
    if end[zipfile._ECD_SIZE] > MAX_DIRECTORY_BYTES:  # type: ignore[attr-defined]
        raise ValueError("its directory is larger than that of a bundle can be")


def _copy(file: IO[bytes], copy: IO[bytes], tick: Callable[[], object]) -> str:
    """Copies as much as a bundle can have: -> the digest of what was written."""
    hashed, left = hashlib.sha256(), MAX_BYTES + 1
    file.seek(0)
    while left and (content := file.read(min(left, MIB))):
        tick()
        hashed.update(content)
        copy.write(content)
        left -= len(content)
    copy.flush()
    return hashed.hexdigest()


def load_bundle(store: CacheStore, bundle: Bundle, tick: Callable[[], object] = lambda: None) -> tuple[int, int]:
    """Signs what the store lacks and adds it: -> (added, already present). The caller has made sure that bundle is trusted. tick: called
    between two; what it raises ends it, with what was added until then.

    Raises ValueError where it does not fit the store's limit, OSError where it cannot be written.
    """
    if bundle.size > store.limit:
        raise ValueError(f"{echo(bundle.path.name)} holds {bundle.size / 1e6:.0f} MB and the limit of the compile cache is "
                         f"{store.limit / 1e6:.0f} MB: raise it in ComfyUI's settings, or with INT8_COMPILE_CACHE_SIZE (GB)")
    added = 0
    try:
        with zipfile.ZipFile(bundle.copy) as archive:
            for held in bundle.held:
                tick()
                with contextlib.suppress(CacheError):
                    store.touch(store.whole(store.base / held.place / held.name))
                    continue
                _unpack(store, held, archive)
                added += 1
    finally:
        store.evict()  # once: it looks at all that there is
    return added, len(bundle.held) - added


def _unpack(store: CacheStore, held: BundleEntry, archive: zipfile.ZipFile):
    prefix = f"{held.place}/{held.name}/"
    body = json.loads(_content(archive, archive.getinfo(prefix + MANIFEST)))["body"]  # checked, and of a copy that is ours
    with store.writing(held.place, held.name, within_limit=False) as (folder, finish):
        for name, digest in body["files"].items():
            content = _content(archive, archive.getinfo(prefix + name))
            if hashlib.sha256(content).hexdigest() != digest:
                raise ValueError(f"{name} was changed after it was checked")
            (folder / name).write_bytes(content)
        finish({key: value for key, value in body.items() if key != "files"})


def is_name(text: str) -> bool:
    """Whether it is one for a file on every system."""
    return bool(_NAME.fullmatch(text)) and len(text.encode()) <= MAX_NAME and not is_reserved(text)


def _folders(archive: zipfile.ZipFile) -> dict[str, dict[str, zipfile.ZipInfo]]:
    """The files of each entry, by its path. Raises ValueError for names and sizes that no bundle has."""
    files = archive.infolist()
    if sum(info.file_size for info in files) > MAX_BYTES:
        raise ValueError(f"it unpacks to more than {MAX_BYTES // MIB} MiB")
    folders: dict[str, dict[str, zipfile.ZipInfo]] = {}
    seen = set()
    for info in files:
        parts = info.orig_filename.split("/")
        if len(parts) != _DEPTH or not all(map(is_name, parts)) or info.orig_filename.casefold() in seen:
            raise ValueError(f"it has a file named {info.orig_filename[:100]!r}")
        if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):  # others ask for as much memory as they like
            raise ValueError(f"{parts[-1]} in it is packed in another way than Save Compile Cache does")
        if info.file_size > (MAX_MANIFEST_BYTES if parts[-1] == MANIFEST else MAX_FILE_BYTES):
            raise ValueError(f"{parts[-1]} in it is too large")
        seen.add(info.orig_filename.casefold())
        folders.setdefault("/".join(parts[:-1]), {})[parts[-1]] = info
    manifests = sum(found[MANIFEST].file_size for found in folders.values() if MANIFEST in found)
    if not 0 < len(folders) <= MAX_ENTRIES or max(map(len, folders.values())) > MAX_FILES or manifests > MAX_MANIFESTS_BYTES:
        raise ValueError("it holds nothing, or more than a bundle can hold")
    return folders


def _check(archive: zipfile.ZipFile, folder: str, files: dict[str, zipfile.ZipInfo], tick: Callable[[], object]) -> BundleEntry:
    tick()
    place, _, name = folder.rpartition("/")
    if MANIFEST not in files:
        raise ValueError(f"{name} has no {MANIFEST}")
    manifest = _content(archive, files[MANIFEST])
    content = json.loads(manifest)
    body = content.get("body") if isinstance(content, dict) else None
    digests = body.get("files") if isinstance(body, dict) else None
    if not isinstance(digests, dict) or set(digests) != set(files) - {MANIFEST}:
        raise ValueError(f"{name} has other files than its {MANIFEST} says")
    labels = tuple(body.get(key, "unknown") for key in LABELS)
    for key, label in zip(LABELS, labels):
        if not (isinstance(label, str) and _LABEL.fullmatch(label)):
            raise ValueError(f"the {key} of {name} is no {key}")
    size = len(manifest)  # as read: a zip may say more
    for file, digest in digests.items():
        with archive.open(files[file]) as stream:
            if _digest_of(stream, tick) != digest:
                raise ValueError(f"{file} of {name} is not what its {MANIFEST} says")
            size += stream.tell()
    return BundleEntry(place, name, labels, size)


def _content(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    """archive.read unpacks up to a GiB, however little the zip says that it is."""
    with archive.open(info) as stream:
        return b"".join(iter(lambda: stream.read(min(MIB, info.file_size + 1)), b""))


def _digest_of(file: IO[bytes], tick: Callable[[], object] = lambda: None) -> str:
    """From its beginning."""
    file.seek(0)
    hashed = hashlib.sha256()
    while content := file.read(MIB):
        tick()
        hashed.update(content)
    return hashed.hexdigest()
