"""Ahead-of-time compile of the Triton kernels, no GPU needed: right instruction, no spill, shared memory within limits."""
from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
# Shared memory a block may take, bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10}

# In a process of its own: the test process has Triton in interpreter mode.
SCRIPT = """
import importlib.util, json, subprocess, sys, tempfile
from pathlib import Path
repo, arch = sys.argv[1], int(sys.argv[2])
spec = importlib.util.spec_from_file_location("int8_compile", repo + "/__init__.py", submodule_search_locations=[repo])
sys.modules["int8_compile"] = importlib.util.module_from_spec(spec)
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from int8_compile.int8.kernels import triton_kernels as tk

cuobjdump = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

def compile_(kernel, types, constants, num_warps=4, num_stages=3):
    signature = {name: types.get(name, "constexpr") for name in kernel.arg_names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(kernel.arg_names) if signature[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    binary = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=dict(num_warps=num_warps, num_stages=num_stages))
    with tempfile.TemporaryDirectory() as folder:
        cubin = Path(folder) / "kernel.cubin"
        cubin.write_bytes(binary.asm["cubin"])
        usage, sass = (subprocess.run([cuobjdump, flag, cubin], capture_output=True, text=True, check=True).stdout
                       for flag in ("-res-usage", "-sass"))
    return dict(shared=binary.metadata.shared, usage=usage, mma=[op for op in ("IMMA", "IGMMA", "HMMA") if op in sass])

out = {}
gemm = dict(q_ptr="*i8", w_ptr="*i8", s_ptr="*fp32", ws_ptr="*fp32", bias_ptr="*bf16", y_ptr="*bf16", M="i32", N="i32")
for m in (16, 128, 1024, 4096):
    for k in (3072, 1000):
        config = tk.gemm_config(m, k, 3072)
        warps, stages = config.pop("num_warps"), config.pop("num_stages")
        constants = dict(K=k, SCALAR_WS=False, HAS_BIAS=True, GROUP_M=tk.GROUP_M, **config)
        out[f"gemm m={m} k={k}"] = compile_(tk.int8_gemm_kernel, gemm, constants, warps, stages)
quant = dict(x_ptr="*bf16", h_ptr="*fp32", q_ptr="*i8", s_ptr="*fp32", stride="i64", min_scale="fp32")
for group in (0, 16, 64, 256):
    out[f"quant group={group}"] = compile_(tk.quant_rows_kernel, quant, dict(K=3072, GROUP=group, BLOCK=4096, PRECISION="tf32"))
print(json.dumps(out))
"""


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed on this platform")
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_kernels_compile_without_spills(arch):
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    run = subprocess.run([sys.executable, "-c", SCRIPT, str(REPO), str(arch)], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-3000:]
    for name, kernel in json.loads(run.stdout).items():
        stack = int(re.search(r"STACK:(\d+)", kernel["usage"]).group(1))
        assert stack == 0, f"{name} spills {stack} bytes on sm_{arch}: {kernel['usage']}"
        assert kernel["shared"] <= SHARED_LIMIT[arch], f"{name} takes {kernel['shared']} bytes of shared memory on sm_{arch}"
        if name.startswith("gemm"):
            want = "IGMMA" if arch == 90 and "m=16 " not in name else "IMMA"
            assert want in kernel["mma"], f"{name} on sm_{arch} uses {kernel['mma']}, not {want}"
