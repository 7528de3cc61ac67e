"""A folder of the compile cache that holds one artifact, signed: what is loaded is what was checked."""
from __future__ import annotations

import errno
import hashlib
import hmac
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from ...int8.files.owners import CacheError, read_own
from ...int8.files.private_load import load_privately

T = TypeVar("T")
STORE_LAYOUT = "v1"
LEVELS = 5  # of an entry's path below it
MANIFEST = "manifest.json"
# Of this process or of a network, not of what is read.
TRANSIENT_ERRNOS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM, getattr(errno, "ESTALE", 0), errno.ETIMEDOUT)


class Damaged(CacheError):
    """What is on disk is not what was signed there."""


@dataclass(frozen=True)
class Entry:
    """A verified entry. body: what the writer said of it."""

    folder: Path
    body: dict

    def read(self, name: str) -> bytes:
        """The content of one of its files, which is what was signed. Raises Damaged for another, CacheError where it cannot be read now."""
        path = self.folder / name
        try:
            content = read_own(path)
        except OSError as error:
            raise _reason(error)(f"{path.name}: {error.strerror or error}") from None
        except CacheError as error:
            raise Damaged(str(error)) from None
        if not hmac.compare_digest(hashlib.sha256(content).hexdigest(), self.body["files"].get(name, "")):
            raise Damaged(f"{path.name} was changed after it was signed")
        return content

    def load(self, name: str, load: Callable[[Path], T], unpack: Callable[[bytes], dict[str, bytes]] | None = None,
             lasting: bool = False) -> T:
        """load(a fresh folder) with that file, or what unpack makes of it, under their names. Raises as read and load_privately;
        only Damaged says anything of the entry."""
        content = self.read(name)
        files = {name: content} if unpack is None else unpack(content)
        return load_privately(files, load, self.folder.parents[LEVELS - 1], lasting)


def _reason(error: OSError) -> type[CacheError]:
    return CacheError if error.errno in TRANSIENT_ERRNOS else Damaged


def canonical(value) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def digest(value, length: int = 16) -> str:
    """Of a JSON value."""
    return hashlib.sha256(canonical(value)).hexdigest()[:length]
