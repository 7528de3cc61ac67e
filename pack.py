"""What this pack is called, where it is, and what it is made of."""
from __future__ import annotations

import functools
import hashlib
import re
from pathlib import Path

NAME = "int8_compile"
# What ComfyUI calls it here: a path for a pack in custom_nodes.
PACKAGE = __name__.rpartition(".")[0]
ROOT = Path(__file__).absolute().parent


@functools.cache
def version() -> str:
    """As the registry has it: of pyproject.toml; empty where that is gone."""
    try:
        found = re.search(r'^version = "(.+)"$', (ROOT / "pyproject.toml").read_text(encoding="utf-8"), re.MULTILINE)
    except OSError:
        return ""
    return found[1] if found else ""


@functools.cache
def sources_digest() -> str:
    """Return a digest of the code below all packages at the root, so that an update or an edit invalidates what was compiled with it."""
    digest = hashlib.sha256()
    packages = [init.parent for init in ROOT.glob("*/__init__.py")]
    for path in sorted(path for package in packages for path in package.rglob("*") if path.suffix in (".py", ".cpp")):
        content = path.read_bytes()
        digest.update(f"{path.relative_to(ROOT).as_posix()} {len(content)}\n".encode())
        digest.update(content)
    return digest.hexdigest()[:16]
