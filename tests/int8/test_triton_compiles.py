"""Ahead-of-time compile of the Triton kernels, no GPU needed: right instruction, no spill, shared memory within limits."""
from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.rotating(3, together=True)

SCRIPT = Path(__file__).with_name("triton_aot.py")
# Shared memory a block may take, bytes (CUDA programming guide, compute capabilities).
SHARED_LIMIT = {80: 163 << 10, 86: 99 << 10, 89: 99 << 10, 90: 227 << 10, 120: 99 << 10}
# Two processes at a time. sm_86, 89 and 120 quantize with sm_80's instructions: some quantizers do for them.
SHARES = (("90", "86"), ("80", "89", "120"))
EVERY_QUANTIZER = ("80", "90")


@pytest.fixture(scope="module")
def compiled():
    """What each kernel takes, by architecture and name."""
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    running = [subprocess.Popen([sys.executable, SCRIPT, *share, "--every-quantizer", *EVERY_QUANTIZER], env=environment, text=True,
                                stdout=subprocess.PIPE, stderr=subprocess.PIPE) for share in SHARES]
    found = {}
    for process in running:
        out, errors = process.communicate()
        assert process.returncode == 0, errors[-3000:]
        found.update(json.loads(out))
    return {int(arch): kernels for arch, kernels in found.items()}


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed on this platform")
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_kernels_compile_without_spills(compiled, arch):
    assert len(compiled[arch]) > 20
    for name, kernel in compiled[arch].items():
        assert kernel["stack"] == 0, f"{name} spills {kernel['stack']} bytes on sm_{arch}, with {kernel['registers']} registers"
        assert kernel["shared"] <= SHARED_LIMIT[arch], f"{name} takes {kernel['shared']} bytes of shared memory on sm_{arch}"


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed on this platform")
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_products_run_on_tensor_cores(compiled, arch):
    for name, kernel in compiled[arch].items():
        if name.startswith(("pointer", "tma", "gluon")):
            rows = int(name.split()[1].split("x")[0])
            want = "IGMMA" if arch == 90 and rows >= 64 else "IMMA"
            assert kernel["mma"] == [want], f"{name} on sm_{arch} uses {kernel['mma']}, not {want}"
        if "group" in name and "group 0" not in name:
            assert kernel["mma"] in (["HMMA"], ["HGMMA"]), f"{name} on sm_{arch} uses {kernel['mma']}"


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed on this platform")
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_the_low_byte_of_a_rounded_value_is_stored_not_its_conversion(compiled, arch):
    """ptxas takes the rounded fp32 of some rows (K = 255) for one to be converted, which gives 255 for all (seen on an H100)."""
    found = {name: kernel["from_float"] for name, kernel in compiled[arch].items() if name.startswith("quant")}
    assert not any(found.values()), found
    assert str(arch) not in EVERY_QUANTIZER or any(" 255 " in name for name in found)


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed on this platform")
@pytest.mark.parametrize("arch", SHARED_LIMIT)
def test_products_and_sums_of_a_norm_are_rounded_apart(compiled, arch):
    """As they are where the normed rows lie in memory."""
    found = {name: kernel["fused"] for name, kernel in compiled[arch].items() if name.startswith("quant after a norm")}
    assert len(found) >= 3 and not any(found.values()), found


@pytest.mark.skipif(not importlib.util.find_spec("triton"), reason="Triton is not installed on this platform")
def test_gluon_leaves_one_product_under_way_in_its_loop_and_none_after_it(compiled):
    import triton
    from int8_compile.int8.kernels.gluon_gemm import KNOWN
    from int8_compile.int8.kernels.triton_configs import GLUON_TILES

    found = {name: kernel["in_flight"] for name, kernel in compiled[90].items() if name.startswith("gluon")}
    if not triton.__version__.startswith(KNOWN) and not found:
        pytest.skip(f"needs Triton 3.6 to 3.9, whose Gluon the kernels are written for: this is {triton.__version__}")
    assert len(found) >= len(GLUON_TILES) and set(map(tuple, found.values())) == {(1, 0)}, found
