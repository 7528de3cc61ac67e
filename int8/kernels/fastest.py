"""The int8 GEMM of a CUDA device, of all that can run there: our tiles and torch._int_mm, whichever measured fastest for the shape."""
from __future__ import annotations

import functools
from collections.abc import Callable

import torch

from . import torch_mm
from .native import cache_folder
from .tuning import Choices, bucket, wall_seconds

# What was chosen in this process, by device, shape and dtype: a lookup a call.
_CHOSEN: dict[tuple, Callable] = {}


@functools.cache
def choices() -> Choices:
    return Choices(cache_folder() / "choices.json")


def int8_gemm(q: torch.Tensor, s: torch.Tensor, qweight: torch.Tensor, weight_scale: torch.Tensor,
              bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """See reference.int8_gemm. The first call with a shape measures, see tuning.Choices; all candidates give the same result."""
    m, k = q.shape
    key = (q.device, bucket(m), k, qweight.shape[0], out_dtype, bias is None)
    chosen = _CHOSEN.get(key)
    if chosen is None:
        chosen = _CHOSEN[key] = _choose(q, s, qweight, weight_scale, bias, out_dtype)
    return chosen(q, s, qweight, weight_scale, bias, out_dtype)


def _choose(q, s, qweight, weight_scale, bias, out_dtype) -> Callable:
    import triton  # optional; absent, ops does not come here

    from . import triton_kernels

    candidates = {str(config): functools.partial(triton_kernels.int8_gemm, config=config)
                  for config in triton_kernels.candidates(q, qweight)}
    if torch.cuda.is_current_stream_capturing():
        return next(iter(candidates.values()))  # nothing can be timed inside a CUDA graph
    candidates["torch._int_mm"] = torch_mm.int8_gemm
    name = torch.cuda.get_device_name(q.device)
    key = f"{name} | triton {triton.__version__} | {out_dtype} | K {q.shape[1]} N {qweight.shape[0]} M {bucket(q.shape[0])}"
    arguments = (q, s, qweight, weight_scale, bias, out_dtype)
    best = choices().choose(key, {n: functools.partial(c, *arguments) for n, c in candidates.items()},
                            lambda candidate: wall_seconds(candidate, lambda: torch.cuda.synchronize(q.device)))
    return candidates[best]
