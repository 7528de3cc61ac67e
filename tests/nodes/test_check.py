"""The check node inside ComfyUI: its facts about ComfyUI, its outputs, its interrupt."""
from __future__ import annotations

import importlib.util
import json
import sys
import types
from pathlib import Path

import pytest
import torch

pytestmark = [pytest.mark.comfy, pytest.mark.rotating(4)]


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
    return lambda sizes="quick", **inputs: node.INT8CompileCheck.execute(sizes, **inputs)


def test_the_node_gives_text_json_and_a_picture(run_node):
    output = run_node()
    text, data, picture, pictures = output.args
    assert pictures.message.startswith("There are no pictures: connect model")
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


@pytest.fixture
def model_inputs(flux, conds):
    return {"model": flux, "positive": conds[0], "latent_image": {"samples": torch.zeros(1, 16, 16, 16)}, "steps": 2}


def test_a_model_is_measured_in_each_way(run_node, model_inputs, flux, sample, vae, monkeypatch):
    from int8_compile.compile.comfyui import model_check
    from int8_compile.compile.comfyui.compile_model import reports

    before = sample(flux)
    monkeypatch.setattr(model_check, "COMPILE", {"name": "compile", "config": {"backend": "aot_eager"}})
    text, data, _, pictures = run_node("full", vae=vae, **model_inputs).args
    model = json.loads(data)["model"]
    assert [way["title"] for way in model["ways"]] == ["eager", "compiled", "INT8 rowwise", "INT8 rowwise + compiled", "INT8 convrot",
                                                       "INT8 convrot + compiled", "INT8 auto", "INT8 auto + compiled"]
    assert not [way["error"] for way in model["ways"] if way["error"]] and all(way["later"] > 0 for way in model["ways"])
    eager, compiled, rowwise, *_ = model["ways"]
    assert eager["decibels"] is None and compiled["decibels"] > 90 > rowwise["decibels"] > 20
    assert rowwise["weights_mb"] < 0.6 * eager["weights_mb"]
    assert "INT8 convrot + compiled" in text and "PSNR of the picture" in text and text.startswith(("This model: ", "INT8"))
    assert pictures.shape[0] == 8 and pictures.shape[-1] == 3 and (pictures[0] - pictures[1]).abs().max() < 1e-3
    assert torch.equal(sample(flux), before) and not reports(flux)


def test_without_a_vae_latents_are_compared_and_what_fails_is_named(run_node, model_inputs, monkeypatch):
    from int8_compile.compile.comfyui import model_check

    quantize = model_check.quantize_and_record

    def failing(model, options, *more):
        if options.method == "auto":
            raise RuntimeError("no memory\nand more")
        return quantize(model, options, *more)
    monkeypatch.setattr(model_check, "quantize_and_record", failing)
    monkeypatch.setattr(model_check, "all_ways", lambda: [model_check.Way(), model_check.Way("convrot"), model_check.Way("auto")])
    text, data, _, pictures = run_node("full", **model_inputs).args
    ways = json.loads(data)["model"]["ways"]
    assert ways[1]["decibels"] > 20 and ways[2]["error"] == "no memory" and "INT8 auto: no memory" in text
    assert "SQNR of the latent" in text and pictures.message


@pytest.mark.parametrize("with_vae", [True, False], ids=["pictures", "latents"])
def test_a_way_that_gives_no_numbers_or_whose_code_fails_is_never_advised(run_node, model_inputs, vae, with_vae, monkeypatch):
    from int8_compile.compile.comfyui import model_check

    run = model_check._run

    def broken(way, *more):
        if way.method == "auto":
            raise KeyError("samples")  # another pack's
        made = run(way, *more)
        if way.method:
            made[0, 0, 0, 0] = float("nan" if way.method == "convrot" else "inf")
            way.later = way.first / 100
        return made
    monkeypatch.setattr(model_check, "_run", broken)
    ways = [model_check.Way(method) for method in ("", "convrot", "rowwise", "auto")]
    monkeypatch.setattr(model_check, "all_ways", lambda: ways)
    if with_vae:  # which makes NaN of the one
        monkeypatch.setattr(model_check, "_decoded", lambda vae, made: made.movedim(1, -1).clamp(0, 1))
        ways.remove(ways[2])
    text, data, _, pictures = run_node("full", **model_inputs, **({"vae": vae} if with_vae else {})).args
    assert text.startswith("This model: nothing was faster"), text
    for way in json.loads(data)["model"]["ways"][1:]:
        says = "KeyError: 'samples'" if way["method"] == "auto" else "what it gives is NaN or infinite"
        assert way["decibels"] is None and way["error"] == says
    assert not with_vae or pictures.isfinite().all()


def test_a_model_that_cannot_be_measured_is_refused_before_anything_is(run_node, model_inputs, nodes, flux):
    from comfy_extras.nodes_torch_compile import TorchCompileModel

    for wrong, says in (({"positive": []}, "positive is not what a sampler takes"), ({"negative": [[None, {}]]}, "negative is not what"),
                        ({"positive": [[torch.zeros(1)]]}, "positive is not what"), ({"latent_image": {}}, "has no tensor as samples"),
                        ({"latent_image": []}, "has no tensor as samples"), ({"cfg": float("nan")}, "cfg is no number"),
                        ({"model": TorchCompileModel.execute(flux, "inductor").args[0]}, "is compiled already"),
                        ({"positive": None}, "Connect positive and latent_image"), ({"latent_image": None}, "Connect positive"),
                        ({"model": nodes.INT8QuantizeModel(flux)}, "INT8 layers or is compiled already"),
                        ({"model": nodes.INT8QuantizeModel(flux, method="auto")}, "INT8 layers or is compiled already"),
                        ({"model": nodes.CompileModel(flux, backend="aot_eager")}, "INT8 layers or is compiled already")):
        with pytest.raises(ValueError, match=says):
            run_node("full", **{**model_inputs, **wrong})
    assert "was not measured: for that set sizes to full" in run_node("quick", **model_inputs).args[0]


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
