"""INT8 from weights that are rounded already: fp8, plain (weight_dtype), scaled and in groups, and 4 bits (ComfyUI's own files)."""
from __future__ import annotations

import itertools
import json

import pytest
import torch
from toys import difference

LAYERS = ("linear1", "linear2", "img_mlp.0", "img_mlp.2", "txt_mlp.0", "txt_mlp.2")
# source: (dtype or layout, what the report says)
SOURCES = {"e4m3": (torch.float8_e4m3fn, "float8_e4m3fn weights, whose own rounding (about 31 dB) stays"),
           "e5m2": (torch.float8_e5m2, "float8_e5m2 weights, whose own rounding (about 25 dB) stays"),
           "scaled": ("float8_e4m3fn", "float8_e4m3fn weights, whose own rounding (about 31 dB) stays"),
           "groups": ("mxfp8", "float8_e4m3fn weights, whose own rounding (about 31 dB) stays"),
           "nvfp4": ("nvfp4", "NVFP4 weights, whose own rounding (about 20 dB) stays"),
           "w4a8": ("asym_w4a8_int8", "W4A8 weights, whose own rounding (about 23 dB) stays"),
           "w4a4": ("convrot_w4a4", "W4A4 weights, whose own rounding (about 17 dB) stays")}


def _quantized_file(path, target, format: str):
    from comfy.quant_ops import QUANT_ALGOS, QuantizedTensor
    from safetensors.torch import load_file, save_file

    if format not in QUANT_ALGOS:
        pytest.skip(f"this ComfyUI has no {format}")
    state, layout = load_file(path), QUANT_ALGOS[format]["comfy_tensor_layout"]
    for name in [key.removesuffix(".weight") for key in state if key.endswith(tuple(f"{layer}.weight" for layer in LAYERS))]:
        weight = state.pop(f"{name}.weight").float()
        scale = weight.abs().max() / 448
        arguments = {"scale": scale} if format == "float8_e4m3fn" else {}
        quantized = QuantizedTensor.from_float(weight, layout, **arguments)
        state.update({f"{name}.weight{key.removeprefix('weight')}": value.contiguous()
                      for key, value in quantized.state_dict("weight").items()})
        state[f"{name}.comfy_quant"] = torch.frombuffer(bytearray(json.dumps({"format": format}).encode()), dtype=torch.uint8)
    save_file(state, target)


@pytest.fixture(params=SOURCES)
def source(request):
    return request.param


@pytest.fixture
def load(comfy, models_dir, tmp_path, source):
    """load(): the small Flux with weights of source; load("floats"): with their values in float."""
    path, kind = models_dir / "models" / "diffusion_models" / "tiny_flux.safetensors", SOURCES[source][0]
    if not isinstance(kind, torch.dtype):
        _quantized_file(path, tmp_path / "source.safetensors", kind)

    def load(form: str = "source"):
        if form == "floats":
            result, values = comfy.sd.load_diffusion_model(str(path)), dict(load().model.named_parameters())
            for name, parameter in result.model.named_parameters():
                value = values[name]
                parameter.data.copy_(value.dequantize() if type(value).__name__ == "QuantizedTensor" else value.float())
            return result
        if isinstance(kind, torch.dtype):
            return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": kind})
        return comfy.sd.load_diffusion_model(str(tmp_path / "source.safetensors"))
    return load


@pytest.fixture
def model(load):
    return load()


@pytest.mark.rotating
@pytest.mark.parametrize("method", ["convrot", "auto"])
def test_int8_of_rounded_weights_is_as_near_to_them_as_int8_is_to_float(load, source, nodes, sample, lora, method):
    from int8_compile.compile.comfyui.int8_calibrate import quantize_model
    from int8_compile.int8.options import Int8Options

    model, floats = load(), load("floats")
    eager, reports = sample(model), []
    quantized = quantize_model(model, Int8Options(method), lambda report, *_: reports.append(report))
    image = sample(quantized)
    layers = [layer for layer in quantized.object_patches.values() if type(layer).__name__ == "Int8Linear"]
    assert len(layers) >= 6 and 1e-4 < difference(image, sample(floats)) < 0.05
    assert difference(image, eager) < (0.1 if source == "w4a4" else 0.05)  # its layers round their input to 4 bits, too
    assert reports[-1].source == SOURCES[source][1] and SOURCES[source][1] in reports[-1].text()
    assert torch.equal(sample(model), eager)
    compiled = nodes.CompileModel(quantized, backend="aot_eager")
    assert difference(sample(compiled), image) < 1e-3

    # A LoRA is added to the float values of the source; core rounds the sum as the source once more, which INT8 does not do.
    changed = sample(lora(floats))
    assert difference(sample(lora(quantized)), changed) < difference(changed, sample(floats)) / 2
    assert difference(sample(lora(quantized)), changed) < difference(sample(lora(model)), changed)
    if "float8" in SOURCES[source][1]:
        changed = sample(lora(model))
        assert difference(sample(lora(quantized)), changed) < difference(changed, eager) / 2
    assert torch.equal(sample(quantized), image) and torch.equal(sample(model), eager)


@pytest.mark.parametrize("source", ["scaled"], indirect=True)
def test_an_int8_layer_holds_the_values_that_its_fp8_layer_multiplies_with(model, nodes):
    from int8_compile.int8.quantize import quantize_weight

    quantized = nodes.INT8QuantizeModel(model, method="rowwise")
    name = "diffusion_model.single_blocks.0.linear2"
    weight = model.get_model_object(name).weight
    assert type(weight).__name__ == "QuantizedTensor" and weight._qdata.dtype == torch.float8_e4m3fn
    q, s, _ = quantize_weight(weight.dequantize(), False)
    layer = quantized.get_model_object(name)
    assert torch.equal(layer.weight._qdata, q) and torch.equal(layer.weight._params.scale, s)
    assert torch.equal(layer.source().float(), weight.dequantize().float()) and layer.float_weight(torch.device("cpu")) is not None


# Core's loader looks at the shapes of W4A8 itself; it knows smoothing in one of these formats, and a scale that is one number in another.
@pytest.mark.parametrize("source, what", [
    *itertools.product(["scaled", "groups", "nvfp4", "w4a4"], ["wider", "taller", "scale", "nan"]),
    ("w4a8", "nan"), ("scaled", "rows"), ("nvfp4", "smoothing"), ("nvfp4", "one number")], indirect=["source"])
def test_a_damaged_file_of_rounded_weights_is_said_with_its_layer(comfy, model, source, nodes, tmp_path, what):
    from safetensors.torch import load_file, save_file

    name, path = "single_blocks.0.linear1", tmp_path / "source.safetensors"
    tensors = load_file(path)
    held = [key for key in tensors if key.startswith(f"{name}.weight")]
    scales = sorted(set(held) - {f"{name}.weight"})
    if what in ("wider", "taller"):
        for key in held:
            value = tensors[key]
            tensors[key] = torch.cat([value, value], -1 if what == "wider" else 0) if value.dim() == 2 else value
    elif what == "scale":
        tensors[scales[0]] = tensors[scales[0]].flatten()[:1].repeat(3)
    elif what == "rows":
        tensors[scales[0]] = tensors[scales[0]].flatten()[:1].repeat(tensors[f"{name}.weight"].shape[0])
    elif what == "smoothing":
        tensors[f"{name}.pre_quant_scale"] = torch.ones(tensors[f"{name}.weight"].shape[0], 1)
    elif what == "one number":
        tensors[f"{name}.pre_quant_scale"] = torch.tensor(1.5)
    else:
        of_rows = next((key for key in scales if "channel" in key), scales[-1])
        tensors[of_rows] = torch.full_like(tensors[of_rows].float(), float("nan")).to(tensors[of_rows].dtype)
    save_file(tensors, tmp_path / "damaged.safetensors")
    damaged = comfy.sd.load_diffusion_model(str(tmp_path / "damaged.safetensors"))
    said = "is none of|cannot be unpacked|NaN or infinite|channels|has one number"
    with pytest.raises(ValueError, match=f"layer '{name}': .*({said}).* Check the checkpoint file"):
        nodes.INT8QuantizeModel(damaged, method="rowwise")


@pytest.mark.parametrize("source", ["e4m3"], indirect=True)
def test_optimize_model_leaves_fp8_weights_as_they_are(model, nodes):
    from int8_compile.compile.comfyui.int8_calibrate import planned_layers
    from int8_compile.compile.comfyui.int8_model import int8_layers

    optimized = nodes.OptimizeModel(model)
    assert not planned_layers(optimized) and not int8_layers(optimized)


@pytest.mark.parametrize("source", ["nvfp4", "w4a8", "w4a4"], indirect=True)
def test_a_file_of_int8_made_of_4_bits_loads_with_the_layers_that_were_kept(comfy, model, nodes, sample, output_folder):
    from int8_compile.nodes import SaveINT8Model

    kept = "single_blocks.0.linear2"
    quantized = nodes.INT8QuantizeModel(model, method="convrot", keep_layers=kept)
    image = sample(quantized)
    SaveINT8Model.execute(model=quantized, filename_prefix="of_4_bits")
    loaded = comfy.sd.load_diffusion_model(str(max(output_folder.glob("of_4_bits_*.safetensors"))))
    layouts = {name: getattr(layer.weight, "_layout_cls", None) for name, layer in loaded.model.diffusion_model.named_modules()
               if hasattr(layer, "weight")}
    assert layouts[kept] == model.get_model_object(f"diffusion_model.{kept}").weight._layout_cls
    assert layouts["single_blocks.0.linear1"] == "TensorWiseINT8Layout"
    assert difference(sample(loaded), image) < 0.02  # core's own INT8 rounds its input otherwise
    again = nodes.INT8QuantizeModel(loaded)  # an image of it has the rounding of floats that lie elsewhere in memory
    for name, layer in quantized.object_patches.items():
        x = torch.randn(3, layer.in_features)
        assert torch.equal(layer(x), again.get_model_object(name)(x)), name
    assert difference(sample(again), image) < 0.02
