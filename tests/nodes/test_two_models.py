"""INT8 layers of a patcher that is cloned onto another model, as INT8 Lazy Torch Compile and core's own nodes do to leave dynamic VRAM, and
core's training and multi-GPU nodes to have a second copy: what is loaded into one model must not show in the other."""
from __future__ import annotations

import pytest
import torch
from toys import difference

pytestmark = pytest.mark.comfy


@pytest.fixture
def onto(load):
    """onto(patcher): a clone of patcher on a second model of the same file."""
    second = load()
    return lambda patcher: patcher.clone(model_override=second.get_clone_model_override())


def test_a_lora_on_a_clone_of_another_model_stays_there(flux, nodes, lora, sample, onto):
    plain = nodes.INT8QuantizeModel(flux, method="convrot")
    want = sample(plain)
    patched = nodes.INT8QuantizeModel(lora(flux), method="convrot")
    want_patched = sample(patched)
    copy, plain_copy = onto(patched), onto(plain)
    assert difference(want_patched, want) > 0.01
    for _ in range(2):
        for model, image in ((copy, want_patched), (plain, want), (plain_copy, want), (patched, want_patched), (plain_copy, want)):
            assert torch.equal(sample(model), image)


def test_clones_of_another_model_share_their_layers_and_memory_that_nobody_has_moved(flux, nodes, lora, onto):
    model = nodes.INT8QuantizeModel(flux, method="convrot")
    one, two = onto(model), onto(model.clone())
    assert one.object_patches and all(one.object_patches[name] is two.object_patches[name] for name in one.object_patches)
    for name, layer in model.object_patches.items():
        copy = one.object_patches[name]
        assert copy is not layer and copy.weight is not layer.weight and copy.kernel == layer.kernel
        assert copy.weight._qdata.data_ptr() == layer.weight._qdata.data_ptr()
    assert all(model.clone().object_patches[name] is layer for name, layer in model.object_patches.items())


def test_what_a_load_noted_on_a_layer_is_not_in_its_copy(flux, nodes, sample, onto):
    model = nodes.INT8QuantizeModel(flux, method="convrot")
    sample(model)
    notes = ("_v", "_v_signature", "_v_weight", "_pin_state", "_prefetch", "comfy_cast_weights", "comfy_patched_weights",
             "_patched_weights", "bias_lowvram_function", "_weight_lowvram_function")
    for layer in model.object_patches.values():
        layer.__dict__.update(dict.fromkeys(notes, "of the load"))
        layer.weight_function = ["of the load"]
    for copy in onto(model).object_patches.values():
        assert not any(getattr(copy, note, None) == "of the load" for note in notes) and copy.weight_function == []


def test_a_channels_last_weight_of_a_clone_of_another_model_is_its_own(load, nodes):
    sd15, second = load("tiny_sd15"), load("tiny_sd15")
    model = nodes.CompileModel(sd15, memory_format="channels_last")
    copy = model.clone(model_override=second.get_clone_model_override())
    parameters = {name: value for name, value in model.object_patches.items() if isinstance(value, torch.nn.Parameter)}
    assert parameters and all(copy.object_patches[name] is not value for name, value in parameters.items())
    assert all(torch.equal(copy.object_patches[name], value) for name, value in parameters.items())


def test_an_int8_model_that_is_not_wholly_loaded_can_be_saved_by_core(flux, nodes):
    """Dynamic VRAM loads nothing: core then wraps what it saves, and integers cannot want gradients."""
    model = nodes.INT8QuantizeModel(flux, method="convrot")
    model.patch_model(load_weights=False)
    try:
        saved = model.state_dict_for_saving()
        name, layer = next(iter(model.object_patches.items()))
        assert torch.equal(saved[f"model.{name}.weight"].to("cpu"), layer.weight._qdata)
    finally:
        model.unpatch_model()
