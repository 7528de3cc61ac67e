"""First contact: whether one INT8 layer is right, in half a minute; then what the card can do at most, and each tile beside it."""
from __future__ import annotations

import functools
import os
import shutil

import torch

from benchmarks.gpu.cards import quantizer_bytes
from benchmarks.gpu.context import Context
from benchmarks.gpu.kernels import EPSILON, interpreter_of_today
from benchmarks.gpu.timing import interleaved
from benchmarks.wrapper_overhead import load_pack

LAYERS = ((1, 3072, 18432), (17, 3072, 3072), (4608, 3072, 12288))
DRY_LAYERS = ((1, 64, 48), (17, 64, 48))
# (M, K, N): Flux's widest layer at 1024x1024 and four such images, its narrow and its long one.
GEMMS = ((4608, 3072, 12288), (16384, 3072, 12288), (4608, 3072, 3072), (4608, 15360, 3072))
DRY_GEMMS = ((32, 64, 48),)
# (M, K, rotation's group, activation)
QUANTIZERS = ((4608, 3072, 0, "none"), (4608, 3072, 256, "none"), (4608, 12288, 256, "gelu_tanh"), (4608, 15360, 256, "none"),
              (32760, 13824, 256, "gelu_tanh"))
DRY_QUANTIZERS = ((32, 256, 256, "none"),)
# An INT8 layer's own error of a normal x and weight, relative, is 0.011; a kernel that is wrong is off by 1.
LAYER_ERROR = 0.02


def run(context: Context) -> None:
    """A Linear layer as a node runs it, kernel "auto", against float64 of the quantized weight: wrong ends the suite."""
    load_pack()
    from int8_compile.int8.kernels import autotune, ops

    device = torch.device(context.device)
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        context.add(free_gb=free / 2**30, total_gb=total / 2**30, l2_mb=torch.cuda.get_device_properties(device).L2_cache_size / 2**20,
                    stack=autotune.stack(), cores=os.cpu_count(), shm_gb=shutil.disk_usage("/dev/shm").free / 2**30,
                    tools={tool: shutil.which(tool) for tool in ("git", "gcc", "g++", "nvcc", "ncu", "compute-sanitizer")})
    with interpreter_of_today(), torch.inference_mode():
        for m, k, n in DRY_LAYERS if context.dry else LAYERS:
            for dtype in (torch.bfloat16, torch.float16, torch.float32):
                context.add(M=m, K=k, N=n, dtype=str(dtype), **one_layer(ops, m, k, n, dtype, device))


def one_layer(ops, m: int, k: int, n: int, dtype: torch.dtype, device: torch.device) -> dict:
    x = torch.randn(m, k, device=device).to(dtype)
    weight = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=device)
    scale = (torch.rand(n, 1, device=device) + 0.5) / 127 / k ** 0.5
    bias = torch.randn(n, device=device).to(dtype)
    y = ops.int8_linear(x, weight, scale, bias)
    want = x.double() @ (weight.double() * scale.double()).t() + bias.double()
    error = ((y.double() - want).norm() / want.norm()).item()
    return {"error": error, "ok": error < LAYER_ERROR + EPSILON[dtype]}


def ceilings(context: Context) -> None:
    """What memory and tensor cores give at best here, by torch; then every tile, torch._int_mm and comfy_kitchen at GEMMS, in TOPS, and the
    quantizer in GB/s. Which road is worth going, not a table to ship."""
    load_pack()
    device = torch.device(context.device)
    rounds, seconds = (2, 1.0) if context.dry else (15, 4.0)
    with interpreter_of_today(), torch.inference_mode():
        if device.type == "cuda":
            context.add(**best_rates(device))
            from benchmarks.gpu.tune import compile_all

            compile_all(context)
        for m, k, n in DRY_GEMMS if context.dry else GEMMS:
            context.add(M=m, K=k, N=n, **gemm_rates(m, k, n, device, rounds, seconds))
        for m, k, group, act in DRY_QUANTIZERS if context.dry else QUANTIZERS:
            context.add(M=m, K=k, group=group, act=act, **quantizer_rate(m, k, group, act, device, rounds, seconds))


def best_rates(device: torch.device) -> dict:
    """Copying 4 GiB (bytes read and written), and 8192 cubed products in bf16 and INT8 of random data."""
    copied = copy_seconds(device)
    a, b = (torch.randn(8192, 8192, device=device).bfloat16() for _ in range(2))
    q, w = (torch.randint(-127, 128, (8192, 8192), dtype=torch.int8, device=device) for _ in range(2))
    times, failed = interleaved({"bf16": lambda: a @ b, "int8": lambda: torch._int_mm(q, w.t())}, device, 10, 2.0)
    rates = {f"{name}_tops": 2 * 8192 ** 3 / taken["median"] / 1e12 for name, taken in times.items()}
    return {"copy_gb_s": 2 * (4 << 30) / copied / 1e9, **rates, "failed": failed, "ok": not failed}


def copy_seconds(device: torch.device) -> float:
    source = torch.randint(0, 255, (4 << 30,), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return interleaved({"copy": lambda: target.copy_(source)}, device, 5, 1.0)[0]["copy"]["median"]


def gemm_rates(m: int, k: int, n: int, device: torch.device, rounds: int, seconds: float) -> dict:
    from int8_compile.int8.kernels import autotune

    q, w = (torch.randint(-127, 128, (rows, k), dtype=torch.int8, device=device) for rows in (m, n))
    arguments = (q, torch.rand(m, device=device), w, torch.rand(n, 1, device=device), torch.randn(n, device=device).bfloat16(),
                 torch.bfloat16 if device.type == "cuda" else torch.float32)
    functions = {name: functools.partial(call, *arguments) for name, call in autotune.candidates(q, w, None).items()}
    a, b = (torch.randn(rows, k, device=device).bfloat16() for rows in (m, n))
    functions["bf16"] = lambda: torch.nn.functional.linear(a, b)
    if m > 16 and device.type == "cuda":
        functions["torch._int_mm alone"] = lambda: torch._int_mm(q, w.t())
    times, failed = interleaved(functions, device, rounds, seconds)
    tops = {name: 2 * m * k * n / taken["median"] / 1e12 for name, taken in times.items()}
    return {"tops": dict(sorted(tops.items(), key=lambda item: -item[1])), "failed": failed}


def quantizer_rate(m: int, k: int, group: int, act: str, device: torch.device, rounds: int, seconds: float) -> dict:
    from int8_compile.int8.kernels import ops

    x = torch.randn(m, k, device=device).bfloat16()
    times, failed = interleaved({"auto": lambda: ops.quant_rows(x, group, act, None, "auto")}, device, rounds, seconds)
    return {"gb_s": quantizer_bytes(m, k) / times["auto"]["median"] / 1e9 if times else None, "failed": failed, "ok": not failed}
