"""CUDA without Triton: torch._int_mm (cuBLASLt), padded to the shapes it takes."""
from __future__ import annotations

import torch
import torch.nn.functional as F

from . import reference

quant_rows = reference.quant_rows
# cuBLASLt's INT8 path takes more than 16 rows, and K and N in multiples of 8.
MIN_ROWS = 17
ALIGN = 8


def int8_gemm(q: torch.Tensor, s: torch.Tensor, qweight: torch.Tensor, weight_scale: torch.Tensor,
              bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """See reference.int8_gemm."""
    m, k = q.shape
    n = qweight.shape[0]
    pad_k, pad_n = -k % ALIGN, -n % ALIGN
    q = F.pad(q, (0, pad_k, 0, max(0, MIN_ROWS - m)))
    qweight = F.pad(qweight, (0, pad_k, 0, pad_n)) if pad_k or pad_n else qweight
    acc = torch._int_mm(q, qweight.t())[:m, :n]
    return reference.epilogue(acc, s, weight_scale, bias, out_dtype)
