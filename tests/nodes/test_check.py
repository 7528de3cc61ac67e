"""The check node inside ComfyUI: its facts about ComfyUI, its outputs, its interrupt."""
from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch

pytestmark = pytest.mark.comfy


@pytest.fixture(scope="session")
def comfy_nodes(comfy):
    """ComfyUI's own module called nodes, which pytest takes this folder for."""
    spec = importlib.util.spec_from_file_location("nodes", Path(next(iter(comfy.__path__))).parent / "nodes.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def run_node(comfy_nodes, monkeypatch):
    """The node with layers and a block that take no time, compiled by aot_eager; everything else is real."""
    from int8_compile.compile.check import machine as check
    from int8_compile.compile.check.block import measure_block
    from int8_compile.compile.check.linear_table import Shape, Sizes
    from int8_compile.nodes import check as node

    monkeypatch.setitem(sys.modules, "nodes", comfy_nodes)
    monkeypatch.setattr(node, "sizes_named", lambda name, device: Sizes([Shape("Tiny", 32, 64, 128)], Shape("Tiny", 32, 64, 64)))
    monkeypatch.setattr(check, "measure_block", lambda *arguments: measure_block(*arguments, backend="aot_eager"))
    return lambda: node.INT8CompileCheck.execute("quick")


def test_the_node_gives_text_json_and_a_picture(run_node):
    output = run_node()
    text, data, picture = output.args
    data = json.loads(data)
    facts = {fact["name"]: fact for fact in data["facts"]}
    assert facts["native INT8"]["status"] == "ok" and facts["ComfyUI"]["value"].count(".") == 2
    assert {"comfy_kitchen", "dynamic VRAM", "memory compiler", "torch", "CPU"} <= facts.keys()
    assert data["baseline"] == "fp32" and data["advice"] in text  # what ComfyUI computes in on a CPU
    assert (not data["block"]["failed"] and "compile alone" in text) or "Neither compile" in text or "Compile: expect" in text
    assert output.ui["text"] == (text,)
    if importlib.util.find_spec("matplotlib") is None:
        assert "pip install matplotlib" in picture.message and "images" not in output.ui
    else:
        assert isinstance(picture, torch.Tensor) and picture.dim() == 4 and len(output.ui["images"]) == 1


@pytest.mark.rotating
def test_an_interrupt_ends_the_check(comfy, run_node):
    import comfy.model_management as management

    management.interrupt_current_processing(True)
    with pytest.raises(management.InterruptProcessingException):
        run_node()
    assert run_node().args[0]


def test_a_pack_that_registers_an_id_of_ours_is_named_whichever_loaded_last(comfy_nodes, monkeypatch):
    from int8_compile.compile.comfyui.machine_check import conflict_facts

    monkeypatch.setitem(sys.modules, "nodes", comfy_nodes)

    assert [fact.value for fact in conflict_facts(["CompileModel"])] == ["none"]

    class Theirs:
        RELATIVE_PYTHON_MODULE = "custom_nodes.teacache"
    pack = types.ModuleType("teacache")
    pack.NODE_CLASS_MAPPINGS = {"CompileModel": Theirs}
    monkeypatch.setitem(sys.modules, "/custom_nodes/teacache", pack)  # as ComfyUI names the modules of packs
    fact, = conflict_facts(["CompileModel", "INT8QuantizeModel"])
    assert fact.status == "warning" and "custom_nodes.teacache also registers CompileModel" in fact.value and "Disable" in fact.remedy
