"""Where the kernels run: on a GPU where there is one, else in Triton's interpreter, with the numpy that is installed."""
from __future__ import annotations

import importlib.util
from importlib import metadata

import pytest
import torch
from torch.utils._pytree import tree_map_only

CUDA = torch.cuda.is_available()
DEVICE = torch.device("cuda" if CUDA else "cpu")


class On:
    """quant_rows and int8_gemm of an implementation on a device, for tensors of the CPU."""

    def __init__(self, module, device: torch.device = DEVICE):
        self.module, self.device = module, device

    def __str__(self):
        return f"{self.module.__name__.rsplit('.', 1)[-1]} {self.device.type}"

    def __getattr__(self, name):
        function = getattr(self.module, name)

        def on_device(*args, **kwargs):
            args, kwargs = tree_map_only(torch.Tensor, lambda t: t.to(self.device), (args, kwargs))
            return tree_map_only(torch.Tensor, torch.Tensor.cpu, function(*args, **kwargs))
        return on_device


@pytest.fixture(autouse=True, scope="session")
def interpreter_takes_bounds_known_at_run_time():
    """Triton 3.6's interpreter makes range() of arrays with one element, which numpy >= 2.4 no longer converts to a number. This is what
    Triton 3.7 does instead: its line, set beside the others that the interpreter replaces for the length of a launch."""
    if importlib.util.find_spec("triton") is None or torch.cuda.is_available() or not metadata.version("triton").startswith("3.6."):
        yield
        return
    from triton.runtime import interpreter

    original = interpreter._patch_lang_tensor

    def patched(tensor, scope):
        original(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.squeeze()))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(interpreter, "_patch_lang_tensor", patched)
        yield
