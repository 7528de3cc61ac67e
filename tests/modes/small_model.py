"""A model with blocks that repeat, and what is typical for it."""
from __future__ import annotations

import torch


class Block(torch.nn.Module):
    def __init__(self, width=64, hidden=256):
        super().__init__()
        self.up = torch.nn.Linear(width, hidden)
        self.down = torch.nn.Linear(hidden, width, bias=False)

    def forward(self, x):
        return x + self.down(torch.relu(self.up(x)))


class Model(torch.nn.Module):
    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = torch.nn.Linear(8, 64)
        self.blocks = torch.nn.ModuleList(Block() for _ in range(3))
        self.norm = torch.nn.BatchNorm1d(64)  # buffers, and another forward in training

    def forward(self, x):
        x = self.first(x)
        for block in self.blocks:
            x = block(x)
        return self.norm(x)


def typical() -> torch.Tensor:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    x[:, 3] *= 30  # an outlier channel
    return x


def forward_loop(model):
    model(typical())
