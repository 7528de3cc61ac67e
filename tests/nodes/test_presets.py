"""Presets of keep_layers are for ComfyUI's own classes."""
from __future__ import annotations

import re

import pytest
from int8_compile.int8 import quantize
from int8_compile.int8.quantize import drop_kept, eligible_linears, presets

from benchmarks.small_families import MORE, SMALL

pytestmark = pytest.mark.comfy
FAMILIES = {"anima": "Anima", "boogu": "Boogu", "chroma": "Chroma", "hidream-o1": "HiDream-O1", "ideogram4": "Ideogram 4",
            "krea2": "Krea 2", "ltx2": "LTX-AV", "minimax-h3": "MiniMax H3",
            "qwen-image": "Qwen-Image", "wan-animate": "Wan Animate", "z-image": "Z-Image"}


def test_there_is_a_family_for_each():
    assert presets().keys() == FAMILIES.keys()


@pytest.mark.parametrize("preset", FAMILIES)
def test_each_glob_finds_layers_of_its_family_and_leaves_most(comfy, monkeypatch, preset):
    monkeypatch.setattr(quantize, "MIN_FEATURES", 1)  # the test's models are small
    family = {**SMALL, **MORE}[FAMILIES[preset]]
    names = eligible_linears(family.build())
    # Which blocks a family's model has depends on its size.
    patterns = [re.sub(r"\.\d+\.", ".0.", glob) if not finds(names, glob) else glob for glob in presets()[preset]]
    assert all(finds(names, glob) for glob in patterns), names
    assert drop_kept(names, patterns)


def finds(names, glob) -> bool:
    """Whether glob finds a layer."""
    try:
        return len(drop_kept(names, [glob])) < len(names)
    except ValueError:
        return False
