"""Weights that are not where the block runs: ComfyUI's own partial load, on a real ModelPatcher."""
from __future__ import annotations

import pytest
from toys import difference

from .test_compile import CHEAP

pytestmark = pytest.mark.comfy


@pytest.mark.rotating
@pytest.mark.parametrize("quantized", [False, True], ids=["float", "int8"])
@pytest.mark.parametrize("with_lora", [False, True], ids=["plain", "lora"])
def test_offloaded_weights_give_the_same_result_and_a_bounded_number_of_graphs(flux, nodes, lora, apply, graphs, quantized, with_lora):
    model = nodes.INT8QuantizeModel(flux, method="convrot") if quantized else flux
    model = lora(model) if with_lora else model
    compiled = nodes.CompileModel(model, **CHEAP)
    shares = (1e-6, 0.3, 0.5, 0.8)
    for share in shares:
        want = apply(model, share)
        assert model.model.model_lowvram
        assert difference(apply(compiled, share), want) < 1e-3
    assert graphs() <= 2


def test_the_split_may_move_without_a_new_graph(flux, nodes, lora, apply, graphs, sample):
    model = lora(flux)
    compiled = nodes.CompileModel(model, **CHEAP)
    apply(compiled, 0.5)
    before = graphs()
    for share in (0.2, 0.9, 1e-6):
        apply(compiled, share)
    assert graphs() == before


def test_offloaded_layers_are_as_they_were_after_the_step(flux, nodes, lora, apply):
    compiled = nodes.CompileModel(lora(flux), **CHEAP)

    def state():
        return {name: (m.comfy_cast_weights, len(m.weight_function), len(m.bias_function), id(m.weight))
                for name, m in flux.model.named_modules() if hasattr(m, "weight_function") and getattr(m, "weight", None) is not None}

    apply(lora(flux), 0.5)
    apply(compiled, 0.5)
    after = state()
    assert any(functions for _, functions, _, _ in after.values()) and any(cast for cast, *_ in after.values())
    compiled.unpatch_model(compiled.offload_device)
    assert not any(functions for _, functions, _, _ in state().values())


def test_a_model_with_dynamic_vram_is_read_from_its_file_once(load, nodes, monkeypatch):
    """The CPU loader is never dynamic: a patcher that says it is, with the loader's own way to load a second time."""
    from comfy.model_patcher import ModelPatcher

    class Dynamic(ModelPatcher):
        def is_dynamic(self):
            return True

    model, reads = load(), []

    def reload(disable_dynamic):
        reads.append(disable_dynamic)
        return load()

    model.__class__ = Dynamic
    model.cached_patcher_init = (reload, ())
    first = nodes.INT8LazyTorchCompile(model)
    quantized = nodes.INT8QuantizeModel(model, method="convrot")
    second = nodes.INT8LazyTorchCompile(quantized)
    assert reads == [True]
    assert first.model is second.model is not model.model and type(second) is ModelPatcher
    # The same layers, but the copy's own: what is loaded into one model must not show in the other (test_two_models.py).
    assert second.object_patches.keys() == quantized.object_patches.keys() != set()
    assert all(second.object_patches[name] is not layer for name, layer in quantized.object_patches.items())


def test_a_cast_that_takes_fewer_arguments_fetches_them_too(comfy, flux, nodes, apply, graphs, monkeypatch):
    """ComfyUI 0.8.0's knows neither compute_dtype nor want_requant."""
    core_cast = comfy.ops.cast_bias_weight

    def cast_bias_weight(s, input=None, dtype=None, device=None, bias_dtype=None, offloadable=False):
        return core_cast(s, input, dtype, device, bias_dtype, offloadable)

    from int8_compile.compile.comfyui import core
    core.usable.cache_clear()
    monkeypatch.setattr(comfy.ops, "cast_bias_weight", cast_bias_weight)
    try:
        compiled = nodes.CompileModel(flux, **CHEAP)
        for share in (1e-6, 0.5):
            assert difference(apply(compiled, share), apply(flux, share)) < 1e-3
        assert core.usable(core.OFFLOAD) and graphs() <= 2
    finally:
        core.usable.cache_clear()
