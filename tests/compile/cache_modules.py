"""Modules whose methods tests cache; importable, since other processes run them too."""
from __future__ import annotations

import torch

FACTOR = 2.0


def scaled(x):
    return x * FACTOR


class Attention(torch.nn.Module):
    """[batch, tokens, 32] -> the same; decode also writes into a cache that is passed in."""

    def __init__(self, width: int = 32, gain: float = 1.0):
        super().__init__()
        self.qkv = torch.nn.Linear(width, 3 * width)
        self.out = torch.nn.Linear(width, width)
        self.register_buffer("shift", torch.full((width,), 0.5))
        self.gain = gain

    def forward(self, x):
        q, k, v = self.qkv(x).chunk(3, -1)
        return self._finish(torch.nn.functional.scaled_dot_product_attention(q, k, v))

    def decode(self, x, cache):
        cache += x
        return self._finish(cache), cache

    def _finish(self, x):
        return scaled(self.out(x) + self.shift) * self.gain


def make(width: int = 32, dtype: torch.dtype = torch.float32, gain: float = 1.0, seed: int = 0) -> Attention:
    torch.manual_seed(seed)
    return Attention(width, gain).to(dtype).eval().requires_grad_(False)
