"""What one call of an INT8 operation costs the CPU, on a machine without a GPU: Triton compiles for sm_90 and launches, and the CUDA driver
under it does nothing (gpu/no_driver.c).

    python benchmarks/launch_cost.py [--before FOLDER] [--json FILE]

by_triton: each kernel launched by Triton itself, kernel[grid](...), in the same code. --before: a checkout of another commit, measured in
turns with this one. Times are of this process alone (time.process_time); ratios are what to look at.
"""
from __future__ import annotations

import argparse
import datetime
import importlib.util
import json
import os
import subprocess
import sys
import time
import timeit
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(ROOT))
M, K, N, GROUP = 512, 3072, 3072, 256
CALLS, REPEATS, ROUNDS = 500, 7, 3
TILES = {"GEMM, TMA": ("tma", 64, 128, 128, 4, 4), "GEMM, Gluon": ("gluon", 64, 128, 128, 4, 4),
         "GEMM, pointers": ("pointer", 64, 128, 128, 4, 3), "GEMM, pointers, split": ("pointer", 64, 128, 128, 4, 3, 4)}


def load_pack(root: Path) -> None:
    spec = importlib.util.spec_from_file_location("int8_compile", root / "__init__.py", submodule_search_locations=[str(root)])
    sys.modules["int8_compile"] = importlib.util.module_from_spec(spec)  # not executed: the kernels need nothing of it


def measured(root: Path) -> dict[str, dict[str, float]]:
    """{"bound" or "by_triton": {operation: microseconds}} of the pack in root; one without bound launches has none."""
    load_pack(root)
    import torch

    from benchmarks.gpu.no_driver import Driver

    driver = Driver()
    from int8_compile.int8.kernels import autotune, gluon_gemm, ops, triton_gemm, triton_kernels, triton_quant
    from int8_compile.int8.kernels.triton_configs import GemmConfig

    triton_gemm.card = gluon_gemm.card = lambda device: (90, 132)
    ops.implementation, ops.triton_unavailable = lambda kernel, device: triton_kernels, lambda device: ""
    torch.Tensor.is_cuda = True  # what the pack asks of its operands, which are the CPU's
    triton_quant.takes_ptx, autotune.is_captured = lambda x: True, lambda q: False
    autotune.waiting.busy = lambda: True
    torch.cuda.get_device_name = lambda device=None: "no card"
    x = torch.zeros(M, K, dtype=torch.bfloat16)
    qweight, scale, bias = torch.zeros(N, K, dtype=torch.int8), torch.ones(N, 1), torch.zeros(N, dtype=torch.bfloat16)
    q, s = triton_quant.quant_rows(x, GROUP)

    def gemm(tile):
        config = GemmConfig(*tile)
        return lambda: triton_gemm.int8_gemm(q, s, qweight, scale, bias, x.dtype, config)
    calls = {"quantizer": lambda: triton_quant.quant_rows(x, GROUP), **{name: gemm(tile) for name, tile in TILES.items()},
             "whole int8_linear": lambda: ops.int8_linear(x, qweight, scale, bias, GROUP)}

    def times() -> dict[str, float]:
        found = {}
        for name, call in calls.items():
            before = driver.launches()
            call()
            call()
            assert driver.launches() > before, f"{name} launches nothing"
            found[name] = round(min(timeit.repeat(call, timer=time.process_time, number=CALLS, repeat=REPEATS)) / CALLS * 1e6, 2)
        return found
    with torch.inference_mode():
        if importlib.util.find_spec("int8_compile.int8.kernels.bound") is None:
            return {"by_triton": times()}
        from int8_compile.int8.kernels import bound

        found, watched = {"bound": times()}, bound.is_watched
        bound.is_watched = lambda kernel: True
        found["by_triton"] = times()
        bound.is_watched = watched
    return found


def in_a_process(root: Path) -> dict[str, dict[str, float]]:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"} | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, __file__, "--of", str(root)], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return json.loads(done.stdout.splitlines()[-1])


def best(rounds: list[dict[str, float]]) -> dict[str, float]:
    return {name: min(each[name] for each in rounds) for name in rounds[0]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--before", type=Path)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--of", type=Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.of:
        print(json.dumps(measured(arguments.of)))
        return
    now, before = [], []
    for _ in range(ROUNDS):
        now.append(in_a_process(ROOT))
        if arguments.before:
            before.append(in_a_process(arguments.before.absolute())["by_triton"])
    bound, by_triton = best([each["bound"] for each in now]), best([each["by_triton"] for each in now])
    older = best(before) if before else {}
    rows = {name: {"us": us, "by_triton_us": by_triton[name], "ratio": round(us / by_triton[name], 3),
                   **({"before_us": older[name], "ratio_to_before": round(us / older[name], 3)} if older else {})}
            for name, us in bound.items()}
    for name, row in rows.items():
        print(f"{name:24s}", "  ".join(f"{key} {value}" for key, value in row.items()))
    if arguments.json:
        import torch
        import triton

        from benchmarks.demo_report import cpu_name

        result = {"date": str(datetime.date.today()), "cpu": cpu_name(), "torch": torch.__version__, "triton": triton.__version__,
                  "shape": {"M": M, "K": K, "N": N, "group": GROUP}, "calls": rows}
        arguments.json.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
