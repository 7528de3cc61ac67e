"""ComfyUI's attention functions, as operations of compiled code."""
from __future__ import annotations

import functools

from ..artifacts.attention import add
from . import core as comfy_core

# Plain torch: fused with what is around it, and good for any size.
_TRACED = "attention_pytorch"
# What wrap_attn reads, or leaves for nested calls.
_UNREAD = frozenset({"transformer_options", "_inside_attn_wrapper"})


@functools.cache
def add_functions() -> None:
    if comfy_core.usable(comfy_core.ATTENTION):
        import comfy.ldm.modules.attention as functions

        wrappers = functions.wrap_attn.__code__.co_consts  # a pack that has wrapped one is left as it is
        for name, function in vars(functions).copy().items():
            if name.startswith("attention") and getattr(function, "__code__", None) in wrappers:
                add(name, function, _UNREAD, traced=name == _TRACED)
