"""ComfyUI's Load LoRA (Bypass) and INT8 layers: it takes hold of a model's layers when its node runs."""
from __future__ import annotations

import pytest
import torch
from toys import difference

from .test_compile import CHEAP

pytestmark = pytest.mark.comfy


@pytest.fixture
def bypass(comfy, models_dir):
    if not hasattr(comfy.sd, "load_bypass_lora_for_models"):
        pytest.skip("this ComfyUI has no bypass LoRAs")
    from int8_compile.compile.comfyui.bypass_lora import patch_bypass_loras

    patch_bypass_loras()  # as the pack's start does

    def bypass(model, name="tiny_flux_a", strength=1.0):
        weights = comfy.utils.load_torch_file(str(models_dir / "models" / "loras" / f"{name}.safetensors"))
        return comfy.sd.load_bypass_lora_for_models(model, None, weights, strength, 0)[0]
    return bypass


@pytest.mark.rotating
@pytest.mark.parametrize("method", ["convrot", "auto"])
def test_its_effect_is_the_same_before_and_behind_int8_layers_whoever_sampled_last(flux, nodes, sample, bypass, method):
    plain, want = sample(flux), sample(bypass(flux))
    effect = difference(want, plain)
    assert effect > 0.05
    int8 = nodes.INT8QuantizeModel(flux, method=method)

    def branches():
        return {"float": bypass(flux), "behind": bypass(int8), "before": nodes.INT8QuantizeModel(bypass(flux), method=method)}

    old, first = branches(), {}
    for last in (flux, int8):
        sample(last)
        for branch in old, branches():  # of a cached node, and of one that runs now
            for name, model in branch.items():
                sample(last)
                latent = sample(model)
                assert difference(latent, want) < (1e-6 if name == "float" else effect / 4), name
                if branch is old:
                    assert torch.equal(first.setdefault(name, latent), latent)
    assert torch.equal(sample(flux), plain) and difference(sample(int8), plain) < effect / 4


def test_a_model_without_our_nodes_has_its_lora_after_int8_layers_were_there(flux, nodes, sample, bypass):
    want = sample(bypass(flux))
    sample(nodes.INT8QuantizeModel(flux, method="convrot"))
    assert torch.equal(sample(bypass(flux)), want)


@pytest.mark.rotating
def test_another_strength_and_compile(flux, nodes, sample, bypass):
    int8 = nodes.INT8QuantizeModel(flux, method="convrot")
    plain = sample(int8)
    for strength in (1.0, 0.3):
        want = sample(bypass(flux, strength=strength))
        image = sample(bypass(int8, strength=strength))
        assert difference(image, want) < difference(image, plain) / 2
        compiled = nodes.CompileModel(int8, **CHEAP)
        assert difference(sample(bypass(compiled, strength=strength)), image) < 1e-3
        assert difference(sample(nodes.CompileModel(bypass(int8, strength=strength), **CHEAP)), image) < 1e-3
    assert torch.equal(sample(int8), plain)
