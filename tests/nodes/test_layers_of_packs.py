"""INT8 Quantize Model beside packs that change how a layer computes: their change stays in effect, and goes with them."""
from __future__ import annotations

import copy
import types
import uuid

import pytest
import torch
from toys import difference

pytestmark = [pytest.mark.comfy, pytest.mark.rotating(3)]
NAME = "double_blocks.0.img_mlp.0"
FULL = f"diffusion_model.{NAME}"


def with_forward(model, factor: float = 1.5):
    """As another pack's node gives it: the layer's result times factor."""
    clone = model.clone()
    forward = clone.get_model_object(f"{FULL}.forward")
    clone.add_object_patch(f"{FULL}.forward", lambda *args, **kwargs: forward(*args, **kwargs) * factor)
    return clone


@pytest.mark.parametrize("method", ["convrot", "auto"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "behind"])
def test_a_forward_that_another_pack_patches_is_in_effect_and_gone_with_it(nodes, flux, sample, method, before):
    def both(model):
        return quantize(with_forward(model)) if before else with_forward(quantize(model))

    def quantize(model):
        return nodes.INT8QuantizeModel(model, method=method)
    eager, quantized, patched = sample(flux), sample(quantize(flux)), sample(with_forward(flux))
    assert difference(patched, eager) > 0.05
    for _ in range(2):
        assert difference(sample(both(flux)), patched) < 0.04
        assert torch.equal(sample(flux), eager)
        assert torch.equal(sample(quantize(flux)), quantized)
        assert torch.equal(sample(with_forward(flux)), patched)


@pytest.mark.parametrize("name", ["forward", "bias", "weight"])
@pytest.mark.parametrize("before", [True, False], ids=["before", "behind"])
def test_what_a_pack_patches_in_a_layer_comes_off_a_clone_of_what_is_loaded(nodes, flux, sample, name, before):
    """ComfyUI puts it on the loaded model, which it does not load again."""
    def quantize(model):
        return nodes.INT8QuantizeModel(model, method="convrot")

    def patch(model):
        if name == "forward":
            return with_forward(model)
        value = flux.get_model_object(f"{FULL}.{name}")
        clone = model.clone()
        clone.add_object_patch(f"{FULL}.{name}", torch.nn.Parameter(torch.randn_like(value) * value.std() * 2, requires_grad=False))
        return clone
    torch.manual_seed(0)
    eager, quantized = sample(flux), sample(quantize(flux))
    int8 = quantize(flux)
    for _ in range(2):
        sample(int8)
        sample(quantize(patch(flux)) if before else patch(int8))
        assert torch.equal(sample(flux), eager)
        assert torch.equal(sample(quantize(flux)), quantized)


@pytest.mark.parametrize("kind", ["forward", "hook", "pre-hook", "class"])
def test_what_a_pack_puts_on_a_layer_keeps_it_in_high_precision(nodes, flux, sample, kind):
    from int8_compile.compile.comfyui.int8_calibrate import quantize_model
    from int8_compile.int8.options import Int8Options

    layer = flux.get_model_object(FULL)
    quantized = sample(nodes.INT8QuantizeModel(flux, method="convrot"))
    before = sample(flux)
    if kind == "forward":
        layer.forward = types.MethodType(lambda self, *args: type(self).forward(self, *args) * 1.5, layer)
        off = lambda: layer.__dict__.pop("forward")  # noqa: E731
    elif kind == "class":
        own = type(layer)
        layer.__class__ = type("Louder", (own,), {"forward": lambda self, *args: own.forward(self, *args) * 1.5})
        off = lambda: setattr(layer, "__class__", own)  # noqa: E731
    elif kind == "hook":
        off = layer.register_forward_hook(lambda module, args, result: result * 1.5).remove
    else:
        off = layer.register_forward_pre_hook(lambda module, args: (args[0] * 1.5,)).remove
    try:
        changed = sample(flux)
        assert difference(changed, before) > 0.05
        said: list = []
        int8 = quantize_model(flux, Int8Options("convrot"), lambda report, *more: said.append(report))
        assert difference(sample(int8), changed) < 0.04
        assert FULL not in int8.object_patches
        assert f"kept in high precision where another pack has changed how they compute: {NAME}" in said[-1].text()
    finally:
        off()
    assert torch.equal(sample(nodes.INT8QuantizeModel(flux, method="convrot")), quantized)
    assert torch.equal(sample(flux), before)


class Around(torch.nn.Module):
    """A module of another pack around one of the model's."""

    def __init__(self, inner, factor: float):
        super().__init__()
        self.inner, self.factor = inner, factor

    def forward(self, *args, **kwargs):
        result = self.inner(*args, **kwargs)
        return tuple(part * self.factor for part in result) if isinstance(result, tuple) else result * self.factor


def with_another_block(model):
    block = copy.deepcopy(model.get_model_object("diffusion_model.double_blocks.0"))
    with torch.no_grad():
        for name, parameter in block.named_parameters():
            parameter.mul_(1.5 if "img_mlp" in name else 1)
    clone = model.clone()
    clone.add_object_patch("diffusion_model.double_blocks.0", block)
    return clone


def with_something_around(name):
    def patched(model):
        clone = model.clone()
        clone.add_object_patch(name, Around(model.get_model_object(name), 1.3))
        return clone
    return patched


PATCHES = {"block": with_another_block, "around a block": with_something_around("diffusion_model.double_blocks.0"),
           "around a layer": with_something_around(FULL), "forward": with_forward}


@pytest.mark.parametrize("kind", PATCHES)
def test_a_model_is_quantized_as_it_is_whichever_clone_was_loaded_last(nodes, flux, sample, kind):
    def quantize(model):
        return nodes.INT8QuantizeModel(model, method="convrot")
    eager, other = sample(flux), PATCHES[kind](flux)
    quantized = sample(quantize(flux))
    first = sample(quantize(other))  # behind a model that was loaded plain
    patched = sample(other)
    assert difference(patched, eager) > 0.02 and difference(first, patched) < 0.04
    assert torch.equal(sample(quantize(flux)), quantized)
    sample(other)
    assert torch.equal(sample(quantize(other)), first)
    sample(quantize(other))
    assert torch.equal(sample(quantize(flux)), quantized) and torch.equal(sample(other), patched) and torch.equal(sample(flux), eager)


def test_a_layer_below_what_a_pack_has_put_around_its_block_is_the_models_own(nodes, flux, sample):
    from int8_compile.compile.comfyui.object_patches import model_of, object_of

    block, layer = "diffusion_model.single_blocks.0", flux.get_model_object("diffusion_model.single_blocks.0.linear1")
    other, name = with_something_around(block)(flux), f"{block}.inner.linear1"
    sample(nodes.INT8QuantizeModel(flux))
    assert flux.model.get_submodule(f"{block}.linear1") is not layer
    assert object_of(other, name) is layer and object_of(other, f"{name}.weight") is layer.weight
    assert model_of(other).get_submodule(name) is layer


def with_a_parameter(model, key: str, seed: int):
    value = model.get_model_object(f"{FULL}.{key}")
    noise = torch.randn(value.shape, generator=torch.Generator().manual_seed(seed)).to(value)
    clone = model.clone()
    clone.add_object_patch(f"{FULL}.{key}", torch.nn.Parameter(noise * (1 if key == "bias" else 0.1), requires_grad=False))
    return clone


@pytest.mark.parametrize("key", ["bias", "weight"])
def test_of_two_packs_that_patch_a_parameter_the_one_behind_int8_counts(nodes, flux, sample, key):
    def both(model, between):
        return with_a_parameter(between(with_a_parameter(model, key, 1)), key, 2)
    wanted = sample(both(flux, lambda model: model))
    assert difference(sample(with_a_parameter(flux, key, 1)), wanted) > 0.05
    assert difference(sample(both(flux, lambda model: nodes.INT8QuantizeModel(model, method="convrot"))), wanted) < 0.04


def test_what_an_int8_layer_was_made_of_is_back_where_it_is_taken_off(nodes, flux, sample):
    from int8_compile.compile.comfyui.int8_checkpoint import native_model
    from int8_compile.compile.comfyui.int8_model import int8_layers

    patched = with_a_parameter(flux, "weight", 1)
    smoothed = nodes.INT8QuantizeModel(patched, method="smoothquant")
    wanted = sample(smoothed)
    native = native_model(smoothed)
    assert not any(is_smoothed for _, is_smoothed in int8_layers(native).values())
    assert difference(sample(native), wanted) < 0.06


def test_a_lora_on_a_layer_whose_weight_another_pack_has_put_behind_int8(nodes, flux, sample):
    """ComfyUI's own way: the LoRA is added to that weight."""
    def both(model):
        clone = with_a_parameter(model, "weight", 1).clone()
        clone.add_patches({f"{FULL}.weight": (torch.ones_like(flux.get_model_object(f"{FULL}.weight")) * 0.01,)}, 1.0)
        return clone
    eager, quantized = sample(flux), sample(nodes.INT8QuantizeModel(flux, method="convrot"))
    wanted = sample(both(flux))
    assert difference(sample(both(nodes.INT8QuantizeModel(flux, method="convrot"))), wanted) < 0.04
    assert torch.equal(sample(flux), eager)
    assert torch.equal(sample(nodes.INT8QuantizeModel(flux, method="convrot")), quantized)


@pytest.mark.parametrize("name", ["forward", "weight"])
def test_patches_come_off_in_reverse_after_a_load_that_failed_or_without_sampling(nodes, flux, sample, name, monkeypatch):
    import comfy.model_management
    from comfy.model_patcher import ModelPatcher

    def patched(model):
        return with_forward(model) if name == "forward" else with_a_parameter(model, name, 1)
    eager, quantized = sample(flux), sample(nodes.INT8QuantizeModel(flux, method="convrot"))
    int8 = nodes.INT8QuantizeModel(flux, method="convrot")
    sample(int8)
    comfy.model_management.load_models_gpu([patched(int8)])
    assert torch.equal(sample(flux), eager)

    with monkeypatch.context() as failing:
        def load(*args, **kwargs):
            raise RuntimeError("no memory")
        failing.setattr(ModelPatcher, "load", load)
        with pytest.raises(RuntimeError, match="no memory"):
            comfy.model_management.load_models_gpu([patched(nodes.INT8QuantizeModel(flux, method="convrot", keep_layers="*linear2"))])
    assert torch.equal(sample(flux), eager)
    assert torch.equal(sample(nodes.INT8QuantizeModel(flux, method="convrot")), quantized)


def test_a_float_model_is_quantized_again_while_a_parameter_is_patched_in_its_int8_layer(nodes, flux, sample):
    quantized = sample(nodes.INT8QuantizeModel(flux, method="convrot"))
    sample(with_a_parameter(nodes.INT8QuantizeModel(flux, method="convrot"), "weight", 1))
    clone = flux.clone()
    clone.patches_uuid = uuid.uuid4()
    assert torch.equal(sample(nodes.INT8QuantizeModel(clone, method="convrot")), quantized)


def test_a_model_that_was_unloaded_is_loaded_again(nodes, flux, sample):
    """ComfyUI's Unload Models: the server frees models outside inference mode."""
    import comfy.model_management

    with torch.inference_mode():
        quantized = nodes.INT8QuantizeModel(flux, method="convrot")
        before = sample(quantized)
    with torch.inference_mode(False):
        comfy.model_management.unload_all_models()
    with torch.inference_mode():
        assert torch.equal(sample(quantized), before)
