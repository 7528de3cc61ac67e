"""The test-suite on a GPU, and the kernels compiled ahead for every architecture."""
from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import xml.etree.ElementTree as ElementTree

from benchmarks.gpu.context import ROOT, Context

# What runs on the GPU where there is one, and the compile core, which runs on the CPU, with the torch and Triton of this machine.
ON_GPU = ("tests/int8/test_kernels.py", "tests/int8/test_triton_gemm.py", "tests/int8/test_triton_quant.py", "tests/int8/test_tables.py",
          "tests/compile/test_on_gpu.py", "tests/int8/test_tuning.py")
ALSO = ("tests/compile/test_engine.py", "tests/compile/test_int8_graphs.py", "tests/int8/test_quality.py")
DRY = ("tests/int8/test_tables.py", "tests/compile/test_on_gpu.py")
ARCHITECTURES = ("90", "80", "86", "89", "120")


def run(context: Context) -> None:
    """pytest, a process for each group, so that a crash of one says nothing of the other."""
    for name, paths in {"on the device": DRY if context.dry else ON_GPU, "beside it": () if context.dry else ALSO}.items():
        if not paths:
            continue
        report = context.work / f"tests_{name.partition(' ')[0]}.xml"
        command = [sys.executable, "-m", "pytest", "-c", "tests/pytest.ini", "--rootdir=tests", *paths, "-q", "--show-capture=no",
                   "-p", "no:cacheprovider", f"--junitxml={report}"]
        if context.device == "cuda" and importlib.util.find_spec("xdist"):
            command += ["-n", str(min(8, os.cpu_count()))]  # most of the time Triton compiles, on one core
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=max(10, context.left()))
        except subprocess.TimeoutExpired:
            context.add(tests=name, ok=False, why="no time left")
            continue
        if not report.exists():
            context.add(tests=name, ok=False, why=(done.stdout + done.stderr)[-2000:])
            continue
        suite = ElementTree.parse(report).getroot().find("testsuite")
        counts = {key: int(suite.get(key)) for key in ("tests", "failures", "errors", "skipped")}
        failed = [f"{case.get('classname')}.{case.get('name')}: {(case.find(kind).get('message') or '')[:200]}"
                  for case in suite for kind in ("failure", "error") if case.find(kind) is not None]
        context.add(group=name, **counts, seconds=float(suite.get("time")), ok=done.returncode == 0, failed=failed[:40])


def ahead_of_time(context: Context) -> None:
    """Every kernel for each architecture, on this machine's Triton; needs no GPU. A row for each: kernels, the most registers and shared
    memory, those that spill."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    for arch in ARCHITECTURES[:1] if context.cheap else ARCHITECTURES:
        if context.left() < 20:
            context.add(arch=arch, skipped="no time left")
            continue
        done = subprocess.run([sys.executable, "tests/int8/triton_aot.py", arch], cwd=ROOT, env=environment, capture_output=True, text=True)
        if done.returncode:
            context.add(arch=arch, ok=False, why=done.stderr[-2000:])
            continue
        kernels = json.loads(done.stdout)[arch]
        spills = {name: kernel["stack"] for name, kernel in kernels.items() if kernel["stack"]}
        context.add(arch=arch, kernels=len(kernels), registers=max(k["registers"] for k in kernels.values()),
                    shared=max(k["shared"] for k in kernels.values()), seconds=sum(k["seconds"] for k in kernels.values()), spills=spills,
                    ok=not spills)
