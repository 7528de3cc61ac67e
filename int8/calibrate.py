"""What a model's Linear layers are fed, seen while it runs. Works on any nn.Module."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

import torch

# Rows of a layer's input that are kept of each call, and in all: enough to tell 0.1 dB.
ROWS_PER_CALL = 64
MAX_ROWS = 256


@dataclass
class LayerStats:
    """The inputs of one layer [tokens, K]. amax: largest magnitude of each channel, [K] fp32. rows: some of the inputs, on the CPU.
    tokens: rows of the largest call."""

    amax: torch.Tensor
    rows: list[torch.Tensor] = field(default_factory=list)
    tokens: int = 0

    def add(self, x: torch.Tensor):
        self.amax = torch.maximum(self.amax, x.abs().amax(dim=0).float())
        self.tokens = max(self.tokens, x.shape[0])
        if sum(r.shape[0] for r in self.rows) < MAX_ROWS:
            picked = torch.linspace(0, x.shape[0] - 1, min(ROWS_PER_CALL, x.shape[0]), device=x.device).long()
            self.rows.append(x[picked].cpu())

    def sample(self) -> torch.Tensor:
        """[rows, K], in the dtype of the model's activations."""
        return torch.cat(self.rows)


@contextlib.contextmanager
def collect(layers: Mapping[str, torch.nn.Module]) -> Iterator[dict[str, LayerStats]]:
    """While it is open, records what the Linear layers are called with: {name: LayerStats} of those that were."""
    stats: dict[str, LayerStats] = {}

    def watch(name):
        def hook(layer, args):
            x = args[0].detach().reshape(-1, args[0].shape[-1])
            if name not in stats:
                stats[name] = LayerStats(torch.zeros(x.shape[-1], device=x.device))
            stats[name].add(x)
        return hook

    handles = [layer.register_forward_pre_hook(watch(name)) for name, layer in layers.items()]
    try:
        yield stats
    finally:
        for handle in handles:
            handle.remove()
