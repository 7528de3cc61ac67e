"""What is known of an implementation of the two operations without importing it."""
from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from dataclasses import dataclass
from types import ModuleType

import torch


@dataclass(frozen=True)
class Kernel:
    """An implementation of quant_rows and int8_gemm, as reference.py has them.

    name: what options, tables and reports call it. module: the one with the functions, imported when it is first used. devices: types of
    those that it runs on. package: what has to be installed. is_option: whether users choose it by its name. serves: whether it runs what
    is asked for by a name on a device; of several the first in the registry. refusal: why it cannot run on a device, for who chose it;
    empty where it can. candidates: {name: int8_gemm} of what it adds for autotune to choose from on a GPU, the one predicted fastest
    first, from (q, qweight, how many are tried, None for all); each takes added=. in_cuda_graphs: whether these run while one is
    captured.
    """

    name: str
    module: str
    devices: tuple[str, ...]
    package: str = ""
    is_option: bool = False
    serves: Callable[[str, torch.device], bool] = lambda name, device: False
    refusal: Callable[[torch.device], str] = lambda device: ""
    candidates: Callable[[torch.Tensor, torch.Tensor, int | None], dict[str, Callable]] = lambda q, qweight, tried: {}
    in_cuda_graphs: bool = True

    def load(self) -> ModuleType:
        return sys.modules.get(self.module) or importlib.import_module(self.module)
