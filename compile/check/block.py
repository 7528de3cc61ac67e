"""A transformer block uncompiled and compiled, each with float and with INT8 layers: what a step of a model gains."""
from __future__ import annotations

import copy
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import nn

from ...int8.linear import Int8Linear
from ..engine import CompiledModule
from ..options import CompileOptions
from .linear_table import Row, Shape, time_in_turn

EAGER, COMPILED, BOTH = "eager", "compiled", "INT8 + compiled"
SECONDS = 6.0  # of timing on a CPU, after the compiling; a GPU has its rounds sooner
LAYERS = ("qkv", "proj", "up", "down")


def rope(x: torch.Tensor, turns: torch.Tensor) -> torch.Tensor:
    """x [B, heads, tokens, D] turned by its tokens' positions, as Flux does it. turns: [tokens, D / 2, 2, 2] fp32."""
    pairs = x.float().unflatten(-1, (-1, 1, 2))
    return (turns[..., 0] * pairs[..., 0] + turns[..., 1] * pairs[..., 1]).flatten(-2).to(x.dtype)


class Block(nn.Module):
    """Attention and MLP, shifted, scaled and gated by the conditioning, as diffusion transformers have them."""

    def __init__(self, width: int):
        super().__init__()
        self.head = 128 if width % 128 == 0 else 64  # channels; 64 divides width
        self.qkv = nn.Linear(width, 3 * width)
        self.proj = nn.Linear(width, width)
        self.up = nn.Linear(width, 4 * width)
        self.down = nn.Linear(4 * width, width)

    def forward(self, x, conditioning, turns):
        """x [B, tokens, width], conditioning [B, 1, 6 * width], turns: see rope -> [B, tokens, width]"""
        shift1, scale1, gate1, shift2, scale2, gate2 = conditioning.chunk(6, dim=-1)
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale1) + shift1
        q, k, v = self.qkv(h).unflatten(-1, (3, -1, self.head)).permute(2, 0, 3, 1, 4)
        q, k = rope(F.rms_norm(q, q.shape[-1:]), turns), rope(F.rms_norm(k, k.shape[-1:]), turns)
        x = x + gate1 * self.proj(F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))
        h = F.layer_norm(x, x.shape[-1:]) * (1 + scale2) + shift2
        return x + gate2 * self.down(F.gelu(self.up(h), approximate="tanh"))


@torch.inference_mode()
def measure_block(device: torch.device, shape: Shape, dtype: torch.dtype, tick: Callable[[], object] = lambda: None,
                  backend: str = "inductor") -> Row:
    """Compiles twice: some ten seconds to a minute where inductor's cache is cold. tick() is called between contenders; what it raises
    ends the measuring."""
    with torch.device(device):
        block = Block(shape.k)
        x, conditioning = torch.randn(1, shape.m, shape.k, dtype=dtype), torch.randn(1, 1, 6 * shape.k, dtype=dtype) / 4
        angles = torch.rand(shape.m, block.head // 2)
        turns = torch.stack((angles.cos(), -angles.sin(), angles.sin(), angles.cos()), dim=-1).unflatten(-1, (2, 2))
    quantized = copy.deepcopy(block)
    for name in LAYERS:
        layer = block.get_submodule(name)
        setattr(quantized, name, Int8Linear.from_float(layer.weight, layer.bias.to(dtype), rotated=True))
    block.to(dtype)
    arguments = x, conditioning, turns
    functions = {EAGER: lambda: block(*arguments), "INT8": lambda: quantized(*arguments)}
    for name, module in ((COMPILED, block), (BOTH, quantized)):
        functions[name] = _compiled(module, arguments, CompileOptions(backend=backend, title="INT8 Compile Check"), device)
    row = Row(*shape)
    time_in_turn(functions, row, device, tick, SECONDS)
    return row


def _compiled(module: nn.Module, arguments: tuple, options: CompileOptions, device: torch.device) -> Callable[[], torch.Tensor]:
    compiled = CompiledModule(options, device)

    def call():
        result = compiled.run(module, lambda: module(*arguments), filter_guards=True, passthrough=lambda error: False)
        if compiled.report.failure:
            raise RuntimeError(compiled.report.failure)
        return result
    return call
