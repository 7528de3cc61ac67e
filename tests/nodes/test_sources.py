"""INT8 from weights that are fp8 already: plain (weight_dtype), scaled and in groups (files of ComfyUI's own formats)."""
from __future__ import annotations

import json

import pytest
import torch
from toys import difference

LAYERS = ("linear1", "linear2", "img_mlp.0", "img_mlp.2", "txt_mlp.0", "txt_mlp.2")
# source: (dtype or layout, what the report says)
SOURCES = {"e4m3": (torch.float8_e4m3fn, "float8_e4m3fn weights, whose own rounding (about 31 dB) stays"),
           "e5m2": (torch.float8_e5m2, "float8_e5m2 weights, whose own rounding (about 25 dB) stays"),
           "scaled": ("float8_e4m3fn", "float8_e4m3fn weights, whose own rounding (about 31 dB) stays"),
           "groups": ("mxfp8", "float8_e4m3fn weights, whose own rounding (about 31 dB) stays")}


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
def model(comfy, models_dir, tmp_path, source):
    path = models_dir / "models" / "diffusion_models" / "tiny_flux.safetensors"
    kind = SOURCES[source][0]
    if isinstance(kind, torch.dtype):
        return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": kind})
    _quantized_file(path, tmp_path / "source.safetensors", kind)
    return comfy.sd.load_diffusion_model(str(tmp_path / "source.safetensors"))


@pytest.mark.rotating
@pytest.mark.parametrize("method", ["convrot", "auto"])
def test_int8_of_fp8_weights_is_as_near_to_them_as_int8_is_to_float(model, source, nodes, sample, lora, method):
    from int8_compile.compile.comfyui.int8_calibrate import quantize_model
    from int8_compile.int8.options import Int8Options

    eager, reports = sample(model), []
    quantized = quantize_model(model, Int8Options(method), lambda report, *_: reports.append(report))
    image = sample(quantized)
    layers = [layer for layer in quantized.object_patches.values() if type(layer).__name__ == "Int8Linear"]
    assert len(layers) >= 6 and 1e-4 < difference(image, eager) < 0.05
    assert reports[-1].source == SOURCES[source][1] and SOURCES[source][1] in reports[-1].text()
    assert torch.equal(sample(model), eager)
    compiled = nodes.CompileModel(quantized, backend="aot_eager")
    assert difference(sample(compiled), image) < 1e-3

    # A LoRA is added to the float values of the source; core rounds the sum to fp8 once more, which INT8 does not do.
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


@pytest.mark.parametrize("source", ["e4m3"], indirect=True)
def test_optimize_model_leaves_fp8_weights_as_they_are(model, nodes):
    from int8_compile.compile.comfyui.int8_calibrate import planned_layers
    from int8_compile.compile.comfyui.int8_model import int8_layers

    optimized = nodes.OptimizeModel(model)
    assert not planned_layers(optimized) and not int8_layers(optimized)
