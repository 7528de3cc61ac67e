"""Plain torch: the oracle of every other implementation, and the one that runs anywhere."""
from __future__ import annotations

import torch

from ..hadamard import rotate

QMAX = 127.0
# An all-zero row has no scale of its own; any positive one gives q = 0.
MIN_SCALE = 1e-30


def quant_rows(x: torch.Tensor, group: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric per-row quantization, in fp32.

    x [M, K] float -> q [M, K] int8 in -127..127, s [M] fp32, with x ~ q * s[:, None]. group: ConvRot group, 0 for none.
    """
    x = rotate(x.float(), group)
    s = (x.abs().amax(dim=-1) / QMAX).clamp_min(MIN_SCALE)
    return torch.round(x / s[:, None]).to(torch.int8), s


def int8_gemm(q: torch.Tensor, s: torch.Tensor, qweight: torch.Tensor, weight_scale: torch.Tensor,
              bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """(q [M, K] @ qweight [N, K].T) * s [M] * weight_scale ([N, 1] or one value) + bias [N], as out_dtype [M, N].

    Accumulates exactly: integers below 2**53 in float64.
    """
    acc = (q.double() @ qweight.double().t()).float()
    return epilogue(acc, s, weight_scale, bias, out_dtype)


def epilogue(acc: torch.Tensor, s: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None,
             out_dtype: torch.dtype) -> torch.Tensor:
    """Scales, bias and cast of an accumulator [M, N], in fp32."""
    y = acc.float() * s[:, None]
    y *= weight_scale.reshape(1, -1)
    if bias is not None:
        y += bias.float()
    return y.to(out_dtype)
