"""Where the kernels run: on a GPU where there is one, else in Triton's interpreter, with the numpy that is installed."""
from __future__ import annotations

import importlib.util

import pytest
import torch
from torch.utils._pytree import tree_map_only

from benchmarks.gpu.kernels import interpreter_of_today

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
    if importlib.util.find_spec("triton") is None:
        yield
        return
    with interpreter_of_today():
        yield
