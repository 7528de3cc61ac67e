"""Plain torch: the oracle of every other implementation, and the one that runs anywhere."""
from __future__ import annotations

import torch
import torch.nn.functional as F

from ..hadamard import rotate
from .kernel import Kernel

ACTIVATIONS = ("none", "gelu_tanh", "swiglu")
QMAX = 127.0
# An all-zero row has no scale of its own; any positive one gives q = 0.
MIN_QUANT_SCALE = 1e-30


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


KERNEL = Kernel("reference", __name__, ("cpu", "cuda"), serves=lambda name, device: True)
