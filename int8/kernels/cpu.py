"""CPU: torch._int_mm (oneDNN) multiplies blocks of rows, small enough that the int32 accumulator stays in cache; native code
(cpu_native.cpp) quantizes and scales in one pass each, torch where there is no compiler. Where torch._int_mm is slow (AVX2 without VNNI:
30 to 50 times fp32's time) native code multiplies, too, or fp32, exactly.

Without blocks the [M, N] temporaries and their page faults cost more than INT8 saves.
"""
from __future__ import annotations

import ctypes
import functools
import threading
import time
from collections.abc import Callable

import torch

from . import native, reference
from .kernel import Kernel

BLOCK_BYTES = 64 << 20  # of int32; measured: less makes oneDNN reorder the weight more often, more costs pages
QUANT_BLOCK_BYTES = 8 << 20
MIN_BLOCK_ROWS = 64
# Up to here (a batch of two through a modulation) one row at a time, a product that oneDNN streams the weight through once: measured, two
# of them take 0.3 to 0.75 of the time of one with two rows, from K = 1280 on.
FEW_ROWS = 2
NATIVE, INT_MM, FP32 = "native code", "torch._int_mm", "fp32"  # what multiplies
BETTER = 2  # of int8c_has_gemm
EXACT_K = 1024  # a sum of so many products of INT8 is at most 2 ** 24, and exact in fp32 in any order
SLOW = 4.0  # times fp32's seconds
NATIVE_DTYPES = (torch.float32, torch.bfloat16)
GROUPS = (0, 16, 64, 256)
_LOCAL = threading.local()


def quant_rows(x: torch.Tensor, group: int = 0, act: str = "none", pre_quant_scale: torch.Tensor | None = None,
               ) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.quant_rows."""
    return _quant_rows(x, None, group, act, pre_quant_scale)


def norm_quant_rows(x: torch.Tensor, normed: reference.Normed, group: int = 0, pre_quant_scale: torch.Tensor | None = None,
                    ) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.norm_quant_rows."""
    return _quant_rows(x, normed, group, "none", pre_quant_scale)


def _quant_rows(x: torch.Tensor, normed: reference.Normed | None, group: int, act: str, pre_quant_scale: torch.Tensor | None,
                ) -> tuple[torch.Tensor, torch.Tensor]:
    m, k = x.shape[0], x.shape[1] // 2 if act == "swiglu" else x.shape[1]
    library = native.library()
    if library is None or group not in GROUPS:
        return _by_torch(x, normed, k, group, act, pre_quant_scale)
    q = torch.empty((m, k), dtype=torch.int8)
    s = torch.empty(m, dtype=torch.float32)
    if group and k % group:
        raise ValueError(f"a rotation group of {group} does not divide {k} channels")
    if x.dtype not in NATIVE_DTYPES or x.stride(1) != 1:
        x = x.float().contiguous()
    if pre_quant_scale is not None:
        pre_quant_scale = pre_quant_scale.to(torch.float32).contiguous()
    scale = None if pre_quant_scale is None else pre_quant_scale.data_ptr()
    steps = None if normed is None else _Steps(normed, m)
    library.int8c_quant_rows(x.data_ptr(), x.dtype == torch.bfloat16, m, k, x.stride(0), None if steps is None else steps.address, group,
                             reference.ACTIVATIONS.index(act), scale, reference.MIN_QUANT_SCALE, q.data_ptr(), s.data_ptr())
    return q, s


def _by_torch(x: torch.Tensor, normed: reference.Normed | None, k: int, group: int, act: str, pre_quant_scale: torch.Tensor | None,
              ) -> tuple[torch.Tensor, torch.Tensor]:
    m = len(x)
    q = torch.empty((m, k), dtype=torch.int8)
    s = torch.empty(m, dtype=torch.float32)
    height = max(MIN_BLOCK_ROWS, QUANT_BLOCK_BYTES // (4 * k))
    for i in range(0, m, height):
        rows = slice(i, i + height)
        block = x[rows] if normed is None else reference.modulated(x[rows].float(), normed.of_rows(rows, m))
        q[rows], s[rows] = reference.quant_rows(block, group, act, pre_quant_scale)
    return q, s


class _Steps:
    """A Normed for m rows, as native code reads it while this lives."""

    def __init__(self, normed: reference.Normed, m: int):
        tensors = [None if t is None else t.to(torch.float32) for t in normed[:6]]
        if normed.plus_one and tensors[4] is not None:
            tensors[4] = 1 + tensors[4]
        self._tensors = [None if t is None else t.contiguous() for t in tensors]
        rows = (1 if t is None else max(1, m // max(1, len(t))) for t in tensors[4:])
        self._structure = native.Normed(*(None if t is None else t.data_ptr() for t in self._tensors), *rows)
        self.address = ctypes.addressof(self._structure)


def _scratch(size: int) -> torch.Tensor:
    """int32 [size], the same memory at every call of a thread: fresh pages would cost a fifth of the multiplication."""
    if getattr(_LOCAL, "scratch", None) is None or _LOCAL.scratch.numel() < size:
        with torch.inference_mode(False):  # so that any later mode can write into it
            _LOCAL.scratch = torch.empty(size, dtype=torch.int32)
    return _LOCAL.scratch[:size]


def multiplier() -> str:
    """What multiplies INT8 here."""
    library = native.library()
    if library is not None and library.int8c_has_gemm() == BETTER:
        return NATIVE
    return FP32 if int_mm_is_slow() else INT_MM


def _int_mm(q: torch.Tensor, qweight: torch.Tensor, acc: torch.Tensor) -> None:
    """q [M, K] times qweight [N, K], into acc [M, N] in int32."""
    torch._int_mm(q, qweight.t(), out=acc)


def _fp32_mm(q: torch.Tensor, qweight: torch.Tensor, acc: torch.Tensor) -> None:
    """The same by fp32's product."""
    product = torch.empty(acc.shape, dtype=torch.float32, device=acc.device)
    for i in range(0, q.shape[1], EXACT_K):
        channels = slice(i, i + EXACT_K)
        torch.mm(q[:, channels].float(), qweight[:, channels].float().t(), out=product)  # out: autocast leaves it
        acc.copy_(product) if i == 0 else acc.add_(product.to(torch.int32))


@functools.cache
def int_mm_is_slow() -> bool:
    """Whether fp32 multiplies much faster on this CPU; a few milliseconds tell."""
    q, qweight = (torch.ones((rows, 512), dtype=torch.int8, device="cpu") for rows in (64, 512))
    acc = torch.empty((64, 512), dtype=torch.int32, device="cpu")

    def seconds(multiply: Callable) -> float:
        start = time.perf_counter()
        multiply(q, qweight, acc)
        return time.perf_counter() - start
    by_fp32, by_int_mm = (min(seconds(multiply) for _ in range(3)) for multiply in (_fp32_mm, _int_mm))
    return by_int_mm > SLOW * by_fp32


def int8_gemm(q: torch.Tensor, s: torch.Tensor, qweight: torch.Tensor, weight_scale: torch.Tensor,
              bias: torch.Tensor | None, out_dtype: torch.dtype, added: reference.Added | None = None) -> torch.Tensor:
    """See reference.int8_gemm."""
    (m, k), n = q.shape, qweight.shape[0]
    built, by = native.library(), multiplier()
    library = built if out_dtype in NATIVE_DTYPES else None
    if by == NATIVE:
        q, qweight = q.contiguous(), qweight.contiguous()
        rows = max(MIN_BLOCK_ROWS, BLOCK_BYTES // max(4 * n, 2 * k))  # it widens q to 16 bits
    else:
        rows = 1 if m <= FEW_ROWS and by == INT_MM else max(MIN_BLOCK_ROWS, BLOCK_BYTES // (4 * n))
    y = torch.empty((m, n), dtype=out_dtype)
    acc = _scratch(min(m, rows) * n).view(-1, n)
    if library:
        weight_scale = weight_scale.to(torch.float32).contiguous()
        bias = None if bias is None else bias.to(torch.float32).contiguous()
        s = s.contiguous()
        residual, gate, rows_of_gate = _dense(added, m)
    for i in range(0, m, rows):
        block = acc[:min(rows, m - i)]
        if by == NATIVE:
            built.int8c_gemm(q[i:].data_ptr(), qweight.data_ptr(), len(block), n, k, block.data_ptr())
        else:
            (_int_mm if by == INT_MM else _fp32_mm)(q[i:i + rows], qweight, block)
        if library:
            library.int8c_epilogue(block.data_ptr(), block.shape[0], n, s[i:].data_ptr(), weight_scale.data_ptr(),
                                   int(weight_scale.numel() > 1), None if bias is None else bias.data_ptr(),
                                   None if residual is None else residual[i:].data_ptr(), None if gate is None else gate.data_ptr(), i,
                                   rows_of_gate, y[i:].data_ptr(), out_dtype == torch.bfloat16)
        else:
            part = None if added is None else added.of_rows(slice(i, i + rows), m)
            y[i:i + rows] = reference.epilogue(block, s[i:i + rows], weight_scale, bias, out_dtype, part)
    return y


def _dense(added: reference.Added | None, m: int) -> tuple[torch.Tensor | None, torch.Tensor | None, int]:
    """(residual, gate in fp32, how many of m rows share a row of gate), as native code reads them."""
    if added is None:
        return None, None, 1
    if added.gate is None:
        return added.residual.contiguous(), None, 1
    return added.residual.contiguous(), added.gate.to(torch.float32).contiguous(), max(1, m // max(1, len(added.gate)))


KERNEL = Kernel("cpu", __name__, ("cpu",), serves=lambda name, device: device.type == "cpu")
