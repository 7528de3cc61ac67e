"""Triton: row quantizer with the activation or a norm and a modulation, the smoothing factor and the ConvRot rotation inside.

Launches of triton_quant_jit's kernels.
"""
from __future__ import annotations

import functools
import os
from typing import NamedTuple

import torch
import triton

from ..hadamard import hadamard, made_apart
from .bound import Bound
from .reference import ACTIVATIONS, MIN_QUANT_SCALE, Normed
from .triton_quant_jit import (
    PLUS_ONE,
    STEP_BITS,
    norm_quant_long_rows_kernel,
    norm_quant_rows_kernel,
    quant_long_rows_kernel,
    quant_rows_kernel,
)

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
# After a norm a product and a sum are two roundings, as where the normed rows lie in memory: fused into one, q would be another. It costs
# an instruction a value, and the kernel waits for memory. Where there is PTX, _product sees to it as well.
EXACT = dict(enable_fp_fusion=False)
INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"  # as Triton reads it, when kernels are defined


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


def launch(k: int, group: int, precision: str, normed: bool = False) -> tuple[object, dict, int]:
    """(kernel, its block sizes, warps) for rows of k values. normed: after the steps of a norm."""
    # tl.dot takes at least 16 rows of 16; a block holds whole groups.
    smallest = 256 if group else 32
    if k > MAX_ROW[precision]:
        return norm_quant_long_rows_kernel if normed else quant_long_rows_kernel, dict(BLOCK=LONG_ROW_BLOCK), LONG_ROW_WARPS
    head = max(smallest, 1 << k.bit_length() - 1)
    tail = max(smallest, triton.next_power_of_2(k - head)) if k > head else 0
    warps = min(MAX_WARPS if k <= LONG else LONG_WARPS, triton.next_power_of_2(triton.cdiv(head + tail, VALUES_PER_WARP)))
    return norm_quant_rows_kernel if normed else quant_rows_kernel, dict(HEAD=head, TAIL=tail), warps


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


def steps(normed: Normed) -> int:
    """STEPS of norm_quant_rows_kernel."""
    return sum(bit for bit, given in zip(STEP_BITS, normed[:6]) if given is not None) + (normed.plus_one and PLUS_ONE.value)


@functools.lru_cache(4096)
def norm_quantizer(device: torch.device, dtype: torch.dtype, k: int, strides: tuple[int, int, int], group: int, given: int, dtypes: tuple,
                   precision: str, ptx: bool) -> Quantizer:
    """quantizer after a norm. strides: of rows of x, factor and shift. given: steps. dtypes: of what the steps take, and of
    pre_quant_scale."""
    kernel, blocks, warps = launch(k, group, precision, normed=True)
    constants = dict(K=k, STEPS=given, SMOOTH=dtypes[-1] is not None, GROUP=group, PRECISION=precision, PTX=ptx, num_warps=warps,
                     num_stages=STAGES, **EXACT, **blocks)
    return Quantizer(Bound(kernel, constants), k, factors(group, device) if group else None)


def _of_images(t: torch.Tensor | None, m: int) -> tuple[torch.Tensor | None, int, int]:
    """(t [B, K] with rows that are dense, from one of them to the next, how many of m rows share one)"""
    if t is None or not m:
        return t, 0, 1
    if t.stride(1) != 1:
        t = t.contiguous()
    return t, t.stride(0) if len(t) > 1 else 0, m // len(t)


def norm_quant_rows(x: torch.Tensor, normed: Normed, group: int = 0, pre_quant_scale: torch.Tensor | None = None,
                    precision: str | None = None) -> tuple[torch.Tensor, torch.Tensor]:
    """See reference.norm_quant_rows. precision: of the rotation, see rotation_precision."""
    (m, k), (stride, step), device = x.shape, x.stride(), x.device
    if step != 1:
        x, stride = x.contiguous(), k
    factor, factor_stride, factor_rows = _of_images(normed.factor, m)
    shift, shift_stride, shift_rows = _of_images(normed.shift, m)
    mean, rstd, weight, bias, smooth = (None if t is None else t.contiguous() for t in (*normed[:4], pre_quant_scale))
    given = mean, rstd, weight, bias, factor, shift, smooth
    bound, _, h = norm_quantizer(device, x.dtype, k, (stride, factor_stride, shift_stride), group, steps(normed),
                                 tuple([None if t is None else t.dtype for t in given]), precision or rotation_precision(x), takes_ptx(x))
    q = torch.empty_strided((m, k), (k, 1), dtype=torch.int8, device=device)
    s = torch.empty_strided((m,), (1,), dtype=torch.float32, device=device)
    operands = x, *(s if t is None else t for t in (*given, h)), q, s
    bound((m, 1, 1), operands, stride, MIN_QUANT_SCALE, factor_stride, factor_rows, shift_stride, shift_rows)
    return q, s
