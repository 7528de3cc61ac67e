"""Triton: row quantizer with the activation, the smoothing factor and the ConvRot rotation inside.

x is read once and nothing but q and s is written. All arithmetic is fp32, but for the rotation of half-precision x: its dots take tf32
(10 bits of mantissa), which costs about 0.01 dB of a layer's SQNR, see tests/int8/test_triton_quant.py.
"""
from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..hadamard import hadamard, made_apart
from .bound import Bound
from .reference import ACTIVATIONS, MIN_QUANT_SCALE

# 1.5 * 2**23: adding it rounds an fp32 in +-2**22 to the nearest even integer, in the low bits of its mantissa.
ROUND_MAGIC = tl.constexpr(12582912.0)
GELU_TANH = tl.constexpr(ACTIVATIONS.index("gelu_tanh"))
SWIGLU = tl.constexpr(ACTIVATIONS.index("swiglu"))
# Rows up to this long stay in registers; longer ones are read twice, the second time from cache. None spills on sm_80 to sm_120 with
# Triton 3.6 to 3.9 (tests/int8/test_triton_compiles.py).
MAX_ROW = {"tf32": 24576, "tf32x3": 8192, "ieee": 8192}
VALUES_PER_WARP = 1024
# An H100 reads and writes half as much again with 8 warps a row as with 16 (K 12288 to 15360): two programs have room on an SM. Longer rows
# would spill.
MAX_WARPS, LONG, LONG_WARPS = 8, 15360, 16
LONG_ROW_BLOCK, LONG_ROW_WARPS = 2048, 8
# Loads that run ahead would wait in shared memory, up to 100 KB of it; other programs of the SM hide them as well.
STAGES = 1
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton reads it, when kernels are defined


@triton.jit
def _reciprocal(x, PTX: tl.constexpr):
    """1 / x of a value that is at least 1, or inf. PTX (takes_ptx): by the special function unit alone, to within an ulp; Triton's division
    takes up to 17 % of a quantizer's instructions more, for what is out of that range."""
    if PTX:
        return tl.inline_asm_elementwise("rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return 1.0 / x


@triton.jit
def _activation(row_ptr, cols, mask, K: tl.constexpr, ACT: tl.constexpr, PTX: tl.constexpr):
    """act(x) at cols in fp32; see reference.activation. exp overflows to inf only where the result is 0."""
    x = tl.load(row_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if ACT == GELU_TANH:
        # x / 2 * (1 + tanh(u)) = x * sigmoid(2 u)
        x = x * _reciprocal(1.0 + tl.exp(-1.5957691216057308 * x * (1.0 + 0.044715 * x * x)), PTX)
    if ACT == SWIGLU:
        up = tl.load(row_ptr + K + cols, mask=mask, other=0.0).to(tl.float32)
        x = x * _reciprocal(1.0 + tl.exp(-x), PTX) * up
    return x


@triton.jit
def _dot(x, h, PRECISION: tl.constexpr):
    """x @ h; h is exact in tf32, x is rounded to it if that is the precision."""
    if PRECISION == "tf32":
        # To the nearest, by cancelling the low 13 bits. Tensor cores would cut them off and shrink all values: 0.17 dB where SQNR is 48.7.
        x = (x + x * 8192.0) - x * 8192.0
    return tl.dot(x, h, input_precision=PRECISION)


@triton.jit
def _rotated(x, h_ptr, GROUP: tl.constexpr, BLOCK: tl.constexpr, PRECISION: tl.constexpr):
    """x [BLOCK] fp32 in runs of GROUP, each multiplied by H, see factors: at most 32 products a value, where H itself would take GROUP."""
    ROWS: tl.constexpr = BLOCK // 16
    OUTER: tl.constexpr = GROUP // 16
    i = tl.arange(0, 16)
    square = i[:, None] * 16 + i[None, :]
    y = _dot(tl.reshape(x, (ROWS, 16)), tl.load(h_ptr + square), PRECISION)
    if OUTER > 1:
        y = tl.permute(tl.reshape(y, (BLOCK // GROUP, OUTER, 16)), (0, 2, 1))
        y = _dot(tl.reshape(y, (ROWS, 16)), tl.load(h_ptr + 256 + square), PRECISION)
        y = tl.permute(tl.reshape(y, (BLOCK // GROUP, 16, OUTER)), (0, 2, 1))
    return tl.reshape(y, (BLOCK,))


@triton.jit
def _prepared(row_ptr, smooth_ptr, h_ptr, start, K: tl.constexpr, ACT: tl.constexpr, SMOOTH: tl.constexpr, GROUP: tl.constexpr,
              PRECISION: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr):
    """rotate(act(x) * smooth) of the columns from start, [BLOCK] fp32; 0 beyond K."""
    cols = start + tl.arange(0, BLOCK)
    mask = cols < K
    x = _activation(row_ptr, cols, mask, K, ACT, PTX)
    if SMOOTH:
        x *= tl.load(smooth_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if GROUP:
        x = _rotated(x, h_ptr, GROUP, BLOCK, PRECISION)
    return x


@triton.jit
def _magnitude(x):
    """|x| as the bits of its fp32: they order as the values do, and NaN comes out above all."""
    return tl.abs(x).to(tl.int32, bitcast=True)


@triton.jit
def _row_scale(largest, s_ptr, row, min_scale):
    """Stores the scale of a row with this largest _magnitude; returns what x is multiplied with."""
    scale = largest.to(tl.float32, bitcast=True) / 127.0
    scale = tl.where(scale < min_scale, min_scale, scale)
    tl.store(s_ptr + row, scale)
    return 1.0 / scale


@triton.jit
def _store_int8(q_row_ptr, x, inverse, start, K: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr):
    cols = start + tl.arange(0, BLOCK)
    # |x * inverse| rounds to at most 127, so the low byte of the rounded value is the int8.
    q = (x * inverse + ROUND_MAGIC).to(tl.int32, bitcast=True)
    if PTX and K % 16:
        # Of bytes that go through shared memory, as those of odd rows do, ptxas (12.8) converts the fp32 to 255 instead (K = 255).
        q = tl.inline_asm_elementwise("prmt.b32 $0, $1, 0, 0x7770;", "=r,r", [q], dtype=tl.int32, is_pure=True, pack=1)
    q = q.to(tl.int8)
    tl.store(q_row_ptr + cols, q, mask=cols < K)


@triton.jit
def quant_rows_kernel(x_ptr, smooth_ptr, h_ptr, q_ptr, s_ptr, stride, min_scale, K: tl.constexpr, ACT: tl.constexpr,
                      SMOOTH: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr, HEAD: tl.constexpr,
                      TAIL: tl.constexpr):
    """One program a row, which stays in registers as HEAD and TAIL values (TAIL may be 0): 3072 = 2048 + 1024 wastes nothing."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + row * stride
    q_row_ptr = q_ptr + row * K
    head = _prepared(row_ptr, smooth_ptr, h_ptr, 0, K, ACT, SMOOTH, GROUP, PRECISION, PTX, HEAD)
    largest = tl.max(_magnitude(head), 0)
    if TAIL:
        tail = _prepared(row_ptr, smooth_ptr, h_ptr, HEAD, K, ACT, SMOOTH, GROUP, PRECISION, PTX, TAIL)
        largest = tl.maximum(largest, tl.max(_magnitude(tail), 0))
    inverse = _row_scale(largest, s_ptr, row, min_scale)
    _store_int8(q_row_ptr, head, inverse, 0, K, PTX, HEAD)
    if TAIL:
        _store_int8(q_row_ptr, tail, inverse, HEAD, K, PTX, TAIL)


@triton.jit
def quant_long_rows_kernel(x_ptr, smooth_ptr, h_ptr, q_ptr, s_ptr, stride, min_scale, K: tl.constexpr, ACT: tl.constexpr,
                           SMOOTH: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr,
                           BLOCK: tl.constexpr):
    """One program a row of any length: absmax over blocks, then all over again to quantize."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + row * stride
    q_row_ptr = q_ptr + row * K
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, K, BLOCK):
        x = _prepared(row_ptr, smooth_ptr, h_ptr, start, K, ACT, SMOOTH, GROUP, PRECISION, PTX, BLOCK)
        largest = tl.maximum(largest, _magnitude(x))
    inverse = _row_scale(tl.max(largest, 0), s_ptr, row, min_scale)
    for start in range(0, K, BLOCK):
        x = _prepared(row_ptr, smooth_ptr, h_ptr, start, K, ACT, SMOOTH, GROUP, PRECISION, PTX, BLOCK)
        _store_int8(q_row_ptr, x, inverse, start, K, PTX, BLOCK)


@functools.cache
def factors(group: int, device: torch.device) -> torch.Tensor:
    """[2, 16, 16] fp32: what a run of group = outer * 16 values is multiplied with along its inner, then along its outer index, as
    H = H_outer (x) H16. The outer product takes 16 / outer columns at once: with H16 for 256, diag(H4, H4, H4, H4) for 64."""
    outer = group // 16

    def make():
        cpu = torch.device("cpu")
        second = torch.kron(torch.eye(16 // outer), hadamard(outer, cpu)) if outer > 1 else torch.eye(16)
        return torch.stack((hadamard(16, cpu), second))
    return made_apart(make, device)


def launch(k: int, group: int, precision: str) -> tuple[object, dict, int]:
    """(kernel, its block sizes, warps) for rows of k values."""
    # tl.dot takes at least 16 rows of 16; a block holds whole groups.
    smallest = 256 if group else 32
    if k > MAX_ROW[precision]:
        return quant_long_rows_kernel, dict(BLOCK=LONG_ROW_BLOCK), LONG_ROW_WARPS
    head = max(smallest, 1 << k.bit_length() - 1)
    tail = max(smallest, triton.next_power_of_2(k - head)) if k > head else 0
    warps = min(MAX_WARPS if k <= LONG else LONG_WARPS, triton.next_power_of_2(triton.cdiv(head + tail, VALUES_PER_WARP)))
    return quant_rows_kernel, dict(HEAD=head, TAIL=tail), warps


def rotation_precision(x: torch.Tensor) -> str:
    """What the dots of the rotation take: tf32 for half-precision x, else three of them that make an fp32."""
    if torch.version.hip:
        return "ieee"
    return "tf32" if x.is_cuda and x.dtype in (torch.bfloat16, torch.float16) else "tf32x3"


def takes_ptx(x: torch.Tensor) -> bool:
    """Whether kernels may have PTX in them: on an NVIDIA card, not in the interpreter."""
    return x.is_cuda and torch.version.hip is None and not INTERPRETED


class Quantizer(NamedTuple):
    """k: values of a row of q. factors: of the rotation, None without."""
    bound: Bound
    k: int
    factors: torch.Tensor | None


@functools.lru_cache(4096)
def quantizer(device: torch.device, dtype: torch.dtype, width: int, stride: int, group: int, act: str, smooth: torch.dtype | None,
              precision: str, ptx: bool) -> Quantizer:
    """What Triton compiles apart, for x of this dtype, width and stride of rows. smooth: the dtype of pre_quant_scale."""
    if act not in ACTIVATIONS:
        raise ValueError(f"Unknown activation '{act}'. Choose one of: {', '.join(ACTIVATIONS)}.")
    k = width // 2 if act == "swiglu" else width
    kernel, blocks, warps = launch(k, group, precision)
    constants = dict(K=k, ACT=ACTIVATIONS.index(act), SMOOTH=smooth is not None, GROUP=group, PRECISION=precision, PTX=ptx,
                     num_warps=warps, num_stages=STAGES, **blocks)
    return Quantizer(Bound(kernel, constants), k, factors(group, device) if group else None)


def quant_rows(x: torch.Tensor, group: int = 0, act: str = "none", pre_quant_scale: torch.Tensor | None = None,
               precision: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.quant_rows. precision: of the rotation, see rotation_precision."""
    (m, width), (stride, step), device = x.shape, x.stride(), x.device
    if step != 1:
        x, stride = x.contiguous(), width
    bound, k, h = quantizer(device, x.dtype, width, stride, group, act, None if pre_quant_scale is None else pre_quant_scale.dtype,
                            precision or rotation_precision(x), takes_ptx(x))
    q = torch.empty_strided((m, k), (k, 1), dtype=torch.int8, device=device)
    s = torch.empty_strided((m,), (1,), dtype=torch.float32, device=device)
    smooth = s if pre_quant_scale is None else pre_quant_scale.contiguous()
    bound((m, 1, 1), (x, smooth, s if h is None else h, q, s), stride, MIN_QUANT_SCALE)
    return q, s
