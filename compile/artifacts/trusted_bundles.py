"""The bundles of compiled code that this machine's owner trusts: a list of digests in a file beside the signing key.

Only the command trust.py, beside this pack's __init__.py, writes it; no node, setting or route does. Plain Python.
"""
from __future__ import annotations

import hashlib
import os
import re
from pathlib import Path

from ...int8.files.folders import make_folders
from ...int8.files.owners import is_of_others, open_regular, require_way
from ...int8.files.whole import write_whole
from .store import CacheError, default_key_file

NAME = "trusted_bundles.txt"
MAX_BYTES = 1 << 20
_DIGEST = re.compile(r"[0-9a-f]{64}")
_HEAD = "# SHA-256 of bundles whose code may run here, one a line; see web/docs/LoadCompileCache.md of INT8 Compile.\n"


def list_file() -> Path:
    return default_key_file().with_name(NAME)


def is_digest(text: str) -> bool:
    return bool(_DIGEST.fullmatch(text))


def trusted() -> dict[str, str]:
    """{digest: what its line says of it}. None is trusted where there is no list. Raises CacheError for a list that others could have
    written, OSError for one that cannot be read."""
    path = list_file()
    try:
        list_of_digests = open_regular(path, getattr(os, "O_NOFOLLOW", 0))
    except FileNotFoundError:
        return {}
    except OSError:
        if path.is_symlink():
            raise CacheError(f"{path} is a symbolic link: put the list itself there") from None
        raise
    with list_of_digests as file:
        _require_safe(path, os.fstat(file.fileno()))
        _require_safe(path.parent, path.parent.stat())
        require_way(path)
        text = file.read(MAX_BYTES).decode("utf-8", errors="replace")
    lines = (line.partition("#")[0].split(maxsplit=1) or [""] for line in text.splitlines())
    return {line[0]: " ".join(line[1:]).strip() for line in lines if is_digest(line[0])}


def _require_safe(path: Path, info: os.stat_result) -> None:
    if is_of_others(path, info):
        raise CacheError(f"{path} belongs to another user or can be written by others: chown it to the user that runs ComfyUI and "
                         "chmod go-w it")


def set_trusted(digest: str, note: str = "", trust: bool = True) -> Path:
    """Adds digest to the list, or takes it out: -> the list, which is whole at any time. Raises as trusted()."""
    path, listed = list_file(), trusted()
    listed.pop(digest, None)
    if trust:
        listed[digest] = "".join(c if c.isprintable() and c != "#" else "_" for c in note)[:200]
    make_folders(path.parent)
    write_whole(path, (_HEAD + "".join(f"{digest}  {note}".rstrip() + "\n" for digest, note in listed.items())).encode())
    return path


def digest_of(path: Path) -> str:
    hashed = hashlib.sha256()
    with path.open("rb") as file:
        while content := file.read(1 << 20):
            hashed.update(content)
    return hashed.hexdigest()
