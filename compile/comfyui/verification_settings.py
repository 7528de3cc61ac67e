"""Checks against eager in ComfyUI: whether they are on, and where a failed one is kept."""
from __future__ import annotations

import json
import logging
import math
import os
import time
from dataclasses import asdict
from pathlib import Path

import folder_paths
import torch

from ...int8.kernels import seen_right
from ..artifacts import key as cache_key
from ..verification.verifier import Failure, VerificationOptions
from .user_settings import is_first, settings

logger = logging.getLogger(__name__)

# The environment comes before the setting.
VARIABLE, SETTING = "INT8_COMPILE_VERIFY", "INT8Compile.Verify"
OFF, FIRST, ALWAYS = "off", "first", "always"
MOST_REPORTS = 20  # files


def _chosen() -> str:
    name, value = (VARIABLE, os.environ[VARIABLE]) if os.environ.get(VARIABLE) else (SETTING, settings().get(SETTING, FIRST))
    if value in (OFF, FIRST, ALWAYS):
        return value
    if is_first(name):
        logger.warning("INT8 Compile: %s is none of %s, %s, %s; using %s.", name, OFF, FIRST, ALWAYS, FIRST)
    return FIRST


def verification_options() -> VerificationOptions | None:
    """None where the checks are off."""
    chosen = _chosen()
    return None if chosen == OFF else VerificationOptions(chosen == ALWAYS, _record)


def watch_kernels() -> None:
    """The INT8 kernels' own checks go by the same choice, and their failures are kept in the same place."""
    def disabled() -> bool:
        return _chosen() == OFF

    def record(kernel: str, device: torch.device, what: str) -> str:
        return _keep({"kernel": kernel, "device": device.type, "difference": what, "machine": cache_key.machine_without_paths(device)})
    seen_right.disabled, seen_right.record = disabled, record


def _record(failure: Failure) -> str:
    return _keep({name: str(value) if value == math.inf else value for name, value in asdict(failure).items()})


def _keep(figures: dict) -> str:
    """Beside ComfyUI's log; where. No prompt, path or file name is in it."""
    folder = Path(folder_paths.get_user_directory()) / "__int8_compile_checks"
    path = folder / f"check-{time.time_ns()}.json"
    try:
        folder.mkdir(mode=0o700, exist_ok=True)
        for old in sorted(folder.glob("check-*.json"))[:-MOST_REPORTS + 1]:
            old.unlink(missing_ok=True)
        with open(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w", encoding="utf-8") as file:
            json.dump(figures, file, indent=1)
    except OSError as error:
        logger.info("INT8 Compile: a failed check was not kept: %s", error)
        return ""
    return str(path)
