"""What ComfyUI tells the world about the pack, and what bad input gets back."""
from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from older_comfyui import NATIVE_INT8, NODE_REPLACEMENT, is_older, needs_comfyui
from toys import difference

from benchmarks.comfy_server import PromptRejected
from benchmarks.workflows import reports, wan_prompt

from .conftest import latent

pytestmark = pytest.mark.e2e
REPO = Path(__file__).resolve().parents[2]
MODES = ["default", "reduce-overhead", "max-autotune", "max-autotune-no-cudagraphs"]

# id -> (display name, [(input, type or options, default)]), from the design.
QUANTIZE = [("method", ["auto", "rowwise", "convrot", "smoothquant"], "auto"), ("keep_layers", "STRING", ""), ("min_sqnr_db", "FLOAT", 0.0),
            ("kernel", ["auto", "triton", "comfy_kitchen", "torch"], "auto")]
CONTRACT = {
    "OptimizeModel": ("Optimize Model", [
        ("model", "MODEL", None), ("goal", ["fastest", "balanced", "smallest", "exact"], "balanced"), ("background", "BOOLEAN", True)]),
    "CompileModel": ("Compile Model", [
        ("model", None, None), ("is_patcher", "BOOLEAN", True), ("object_to_patch", "STRING", "diffusion_model"),
        ("memory_format", ["preserve_format", "contiguous_format", "channels_last", "channels_last_3d"], "preserve_format"),
        ("fullgraph", "BOOLEAN", False), ("dynamic", "BOOLEAN", False), ("mode", MODES, "default"), ("options", "STRING", ""),
        ("disable", "BOOLEAN", False), ("backend", None, "inductor")]),
    "INT8LazyTorchCompile": ("INT8 Lazy Torch Compile", [
        ("model", "MODEL", None), ("backend", ["inductor", "cudagraphs"], "inductor"), ("fullgraph", "BOOLEAN", False),
        ("mode", ["default", "max-autotune", "max-autotune-no-cudagraphs", "reduce-overhead"], "default"),
        ("dynamic", ["auto", "true", "false"], "true"), ("compile_transformer_blocks_only", "BOOLEAN", True),
        ("dynamo_cache_size_limit", "INT", 640), ("use_guard_filter", "BOOLEAN", True), ("disable_dynamic_vram", "BOOLEAN", True),
        ("log_compile", "BOOLEAN", False)]),
    "INT8QuantizeModel": ("INT8 Quantize Model", [("model", None, None), *QUANTIZE]),
    "LoadINT8Model": ("Load INT8 Model", [("unet_name", None, None), *QUANTIZE]),
    "SaveINT8Model": ("Save INT8 Model", [("model", None, None), ("filename_prefix", "STRING", "diffusion_models/int8")]),
    "ApplyModes": ("Apply Modes", [("model", "MODEL", None), ("modes", "STRING", '["convrot", "int8", "compile"]')]),
    "ShowModes": ("Show Modes", [("model", "MODEL", None)]),
    "SaveCompileCache": ("Save Compile Cache", [("filename_prefix", "STRING", "int8_compile")]),
    "LoadCompileCache": ("Load Compile Cache", [("bundle", "STRING", ""), ("trust", "STRING", "")]),
    "ClearCompileCache": ("Clear Compile Cache", []),
    "INT8CompileCheck": ("INT8 Compile Check", [("sizes", ["quick", "full"], "quick")]),
}
OUTPUTS = {"SaveINT8Model": 0, "SaveCompileCache": 2, "INT8CompileCheck": 4}


@pytest.mark.parametrize("node_id", CONTRACT)
def test_object_info_matches_the_contract(server, node_id):
    display_name, inputs = CONTRACT[node_id]
    info = server.object_info(node_id)
    assert (info["display_name"], info["category"], info["name"]) == (display_name, "INT8 Compile", node_id)
    required = info["input"].get("required", {})
    assert list(required) == [name for name, _, _ in inputs]
    for name, kind, default in inputs:
        spec = required[name]
        got = spec[1]["options"] if spec[0] == "COMBO" else spec[0]
        assert kind is None or got == kind, name
        assert spec[1].get("default") == default, name
        assert len(spec[1]["tooltip"]) > 10, name
    assert len(info["output"]) == OUTPUTS.get(node_id, 1)
    assert info["output_node"] == (node_id.endswith("Cache") or node_id in ("SaveINT8Model", "ShowModes", "INT8CompileCheck"))


@pytest.mark.parametrize("node_id", ["CompileModel", "INT8LazyTorchCompile"])
def test_background_is_the_last_and_optional_input(server, node_id):
    (name, (kind, options)), = server.object_info(node_id)["input"]["optional"].items()
    assert (name, kind, options["default"]) == ("background", "BOOLEAN", False)


def test_what_the_check_may_be_given_of_a_model_is_optional(server):
    optional = server.object_info("INT8CompileCheck")["input"]["optional"]
    assert {name: (spec[0], spec[1].get("default")) for name, spec in optional.items()} == {
        "model": ("MODEL", None), "positive": ("CONDITIONING", None), "negative": ("CONDITIONING", None), "latent_image": ("LATENT", None),
        "vae": ("VAE", None), "steps": ("INT", 8), "cfg": ("FLOAT", 1.0)}


@pytest.mark.parametrize("node_id, types", [("CompileModel", "MODEL,CLIP,VAE,CONTROL_NET"), ("INT8QuantizeModel", "MODEL,CLIP"),
                                            ("SaveINT8Model", "MODEL,CLIP")])
def test_a_node_takes_these_types_and_gives_back_its_inputs(server, node_id, types):
    info = server.object_info(node_id)
    template = info["input"]["required"]["model"][1]["template"]
    assert template["allowed_types"] == types
    assert [template["template_id"]] == info["output_matchtypes"] or not info["output"]


def test_backends_are_those_of_torch_and_the_optional_ones(server):
    options = server.object_info("CompileModel")["input"]["required"]["backend"][1]["options"]
    assert {*torch.compiler.list_backends(), "velocator", "xelerate"} <= set(options)


def test_cache_size_limit_has_the_contracts_range(server):
    spec = server.object_info("INT8LazyTorchCompile")["input"]["required"]["dynamo_cache_size_limit"][1]
    assert (spec["min"], spec["max"]) == (0, 2048)


def errors_of(server, prompt) -> str:
    """What ComfyUI answers to a prompt that cannot work: HTTP 400, or an execution error."""
    try:
        result = server.run(prompt)
    except PromptRejected as error:
        assert error.status == 400
        return str(error)
    assert result.status == "error"
    return result.error["exception_message"]


@pytest.mark.parametrize("inputs, message", [
    ({"memory_format": "channels_first"}, "Invalid memory format 'channels_first'"),
    ({"options": "not json"}, "Compilation failed due to invalid options: not JSON"),
    ({"options": '{"epilog_fusion": true}'}, "Compilation failed due to invalid options: inductor has no option 'epilog_fusion'. "
                                             "Did you mean epilogue_fusion"),
    ({"backend": "velocator"}, "velocator is not installed"),
    ({"backend": "nonsense"}, "Unknown backend 'nonsense'"),
    ({"object_to_patch": "diffusion_model.block"}, "The nearest path is 'diffusion_model.blocks'"),
    ({"is_patcher": False}, "set is_patcher to true"),
])
def test_bad_input_of_compile_model_is_explained_and_the_next_prompt_works(server, defaults, inputs, message):
    assert message in errors_of(server, wan_prompt(model_nodes=[defaults("CompileModel", **inputs)]))
    latent(server, server.run(wan_prompt(steps=1, seed=hash(message) % 10**6)))


@pytest.mark.parametrize("inputs, message", [
    ({"min_sqnr_db": 200.0}, "min_sqnr_db"),
    ({"keep_layers": "double_blocks"}, "'double_blocks' matches no layer"),
    ({"kernel": "cutlass"}, "not in list"),
    ({"kernel": "triton"}, "needs a CUDA device"),
])
def test_bad_input_of_quantize_is_explained_and_the_next_prompt_works(server, defaults, inputs, message):
    assert message.lower() in errors_of(server, wan_prompt(model_nodes=[defaults("INT8QuantizeModel", **inputs)])).lower()
    latent(server, server.run(wan_prompt(steps=1, seed=hash(message) % 10**6)))


@pytest.mark.parametrize("node_id", ["INT8QuantizeModel", "ApplyModes"])
def test_where_comfyui_has_no_int8_the_node_says_what_to_update_and_the_next_prompt_works(server, node_id):
    if not is_older(NATIVE_INT8):
        pytest.skip(f"needs a ComfyUI before {NATIVE_INT8}, which has no native INT8")
    said = errors_of(server, wan_prompt(model_nodes=[(node_id, server.defaults(node_id))]))
    assert said == (f"INT8 Quantize Model needs ComfyUI {NATIVE_INT8} or later (native INT8 support). "
                    "Update ComfyUI; the compile nodes work on this version too.\n")
    latent(server, server.run(wan_prompt(steps=1, seed=hash(node_id) % 10**6)))


def with_compiled_clip(prompt, node_id, inputs):
    prompt["compile_clip"] = {"class_type": node_id, "inputs": {**inputs, "model": ["clip", 0]}}
    prompt["positive"]["inputs"]["clip"] = ["compile_clip", 0]
    return prompt


def test_a_clip_needs_is_patcher_off_and_then_encodes_the_same(server, defaults):
    assert "set is_patcher to false" in errors_of(server, with_compiled_clip(wan_prompt(), *defaults("CompileModel")))
    eager = latent(server, server.run(wan_prompt()))
    compiled = with_compiled_clip(wan_prompt(), *defaults("CompileModel", is_patcher=False, backend="aot_eager"))
    assert difference(latent(server, server.run(compiled)), eager) < 1e-3
    assert "compiled CLIPLayer x12" in server.log_text()


@pytest.mark.parametrize("method", ["convrot", "auto"])
def test_a_clip_is_quantized_at_once_or_by_its_first_prompt(server, defaults, method):
    needs_comfyui(NATIVE_INT8, "no native INT8")
    eager = latent(server, server.run(wan_prompt()))
    result = server.run(with_compiled_clip(wan_prompt(), *defaults("INT8QuantizeModel", method=method)))
    assert 1e-6 < difference(latent(server, result), eager) < 0.05
    (report,) = reports(result.outputs)
    assert report["status"] == "quantized 72 layers" and "72 of clip_l" in str(report)
    assert difference(latent(server, server.run(wan_prompt(prefix="again"))), eager) == 0


def test_help_pages_are_served(server):
    import urllib.request

    for node_id in CONTRACT:
        page = urllib.request.urlopen(f"{server.url}/extensions/int8-compile/docs/{node_id}.md").read().decode()
        assert all(f"`{name}`" in page for name, _, _ in CONTRACT[node_id][1])


def test_any_folder_name_and_a_sibling_copy_work(serve, defaults, tmp_path):
    """ComfyUI-Manager uses the registry's name, git the repository's; some people have both, and dots and spaces."""
    sibling = tmp_path / "sibling"
    shutil.copytree(REPO, sibling, ignore=shutil.ignore_patterns(".git", ".nox", "tests", "benchmarks", "__pycache__"))
    with serve(pack_folder="ComfyUI INT8-compile v0.1", extra_packs={"int8_compile-main": sibling}) as server:
        log = server.log_text()
        # Core says so of its own extras without brackets.
        assert "(IMPORT FAILED)" not in log and "Error while calling comfy_entrypoint" not in log
        assert log.count("the node id CompileModel is also registered by") == 1
        compiled = defaults("CompileModel", backend="aot_eager")
        eager = latent(server, server.run(wan_prompt()))
        assert difference(latent(server, server.run(wan_prompt(model_nodes=[compiled]))), eager) < 1e-3
        if not is_older(NATIVE_INT8):
            nodes = [defaults("INT8QuantizeModel", method="convrot"), compiled]
            assert 1e-6 < difference(latent(server, server.run(wan_prompt(model_nodes=nodes))), eager) < 0.05


def test_velocators_node_is_replaced_where_velocator_is_absent(server):
    needs_comfyui(NODE_REPLACEMENT, "no replacement of nodes")
    inputs = {"is_patcher": True, "object_to_patch": "diffusion_model", "memory_format": "channels_last", "fullgraph": False,
              "dynamic": False, "mode": "cache-all:max-autotune:low-precision", "options": "", "disable": True, "backend": "velocator"}
    prompt = wan_prompt(model_nodes=[("VelocatorCompileModel", inputs)])
    for node in prompt.values():
        node["_meta"] = {"title": node["class_type"]}
    latent(server, server.run(prompt))


def test_another_packs_node_of_the_same_id_is_named_once(serve, tmp_path):
    """Whichever of the two ComfyUI loads last."""
    (tmp_path / "__init__.py").write_text("""
class Theirs:
    INPUT_TYPES = classmethod(lambda cls: {"required": {"model": ("MODEL",)}})
    RETURN_TYPES, FUNCTION = ("MODEL",), "run"

NODE_CLASS_MAPPINGS = {"CompileModel": Theirs}
""")
    with serve(extra_packs={"zz_teacache": tmp_path}) as server:
        lines = [line for line in server.log_text().splitlines() if "is also registered by" in line]
    assert len(lines) == 1 and "the node id CompileModel is also registered by custom_nodes.zz_teacache" in lines[0]
