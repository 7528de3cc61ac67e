"""CPU: row blocks small enough that the int32 accumulator stays in cache; torch._int_mm (oneDNN) multiplies.

Without blocks the [M, N] int32 and fp32 temporaries and their page faults cost more than INT8 saves.
"""
from __future__ import annotations

import torch

from . import reference

BLOCK_BYTES = 8 << 20
MIN_BLOCK_ROWS = 64


def quant_rows(x: torch.Tensor, group: int = 0, act: str = "none", pre_quant_scale: torch.Tensor | None = None,
               ) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.quant_rows."""
    m, k = x.shape
    rows = max(MIN_BLOCK_ROWS, BLOCK_BYTES // (4 * k))
    if m <= rows:
        return reference.quant_rows(x, group, act, pre_quant_scale)
    q = torch.empty((m, k // 2 if act == "swiglu" else k), dtype=torch.int8)
    s = torch.empty(m, dtype=torch.float32)
    for i in range(0, m, rows):
        q[i:i + rows], s[i:i + rows] = reference.quant_rows(x[i:i + rows], group, act, pre_quant_scale)
    return q, s


def int8_gemm(q: torch.Tensor, s: torch.Tensor, qweight: torch.Tensor, weight_scale: torch.Tensor,
              bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """See reference.int8_gemm."""
    m, n = q.shape[0], qweight.shape[0]
    rows = max(MIN_BLOCK_ROWS, BLOCK_BYTES // (4 * n))
    wt = qweight.t()
    if m <= rows:
        return reference.epilogue(torch._int_mm(q, wt), s, weight_scale, bias, out_dtype)
    y = torch.empty((m, n), dtype=out_dtype)
    for i in range(0, m, rows):
        acc = torch._int_mm(q[i:i + rows], wt)
        y[i:i + rows] = reference.epilogue(acc, s[i:i + rows], weight_scale, bias, out_dtype)
    return y
