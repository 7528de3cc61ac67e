"""What an older ComfyUI cannot do: tests that need it are skipped there, with the reason."""
from __future__ import annotations

import re
import runpy

import pytest

from benchmarks.comfy_server import find_comfyui

NATIVE_INT8 = "0.26.0"
NODE_REPLACEMENT = "0.13.0"
# Small model or node -> (the first ComfyUI that can run it, what an older one says or does).
NEEDS = {
    "tiny_flux": ("0.9.0", "every Flux is taken for one of 24 heads"),
    **dict.fromkeys(("INT8QuantizeModel", "LoadINT8Model", "SaveINT8Model"), (NATIVE_INT8, "no native INT8")),
}


def is_older(than: str) -> bool:
    comfyui = find_comfyui()
    return comfyui is not None and _numbers(runpy.run_path(str(comfyui / "comfyui_version.py"))["__version__"]) < _numbers(than)


def needs_comfyui(version: str, reason: str) -> None:
    """Skip the running test where ComfyUI is older than version."""
    if is_older(version):
        pytest.skip(f"{reason} before ComfyUI {version}")


def needs_for(name: str) -> None:
    """The same for what a test uses by name: a small model, a node."""
    if name in NEEDS:
        needs_comfyui(*NEEDS[name])


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall("[0-9]+", version)[:3]))
