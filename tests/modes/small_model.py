"""A model with blocks that repeat, and what is typical for it."""
from __future__ import annotations

import functools

import torch
from toys import Mlp, Stack


class Model(Stack):
    def __init__(self, seed=0):
        torch.manual_seed(seed)
        super().__init__(functools.partial(Mlp, activation=torch.relu, bias=False))
        self.first = torch.nn.Linear(8, 64)
        self.norm = torch.nn.BatchNorm1d(64)  # buffers, and another forward in training

    def forward(self, x):
        return self.norm(super().forward(self.first(x)))


def typical() -> torch.Tensor:
    x = torch.randn(16, 8, generator=torch.Generator().manual_seed(1))
    x[:, 3] *= 30  # an outlier channel
    return x


def forward_loop(model):
    model(typical())
