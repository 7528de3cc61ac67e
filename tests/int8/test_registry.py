"""What a kernel is asked for by, where, and who may choose it: all from its own file and its line in the registry."""
from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest
import torch
from int8_compile.int8.kernels import cpu, ops, reference, registry, torch_mm, with_triton
from int8_compile.int8.options import KERNELS

REPO = Path(__file__).resolve().parents[2]
FOLDER = REPO / "int8" / "kernels"
NAMES = ("auto", "triton", "comfy_kitchen", "torch", "reference")
CPU, MPS, CUDA = map(torch.device, ("cpu", "mps", "cuda"))


@pytest.fixture(autouse=True)
def nothing_is_known():
    ops.implementation.cache_clear()
    yield
    ops.implementation.cache_clear()


def test_every_file_with_a_kernel_is_in_the_registry():
    files = [path.stem for path in FOLDER.glob("*.py") if "\nKERNEL = " in path.read_text()]
    found = [importlib.import_module(f"{registry.__package__}.{name}").KERNEL for name in files]
    assert len(found) == len(registry.KERNELS) and all(any(kernel is known for known in registry.KERNELS) for kernel in found)
    assert len(registry.BY_NAME) == len(registry.KERNELS), "two of one name"


def test_users_choose_among_the_registrys_kernels_and_each_is_explained():
    assert KERNELS == ("auto", "triton", "comfy_kitchen", "torch"), "in this order, which saved workflows and the node's page have"
    for language in ("en", "zh"):
        nodes = json.loads((REPO / "locales" / language / "nodeDefs.json").read_text())
        tooltips = [node["inputs"]["kernel"]["tooltip"] for node in nodes.values() if "kernel" in node.get("inputs", {})]
        assert tooltips and all(name in tooltip for tooltip in tooltips for name in KERNELS)


@pytest.mark.parametrize("name", NAMES)
def test_a_cpu_and_a_device_of_no_kernel_have_one_each(name):
    assert ops.implementation(name, CPU) is (reference if name == "reference" else cpu)
    if name != "triton":
        assert ops.implementation(name, MPS) is reference


@pytest.mark.parametrize("reason", ["", "no compiler"])
def test_on_a_gpu_auto_is_triton_where_it_runs_and_a_name_is_what_it_says(monkeypatch, reason):
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    from int8_compile.int8.kernels import triton_kernels

    monkeypatch.setattr(with_triton, "triton_unavailable", lambda device: reason)
    assert {name: ops.implementation(name, CUDA) for name in NAMES} == {
        "auto": torch_mm if reason else triton_kernels, "triton": triton_kernels, "comfy_kitchen": torch_mm, "torch": torch_mm,
        "reference": reference}


def test_who_chose_a_kernel_that_cannot_run_is_told_why():
    assert [name for name in KERNELS[1:] if registry.BY_NAME[name].refusal(CPU)] == ["triton"]
