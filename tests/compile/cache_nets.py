"""Models of blocks for tests of artifacts; importable, since the builder process needs their classes."""
from __future__ import annotations

import torch


def strength():
    return 1.0


class Block(torch.nn.Module):
    """Reads a flag of transformer_options that its caller sets, as LTXV's blocks do, and a layer's list of functions, as ComfyUI's do."""

    def __init__(self, width: int):
        super().__init__()
        self.first = torch.nn.Linear(width, 2 * width)
        self.second = torch.nn.Linear(2 * width, width)
        self.patches = []

    def forward(self, x, scale, transformer_options=None):
        options = transformer_options or {}
        h = self.second(torch.nn.functional.silu(self.first(x))) * scale[:, None] * strength()
        for patch in self.patches:
            h = patch(h)
        if options.get("double"):
            h = h * 2
        x += h
        return x


class Net(torch.nn.Module):
    def __init__(self, width: int = 32, depth: int = 3):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(width) for _ in range(depth)])

    def forward(self, x, scale, **options):
        x = x.clone()
        for index, block in enumerate(self.blocks):
            x = block(x, scale, transformer_options={"block_index": index, **options})
        return x


class Hidden(torch.nn.Module):
    """Its blocks hold what no other process can be told."""

    def __init__(self):
        super().__init__()
        self.blocks = torch.nn.ModuleList([Block(32) for _ in range(2)])
        for block in self.blocks:
            block.patches = [lambda h: h * 3]

    def forward(self, x, scale):
        x = x.clone()
        for block in self.blocks:
            x = block(x, scale)
        return x


def make(kind=Net, **arguments):
    torch.manual_seed(0)
    return kind(**arguments).eval().requires_grad_(False)
