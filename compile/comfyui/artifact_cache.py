"""The compile cache in ComfyUI: where it is, its settings, and what the builder process needs of ComfyUI.

Where compiled code lies is said by the environment or by ComfyUI's command line. ComfyUI's settings, which every client of its HTTP API
can write, say whether anything is kept and how much.
"""
from __future__ import annotations

import functools
import logging
import os
import re
from collections.abc import Iterator
from pathlib import Path

import comfy.cli_args
import folder_paths
import torch

from ...int8.files.folders import make_folder
from ...int8.files.user_folder import is_kept
from ..artifacts.builder import Builder
from ..artifacts.bundle import sweep
from ..artifacts.runtime import Cache
from ..artifacts.store import DEFAULT_LIMIT, GIB, CacheError, CacheStore, default_key_file
from .user_settings import is_first, settings

logger = logging.getLogger(__name__)

MIN_TORCH = 2, 8
# Ids of ComfyUI's settings, and the environment variables that come before them.
ENABLED, LIMIT = "INT8Compile.Cache.Enabled", "INT8Compile.Cache.SizeLimit"
ENABLED_VARIABLE, LIMIT_VARIABLE, FOLDER_VARIABLE = "INT8_COMPILE_CACHE", "INT8_COMPILE_CACHE_SIZE", "INT8_COMPILE_CACHE_DIR"
OLD_FOLDER = "INT8Compile.Cache.Folder"  # a setting of versions before 0.2
# GB. The first as in web/int8_compile.js.
SETTING_RANGE, VARIABLE_RANGE = (0.1, 1000.0), (0.0, 1e6)
# Of the size limit, for what Save Compile Cache writes: saving must not push out what is compiled.
BUNDLES_SHARE = 0.5
# ComfyUI's options that decide what its layers compute; ports and folders do not.
_NUMERICS_FLAGS = re.compile("attention|fp16|fp8|bf16|fp32|fast|precision|vram|cpu|directml|xformers|upcast|deterministic|channels_last|"
                            "device|optimiz|triton|quant")


def folder() -> Path:
    """INT8_COMPILE_CACHE_DIR, or a folder of ComfyUI's user directory that its HTTP routes do not serve (named with __)."""
    chosen = os.environ.get(FOLDER_VARIABLE)
    return Path(chosen) if chosen else Path(folder_paths.get_user_directory()) / "__int8_compile"


def require_apart(path: Path) -> None:
    """Raises CacheError for a folder that lies, links followed, where ComfyUI's HTTP routes or a prompt's nodes read or write files, or
    that holds such a folder."""
    path = _real(path)
    for name, served in _served():
        if _is_in(path, served) or _is_in(served, path):
            raise CacheError(f"the compile cache must not be in ComfyUI's {name} folder, nor around it: prompts can write there. Set "
                             f"{FOLDER_VARIABLE} to a folder of its own")
    user = _real(folder_paths.get_user_directory())
    # core keeps __ from its routes (folder_paths.get_public_user_directory).
    if _is_in(user, path) or (_is_in(path, user) and not path.relative_to(user).parts[0].startswith("__")):
        raise CacheError(f"the compile cache must not be among ComfyUI's user data, nor around it: clients can write there. Set "
                         f"{FOLDER_VARIABLE} to a folder of its own")


def _served() -> Iterator[tuple[str, Path]]:
    """(name, folder) of what prompts and clients reach besides user data."""
    for name in ("input", "output", "temp"):
        yield name, _real(getattr(folder_paths, f"get_{name}_directory")())
    base = _real(folder_paths.base_path)
    for name, known in dict(folder_paths.folder_names_and_paths).items():
        for models in map(_real, known[0]):
            # Code is no model, and a folder that holds ComfyUI itself is none of models.
            if name != "custom_nodes" and not _is_in(base, models):
                yield "models", models


def _real(path) -> Path:
    return Path(os.path.normcase(os.path.realpath(path)))


def _is_in(path: Path, other: Path) -> bool:
    return path == other or other in path.parents


def is_enabled() -> bool:
    chosen = os.environ.get(ENABLED_VARIABLE)
    if chosen:
        return chosen not in ("0", "false", "off")
    value = settings().get(ENABLED, True)
    if type(value) is not bool:
        if is_first(ENABLED):
            logger.warning("INT8 Compile: %s is neither true nor false; using true.", ENABLED)
        return True
    return value


def size_limit() -> int:
    """Bytes, of all that is compiled and all bundles."""
    chosen = os.environ.get(LIMIT_VARIABLE)
    name, value, (least, most) = (LIMIT_VARIABLE, _number(chosen), VARIABLE_RANGE) if chosen else (
        LIMIT, settings().get(LIMIT, DEFAULT_LIMIT / GIB), SETTING_RANGE)
    if type(value) in (int, float) and least <= value <= most and value:
        return int(value * GIB)
    if is_first(name):
        logger.warning("INT8 Compile: %s is not a number of GB; using %d.", name, DEFAULT_LIMIT // GIB)
    return DEFAULT_LIMIT


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def bundles() -> Path:
    """The folder of what Save Compile Cache writes and Load Compile Cache reads, beside the cache. Raises CacheError, OSError."""
    path = folder() / "bundles"
    require_apart(path)
    make_folder(path)
    sweep(path)
    return path


def bundle_sizes() -> dict[str, int]:
    """{name: bytes} of the bundles, those that somebody put there too."""
    sizes = {}
    try:
        with os.scandir(folder() / "bundles") as entries:
            for entry in entries:
                if not entry.name.startswith(".") and entry.is_file(follow_symlinks=False):
                    sizes[entry.name] = entry.stat(follow_symlinks=False).st_size
    except OSError:
        pass
    return sizes


def room_for_bundles() -> int:
    """Bytes that Save Compile Cache may still write."""
    return max(0, int(size_limit() * BUNDLES_SHARE) - sum(bundle_sizes().values()))


def _room_for_entries() -> int:
    """Bytes: the limit without the bundles, which have their share of it at most."""
    limit = size_limit()
    return limit - min(sum(bundle_sizes().values()), int(limit * BUNDLES_SHARE))


def open_store() -> CacheStore:
    """Raises CacheError where it cannot be used."""
    require_apart(folder() / "compiled")
    return CacheStore(folder() / "compiled", default_key_file(), _room_for_entries())


def get_cache() -> Cache | None:
    """The cache of this process, None where it is off, torch is older than 2.8, or it cannot be used (one warning)."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < MIN_TORCH or not is_enabled() or not is_kept(default_key_file()):
        return None
    cache = _cache(folder(), default_key_file())
    if cache is not None:
        cache.store.limit = _room_for_entries()
    return cache


@functools.cache
def _cache(*_) -> Cache | None:
    try:
        store = open_store()
    except CacheError as error:
        logger.warning("INT8 Compile: %s: nothing is kept for the next start.", error)
        return None
    sweep(folder() / "bundles")
    if settings().get(OLD_FOLDER):
        logger.warning("INT8 Compile: the setting %s does not count any more, as every client could write it. Set %s instead.", OLD_FOLDER,
                       FOLDER_VARIABLE)
    return Cache(store, Builder(store, ("compile.comfyui.artifact_cache", "prepare", (vars(comfy.cli_args.args),))), host)


def host() -> dict:
    """ComfyUI's options that decide what layers compute, and how."""
    return {name: repr(sorted(map(str, value)) if isinstance(value, (set, list)) else value)
            for name, value in sorted(vars(comfy.cli_args.args).items()) if _NUMERICS_FLAGS.search(name)}


def prepare(options: dict) -> None:
    """In the builder process: ComfyUI as it was started. Called before anything of it is imported but its options."""
    vars(comfy.cli_args.args).update(options)
    from .attention import add_functions
    from .int8_layer import patch_linear_input_act

    patch_linear_input_act()
    add_functions()
