"""Layers of other packs whose weights are tensors of a class of their own, such as ComfyUI-GGUF's, in compiled blocks: operations that call
the layer as eager does, so that no LoRA is another graph."""
from __future__ import annotations

import copy
import gc
import importlib
import sys
import weakref
from pathlib import Path

import pytest
import torch
from toys import difference, wait_until

from .test_compile import CHEAP
from .test_encoder import KINDS, TEXT, files

__all__ = ["files"]

pytestmark = [pytest.mark.comfy, pytest.mark.rotating(3)]
FOLDER = Path(__file__).parent.parent / "assets" / "packed_layers"


@pytest.fixture(scope="module")
def pack(comfy):
    """The pack under the name that ComfyUI would give it."""
    name = str(FOLDER).replace(".", "_x_")
    spec = importlib.util.spec_from_file_location(name, FOLDER / "__init__.py")
    sys.modules[name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(sys.modules[name])
    return importlib.import_module(f"{name}.nodes")


@pytest.fixture
def packed(pack, models_dir):
    return tiny_flux(pack, models_dir)


def tiny_flux(pack, models_dir):
    return pack.load(str(models_dir / "models" / "diffusion_models" / "tiny_flux.safetensors"))


def layer_of(model):
    return model.model.diffusion_model.double_blocks[0].img_mlp[0]


def test_no_lora_is_another_graph_and_each_image_is_eagers(packed, nodes, sample, lora, graphs):
    eager = sample(packed)
    compiled = nodes.CompileModel(packed, **CHEAP)
    assert torch.equal(sample(compiled), eager)
    before = graphs()
    for name, strength in [("tiny_flux_a", 1.0), ("tiny_flux_a", 0.5), ("tiny_flux_b", 0.7)]:
        want = sample(lora(packed, name, strength))
        assert difference(want, eager) > 0.01
        assert torch.equal(sample(lora(compiled, name, strength)), want)
        assert torch.equal(sample(nodes.CompileModel(lora(packed, name, strength), **CHEAP)), want)
        assert torch.equal(sample(packed), eager)  # the model without either
        assert torch.equal(sample(compiled), eager)
    assert graphs() == before == 2
    from int8_compile.compile.comfyui.compile_model import reports

    (report,) = reports(compiled)
    assert report.checks and set(report.checked) == {"DoubleStreamBlock", "SingleStreamBlock"}, report  # compared with eager


def test_layers_that_are_packed_and_layers_that_are_not_share_a_graph(packed, pack, nodes, sample, graphs):
    for block in packed.model.diffusion_model.single_blocks[1:]:
        layer = block.linear1
        values = layer.get_weight(layer.weight, torch.float16).as_subclass(pack.PackedTensor)
        values.tensor_type, values.tensor_shape, values.patches = None, values.shape, []
        layer.weight = torch.nn.Parameter(values, requires_grad=False)
    eager = sample(packed)
    assert torch.equal(sample(nodes.CompileModel(packed, **CHEAP)), eager)
    assert graphs() == 2


def test_a_model_with_packed_convolutions_is_left_as_it_is(packed, pack, nodes):
    convolution = torch.nn.Conv2d(8, 8, 1)
    convolution.weight = torch.nn.Parameter(pack.PackedTensor.pack(torch.randn(8, 64)), requires_grad=False)
    packed.model.diffusion_model.double_blocks[0].add_module("convolution", convolution)
    assert not nodes.CompileModel(packed, **CHEAP).object_patches


def test_the_layer_is_found_however_the_model_is_copied_moved_or_freed(pack, models_dir, nodes, sample):
    packed = tiny_flux(pack, models_dir)
    eager = sample(packed)
    compiled = nodes.CompileModel(packed, **CHEAP)
    sample(compiled)
    stands_in = layer_of(compiled)
    assert type(stands_in) is not type(packed.get_model_object("diffusion_model.double_blocks.0.img_mlp.0"))
    twin = copy.deepcopy(stands_in)
    x = torch.randn(3, twin.in_features)
    assert torch.equal(twin(x), stands_in(x)) and twin.artifact_tensors()["tag"] is not stands_in.artifact_tensors()["tag"]
    compiled.detach()
    assert torch.equal(sample(packed), eager) and torch.equal(sample(compiled), eager)
    gone = weakref.ref(stands_in)
    del stands_in, twin
    compiled.detach()
    del compiled, packed
    comfy_cleanup()
    wait_until(lambda: gc.collect() is not None and gone() is None, 20)


def comfy_cleanup():
    import comfy.model_management as management

    management.unload_all_models()
    management.cleanup_models()


@pytest.mark.parametrize("how", ["hook", "own forward"])
def test_what_a_pack_puts_on_a_layer_is_done(packed, nodes, sample, how):
    compiled = nodes.CompileModel(packed, **CHEAP)
    eager = sample(compiled)
    layer = layer_of(packed)
    if how == "hook":
        handle = layer.register_forward_hook(lambda module, args, result: result * 1.5)
    else:
        own = layer.forward
        layer.forward = lambda x: own(x) * 1.5
    want = sample(packed)
    assert difference(want, eager) > 1e-3 and torch.equal(sample(compiled), want)
    if how == "hook":
        handle.remove()
    else:
        del layer.forward
    assert torch.equal(sample(compiled), eager)


def test_a_bypass_lora_is_added_and_compile_goes_on_without_it(comfy, packed, nodes, sample, models_dir, graphs):
    weights = comfy.utils.load_torch_file(str(models_dir / "models" / "loras" / "tiny_flux_a.safetensors"))
    compiled = nodes.CompileModel(packed, **CHEAP)
    eager = sample(packed)
    sample(compiled)
    before = graphs()
    want = sample(comfy.sd.load_bypass_lora_for_models(packed, None, weights, 1.0, 0)[0])
    assert difference(want, eager) > 0.01
    assert torch.equal(sample(comfy.sd.load_bypass_lora_for_models(compiled, None, weights, 1.0, 0)[0]), want)
    assert torch.equal(sample(compiled), eager) and graphs() == before


def test_a_layer_that_does_not_give_what_a_linear_gives_runs_uncompiled(packed, nodes, sample, caplog):
    """The operation has said what will come of it."""
    layer = layer_of(packed)
    kind = type(layer)
    own = kind.forward_comfy_cast_weights
    kind.forward_comfy_cast_weights = lambda self, x: own(self, x).half() if self.weight is layer.weight else own(self, x)
    try:
        want = sample(packed)
        assert torch.equal(sample(nodes.CompileModel(packed, **CHEAP)), want)
    finally:
        kind.forward_comfy_cast_weights = own
    assert "gave another kind of result than a Linear's" in caplog.text


def test_weights_are_unpacked_by_compiled_code_where_that_is_faster(packed, nodes, sample, lora, graphs, monkeypatch, caplog):
    """On CUDA."""
    from int8_compile.compile.comfyui import foreign_layers

    monkeypatch.setattr(foreign_layers, "COMPILES_UNPACKING", {"cpu"})
    monkeypatch.setattr(foreign_layers, "_COMPILES", failed := {})
    # In fp16, inductor rounds as eager does on CUDA only.
    monkeypatch.setattr(type(layer_of(packed)), "dequant_dtype", "target")
    compiled = nodes.CompileModel(packed, **CHEAP)
    for model in (packed, lora(packed, strength=0.5)):
        want = sample(model)
        before = graphs()
        assert difference(sample(nodes.CompileModel(model, **CHEAP)), want) < 1e-6
        assert graphs() - before == (3 if model is packed else 0)  # two of blocks and one that unpacks
    assert not failed
    functions = foreign_layers.unpacking(type(layer_of(packed))).dequantize_functions
    unpack = functions["blocks"]
    monkeypatch.setitem(functions, "blocks", lambda *args: torch.compiler.disable(unpack)(*args))
    assert torch.equal(sample(compiled), sample(packed)) and list(failed.values()) == [False]
    assert "unpacking blocks weights cannot be compiled, and stays slower" in caplog.text


def test_with_cuda_graphs_layers_are_left_as_they_are(packed, nodes, monkeypatch):
    """A graph would replay the LoRA of the call that was recorded. On a CPU there are none."""
    assert nodes.CompileModel(packed, backend="cudagraphs").object_patches
    monkeypatch.setattr(packed, "load_device", torch.device("cuda"))
    assert not nodes.CompileModel(packed, backend="cudagraphs").object_patches


def test_other_layers_are_left_as_they_are(flux, nodes):
    assert not nodes.CompileModel(flux, **CHEAP).object_patches


@pytest.mark.rotating
@pytest.mark.parametrize("method", ["convrot", "auto"])
def test_int8_layers_are_made_of_the_values_that_they_multiply_with(packed, nodes, sample, lora, graphs, method):
    """With the LoRA of that pack's own patcher, before and behind, and compiled."""
    from int8_compile.compile.comfyui.int8_calibrate import quantize_model
    from int8_compile.int8.options import Int8Options

    eager, told = sample(packed), []
    quantized = quantize_model(packed, Int8Options(method), lambda report, *_: told.append(report))
    image = sample(quantized)
    layers = [layer for layer in quantized.object_patches.values() if type(layer).__name__ == "Int8Linear"]
    assert len(layers) >= 6 and 1e-4 < difference(image, eager) < 0.05
    assert told[-1].source == "blocks weights, whose own rounding stays"
    changed = sample(lora(packed))
    for model in (lora(quantized), quantize_model(lora(packed), Int8Options(method))):
        assert difference(sample(model), changed) < difference(changed, eager) / 3
        assert torch.equal(sample(quantized), image) and torch.equal(sample(packed), eager)
    compiled = nodes.CompileModel(quantized, **CHEAP)
    assert difference(sample(compiled), image) < 1e-3
    assert difference(sample(lora(compiled)), sample(lora(quantized))) < 1e-3 and graphs() == 2
    assert torch.equal(sample(packed), eager) and torch.equal(sample(quantized), image)


def test_a_partial_load_and_another_strength_of_a_lora_reach_int8_layers(packed, nodes, lora):
    model = nodes.INT8QuantizeModel(packed, method="convrot")
    x, context, y = torch.randn(1, 16, 8, 8), torch.randn(1, 20, 4096), torch.randn(1, 2048)

    def forward(model, **load):
        model.patch_model(torch.device("cpu"), **load)
        try:
            with torch.inference_mode():
                return model.model.diffusion_model(x, torch.tensor([0.5]), context=context, y=y)
        finally:
            model.unpatch_model(torch.device("cpu"))

    plain = forward(model)
    for strength in (1.0, 0.5):
        whole = forward(lora(model, strength=strength))
        assert difference(whole, plain) > 0.01
        assert torch.equal(forward(lora(model, strength=strength), lowvram_model_memory=1), whole)
    assert torch.equal(forward(model), plain)


@pytest.mark.rotating
def test_what_is_saved_of_such_a_model_stock_comfyui_loads(comfy, packed, pack, nodes, sample, lora, tmp_path):
    """What was not quantized, and what smoothing has no place for, becomes float."""
    from int8_compile.compile.comfyui.int8_checkpoint import save_int8_model

    eager = sample(packed)
    for number, model in enumerate((nodes.INT8QuantizeModel(packed, method="convrot", keep_layers="*.img_mlp.*"),
                                    lora(nodes.INT8QuantizeModel(packed, method="rowwise")))):
        image, path = sample(model), tmp_path / f"{number}.safetensors"
        save_int8_model(model, path)
        assert torch.equal(sample(packed), eager)
        loaded = comfy.sd.load_diffusion_model(str(path))
        assert not any(isinstance(tensor, pack.PackedTensor) for tensor in loaded.model.parameters())
        # The packed layers multiply with values in fp16; the kernels are core's, whose roundings are others.
        assert difference(sample(loaded), image) < 0.01
        comfy.sd.save_checkpoint(str(path), model, metadata={})  # core's Save Model
        assert difference(sample(comfy.sd.load_diffusion_model(str(path))), image) < 0.01
        assert torch.equal(sample(packed), eager) and torch.equal(sample(model), image)


@pytest.fixture
def packed_clip(comfy, files, pack):
    """(a CLIP of packed layers, its type and options for stock loaders)"""
    config, part, kind, _ = KINDS["qwen"]
    kind, options = getattr(comfy.sd.CLIPType, kind), {f"{part}_model_config": dict(config)}
    state = comfy.utils.load_torch_file(str(files / "qwen.safetensors"))
    packed = {name: pack.PackedTensor.pack(value) if value.ndim == 2 and "embed" not in name else value for name, value in state.items()}
    clip = comfy.sd.load_text_encoder_state_dicts(state_dicts=[packed], clip_type=kind,
                                                  model_options={**options, "custom_operations": pack.Ops})
    clip.patcher.__class__ = pack.PackedPatcher
    return clip, kind, options


def test_a_text_encoder_is_a_source_and_is_saved_too(comfy, packed_clip, nodes, output_folder):
    from int8_compile.compile.comfyui.int8_encoder import save_encoder

    clip, kind, options = packed_clip

    def encode(clip):
        return clip.encode_from_tokens(clip.tokenize(TEXT))

    want = encode(clip)
    quantized = nodes.INT8QuantizeModel(clip, method="convrot")
    assert 1e-4 < difference(encode(quantized), want) < 0.1
    loaded = comfy.sd.load_clip([str(save_encoder(quantized, "encoder")[0])], clip_type=kind, model_options=options)
    assert difference(encode(loaded), want) < 0.1
    assert torch.equal(encode(clip), want)


def test_a_text_encoder_with_packed_embeddings_compiles_once_and_is_checked(packed_clip, pack, nodes, graphs):
    from int8_compile.compile.comfyui.compile_model import reports

    clip = packed_clip[0]
    outside = torch.nn.Embedding(4, 64)
    outside.weight = torch.nn.Parameter(pack.PackedTensor.pack(torch.randn(4, 64)), requires_grad=False)
    clip.cond_stage_model.add_module("not_in_a_block", outside)
    compiled = nodes.CompileModel(clip, is_patcher=False, **CHEAP)
    want = clip.encode_from_tokens(clip.tokenize(TEXT))
    assert torch.equal(compiled.encode_from_tokens(compiled.tokenize(TEXT)), want) and graphs() == 1
    (report,) = reports(compiled.patcher)
    assert report.checks and not report.fallbacks


def test_what_cannot_be_saved_is_refused_by_name(packed, pack, nodes, tmp_path):
    from int8_compile.compile.comfyui.int8_checkpoint import save_int8_model

    convolution = torch.nn.Conv2d(8, 8, 1)
    convolution.weight = torch.nn.Parameter(pack.PackedTensor.pack(torch.randn(8, 64)), requires_grad=False)
    packed.model.diffusion_model.add_module("convolution", convolution)
    with pytest.raises(ValueError, match=r"'diffusion_model.convolution' is a Conv2d with weights of another pack's loader"):
        save_int8_model(nodes.INT8QuantizeModel(packed, method="convrot"), tmp_path / "int8.safetensors")
    assert not list(tmp_path.iterdir())


def test_layers_whose_pack_cannot_be_asked_are_refused_by_name(packed, nodes):
    kind = type("OtherTensor", (torch.Tensor,), {"__module__": "of_no_pack"})
    layer = layer_of(packed)
    layer.weight = torch.nn.Parameter(torch.zeros(256, 256).as_subclass(kind), requires_grad=False)
    with pytest.raises(ValueError, match=r"is one of another pack's loader \(OtherTensor\), which keeps its values to itself"):
        nodes.INT8QuantizeModel(packed, method="convrot")
