"""Plain torch: the oracle of every other implementation, and the one that runs anywhere."""
from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F

from ..hadamard import rotate
from .kernel import Kernel

ACTIVATIONS = ("none", "gelu_tanh", "swiglu")
QMAX = 127.0
# An all-zero row has no scale of its own; any positive one gives q = 0.
MIN_QUANT_SCALE = 1e-30


class Normed(NamedTuple):
    """What is done to rows [M, K] before they are quantized, in fp32 and in this order; what is None is left out.

    Less mean [M], times rstd [M], times weight [K], plus bias [K], times factor [B, K] (1 + factor if plus_one), plus shift [B, K]. All
    float. B divides M: row i has factor and shift i // (M / B), as the tokens of an image have its modulation.
    """
    mean: torch.Tensor | None = None
    rstd: torch.Tensor | None = None
    weight: torch.Tensor | None = None
    bias: torch.Tensor | None = None
    factor: torch.Tensor | None = None
    shift: torch.Tensor | None = None
    plus_one: bool = False

    def of_rows(self, rows: slice | torch.Tensor, m: int) -> Normed:
        """What of it is for some of m rows; each of these then has factor and shift of its own, or all share them."""
        mean, rstd = (None if t is None else t[rows] for t in self[:2])
        factor, shift = (None if t is None else _of_rows(t, m, rows) for t in self[4:6])
        return self._replace(mean=mean, rstd=rstd, factor=factor, shift=shift)


class Added(NamedTuple):
    """What becomes of a product y [M, N], in fp32, before it is cast: residual [M, N] + gate [B, N] * y, without a gate residual + y.
    residual has the type of the result. Row i has gate i // (M / B)."""
    residual: torch.Tensor
    gate: torch.Tensor | None = None

    def of_rows(self, rows: slice | torch.Tensor, m: int) -> Added:
        """What of it is for some of m rows; each of these then has a gate of its own, or all share one."""
        return Added(self.residual[rows], None if self.gate is None else _of_rows(self.gate, m, rows))


def activation(x: torch.Tensor, act: str) -> torch.Tensor:
    """One of ACTIVATIONS of x, named as in comfy.ops.INPUT_ACT_EAGER. swiglu: [..., 2K] -> silu(first half) * second half [..., K]."""
    if act == "none":
        return x
    if act == "gelu_tanh":
        return F.gelu(x, approximate="tanh")
    if act == "swiglu":
        gate, up = x.chunk(2, dim=-1)
        return F.silu(gate) * up
    raise ValueError(f"Unknown activation '{act}'. Choose one of: {', '.join(ACTIVATIONS)}.")


def quant_rows(x: torch.Tensor, group: int = 0, act: str = "none", pre_quant_scale: torch.Tensor | None = None,
               ) -> tuple[torch.Tensor, torch.Tensor]:
    """Symmetric per-row quantization of x after activation, smoothing and rotation, in fp32.

    x [M, K] float ([M, 2K] for swiglu) -> q [M, K] int8 in -127..127, s [M] fp32, with rotate(act(x) * pre_quant_scale) ~ q * s[:, None].
    group: ConvRot group, 0 for none. pre_quant_scale: [K] or None (SmoothQuant, arXiv 2211.10438; ModelOpt's name for 1/smooth).
    """
    x = prepared(x.float(), group, act, pre_quant_scale)
    s = row_scale(x)
    return torch.round(x / s[:, None]).to(torch.int8), s


def norm_quant_rows(x: torch.Tensor, normed: Normed, group: int = 0, pre_quant_scale: torch.Tensor | None = None,
                    ) -> tuple[torch.Tensor, torch.Tensor]:
    """quant_rows of x [M, K] float after a norm and a modulation, which never lie in memory: see Normed."""
    return quant_rows(modulated(x.float(), normed), group, "none", pre_quant_scale)


def modulated(x: torch.Tensor, normed: Normed) -> torch.Tensor:
    """x [M, K] after normed, in its dtype, which is fp32 or fp64."""
    if normed.mean is not None:
        x = x - normed.mean.to(x.dtype)[:, None]
    if normed.rstd is not None:
        x = x * normed.rstd.to(x.dtype)[:, None]
    if normed.weight is not None:
        x = x * normed.weight.to(x.dtype)
    if normed.bias is not None:
        x = x + normed.bias.to(x.dtype)
    if normed.factor is not None:
        factor = normed.factor.to(x.dtype)
        x = x * _of_rows(1 + factor if normed.plus_one else factor, len(x))
    return x if normed.shift is None else x + _of_rows(normed.shift.to(x.dtype), len(x))


def _of_rows(each: torch.Tensor, m: int, rows: slice | torch.Tensor = slice(None)) -> torch.Tensor:
    """each [B, K] for some of m rows, as [rows, K] or as one that all share."""
    if len(each) in (1, m):
        return each if len(each) == 1 else each[rows]
    return each[torch.arange(m, device=each.device)[rows] // max(1, m // max(1, len(each)))]


def prepared(x: torch.Tensor, group: int, act: str, pre_quant_scale: torch.Tensor | None) -> torch.Tensor:
    """What quant_rows quantizes: x after activation, smoothing and rotation, [M, K] in x's dtype."""
    x = activation(x, act)
    if pre_quant_scale is not None:
        x = x * pre_quant_scale.to(x.dtype)
    return rotate(x, group)


def row_scale(x: torch.Tensor) -> torch.Tensor:
    """s [M] of prepared rows [M, K]."""
    return (x.abs().amax(dim=-1) / QMAX).clamp_min(MIN_QUANT_SCALE)


def int8_gemm(q: torch.Tensor, s: torch.Tensor, qweight: torch.Tensor, weight_scale: torch.Tensor,
              bias: torch.Tensor | None, out_dtype: torch.dtype, added: Added | None = None) -> torch.Tensor:
    """(q [M, K] @ qweight [N, K].T) * s [M] * weight_scale ([N, 1] or one value) + bias [N], as out_dtype [M, N]. added: see Added.

    Accumulates exactly: integers below 2**53 in float64.
    """
    acc = (q.double() @ qweight.double().t()).float()
    return epilogue(acc, s, weight_scale, bias, out_dtype, added)


def epilogue(acc: torch.Tensor, s: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None,
             out_dtype: torch.dtype, added: Added | None = None) -> torch.Tensor:
    """Scales, bias, what is added, and cast of an accumulator [M, N], in fp32."""
    y = acc.float() * s[:, None]
    y *= weight_scale.reshape(1, -1)
    if bias is not None:
        y += bias.float()
    if added is not None:
        if added.gate is not None:
            y *= _of_rows(added.gate.float(), len(y))
        y += added.residual
    return y.to(out_dtype)


KERNEL = Kernel("reference", __name__, ("cpu", "cuda"), serves=lambda name, device: True)
