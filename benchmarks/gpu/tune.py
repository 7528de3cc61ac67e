"""Measures every candidate for every shape of real models, and writes the table that ships for this card."""
from __future__ import annotations

import argparse
import datetime
import math
import os
import subprocess
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).absolute().parent.parent.parent))

from benchmarks.gpu.context import Context
from benchmarks.gpu.kernels import interpreter_of_today
from benchmarks.int8_linear import SHAPES
from benchmarks.wrapper_overhead import load_pack

# What a block's modulation has, besides the layers that tokens go through: (K, N), rows 1 to 16.
MODULATIONS = ((3072, 18432), (3072, 9216))
DRY_SHAPES, DRY_ROWS = ((64, 48),), (16,)


def run(context: Context) -> None:
    load_pack()
    from int8_compile.int8.kernels import autotune, tables, tuning

    device = torch.device(context.device)
    card = autotune.card(device) if device.type == "cuda" else "Test Card"
    shapes = DRY_SHAPES if context.dry else tuple(dict.fromkeys((*(s for group in SHAPES.values() for s in group), *MODULATIONS)))
    if device.type == "cuda":
        compile_all(context)
    found, facts = {}, {"date": datetime.date.today().isoformat(), "torch": torch.__version__}
    # The buckets that images and videos fall into first: with little time the rest stays to the user's machine.
    buckets = DRY_ROWS if context.dry else sorted(tuning.BUCKETS, key=lambda m: abs(math.log2(m / 4096)))
    with interpreter_of_today(), torch.inference_mode():
        for m in buckets:
            for k, n in shapes:
                if context.left() < 10:
                    break
                if (k, n) in MODULATIONS and m > 16:
                    continue
                dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
                row = tune(autotune, tables, tuning, card, (m, k, n), dtype, device, found)
                context.add(**row)
            path = tables.save(context.tables, card, autotune.stack(), facts, found)
    loaded = tables.load(context.tables)
    context.add(table=path.name, entries=len(found), stack=autotune.stack(), choices=found,
                ok=all(loaded[tables.key(card, autotune.stack(), shape)] == name for shape, name in found.items()))


def compile_all(context: Context) -> None:
    """Every tile, unsplit and split, for K that fits its steps, into Triton's cache: Triton compiles on one core, so a process for each."""
    shares = os.cpu_count() or 1
    running = [subprocess.Popen([sys.executable, __file__, str(share), str(shares)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                                text=True) for share in range(shares)]
    failed = []
    for process in running:
        try:
            output, _ = process.communicate(timeout=max(5.0, context.left()))
        except subprocess.TimeoutExpired:
            process.kill()
            output, _ = process.communicate()
        failed += [output[-600:]] * (process.returncode != 0)
    context.add(compiled_by=shares, failed=failed)


def compile_share(share: int, shares: int) -> None:
    from int8_compile.int8.kernels import triton_configs, triton_gemm

    device = torch.device("cuda")
    arch = triton_gemm.card(device)[0]
    found = [config._replace(split_k=split) for config in triton_configs.tiles(arch) for split in (1, *triton_configs.SPLITS[1:])
             if split == 1 or config.kernel != "gluon"]
    k, n, m = 6144, 3072, 64
    for config in found[share::shares]:
        q, w = (torch.ones((rows, k), dtype=torch.int8, device=device) for rows in (m, n))
        try:
            triton_gemm.int8_gemm(q, torch.ones(m, device=device), w, torch.ones(n, 1, device=device),
                                  torch.ones(n, device=device).bfloat16(), torch.bfloat16, config)
            torch.cuda.synchronize()
        except Exception as error:
            print(f"{config}: {type(error).__name__}: {error}"[:300])


def tune(autotune, tables, tuning, card, shape, dtype, device, found: dict) -> dict:
    """Adds the choice for a shape to found: -> what it measured."""
    m, k, n = shape
    q, w = (torch.randint(-127, 128, (rows, k), dtype=torch.int8, device=device) for rows in (m, n))
    arguments = (q, torch.rand(m, device=device), w, torch.rand(n, 1, device=device), torch.randn(n, device=device).to(dtype), dtype)
    candidates = autotune.candidates(q, w, None)
    names, taken, seconds = iter(candidates), {}, autotune.timer(device)

    def measured(call):
        name = next(names)
        taken[name] = float("nan")
        taken[name] = seconds(call)
        return taken[name]
    key = autotune.shape_key(q, w, dtype)
    best = found[key] = autotune.choose(tuning.Choices(None, budget=math.inf), tables.key(card, autotune.stack(), key), candidates,
                                        arguments, measured)
    first = next(iter(candidates))
    return {"M": m, "K": k, "N": n, "chosen": best, "tops": 2 * m * k * n / taken[best] / 1e12, "heuristic": first,
            "gain_over_heuristic": taken[first] / taken[best], "int_mm_ratio": taken["torch._int_mm"] / taken[best],
            "failed": [name for name, value in taken.items() if value != value],
            "milliseconds": {name: round(value * 1e3, 5) for name, value in sorted(taken.items(), key=lambda item: item[1])}}


if __name__ == "__main__":
    parser = argparse.ArgumentParser()
    parser.add_argument("share", type=int)
    parser.add_argument("shares", type=int)
    options = parser.parse_args()
    load_pack()
    compile_share(options.share, options.shares)
