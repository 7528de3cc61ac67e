"""The compile cache in ComfyUI: where it is, its settings, and what the builder process needs of ComfyUI."""
from __future__ import annotations

import functools
import json
import logging
import os
import re
from pathlib import Path

import comfy.cli_args
import folder_paths
import torch

from .artefacts import Cache
from .builder import Builder
from .cache_store import DEFAULT_LIMIT, GIB, CacheError, CacheStore, default_key_file

logger = logging.getLogger(__name__)

MIN_TORCH = 2, 8
# Ids of ComfyUI's settings, and the environment variables that come before them.
ENABLED, LIMIT, FOLDER = "INT8Compile.Cache.Enabled", "INT8Compile.Cache.SizeLimit", "INT8Compile.Cache.Folder"
ENABLED_VARIABLE, LIMIT_VARIABLE, FOLDER_VARIABLE = "INT8_COMPILE_CACHE", "INT8_COMPILE_CACHE_SIZE", "INT8_COMPILE_CACHE_DIR"
# ComfyUI's options that decide what its layers compute; ports and folders do not.
_COMPUTES = re.compile("attention|fp16|fp8|bf16|fp32|fast|precision|vram|cpu|directml|xformers|upcast|deterministic|channels_last|device|"
                       "optimiz|triton|quant")


def folder() -> Path:
    """INT8_COMPILE_CACHE_DIR, the setting, or a folder of ComfyUI's user directory that its HTTP routes do not serve (named with __)."""
    chosen = os.environ.get(FOLDER_VARIABLE) or _settings().get(FOLDER)
    return Path(chosen) if chosen else Path(folder_paths.get_user_directory()) / "__int8_compile"


def is_enabled() -> bool:
    chosen = os.environ.get(ENABLED_VARIABLE)
    return chosen not in ("0", "false", "off") if chosen else bool(_settings().get(ENABLED, True))


def size_limit() -> int:
    """Bytes."""
    try:
        return int(float(os.environ.get(LIMIT_VARIABLE) or _settings().get(LIMIT, DEFAULT_LIMIT / GIB)) * GIB)
    except ValueError:
        logger.warning("INT8 Compile: %s is not a number of GB; using %d.", LIMIT_VARIABLE, DEFAULT_LIMIT // GIB)
        return DEFAULT_LIMIT


def _settings() -> dict:
    """Of ComfyUI's default user."""
    try:
        return json.loads((Path(folder_paths.get_user_directory()) / "default" / "comfy.settings.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}


def open_store() -> CacheStore:
    """Raises CacheError where it cannot be used."""
    return CacheStore(folder() / "compiled", default_key_file(), size_limit())


def get_cache() -> Cache | None:
    """The cache of this process, None where it is off, torch is older than 2.8, or it cannot be used (one warning)."""
    if tuple(map(int, torch.__version__.split(".")[:2])) < MIN_TORCH or not is_enabled():
        return None
    return _cache(folder(), default_key_file(), size_limit())


@functools.cache
def _cache(*_) -> Cache | None:
    try:
        store = open_store()
    except CacheError as error:
        logger.warning("INT8 Compile: %s: nothing is kept for the next start.", error)
        return None
    return Cache(store, Builder(store, ("compile.comfy_cache", "prepare", (vars(comfy.cli_args.args),))), _host)


def _host() -> dict:
    return {name: repr(sorted(map(str, value)) if isinstance(value, (set, list)) else value)
            for name, value in sorted(vars(comfy.cli_args.args).items()) if _COMPUTES.search(name)}


def prepare(options: dict) -> None:
    """In the builder process: ComfyUI as it was started. Called before anything of it is imported but its options."""
    vars(comfy.cli_args.args).update(options)
    from ..int8.comfy_ops import patch_linear_input_act

    patch_linear_input_act()
