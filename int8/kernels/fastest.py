"""The int8 GEMM of a CUDA device, of all that can run there: our tiles, torch._int_mm and comfy_kitchen's, whichever measured fastest
for the shape."""
from __future__ import annotations

import ctypes
import functools
import os
from collections.abc import Callable

import torch

from . import kitchen, tables, torch_mm
from .native import cache_folder
from .tuning import Choices, bucket, wall_seconds

# What was chosen in this process, by device, shape, dtype and alignment: a lookup a call.
_CHOSEN: dict[tuple, Callable] = {}
# Tiles that are measured where no table ships, the ones predicted fastest: each takes Triton a second or two to compile while somebody
# waits for an image. All of them are for benchmarks/gpu_suite.py.
TRIED = 5
RUNS = 7
FLUSH = 2  # times the L2 cache's size that is written between two runs: a layer finds neither its weight nor its input there
HEAD_START = 200_000  # cycles that the GPU waits before a run, while the CPU launches it: 0.1 ms


@functools.cache
def choices() -> Choices:
    return Choices(cache_folder() / "choices.json", tables.load())


@functools.cache
def card(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else device.type


@functools.cache
def stack() -> str:
    """What decides, beside the card, which candidate is fast: Triton compiles ours, CUDA's library and the driver have torch._int_mm."""
    import triton  # optional; absent, ops does not come here

    toolkit = f"HIP {torch.version.hip}" if torch.version.hip else f"CUDA {torch.version.cuda}"
    return f"triton {triton.__version__}, {toolkit}, driver {driver_version()}"


def driver_version() -> int:
    """The CUDA version that NVIDIA's driver is for, its major part (13 for driver 580); 0 where there is none or it does not say. No torch
    from 2.8 to 2.15 tells it, so the driver itself is asked."""
    version = ctypes.c_int(0)
    try:
        driver = ctypes.WinDLL("nvcuda.dll") if os.name == "nt" else ctypes.CDLL("libcuda.so.1")
        driver.cuDriverGetVersion(ctypes.byref(version))  # needs no context; leaves 0 where it fails
    except (OSError, AttributeError):
        return 0
    return version.value // 1000


def shape_key(q: torch.Tensor, qweight: torch.Tensor, out_dtype: torch.dtype) -> str:
    from . import triton_kernels

    aligned = "" if triton_kernels.takes_tma(q, qweight) else ", unaligned"
    return f"{out_dtype} | K {q.shape[1]} N {qweight.shape[0]} M {bucket(q.shape[0])}{aligned}"


def candidates(q: torch.Tensor, qweight: torch.Tensor, tried: int | None = TRIED) -> dict[str, Callable]:
    """{name: int8_gemm} of what can run these operands, the one predicted fastest first. tried: how many tiles, None for all."""
    from . import triton_kernels

    configs = triton_kernels.candidates(q, qweight)[:tried]
    found = {str(config): functools.partial(triton_kernels.int8_gemm, config=config) for config in configs}
    found["torch._int_mm"] = torch_mm.int8_gemm
    if q.is_cuda and not torch.cuda.is_current_stream_capturing() and not kitchen.why_not(q.device):
        found["comfy_kitchen"] = kitchen.int8_gemm
    return found


def int8_gemm(q: torch.Tensor, s: torch.Tensor, qweight: torch.Tensor, weight_scale: torch.Tensor,
              bias: torch.Tensor | None, out_dtype: torch.dtype) -> torch.Tensor:
    """See reference.int8_gemm. The first call with a shape measures, see tuning.Choices; all candidates give the same result."""
    m, k = q.shape
    if not m:  # nothing to measure with
        return q.new_empty((0, qweight.shape[0]), dtype=out_dtype)
    arguments = (q, s, qweight, weight_scale, bias, out_dtype)
    # TMA reads 16 bytes at a time: a weight at another address (a slice of a streaming buffer) needs another kernel.
    key = (q.device, bucket(m), k, qweight.shape[0], out_dtype, bias is None, (q.data_ptr() | qweight.data_ptr()) % 16 == 0)
    chosen = _CHOSEN.get(key)
    if chosen is None:
        known = tables.key(card(q.device), stack(), shape_key(q, qweight, out_dtype))
        found = candidates(q, qweight, None if choices().get(known) else TRIED)
        if torch.cuda.is_current_stream_capturing():  # nothing can be timed inside a CUDA graph
            return found.get(choices().get(known), next(iter(found.values())))(*arguments)
        chosen = _CHOSEN[key] = found[choose(choices(), known, found, arguments)]
    return chosen(*arguments)


def choose(choices: Choices, key: str, found: dict[str, Callable], arguments: tuple,
           seconds: Callable[[Callable], float] | None = None) -> str:
    """The name of the fastest of found for arguments of int8_gemm, as choices know it, else measured with seconds(call)."""
    calls = {name: functools.partial(candidate, *arguments) for name, candidate in found.items()}
    return choices.choose(key, calls, seconds or timer(arguments[0].device))


def timer(device: torch.device) -> Callable[[Callable], float]:
    """seconds(call) on device: the best run. On a GPU by its own clock, with nothing in its L2 cache, as a layer of a model finds it."""
    if device.type != "cuda":
        return lambda call: wall_seconds(call, lambda: None)

    def seconds(call: Callable) -> float:
        with torch.cuda.device(device):
            flush = torch.empty(FLUSH * torch.cuda.get_device_properties(device).L2_cache_size, dtype=torch.int8, device=device)
            call()  # compiles
            events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(RUNS)]
            for start, end in events:
                flush.zero_()
                torch.cuda._sleep(HEAD_START)
                start.record()
                call()
                end.record()
            torch.cuda.synchronize(device)
        return min(start.elapsed_time(end) for start, end in events) / 1e3
    return seconds
