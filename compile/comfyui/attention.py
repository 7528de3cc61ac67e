"""ComfyUI's attention functions, as operations of compiled code."""
from __future__ import annotations

import functools

import comfy.ldm.modules.attention as core

from ..artifacts.attention import add

# Plain torch: fused with what is around it, and good for any size.
_TRACED = "attention_pytorch",


@functools.cache
def add_functions() -> None:
    for name, function in list(vars(core).items()):
        if name.startswith("attention") and name not in _TRACED and getattr(function, "__module__", "") == core.__name__:
            add(name, function)
