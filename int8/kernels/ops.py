"""The operations ``int8_compile::quant_rows`` and ``int8_compile::int8_gemm``, and ``int8_compile::linear``, which is both.

Two of them, so that one quantization of x can serve several weights; library ops with fakes, so that neither torch.compile
nor export breaks on them. ``Library.define`` costs 3.5 us a call where ``custom_op`` costs 6-13 (measured).
"""
from __future__ import annotations

import functools
from collections.abc import Callable
from types import ModuleType

import torch

from . import autotune, reference, seen_right, torch_mm
from .registry import KERNELS
from .with_triton import triton_unavailable

NAMESPACE = "int8_compile"
# int8_gemm takes the type of its result by name: a ScalarType that AOTInductor hands to a Python op is another one there (torch 2.11).
DTYPE_NAMES = {torch.float32: "float32", torch.float16: "float16", torch.bfloat16: "bfloat16", torch.float64: "float64"}


@functools.cache
def implementation(kernel: str, device: torch.device) -> ModuleType:
    """The module with quant_rows and int8_gemm that ``kernel`` (auto, or a name in the registry) means on device."""
    if kernel == reference.KERNEL.name:
        return reference
    return next(each for each in KERNELS if each.serves(kernel, device)).load()


def _functions(operation: str, kernel: str, device: torch.device) -> dict[str, Callable]:
    """{name: function} of what can do an operation on device: what kernel means, then torch's."""
    modules = {each.__name__.rpartition(".")[2]: each for each in (implementation(kernel, device), torch_mm)}
    return {name: getattr(module, operation) for name, module in modules.items()}


def _quant_rows(x, group, act, pre_quant_scale, kernel):
    if pre_quant_scale is not None and pre_quant_scale.numel() != (k := x.shape[1] // 2 if act == "swiglu" else x.shape[1]):
        raise ValueError(f"a pre_quant_scale of {pre_quant_scale.numel()} for {k} channels")
    return seen_right.quant_rows(kernel, _functions, x, group, act, pre_quant_scale)


def _int8_gemm(q, s, qweight, weight_scale, bias, out_dtype, kernel):
    # Kernels take addresses, and tensors come from files.
    n = qweight.shape[0]
    if not n or weight_scale.numel() not in (1, n) or (bias is not None and bias.numel() != n) or s.numel() != q.shape[0]:
        raise ValueError(f"scales {list(weight_scale.shape)} and bias {None if bias is None else list(bias.shape)} are not of a weight "
                         f"{list(qweight.shape)}, or scales {list(s.shape)} not of {list(q.shape)}")
    out_dtype = getattr(torch, out_dtype)
    if kernel == "auto" and not triton_unavailable(q.device):
        return autotune.int8_gemm(q, s, qweight, weight_scale, bias, out_dtype)
    return seen_right.int8_gemm(kernel, _functions, q, s, qweight, weight_scale, bias, out_dtype)


def float_linear(x, weight, bias, act, pre_quant_scale, kernel=""):
    """The same linear with a float weight [N, K]."""
    x = reference.activation(x, act)
    return torch.nn.functional.linear(x if pre_quant_scale is None else x * pre_quant_scale.to(x.dtype), weight, bias)


def _fake_quant_rows(x, group, act, pre_quant_scale, kernel):
    m, k = x.shape
    return x.new_empty((m, k // 2 if act == "swiglu" else k), dtype=torch.int8), x.new_empty(m, dtype=torch.float32)


def _fake_int8_gemm(q, s, qweight, weight_scale, bias, out_dtype, kernel):
    return q.new_empty((q.shape[0], qweight.shape[0]), dtype=getattr(torch, out_dtype))


def _define() -> torch.library.Library | None:
    # A sibling copy of the pack may have defined them already: an op name belongs to the process, not to a module.
    if hasattr(getattr(torch.ops, NAMESPACE), "int8_gemm"):
        return None
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    tags = (torch.Tag.pt2_compliant_tag,)
    library.define("quant_rows(Tensor x, int group, str act, Tensor? pre_quant_scale, str kernel) -> (Tensor, Tensor)", tags=tags)
    library.define("int8_gemm(Tensor q, Tensor s, Tensor qweight, Tensor weight_scale, Tensor? bias, "
                   "str out_dtype, str kernel) -> Tensor", tags=tags)
    library.impl("quant_rows", _quant_rows, "CompositeExplicitAutograd")
    library.impl("int8_gemm", _int8_gemm, "CompositeExplicitAutograd")
    library.define("linear(Tensor x, Tensor weight, Tensor? bias, str act, Tensor? pre_quant_scale, str kernel) -> Tensor", tags=tags)
    library.impl("linear", float_linear, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::linear", float_linear, lib=library)
    torch.library.register_fake(f"{NAMESPACE}::quant_rows", _fake_quant_rows, lib=library)
    torch.library.register_fake(f"{NAMESPACE}::int8_gemm", _fake_int8_gemm, lib=library)
    return library


LIBRARY = _define()
# What traced code calls for a weight that is a tensor subclass: the subclass replaces it with the two ops above.
linear = getattr(torch.ops, NAMESPACE).linear
quant_rows = getattr(torch.ops, NAMESPACE).quant_rows
int8_gemm = getattr(torch.ops, NAMESPACE).int8_gemm


def int8_linear(x: torch.Tensor, qweight: torch.Tensor, weight_scale: torch.Tensor, bias: torch.Tensor | None = None,
                group: int = 0, act: str = "none", pre_quant_scale: torch.Tensor | None = None, kernel: str = "auto") -> torch.Tensor:
    """Linear with both operands in INT8: x [..., K] float, qweight [N, K] int8, weight_scale [N, 1] or one fp32,
    bias [N] or None -> [..., N] in x's dtype. group: the ConvRot group that qweight was rotated with, 0 for none. act, pre_quant_scale:
    applied to x before; see reference.quant_rows."""
    rows = quant_rows(x.reshape(-1, x.shape[-1]), group, act, pre_quant_scale, kernel)
    return int8_linear_prequantized(x, rows, qweight, weight_scale, bias, kernel)


def int8_linear_prequantized(x: torch.Tensor, rows: tuple[torch.Tensor, torch.Tensor], qweight: torch.Tensor, weight_scale: torch.Tensor,
                   bias: torch.Tensor | None, kernel: str) -> torch.Tensor:
    """int8_linear of x whose rows quant_rows has quantized already."""
    y = int8_gemm(*rows, qweight, weight_scale, bias, DTYPE_NAMES[x.dtype], kernel)
    return y.reshape(*x.shape[:-1], qweight.shape[0])
