"""INT8 Quantize Model beside packs that change how a layer computes: their change stays in effect, and goes with them."""
from __future__ import annotations

import types

import pytest
import torch
from toys import difference

pytestmark = pytest.mark.comfy
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
