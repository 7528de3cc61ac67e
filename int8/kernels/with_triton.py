"""Where Triton's kernels can run. Without importing Triton, which is optional."""
from __future__ import annotations

import functools
import importlib.util
import logging
from collections.abc import Callable

import torch

from .kernel import Kernel

logger = logging.getLogger(__name__)

# Triton compiles INT8 tl.dot to tensor cores from Ampere on; Turing has only torch._int_mm.
TRITON_MIN_CAPABILITY = (8, 0)


@functools.cache
def triton_unavailable(device: torch.device) -> str:
    """Why the Triton kernels cannot run on this device; empty where they can."""
    if device.type != "cuda":
        return f"the triton kernel needs a CUDA device, and this model runs on {device.type}"
    if importlib.util.find_spec("triton") is None:
        return "the triton kernel needs Triton, which is not installed (Windows: pip install triton-windows)"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < TRITON_MIN_CAPABILITY:
        return f"the triton kernel needs compute capability 8.0 or later, this GPU has {capability[0]}.{capability[1]}"
    return triton_failure(device)


def triton_failure(device: torch.device) -> str:
    """Why Triton cannot launch a kernel here (it builds its launcher with a C compiler), with one warning; empty where it can."""
    try:
        from . import triton_kernels

        triton_kernels.quant_rows(torch.zeros(1, 16, device=device))
    except Exception as error:
        cause = f"{type(error).__name__}: {error}".partition("\n")[0]
        reason = ("the triton kernel needs Triton to run, and here it fails: install a C compiler (Linux: apt install gcc) or reinstall "
                  f"Triton ({cause})")
        logger.warning("INT8: %s. Until then torch._int_mm multiplies, which is slower.", reason)
        return reason
    return ""


def candidates(q: torch.Tensor, qweight: torch.Tensor, tried: int | None) -> dict[str, Callable]:
    """Tiles, and torch._int_mm with its epilogue in one pass."""
    from . import triton_kernels

    configs = triton_kernels.candidates(q, qweight)[:tried]
    found: dict[str, Callable] = {str(config): functools.partial(triton_kernels.int8_gemm, config=config) for config in configs}
    return {**found, "torch._int_mm": triton_kernels.int_mm}


KERNEL = Kernel("triton", f"{__package__}.triton_kernels", ("cuda",), package="triton", is_option=True, refusal=triton_unavailable,
                serves=lambda name, device: name == "triton" or (name == "auto" and not triton_unavailable(device)), candidates=candidates)
