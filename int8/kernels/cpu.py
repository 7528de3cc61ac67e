"""CPU: torch._int_mm (oneDNN) multiplies blocks of rows, small enough that the int32 accumulator stays in cache; native code
(cpu_native.cpp) quantizes and scales in one pass each, torch where there is no compiler.

Without blocks the [M, N] temporaries and their page faults cost more than INT8 saves.
"""
from __future__ import annotations

import threading

import torch

from . import native, reference
from .kernel import Kernel

BLOCK_BYTES = 64 << 20  # of int32; measured: less makes oneDNN reorder the weight more often, more costs pages
QUANT_BLOCK_BYTES = 8 << 20
MIN_BLOCK_ROWS = 64
# Up to here (a batch of two through a modulation) one row at a time, a product that oneDNN streams the weight through once: measured, two
# of them take 0.3 to 0.75 of the time of one with two rows, from K = 1280 on.
FEW_ROWS = 2
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
GROUPS = (0, 16, 64, 256)
_LOCAL = threading.local()


def quant_rows(x: torch.Tensor, group: int = 0, act: str = "none", pre_quant_scale: torch.Tensor | None = None,
               ) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.quant_rows."""
    m, k = x.shape[0], x.shape[1] // 2 if act == "swiglu" else x.shape[1]
    q = torch.empty((m, k), dtype=torch.int8)
    s = torch.empty(m, dtype=torch.float32)
    library = native.library()
    if library is None or group not in GROUPS:
        rows = max(MIN_BLOCK_ROWS, QUANT_BLOCK_BYTES // (4 * k))
        for i in range(0, m, rows):
            q[i:i + rows], s[i:i + rows] = reference.quant_rows(x[i:i + rows], group, act, pre_quant_scale)
        return q, s
    if group and k % group:
        raise ValueError(f"a rotation group of {group} does not divide {k} channels")
    if x.dtype not in NATIVE_DTYPES or x.stride(1) != 1:
        x = x.float().contiguous()
    if pre_quant_scale is not None:
        pre_quant_scale = pre_quant_scale.to(torch.float32).contiguous()
    scale = None if pre_quant_scale is None else pre_quant_scale.data_ptr()
    library.int8c_quant_rows(x.data_ptr(), x.dtype == torch.bfloat16, m, k, x.stride(0), group, reference.ACTIVATIONS.index(act), scale,
                             reference.MIN_QUANT_SCALE, q.data_ptr(), s.data_ptr())
    return q, s


def _scratch(size: int) -> torch.Tensor:
    """int32 [size], the same memory at every call of a thread: fresh pages would cost a fifth of the multiplication."""
    if getattr(_LOCAL, "scratch", None) is None or _LOCAL.scratch.numel() < size:
        with torch.inference_mode(False):  # so that any later mode can write into it
            _LOCAL.scratch = torch.empty(size, dtype=torch.int32)
    return _LOCAL.scratch[:size]


def int8_gemm(q: torch.Tensor, s: torch.Tensor, qweight: torch.Tensor, weight_scale: torch.Tensor,
              bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """See reference.int8_gemm."""
    m, n = q.shape[0], qweight.shape[0]
    rows = 1 if m <= FEW_ROWS else max(MIN_BLOCK_ROWS, BLOCK_BYTES // (4 * n))
    wt = qweight.t()
    y = torch.empty((m, n), dtype=out_dtype)
    acc = _scratch(min(m, rows) * n).view(-1, n)
    library = native.library() if out_dtype in NATIVE_DTYPES else None
    if library:
        weight_scale = weight_scale.to(torch.float32).contiguous()
        bias = None if bias is None else bias.to(torch.float32).contiguous()
        s = s.contiguous()
    for i in range(0, m, rows):
        block = torch._int_mm(q[i:i + rows], wt, out=acc[:min(rows, m - i)])
        if library:
            library.int8c_epilogue(block.data_ptr(), block.shape[0], n, s[i:].data_ptr(), weight_scale.data_ptr(),
                                   int(weight_scale.numel() > 1), None if bias is None else bias.data_ptr(), y[i:].data_ptr(),
                                   out_dtype == torch.bfloat16)
        else:
            y[i:i + rows] = reference.epilogue(block, s[i:i + rows], weight_scale, bias, out_dtype)
    return y


KERNEL = Kernel("cpu", __name__, ("cpu",), serves=lambda name, device: device.type == "cpu")
