from __future__ import annotations

import gc

import pytest
import torch
from toys import difference

from .conftest import Ops

pytestmark = pytest.mark.comfy


@pytest.mark.parametrize("method", ["rowwise", "convrot", "auto"])
@pytest.mark.parametrize("family", ["tiny_flux", "tiny_wan"])
def test_a_quantized_model_samples_almost_the_same(load, nodes, sample, family, method):
    model = load(family)
    eager = sample(model)
    assert 1e-6 < difference(sample(nodes.INT8QuantizeModel(model, method=method)), eager) < 0.05


def test_the_upstream_model_is_untouched_and_gets_its_bits_back(flux, nodes, sample):
    weights = {k: v.clone() for k, v in flux.model.state_dict().items()}
    before = sample(flux)
    uuid, patches = flux.patches_uuid, dict(flux.object_patches)
    quantized = nodes.INT8QuantizeModel(flux)
    assert (flux.patches_uuid, flux.object_patches) == (uuid, patches)
    first = sample(quantized)
    assert torch.equal(sample(flux), before)
    assert torch.equal(sample(quantized), first)
    assert torch.equal(sample(flux.clone()), before)
    after = flux.model.state_dict()
    assert after.keys() == weights.keys() and all(torch.equal(after[k], v) for k, v in weights.items())


def test_weights_are_comfyuis_own_int8_format(comfy, flux, nodes, sample):
    quantized = nodes.INT8QuantizeModel(flux, method="convrot")
    layer = quantized.get_model_object("diffusion_model.double_blocks.0.img_attn.qkv")
    original = flux.get_model_object("diffusion_model.double_blocks.0.img_attn.qkv").weight
    weight = layer.weight
    assert isinstance(weight, comfy.ops.QuantizedTensor) and weight._layout_cls == "TensorWiseINT8Layout"
    assert weight._qdata.dtype == torch.int8 and weight._params.scale.shape == (original.shape[0], 1)
    assert weight._params.convrot and weight._params.convrot_groupsize == 256
    # comfy_kitchen undoes our rotation and scales.
    assert difference(weight.dequantize(), original) < 0.01
    sd = layer.state_dict(prefix="x.")
    assert {"x.weight", "x.weight_scale", "x.comfy_quant", "x.bias"} == set(sd)


def test_our_kernels_agree_with_comfy_kitchens(flux, nodes, sample):
    ours = sample(nodes.INT8QuantizeModel(flux, method="convrot"))
    theirs = sample(nodes.INT8QuantizeModel(flux, method="convrot", kernel="comfy_kitchen"))
    assert difference(ours, theirs) < 0.02


@pytest.mark.parametrize("family", ["tiny_flux", "tiny_wan"])
def test_every_quantized_layer_runs_through_our_two_operations(load, nodes, sample, family):
    """Wan's FFN reaches its INT8 weight past the layer's forward, through core's linear_input_act."""
    quantized = nodes.INT8QuantizeModel(load(family), method="convrot")
    with Ops() as ops:
        sample(quantized)
    steps, layers = 2, len(quantized.object_patches)
    # In a block of Wan q, k and v share one quantization, and k and v of the cross attention; the first step proves that they may.
    saved = 3 * len(quantized.model.diffusion_model.blocks) if family == "tiny_wan" else 0
    assert ops.counts["int8_compile::int8_gemm"] == steps * layers
    assert ops.counts["int8_compile::quant_rows"] == steps * layers - saved
    assert not any(name.startswith("comfy_kitchen::int8_linear") for name in ops.counts)


def test_memory_is_about_halved(flux, nodes):
    quantized = nodes.INT8QuantizeModel(flux, method="convrot")
    blocks = sum(p.nbytes for p in flux.model.diffusion_model.double_blocks.parameters())
    assert quantized.model_size() < flux.model_size() - 0.4 * blocks


def test_kept_layers_stay_in_high_precision(flux, nodes):
    quantized = nodes.INT8QuantizeModel(flux, method="convrot", keep_layers="double_blocks.0.*\nsingle_blocks.*.linear2")
    names = [name.removeprefix("diffusion_model.") for name in quantized.object_patches]
    assert names and not any(n.startswith("double_blocks.0.") or n.endswith("linear2") for n in names)
    assert any(n.startswith("double_blocks.1.") for n in names)


@pytest.mark.parametrize("order", ["before", "after"])
def test_lora_applies_before_or_after_quantizing(flux, nodes, sample, lora, order):
    with_lora = sample(lora(flux))
    model = nodes.INT8QuantizeModel(lora(flux)) if order == "before" else lora(nodes.INT8QuantizeModel(flux))
    got = sample(model)
    assert difference(got, with_lora) < 0.05
    assert difference(got, with_lora) < difference(got, sample(flux)) / 2


def test_two_lora_branches_do_not_disturb_each_other(flux, nodes, sample, lora):
    quantized = nodes.INT8QuantizeModel(flux)
    plain = sample(quantized)
    a, b = lora(quantized, "tiny_flux_a"), lora(quantized, "tiny_flux_b")
    first_a, first_b = sample(a), sample(b)
    assert difference(first_a, first_b) > 0.01
    assert torch.equal(sample(a), first_a) and torch.equal(sample(b), first_b) and torch.equal(sample(quantized), plain)


def test_quantizing_while_a_lora_is_loaded_reads_the_files_weights(flux, nodes, sample, lora):
    want = sample(nodes.INT8QuantizeModel(flux))
    gc.collect()
    sample(lora(flux, strength=3.0))  # the shared model now holds patched weights
    assert torch.equal(sample(nodes.INT8QuantizeModel(flux)), want)


def test_running_again_reuses_the_layers(flux, nodes):
    a, b = nodes.INT8QuantizeModel(flux), nodes.INT8QuantizeModel(flux)
    assert all(a.object_patches[k] is b.object_patches[k] for k in a.object_patches)
    other = nodes.INT8QuantizeModel(flux, method="rowwise")
    assert not any(a.object_patches[k] is other.object_patches[k] for k in a.object_patches)


@pytest.mark.parametrize("method", ["rowwise", "convrot"])
def test_what_another_pack_writes_into_weights_is_in_layers_that_are_made_after_it(load, nodes, sample, method):
    def scale(layer):
        layer.weight.data.mul_(1.5)

    def replace(layer):
        layer.weight = torch.nn.Parameter(layer.weight * 1.5, requires_grad=False)

    def shift(layer):
        layer.bias.data.add_(1.0)

    def layer_of(model):
        return model.get_model_object("diffusion_model.double_blocks.0.img_mlp.0")
    model = load()
    layer = layer_of(model)
    for number, edit in enumerate((scale, replace, shift), 1):
        before = nodes.INT8QuantizeModel(model, method=method)
        image = sample(before)
        edit(layer)
        after = nodes.INT8QuantizeModel(model, method=method)
        fresh = load()
        for done in (scale, replace, shift)[:number]:
            done(layer_of(fresh))
        want = sample(nodes.INT8QuantizeModel(fresh, method=method))
        assert torch.equal(sample(after), want) and difference(want, image) > 1e-4, edit
        assert torch.equal(sample(before), image)
        kept = [name for name in before.object_patches if before.object_patches[name] is after.object_patches[name]]
        assert len(kept) == len(before.object_patches) - 1


def test_of_a_large_weight_any_dense_change_is_seen(flux):
    from int8_compile.compile.comfyui.int8_source import values_of

    name = "double_blocks.0.img_mlp.0"
    model = flux.clone()
    for dtype in (torch.bfloat16, torch.float8_e4m3fn):
        weight = torch.randn(1000, 3000).to(dtype)
        model.object_patches[f"diffusion_model.{name}.weight"] = torch.nn.Parameter(weight, requires_grad=False)
        before = values_of(model, name)
        assert values_of(model, name) == before
        weight[:, 7::8] = (weight[:, 7::8].float() * 1.5).to(dtype)  # by columns, as a merge of some channels
        assert values_of(model, name) != before


def test_a_layer_whose_weight_another_pack_has_replaced_is_made_again(flux, nodes, sample):
    want = sample(nodes.INT8QuantizeModel(flux, method="rowwise"))
    sample(flux)
    model = nodes.INT8QuantizeModel(flux, method="rowwise")
    name, layer = next(iter(model.object_patches.items()))
    layer.weight = torch.nn.Parameter(torch.zeros(layer.weight.shape), requires_grad=False)
    again = nodes.INT8QuantizeModel(flux, method="rowwise")
    assert again.object_patches[name] is not layer and torch.equal(sample(again), want)


def test_layers_go_with_the_model(load, nodes):
    from int8_compile.compile.comfyui import int8_layer

    model = load()
    quantized = nodes.INT8QuantizeModel(model, method="convrot")
    before = len(int8_layer._LAYERS)
    assert len(int8_layer._LAYERS[model.model]) == len(quantized.object_patches)
    layers = int8_layer._LAYERS[model.model]
    del quantized
    gc.collect()
    assert len(layers) == 0
    del model
    gc.collect()
    assert len(int8_layer._LAYERS) < before


def test_quantizing_twice_says_that_nothing_is_left(flux, nodes):
    for method in ("auto", "convrot"):
        with pytest.raises(ValueError, match="no Linear layers to quantize"):
            nodes.INT8QuantizeModel(nodes.INT8QuantizeModel(flux, method=method))


def test_a_model_without_linear_layers_is_refused(flux, nodes):
    model = flux.clone()
    model.model = type("BaseModel", (torch.nn.Module,), {})()
    model.model.diffusion_model = torch.nn.Sequential(torch.nn.Conv2d(4, 4, 3))
    with pytest.raises(ValueError, match="no Linear layers to quantize"):
        nodes.INT8QuantizeModel(model)


def test_bad_weights_are_named_and_the_model_still_samples(load, nodes, sample):
    model = load()
    before = sample(model)
    weight = model.model.diffusion_model.single_blocks[1].linear1.weight
    value = weight[0, 0].item()
    weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"layer 'single_blocks\.1\.linear1'.*NaN"):
        nodes.INT8QuantizeModel(model, method="convrot")
    measured = nodes.INT8QuantizeModel(model)
    with pytest.raises(ValueError, match=r"layer 'single_blocks\.1\.linear1'.*NaN"):
        sample(measured)
    weight[0, 0] = value
    assert torch.equal(sample(model), before)


def test_weights_whose_float_values_are_not_known_are_refused_by_the_name_of_their_format(flux, nodes):
    for weight, what in ((torch.zeros(256, 256, dtype=torch.uint8), r"already quantized \(torch\.uint8\)"),
                         (torch.zeros(256, 256).as_subclass(type("GGMLTensor", (torch.Tensor,), {})),
                          r"one of another pack's loader \(GGMLTensor\), which keeps its values to itself")):
        other = flux.clone()
        other.add_object_patch("diffusion_model.single_blocks.0.linear2.weight", torch.nn.Parameter(weight, requires_grad=False))
        with pytest.raises(ValueError, match=what):
            nodes.INT8QuantizeModel(other)


def test_the_triton_kernel_needs_a_gpu(flux, nodes):
    if flux.load_device.type == "cuda":
        pytest.skip("this machine has a GPU")
    with pytest.raises(ValueError, match=r"triton kernel needs a CUDA device.*Set kernel to auto"):
        nodes.INT8QuantizeModel(flux, kernel="triton")


def test_offloaded_layers_with_lora_give_the_same_result(flux, nodes, lora):
    """Low VRAM: weights stay on the offload device, and core leaves the LoRA in the layer's weight_function."""
    model = lora(nodes.INT8QuantizeModel(flux, method="convrot"))
    x, context, y = torch.randn(1, 16, 8, 8), torch.randn(1, 20, 4096), torch.randn(1, 2048)

    def forward():
        return model.model.diffusion_model(x, torch.tensor([0.5]), context=context, y=y)

    model.patch_model(torch.device("cpu"))
    want = forward()
    model.unpatch_model(torch.device("cpu"))
    model.patch_model(torch.device("cpu"), lowvram_model_memory=1)
    try:
        assert any(getattr(m, "weight_function", None) for m in model.model.modules())
        assert torch.equal(forward(), want)
    finally:
        model.unpatch_model(torch.device("cpu"))


def test_a_layer_whose_class_another_pack_patched_is_in_no_artifact(flux, nodes, monkeypatch):
    model = nodes.INT8QuantizeModel(flux, method="convrot")
    layer = next(iter(model.object_patches.values()))
    assert layer.artifact_tensors()
    for kind in (type(layer), type(layer).__mro__[1], torch.nn.Module):
        name = "_call_impl" if kind is torch.nn.Module else "forward"
        with monkeypatch.context() as patched:
            original = getattr(kind, name)
            patched.setattr(kind, name, lambda self, *args, _call=original, **kwargs: _call(self, *args, **kwargs) * 2)
            assert not layer.artifact_tensors()
    assert layer.artifact_tensors()
