"""A Linear layer beside all that can replace it, each part by itself, and the floor that bytes and operations set.

Rows: the whole layer (x in bf16 to y in bf16, quantization included) for every contender; the quantizer alone in GB/s; the GEMM alone in
TOPS. expected_ratio is bf16's floor over ours: what INT8 would gain if both ran at the card's rates.
"""
from __future__ import annotations

import functools
import math

import torch

from benchmarks.gpu.cards import CARDS, floors, quantizer_bytes
from benchmarks.gpu.context import Context
from benchmarks.gpu.kernels import interpreter_of_today
from benchmarks.gpu.timing import interleaved
from benchmarks.int8_linear import SHAPES, contenders
from benchmarks.wrapper_overhead import load_pack

# Tokens of Flux at 1024x1024 with its text, of one at 512x512, of a short video; a prompt's; the modulation's.
ROWS = (4608, 1536, 16384, 512, 1)
# Compiled by inductor, or tuned by Triton, anew for each shape: minutes.
SKIP = {"fp32", "ours ConvRot compiled", "torchao compiled"}
SKIP_ON_GPU = {"comfy_kitchen triton ConvRot", "comfy_kitchen eager ConvRot"}


def run(context: Context) -> None:
    load_pack()
    device = torch.device(context.device)
    card = CARDS.get(torch.cuda.get_device_name(device)) if device.type == "cuda" else None
    shapes = {"tiny": [(256, 128)]} if context.dry else SHAPES
    if device.type == "cuda":
        from int8_compile.int8.kernels import autotune

        autotune.choices().budget = math.inf  # each shape by its fastest kernel, as after the step tune
    seen = set()
    with interpreter_of_today(), torch.inference_mode():
        for m in (32,) if context.dry else ROWS:
            for model, layers in shapes.items():
                for k, n in layers:
                    if (m, k, n) in seen:
                        continue
                    seen.add((m, k, n))
                    if context.left() < 15:
                        context.add(model=model, M=m, K=k, N=n, skipped="no time left")
                        continue
                    context.add(model=model, M=m, K=k, N=n, **layer(m, k, n, device, card, context.dry))


def layer(m: int, k: int, n: int, device: torch.device, card, dry: bool) -> dict:
    x = torch.randn(m, k, device=device).bfloat16()
    skip = SKIP | SKIP_ON_GPU if device.type == "cuda" else SKIP
    whole = {name: functools.partial(function, x) for name, function in {**contenders(k, n, device, skip), **fp8(k, n, device)}.items()}
    rounds, seconds = (2, 1.0) if dry else (30, 1.5)
    times, failed = interleaved({**whole, **parts(x, n)}, device, rounds, seconds)
    median = {name: taken["median"] for name, taken in times.items()}
    row = {"milliseconds": {name: value * 1e3 for name, value in median.items() if name in whole},
           "ratio_to_bf16": {name: median["bf16"] / value for name, value in median.items() if name in whole},
           "quantizer_gb_s": {name: quantizer_bytes(m, k) / value / 1e9 for name, value in median.items() if name.startswith("quantize")},
           "gemm_tops": {name: 2 * m * k * n / value / 1e12 for name, value in median.items() if name.startswith("gemm")},
           "bf16_tflops": 2 * m * k * n / median["bf16"] / 1e12, "failed": failed,
           "ok": not any("ours" in name for name in failed)}
    if card:
        floor = floors(card, m, k, n)
        row |= {"floor_milliseconds": {name: value * 1e3 for name, value in floor.items() if name != "expected_ratio"},
                "expected_ratio": floor["expected_ratio"]}
    return row


def parts(x: torch.Tensor, n: int) -> dict:
    """Ours, apart: the quantizer plain and rotated; the chosen GEMM, the one predicted fastest, torch._int_mm without and with epilogue."""
    from int8_compile.int8.kernels import autotune, ops, torch_mm

    k = x.shape[1]
    q, s = ops.quant_rows(x, 0, "none", None, "auto")
    w = torch.randint(-127, 128, (n, k), dtype=torch.int8, device=x.device)
    arguments = q, s, w, torch.rand(n, 1, device=x.device), torch.randn(n, device=x.device).bfloat16(), torch.bfloat16
    found = {"quantize": lambda: ops.quant_rows(x, 0, "none", None, "auto"),
             "quantize gelu": lambda: ops.quant_rows(x, 0, "gelu_tanh", None, "auto")}
    if k % 256 == 0:
        found["quantize ConvRot"] = lambda: ops.quant_rows(x, 256, "none", None, "auto")
    found["gemm ours"] = lambda: ops.int8_gemm(*arguments[:5], "bfloat16", "auto")
    if x.is_cuda:
        names = list(autotune.candidates(q, w))
        found[f"gemm heuristic {names[0]}"] = functools.partial(autotune.candidates(q, w)[names[0]], *arguments)
    found["gemm torch._int_mm"] = lambda: torch_mm.int8_gemm(*arguments)
    if x.is_cuda:
        from int8_compile.int8.kernels import triton_kernels

        found["gemm torch._int_mm fused"] = lambda: triton_kernels.int_mm(*arguments)
    if len(q) > 16 and n % 8 == 0 and k % 8 == 0:
        found["gemm torch._int_mm alone"] = lambda: torch._int_mm(q, w.t())
    return found


def fp8(k: int, n: int, device: torch.device) -> dict:
    """torch._scaled_mm: as ComfyUI uses it (one scale, x cast as it is), and with a scale for each row, as accurate inference does."""
    from int8_compile.compile.check.linear_table import FP8_MAX, fp8_linear, has_fp8

    if not has_fp8(device):
        return {}
    weight = torch.randn(n, k, device=device) / k ** 0.5
    bias = torch.randn(n, device=device).bfloat16()
    scale = (weight.abs().amax(1, keepdim=True) / FP8_MAX).float()
    scaled = (weight / scale).to(torch.float8_e4m3fn).t()

    def rowwise(x):
        s = (x.abs().amax(1, keepdim=True) / FP8_MAX).float().clamp_min(1e-12)
        q = (x / s).to(torch.float8_e4m3fn)
        return torch._scaled_mm(q, scaled, scale_a=s, scale_b=scale.t(), bias=bias, out_dtype=torch.bfloat16)
    return {"fp8": fp8_linear(weight, bias), "fp8 rows": rowwise}
