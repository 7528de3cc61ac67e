"""Triton: row quantizer with the rotation inside, and an int8 GEMM with scales, bias and cast in its epilogue.

Design and traps: W is loaded as [BN, BK] and transposed in registers, because Triton >= 3.8 spills 3 KB a thread with the
usual [BK, BN] pointer tile on sm_80/86/89. K is a constexpr: a model has few distinct K, and the loops get a fixed length.
"""
from __future__ import annotations

import torch
import triton
import triton.language as tl

from ..hadamard import hadamard
from .reference import MIN_SCALE, activation

# 1.5 * 2**23: adding it rounds an fp32 in +-2**22 to the nearest even integer, in the low bits of its mantissa.
ROUND_MAGIC = tl.constexpr(12582912.0)
GROUP_M = 8
MAX_BLOCK = 4096


@triton.jit
def _rotated(x, h_ptr, GROUP: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """x [BLOCK] fp32 in runs of GROUP, each multiplied by H. H256 = H16 (x) H16: two small dots, 8x fewer operations."""
    if GROUP == 256:
        i = tl.arange(0, 16)
        h = tl.load(h_ptr + i[:, None] * 16 + i[None, :])
        y = tl.dot(tl.reshape(x, (BLOCK // 16, 16)), h, input_precision=PRECISION)
        y = tl.permute(tl.reshape(y, (BLOCK // 256, 16, 16)), (0, 2, 1))
        y = tl.dot(tl.reshape(y, (BLOCK // 16, 16)), h, input_precision=PRECISION)
        return tl.reshape(tl.permute(tl.reshape(y, (BLOCK // 256, 16, 16)), (0, 2, 1)), (BLOCK,))
    i = tl.arange(0, GROUP)
    h = tl.load(h_ptr + i[:, None] * GROUP + i[None, :])
    return tl.reshape(tl.dot(tl.reshape(x, (BLOCK // GROUP, GROUP)), h, input_precision=PRECISION), (BLOCK,))


@triton.jit
def _load_chunk(row_ptr, h_ptr, start, K: tl.constexpr, GROUP: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    cols = start + tl.arange(0, BLOCK)
    x = tl.load(row_ptr + cols, mask=cols < K, other=0.0).to(tl.float32)
    if GROUP:
        x = _rotated(x, h_ptr, GROUP, BLOCK, PRECISION)
    return x, cols


@triton.jit
def quant_rows_kernel(x_ptr, h_ptr, q_ptr, s_ptr, stride, min_scale, K: tl.constexpr, GROUP: tl.constexpr,
                      BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """One program a row: absmax over chunks, then quantize (the second read comes from cache)."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + row * stride
    amax = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, K, BLOCK):
        x, _ = _load_chunk(row_ptr, h_ptr, start, K, GROUP, BLOCK, PRECISION)
        amax = tl.maximum(amax, tl.abs(x))
    scale = tl.maximum(tl.max(amax, 0) / 127.0, min_scale)
    tl.store(s_ptr + row, scale)
    for start in range(0, K, BLOCK):
        x, cols = _load_chunk(row_ptr, h_ptr, start, K, GROUP, BLOCK, PRECISION)
        # |x / scale| <= 127 by construction, so the low byte of the rounded value is the int8.
        q = (x / scale + ROUND_MAGIC).to(tl.int32, bitcast=True).to(tl.int8)
        tl.store(q_ptr + row * K + cols, q, mask=cols < K)


@triton.jit
def int8_gemm_kernel(q_ptr, w_ptr, s_ptr, ws_ptr, bias_ptr, y_ptr, M, N, K: tl.constexpr, SCALAR_WS: tl.constexpr,
                     HAS_BIAS: tl.constexpr, BM: tl.constexpr, BN: tl.constexpr, BK: tl.constexpr, GROUP_M: tl.constexpr):
    """y [M, N] = (q [M, K] @ w [N, K].T) * s [M] * ws [N] + bias [N]; contiguous operands, masked edges, 64-bit offsets."""
    pid = tl.program_id(0)
    grid_m = tl.cdiv(M, BM)
    grid_n = tl.cdiv(N, BN)
    # Grouped raster: programs that run together share rows of q and w in L2.
    width = GROUP_M * grid_n
    first = pid // width * GROUP_M
    rows = min(grid_m - first, GROUP_M)
    pid_m = first + pid % width % rows
    pid_n = pid % width // rows

    offs_m = pid_m * BM + tl.arange(0, BM)
    offs_n = pid_n * BN + tl.arange(0, BN)
    offs_k = tl.arange(0, BK)
    mask_m = offs_m < M
    mask_n = offs_n < N
    q_tile = q_ptr + offs_m.to(tl.int64)[:, None] * K + offs_k[None, :]
    w_tile = w_ptr + offs_n.to(tl.int64)[:, None] * K + offs_k[None, :]
    acc = tl.zeros((BM, BN), tl.int32)
    for k in range(0, K, BK):
        if K % BK == 0:
            q = tl.load(q_tile, mask=mask_m[:, None], other=0)
            w = tl.load(w_tile, mask=mask_n[:, None], other=0)
        else:
            mask_k = (k + offs_k < K)[None, :]
            q = tl.load(q_tile, mask=mask_m[:, None] & mask_k, other=0)
            w = tl.load(w_tile, mask=mask_n[:, None] & mask_k, other=0)
        acc = tl.dot(q, w.T, acc, out_dtype=tl.int32)
        q_tile += BK
        w_tile += BK

    s = tl.load(s_ptr + offs_m, mask=mask_m, other=0.0)
    if SCALAR_WS:
        y = acc.to(tl.float32) * s[:, None] * tl.load(ws_ptr)
    else:
        y = acc.to(tl.float32) * s[:, None] * tl.load(ws_ptr + offs_n, mask=mask_n, other=0.0)[None, :]
    if HAS_BIAS:
        y += tl.load(bias_ptr + offs_n, mask=mask_n, other=0.0).to(tl.float32)[None, :]
    y_tile = y_ptr + offs_m.to(tl.int64)[:, None] * N + offs_n[None, :]
    tl.store(y_tile, y.to(y_ptr.dtype.element_ty), mask=mask_m[:, None] & mask_n[None, :])


def gemm_config(m: int, k: int, n: int) -> dict:
    """Tile sizes, warps and stages for a shape; tiles that do not spill on sm_80/86/89/90 (research, 4.2)."""
    if m <= 32:
        return dict(BM=16, BN=64, BK=256, num_warps=4, num_stages=3)
    if m <= 128:
        return dict(BM=64, BN=64, BK=128, num_warps=4, num_stages=3)
    if m <= 1024:
        return dict(BM=128, BN=128, BK=64, num_warps=4, num_stages=3)
    return dict(BM=128, BN=128, BK=128, num_warps=8, num_stages=3)


def quant_rows(x: torch.Tensor, group: int = 0, act: str = "none", pre_quant_scale: torch.Tensor | None = None,
               ) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.quant_rows."""
    if act != "none" or pre_quant_scale is not None:
        x = activation(x.float(), act)
        x = x if pre_quant_scale is None else x * pre_quant_scale
    x = x if x.stride(-1) == 1 else x.contiguous()
    m, k = x.shape
    q = torch.empty((m, k), dtype=torch.int8, device=x.device)
    s = torch.empty(m, dtype=torch.float32, device=x.device)
    # tl.dot takes at least 16 rows: 16 runs of a group, or one of 256 as 16 x 16.
    block = min(MAX_BLOCK, max(triton.next_power_of_2(k), 256 if group == 256 else 16 * max(group, 16)))
    # bf16 and fp16 values are exact in tf32; fp32 activations keep full precision.
    precision = "ieee" if x.dtype == torch.float32 else "tf32"
    h = hadamard(16 if group == 256 else group, x.device) if group else s
    with torch.cuda.device_of(x):  # Triton launches on the current device
        quant_rows_kernel[(m,)](x, h, q, s, x.stride(0), MIN_SCALE, K=k, GROUP=group, BLOCK=block, PRECISION=precision, num_warps=4)
    return q, s


def int8_gemm(q: torch.Tensor, s: torch.Tensor, qweight: torch.Tensor, weight_scale: torch.Tensor,
              bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """See reference.int8_gemm."""
    q, qweight = q.contiguous(), qweight.contiguous()
    m, k = q.shape
    n = qweight.shape[0]
    y = torch.empty((m, n), dtype=out_dtype, device=q.device)
    config = gemm_config(m, k, n)
    grid = (triton.cdiv(m, config["BM"]) * triton.cdiv(n, config["BN"]),)
    with torch.cuda.device_of(q):
        int8_gemm_kernel[grid](q, qweight, s, weight_scale, s if bias is None else bias, y, m, n, K=k,
                               SCALAR_WS=weight_scale.numel() == 1, HAS_BIAS=bias is not None, GROUP_M=GROUP_M, **config)
    return y
