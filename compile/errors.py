"""Whose fault an error in a compiled call is, and of which kind."""
from __future__ import annotations

from pathlib import Path

import torch

# What the graph pass puts into compiled code calls the kernels as no layer does.
_KERNELS = str(Path(__file__).parent.parent / "int8" / "kernels")
_NOT_THE_MODELS = "<", str(Path(torch.__file__).parent), str(Path(__file__).parent), _KERNELS
_LAYERS = str(Path(__file__).parent / "comfyui")  # INT8 layers are parts of the model


def is_models_own(error: Exception) -> bool:
    """Whether it came up in the model's code, or another pack's: neither in torch, nor in what it compiled, nor in a
    kernel."""
    if type(error).__module__.partition(".")[0] in ("torch", "triton"):
        return False
    traceback = error.__traceback__
    while traceback is not None and traceback.tb_next is not None:
        traceback = traceback.tb_next
    if traceback is None:
        return False
    code = traceback.tb_frame.f_code
    if code.co_filename.startswith(_LAYERS):
        return True
    return not code.co_filename.startswith(_NOT_THE_MODELS) and "torchinductor" not in code.co_filename


def is_out_of_memory(error: Exception) -> bool:
    """Of a device or of the host's allocator, by torch's classes and texts."""
    text = str(error).lower()
    return isinstance(error, RuntimeError) and ("out of memory" in text or "can't allocate memory" in text)
