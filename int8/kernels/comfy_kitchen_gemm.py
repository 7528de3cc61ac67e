"""comfy_kitchen's CUTLASS GEMM as one more candidate for the int8 GEMM of a CUDA device.

The package's public linear quantizes x itself; this is the multiplication inside it (backends/cuda, cutlass_int8_dequant), which is not
public: it is used only where it is there and agrees with torch._int_mm.
"""
from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from . import torch_mm
from .kernel import Kernel
from .reference import Added

POINTER_ALIGNMENT = 16  # bytes
# M, K, N of the check. The first is a multiple of all that CUTLASS aligns to: it says that it has computed it, or is not used.
CHECK = ((256, 512, 256), (65, 512, 96))


@functools.cache
def why_not(device: torch.device) -> str:
    """Why it cannot be used on device (a CUDA device); empty where it can. ComfyUI turns it off for torch builds before CUDA 13."""
    try:
        import comfy_kitchen

        state = comfy_kitchen.list_backends()["cuda"]
        if not state["available"] or state["disabled"]:
            return "comfy_kitchen's cuda backend is off"
    except Exception as error:  # another version of the package
        return f"comfy_kitchen: {type(error).__name__}: {error}"
    _, reason = bias_in_fp32(device)
    return reason


@functools.cache
def bias_in_fp32(device: torch.device) -> tuple[bool, str]:
    """(whether the bias is handed over in fp32, as 0.2.31 takes it, or in the output's type, as 0.2.40 does; why neither is right)"""
    reason = ""
    for fp32 in (True, False):
        try:
            reason = _differs(device, fp32)
        except Exception as error:
            reason = f"comfy_kitchen: {type(error).__name__}: {error}"
        if not reason:
            return fp32, ""
    return True, reason


def _differs(device: torch.device, fp32: bool) -> str:
    """How its results differ from torch._int_mm's; empty if they do not."""
    generator = torch.Generator().manual_seed(0)
    for m, k, n in CHECK:
        q, qweight = (torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator).to(device) for shape in ((m, k), (n, k)))
        s, weight_scale, bias = (torch.rand(size, generator=generator).to(device) for size in (m, (n, 1), n))
        for dtype in (torch.bfloat16, torch.float16):
            for with_bias in (True, False):
                # Followed by as much again: a kernel that takes it for a longer type reads that.
                rounded = torch.cat((bias, bias)).to(dtype)[:n]
                arguments = (q, s / k, qweight, weight_scale / k, rounded if with_bias else None, dtype)
                y = _multiply(*arguments, fp32)
                if y is None and (m, k, n) == CHECK[0]:
                    return "comfy_kitchen's CUTLASS takes none of our shapes"
                if y is not None and not torch.allclose(y.float(), torch_mm.int8_gemm(*arguments).float(),
                                                        rtol=2 * torch.finfo(dtype).eps, atol=1e-4):
                    return "comfy_kitchen's result is another one"
    return ""


def int8_gemm(q: torch.Tensor, s: torch.Tensor, qweight: torch.Tensor, weight_scale: torch.Tensor,
              bias: torch.Tensor | None, out_dtype: torch.dtype, added: Added | None = None) -> torch.Tensor:
    """See reference.int8_gemm. By torch._int_mm for a shape that CUTLASS does not take."""
    y = _multiply(q, s, qweight, weight_scale, bias, out_dtype, bias_in_fp32(q.device)[0])
    if y is None:
        return torch_mm.int8_gemm(q, s, qweight, weight_scale, bias, out_dtype, added)
    return y if added is None else torch_mm.add(y, added)


def _multiply(q, s, qweight, weight_scale, bias, out_dtype, fp32: bool) -> torch.Tensor | None:
    """int8_gemm with its bias in fp32 or in out_dtype; None for a shape that CUTLASS does not take."""
    from comfy_kitchen.backends import cuda

    y = torch.empty((q.shape[0], qweight.shape[0]), dtype=out_dtype, device=q.device)
    scales = weight_scale.reshape(-1).float().expand(qweight.shape[0])
    bias = torch.empty(0, dtype=out_dtype, device=q.device) if bias is None else bias.to(torch.float32 if fp32 else out_dtype)
    # Vectors are read of all of them.
    operands = (*map(_dense, (q, qweight, s.float().reshape(-1, 1), scales, bias)), y)
    with torch.cuda.device(q.device):
        done = cuda._C.cutlass_int8_dequant(*map(cuda._wrap_for_dlpack, operands), cuda.DTYPE_TO_CODE[out_dtype],
                                            torch.cuda.current_stream(q.device).cuda_stream)
    return y if done else None


def _dense(t: torch.Tensor) -> torch.Tensor:
    return t if t.is_contiguous() and t.data_ptr() % POINTER_ALIGNMENT == 0 else t.clone(memory_format=torch.contiguous_format)


def candidates(q: torch.Tensor, qweight: torch.Tensor, tried: int | None) -> dict[str, Callable]:
    return {"comfy_kitchen": int8_gemm} if q.is_cuda and not why_not(q.device) else {}


# Who chooses it has ComfyUI's own layers multiply: see compile/comfyui/int8_layer.py.
KERNEL = Kernel("comfy_kitchen", __name__, ("cuda",), package="comfy_kitchen", is_option=True, candidates=candidates, in_cuda_graphs=False)
