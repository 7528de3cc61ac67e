"""comfy_kitchen's CUTLASS GEMM as one more candidate for the int8 GEMM of a CUDA device.

The package's public linear quantizes x itself; this is the multiplication inside it (backends/cuda, cutlass_int8_dequant), which is not
public: it is used only where it is there and agrees with torch._int_mm.
"""
from __future__ import annotations

import functools

import torch

from . import torch_mm


@functools.cache
def why_not(device: torch.device) -> str:
    """Why it cannot be used on device (a CUDA device); empty where it can. ComfyUI turns it off for torch builds before CUDA 13."""
    try:
        import comfy_kitchen

        state = comfy_kitchen.list_backends()["cuda"]
        if not state["available"] or state["disabled"]:
            return "comfy_kitchen's cuda backend is off"
        generator = torch.Generator().manual_seed(0)
        q, qweight = (torch.randint(-127, 128, shape, dtype=torch.int8, generator=generator).to(device) for shape in ((65, 512), (96, 512)))
        s, weight_scale, bias = (torch.rand(size, generator=generator).to(device) for size in (65, (96, 1), 96))
        for dtype in (torch.bfloat16, torch.float16):
            arguments = (q, s / 512, qweight, weight_scale / 512, bias.to(dtype), dtype)
            want = torch_mm.int8_gemm(*arguments).float()
            if not torch.allclose(int8_gemm(*arguments).float(), want, rtol=2 * torch.finfo(dtype).eps, atol=1e-4):
                return "comfy_kitchen's result is another one"
    except Exception as error:  # another version of the package
        return f"comfy_kitchen: {type(error).__name__}: {error}"
    return ""


def int8_gemm(q: torch.Tensor, s: torch.Tensor, qweight: torch.Tensor, weight_scale: torch.Tensor,
              bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """See reference.int8_gemm. By torch._int_mm for a shape that CUTLASS does not take."""
    from comfy_kitchen.backends import cuda

    y = torch.empty((q.shape[0], qweight.shape[0]), dtype=out_dtype, device=q.device)
    scales = weight_scale.reshape(-1).float().expand(qweight.shape[0]).contiguous()
    bias = torch.empty(0, device=q.device) if bias is None else bias.float().contiguous()
    operands = (q.contiguous(), qweight.contiguous(), s.reshape(-1, 1).contiguous(), scales, bias, y)
    with torch.cuda.device(q.device):
        done = cuda._C.cutlass_int8_dequant(*map(cuda._wrap_for_dlpack, operands), cuda.DTYPE_TO_CODE[out_dtype],
                                            torch.cuda.current_stream(q.device).cuda_stream)
    return y if done else torch_mm.int8_gemm(q, s, qweight, weight_scale, bias, out_dtype)
