"""The operations ``int8_compile::quant_rows`` and ``int8_compile::int8_gemm``, and ``int8_compile::linear``, which is both.

Two of them, so that one quantization of x can serve several weights. Graphs may have them with what stands around them (fused_graph.py):
``int8_compile::norm_quant_rows`` and ``int8_compile::int8_gemm_added``. Library ops with fakes, so that neither torch.compile
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


def _norm_quant_rows(x, mean, rstd, weight, bias, factor, shift, plus_one, group, pre_quant_scale, kernel):
    k = x.shape[-1]
    rows = x.reshape(-1, k)
    of_rows = (None if each is None else each.reshape(len(rows)) for each in (mean, rstd))
    of_channels = (None if each is None else each.reshape(k) for each in (weight, bias))
    of_images = [None if each is None else each.reshape(-1, k) for each in (factor, shift)]
    if any(each is not None and len(rows) % max(1, len(each)) for each in of_images):
        raise ValueError(f"a modulation {[list(each.shape) for each in of_images if each is not None]} is not of rows {list(rows.shape)}")
    return seen_right.norm_quant_rows(kernel, _functions, rows, reference.Normed(*of_rows, *of_channels, *of_images, plus_one), group,
                                      pre_quant_scale)


def _int8_gemm_added(q, s, qweight, weight_scale, bias, residual, gate, out_dtype, kernel):
    n = qweight.shape[0]
    added = reference.Added(residual.reshape(q.shape[0], n), None if gate is None else gate.reshape(-1, n))
    if gate is not None and q.shape[0] % max(1, len(added.gate)):
        raise ValueError(f"a gate {list(gate.shape)} is not of {list(q.shape)}")
    return _int8_gemm(q, s, qweight, weight_scale, bias, out_dtype, kernel, added).reshape(residual.shape)


def _int8_gemm(q, s, qweight, weight_scale, bias, out_dtype, kernel, added=None):
    # Kernels take addresses, and tensors come from files.
    n = qweight.shape[0]
    if not n or weight_scale.numel() not in (1, n) or (bias is not None and bias.numel() != n) or s.numel() != q.shape[0]:
        raise ValueError(f"scales {list(weight_scale.shape)} and bias {None if bias is None else list(bias.shape)} are not of a weight "
                         f"{list(qweight.shape)}, or scales {list(s.shape)} not of {list(q.shape)}")
    out_dtype = getattr(torch, out_dtype)
    if kernel == "auto" and not triton_unavailable(q.device):
        return autotune.int8_gemm(q, s, qweight, weight_scale, bias, out_dtype, added)
    return seen_right.int8_gemm(kernel, _functions, q, s, qweight, weight_scale, bias, out_dtype, added)


def float_linear(x, weight, bias, act, pre_quant_scale, kernel=""):
    """The same linear with a float weight [N, K]."""
    x = reference.activation(x, act)
    return torch.nn.functional.linear(x if pre_quant_scale is None else x * pre_quant_scale.to(x.dtype), weight, bias)


def _fake_quant_rows(x, group, act, pre_quant_scale, kernel):
    m, k = x.shape
    return x.new_empty((m, k // 2 if act == "swiglu" else k), dtype=torch.int8), x.new_empty(m, dtype=torch.float32)


def _fake_int8_gemm(q, s, qweight, weight_scale, bias, out_dtype, kernel):
    return q.new_empty((q.shape[0], qweight.shape[0]), dtype=getattr(torch, out_dtype))


def _fake_norm_quant_rows(x, mean, rstd, weight, bias, factor, shift, plus_one, group, pre_quant_scale, kernel):
    return _fake_quant_rows(x.reshape(-1, x.shape[-1]), group, "none", pre_quant_scale, kernel)


def _fake_int8_gemm_added(q, s, qweight, weight_scale, bias, residual, gate, out_dtype, kernel):
    return q.new_empty(residual.shape, dtype=getattr(torch, out_dtype))


def _define() -> torch.library.Library:
    library = torch.library.Library(NAMESPACE, "FRAGMENT")

    def define(name: str, signature: str, implementation: Callable, fake: Callable) -> None:
        # A sibling copy of the pack may have defined it already: an op name belongs to the process, not to a module.
        if hasattr(getattr(torch.ops, NAMESPACE), name):
            return
        library.define(name + signature, tags=(torch.Tag.pt2_compliant_tag,))
        library.impl(name, implementation, "CompositeExplicitAutograd")
        torch.library.register_fake(f"{NAMESPACE}::{name}", fake, lib=library)

    define("quant_rows", "(Tensor x, int group, str act, Tensor? pre_quant_scale, str kernel) -> (Tensor, Tensor)", _quant_rows,
           _fake_quant_rows)
    define("norm_quant_rows", "(Tensor x, Tensor? mean, Tensor? rstd, Tensor? weight, Tensor? bias, Tensor? factor, Tensor? shift, "
           "bool plus_one, int group, Tensor? pre_quant_scale, str kernel) -> (Tensor, Tensor)", _norm_quant_rows, _fake_norm_quant_rows)
    define("int8_gemm", "(Tensor q, Tensor s, Tensor qweight, Tensor weight_scale, Tensor? bias, str out_dtype, str kernel) -> Tensor",
           _int8_gemm, _fake_int8_gemm)
    define("int8_gemm_added", "(Tensor q, Tensor s, Tensor qweight, Tensor weight_scale, Tensor? bias, Tensor residual, Tensor? gate, "
           "str out_dtype, str kernel) -> Tensor", _int8_gemm_added, _fake_int8_gemm_added)
    define("linear", "(Tensor x, Tensor weight, Tensor? bias, str act, Tensor? pre_quant_scale, str kernel) -> Tensor", float_linear,
           float_linear)
    return library


LIBRARY = _define()
# What traced code calls for a weight that is a tensor subclass: the subclass replaces it with the two ops above.
linear = getattr(torch.ops, NAMESPACE).linear
quant_rows = getattr(torch.ops, NAMESPACE).quant_rows
int8_gemm = getattr(torch.ops, NAMESPACE).int8_gemm
norm_quant_rows = getattr(torch.ops, NAMESPACE).norm_quant_rows
int8_gemm_added = getattr(torch.ops, NAMESPACE).int8_gemm_added


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
