"""One INT8 linear beside the layers that it can replace or compete with, over the shapes of real models.

Every row times all contenders in turn, over and over, and takes each one's best: ratios hold on a busy machine too. Quantization of x (and
its rotation, where it says ConvRot) is in the time. Prints milliseconds (and times faster than bf16)
and, with --json, writes them.

    python benchmarks/int8_linear.py [--device cuda] [--models Flux Wan ...] [--rows 1 256 4096 ...] [--json FILE]
"""
from __future__ import annotations

import argparse
import copy
import datetime
import functools
import importlib.util
import json
import sys
import time
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.demo_report import cpu_name  # noqa: E402
from benchmarks.wrapper_overhead import load_pack  # noqa: E402

# (K, N): what an image or video token goes through in a block.
SHAPES = {
    "Flux": [(3072, 3072), (3072, 9216), (3072, 12288), (12288, 3072), (15360, 3072)],
    "Wan 14B": [(5120, 5120), (5120, 13824), (13824, 5120)],
    "Qwen-Image": [(3072, 3072), (3072, 12288), (12288, 3072)],
    "SDXL": [(640, 640), (640, 5120), (1280, 1280), (1280, 10240), (5120, 1280)],
}
ROWS = (1, 16, 64, 256, 1024, 4096)
GPU_ROWS = (*ROWS, 16384)
SECONDS = 0.5  # that a contender is timed for in the mean, at least twice


def contenders(k: int, n: int, device: torch.device, skip: set[str]) -> dict:
    """{name: function of x [M, K] bf16}; those that this machine has."""
    from int8_compile.compile.check.linear_table import kitchen_linear
    from int8_compile.int8.kernels import ops
    from int8_compile.int8.quantize import quantize_weight

    weight = torch.randn(n, k, device=device) / k ** 0.5
    bias = torch.randn(n, device=device).bfloat16()
    half, bias32 = weight.bfloat16(), bias.float()
    rowwise, scale, _ = quantize_weight(weight, rotate=False)
    rotated, rotated_scale, group = quantize_weight(weight, rotate=True)
    found = {
        "bf16": lambda x: F.linear(x, half, bias),
        "fp32": lambda x: F.linear(x.float(), weight, bias32),
        "ours": lambda x: ops.int8_linear(x, rowwise, scale, bias),
        "ours ConvRot": lambda x: ops.int8_linear(x, rotated, rotated_scale, bias, group=group),
    }
    found["ours ConvRot compiled"] = torch.compile(found["ours ConvRot"], fullgraph=True, dynamic=True)

    def naive(x):
        s = x.abs().amax(dim=1, keepdim=True).float() / 127
        q = torch.round(x / s).to(torch.int8)
        if len(q) <= 16 and x.is_cuda:  # what cuBLASLt takes
            q = F.pad(q, (0, 0, 0, 17 - len(q)))
        return (torch._int_mm(q, rowwise.t())[:len(x)] * s * scale.t() + bias).to(x.dtype)

    found["_int_mm naive"] = naive
    if importlib.util.find_spec("comfy_kitchen"):
        import comfy_kitchen

        for backend, state in comfy_kitchen.list_backends().items():
            if state["available"] and "int8_linear" in state["capabilities"]:
                found[f"comfy_kitchen {backend} ConvRot"] = functools.partial(
                    kitchen_linear, backend=backend, qweight=rotated, scale=rotated_scale, bias=bias, group=group)
    if importlib.util.find_spec("torchao"):
        from torchao.quantization import Int8DynamicActivationInt8WeightConfig, quantize_

        layer = torch.nn.Linear(k, n, device=device, dtype=torch.bfloat16)
        layer.weight.data, layer.bias.data = half.clone(), bias
        quantize_(layer, Int8DynamicActivationInt8WeightConfig())
        found["torchao"] = layer
        found["torchao compiled"] = torch.compile(copy.deepcopy(layer), dynamic=True)
    return {name: f for name, f in found.items() if name not in skip}


def best_seconds(functions: dict, synchronize) -> dict[str, float]:
    """{name: the best run}. In turn, so that what else the machine does (and what is left in its caches) meets all of them."""
    best = dict.fromkeys(functions, float("inf"))
    spent, count = 0.0, 0
    while count < 2 or (spent < SECONDS * len(functions) and count < 50):
        for name, function in functions.items():
            start = time.perf_counter()
            function()
            synchronize()
            seconds = time.perf_counter() - start
            best[name], spent = min(best[name], seconds), spent + seconds
        count += 1
    return best


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--models", nargs="*", choices=SHAPES, default=list(SHAPES))
    parser.add_argument("--rows", nargs="*", type=int)
    parser.add_argument("--skip", nargs="*", default=[], help="contenders to leave out")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    load_pack()
    torch._dynamo.config.recompile_limit = 1000  # each shape compiles anew; at the default of 8 the later ones would run uncompiled
    device = torch.device(options.device)
    synchronize = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    rows = options.rows or (GPU_ROWS if device.type == "cuda" else ROWS)
    results = []
    with torch.inference_mode():
        for k, n in dict.fromkeys(shape for model in options.models for shape in SHAPES[model]):
            functions = contenders(k, n, device, set(options.skip))
            for m in rows:
                x = torch.randn(m, k, device=device).bfloat16()
                running, failed = {}, {}
                for name, function in functions.items():
                    try:
                        function(x)
                        running[name] = functools.partial(function, x)
                    except Exception as error:  # a contender that cannot: the others go on
                        failed[name] = f"{type(error).__name__}: {error}".splitlines()[0]
                milliseconds = {name: seconds * 1e3 for name, seconds in best_seconds(running, synchronize).items()}
                results.append({"K": k, "N": n, "M": m, "milliseconds": milliseconds, "failed": failed})
                cells = [f"{name} {ms:.2f} ({milliseconds['bf16'] / ms:.2f}x)" for name, ms in milliseconds.items()]
                cells += [f"{name} failed: {why[:80]}" for name, why in failed.items()]
                print(f"K {k} N {n} M {m}: " + ", ".join(cells), flush=True)
    if options.json:
        facts = {"date": datetime.date.today().isoformat(), "torch": torch.__version__,
                 "device": cpu_name() if device.type == "cpu" else torch.cuda.get_device_name(), "threads": torch.get_num_threads()}
        options.json.parent.mkdir(parents=True, exist_ok=True)
        options.json.write_text(json.dumps({**facts, "results": results}, indent=1) + "\n")


if __name__ == "__main__":
    main()
