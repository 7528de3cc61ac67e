"""What tests of several folders share: small models of blocks that repeat, how far results are apart, waiting."""
from __future__ import annotations

import time
from collections.abc import Callable

import torch


class Mlp(torch.nn.Module):
    """A block of two layers around its input, [..., width] to the same."""

    def __init__(self, width: int = 64, hidden: int = 256, ops=torch.nn, activation: Callable = torch.nn.functional.gelu,
                 bias: bool = True):
        super().__init__()
        self.up, self.down = ops.Linear(width, hidden), ops.Linear(hidden, width, bias=bias)
        self.activation = activation

    def forward(self, x, transformer_options=None):
        return x + self.down(self.activation(self.up(x)))


class Stack(torch.nn.Module):
    """Blocks one after another. block: makes one."""

    def __init__(self, block: Callable[[], torch.nn.Module] = Mlp, depth: int = 3):
        super().__init__()
        self.blocks = torch.nn.ModuleList(block() for _ in range(depth))

    def forward(self, x, *args, **kwargs):
        for block in self.blocks:
            x = block(x, *args, **kwargs)
        return x


def difference(a, b) -> float:
    """||a - b|| / ||b|| in float64, of tensors or arrays of one shape."""
    a, b = torch.as_tensor(a).double(), torch.as_tensor(b).double()
    assert a.shape == b.shape
    return ((a - b).norm() / b.norm()).item()


def wait_until(done: Callable[[], bool], seconds: float = 120, step: float = 0.05) -> None:
    end = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < end, f"it was not done within {seconds} s"
        time.sleep(step)


def wait_for_builder(cache, seconds: float = 200) -> None:
    """Until all that was ordered of cache's builder is built."""
    wait_until(lambda: cache.builder._thread is None, seconds, 0.2)
