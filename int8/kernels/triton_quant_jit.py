"""What Triton compiles of the row quantizer: a row of x is read once, and nothing but q and s is written.

All arithmetic is fp32, but for the rotation of half-precision x: its dots take tf32 (10 bits of mantissa), which costs about 0.01 dB of a
layer's SQNR, see tests/int8/test_triton_quant.py.
"""
from __future__ import annotations

import triton
import triton.language as tl

from .reference import ACTIVATIONS

# 1.5 * 2**23: adding it rounds an fp32 in +-2**22 to the nearest even integer, in the low bits of its mantissa.
ROUND_MAGIC = tl.constexpr(12582912.0)
GELU_TANH = tl.constexpr(ACTIVATIONS.index("gelu_tanh"))
SWIGLU = tl.constexpr(ACTIVATIONS.index("swiglu"))
# What a row goes through before it is quantized, as reference.Normed has it: bits of STEPS.
STEP_BITS = tuple(1 << i for i in range(6))
MEAN, RSTD, WEIGHT, BIAS, FACTOR, SHIFT = map(tl.constexpr, STEP_BITS)
PLUS_ONE = tl.constexpr(1 << len(STEP_BITS))


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
def _smooth_and_rotated(x, smooth_ptr, h_ptr, cols, mask, SMOOTH: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
                        BLOCK: tl.constexpr):
    if SMOOTH:
        x *= tl.load(smooth_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if GROUP:
        x = _rotated(x, h_ptr, GROUP, BLOCK, PRECISION)
    return x


@triton.jit
def _prepared(row_ptr, smooth_ptr, h_ptr, start, K: tl.constexpr, ACT: tl.constexpr, SMOOTH: tl.constexpr, GROUP: tl.constexpr,
              PRECISION: tl.constexpr, PTX: tl.constexpr, BLOCK: tl.constexpr):
    """rotate(act(x) * smooth) of the columns from start, [BLOCK] fp32; 0 beyond K."""
    cols = start + tl.arange(0, BLOCK)
    mask = cols < K
    x = _activation(row_ptr, cols, mask, K, ACT, PTX)
    return _smooth_and_rotated(x, smooth_ptr, h_ptr, cols, mask, SMOOTH, GROUP, PRECISION, BLOCK)


@triton.jit
def _product(x, y, PTX: tl.constexpr):
    """x * y, rounded also where a sum follows. In fp32x2, as it is compiled for Blackwell, ptxas (12.8, sm_120) fuses the two even with
    --fmad=false."""
    if PTX:
        return tl.inline_asm_elementwise("mul.rn.f32 $0, $1, $2;", "=f,f,f", [x, y], dtype=tl.float32, is_pure=True, pack=1)
    else:
        return x * y


@triton.jit
def _normed(row_ptr, mean, rstd, weight_ptr, bias_ptr, factor_ptr, shift_ptr, smooth_ptr, h_ptr, start, K: tl.constexpr,
            STEPS: tl.constexpr, SMOOTH: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr,
            BLOCK: tl.constexpr):
    """_prepared of a row after STEPS, see reference.Normed. factor_ptr, shift_ptr: this row's."""
    cols = start + tl.arange(0, BLOCK)
    mask = cols < K
    x = tl.load(row_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if MEAN & STEPS:
        x = x - mean
    if RSTD & STEPS:
        x = _product(x, rstd, PTX)
    if WEIGHT & STEPS:
        x = _product(x, tl.load(weight_ptr + cols, mask=mask, other=0.0).to(tl.float32), PTX)
    if BIAS & STEPS:
        x = x + tl.load(bias_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    if FACTOR & STEPS:
        factor = tl.load(factor_ptr + cols, mask=mask, other=0.0).to(tl.float32)
        if PLUS_ONE & STEPS:
            factor = 1.0 + factor
        x = _product(x, factor, PTX)
    if SHIFT & STEPS:
        x = x + tl.load(shift_ptr + cols, mask=mask, other=0.0).to(tl.float32)
    x = tl.where(mask, x, 0.0)
    return _smooth_and_rotated(x, smooth_ptr, h_ptr, cols, mask, SMOOTH, GROUP, PRECISION, BLOCK)


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
    q = tl.fma(x, inverse, ROUND_MAGIC).to(tl.int32, bitcast=True)
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


@triton.jit
def _row_or_0(t_ptr, row, GIVEN: tl.constexpr):
    """t [M] at row, as fp32."""
    value = 0.0
    if GIVEN:
        value = tl.load(t_ptr + row).to(tl.float32)
    return value


@triton.jit(do_not_specialize=["factor_rows", "shift_rows"])
def norm_quant_rows_kernel(x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, factor_ptr, shift_ptr, smooth_ptr, h_ptr, q_ptr, s_ptr, stride,
                           min_scale, factor_stride, factor_rows, shift_stride, shift_rows, K: tl.constexpr, STEPS: tl.constexpr,
                           SMOOTH: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr, PTX: tl.constexpr, HEAD: tl.constexpr,
                           TAIL: tl.constexpr):
    """quant_rows_kernel after STEPS. factor_rows, shift_rows: rows of x that share a row of factor, of shift."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + row * stride
    q_row_ptr = q_ptr + row * K
    mean = _row_or_0(mean_ptr, row, MEAN & STEPS)
    rstd = _row_or_0(rstd_ptr, row, RSTD & STEPS)
    factor_ptr += (tl.program_id(0) // factor_rows).to(tl.int64) * factor_stride
    shift_ptr += (tl.program_id(0) // shift_rows).to(tl.int64) * shift_stride
    head = _normed(row_ptr, mean, rstd, weight_ptr, bias_ptr, factor_ptr, shift_ptr, smooth_ptr, h_ptr, 0, K, STEPS, SMOOTH, GROUP,
                   PRECISION, PTX, HEAD)
    largest = tl.max(_magnitude(head), 0)
    if TAIL:
        tail = _normed(row_ptr, mean, rstd, weight_ptr, bias_ptr, factor_ptr, shift_ptr, smooth_ptr, h_ptr, HEAD, K, STEPS, SMOOTH, GROUP,
                       PRECISION, PTX, TAIL)
        largest = tl.maximum(largest, tl.max(_magnitude(tail), 0))
    inverse = _row_scale(largest, s_ptr, row, min_scale)
    _store_int8(q_row_ptr, head, inverse, 0, K, PTX, HEAD)
    if TAIL:
        _store_int8(q_row_ptr, tail, inverse, HEAD, K, PTX, TAIL)


@triton.jit(do_not_specialize=["factor_rows", "shift_rows"])
def norm_quant_long_rows_kernel(x_ptr, mean_ptr, rstd_ptr, weight_ptr, bias_ptr, factor_ptr, shift_ptr, smooth_ptr, h_ptr, q_ptr, s_ptr,
                                stride, min_scale, factor_stride, factor_rows, shift_stride, shift_rows, K: tl.constexpr,
                                STEPS: tl.constexpr, SMOOTH: tl.constexpr, GROUP: tl.constexpr, PRECISION: tl.constexpr,
                                PTX: tl.constexpr, BLOCK: tl.constexpr):
    """quant_long_rows_kernel after STEPS."""
    row = tl.program_id(0).to(tl.int64)
    row_ptr = x_ptr + row * stride
    q_row_ptr = q_ptr + row * K
    mean = _row_or_0(mean_ptr, row, MEAN & STEPS)
    rstd = _row_or_0(rstd_ptr, row, RSTD & STEPS)
    factor_ptr += (tl.program_id(0) // factor_rows).to(tl.int64) * factor_stride
    shift_ptr += (tl.program_id(0) // shift_rows).to(tl.int64) * shift_stride
    largest = tl.zeros((BLOCK,), tl.int32)
    for start in range(0, K, BLOCK):
        x = _normed(row_ptr, mean, rstd, weight_ptr, bias_ptr, factor_ptr, shift_ptr, smooth_ptr, h_ptr, start, K, STEPS, SMOOTH, GROUP,
                    PRECISION, PTX, BLOCK)
        largest = tl.maximum(largest, _magnitude(x))
    inverse = _row_scale(tl.max(largest, 0), s_ptr, row, min_scale)
    for start in range(0, K, BLOCK):
        x = _normed(row_ptr, mean, rstd, weight_ptr, bias_ptr, factor_ptr, shift_ptr, smooth_ptr, h_ptr, start, K, STEPS, SMOOTH, GROUP,
                    PRECISION, PTX, BLOCK)
        _store_int8(q_row_ptr, x, inverse, start, K, PTX, BLOCK)
