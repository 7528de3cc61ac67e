"""LoRAs on INT8 layers against the float model with the same LoRAs: order, offloading, how many, strength, method, compiled or not."""
from __future__ import annotations

import pytest
import torch
from toys import difference

from .test_compile import CHEAP

pytestmark = pytest.mark.comfy

# One at full strength, the same at another, two of them.
LORAS = {
    "tiny_flux": ([("tiny_flux_a", 1.0)], [("tiny_flux_a", -0.5)], [("tiny_flux_a", 1.0), ("tiny_flux_b", 0.3)]),
    "tiny_wan": ([("tiny_wan_a", 1.0)], [("tiny_wan_a", -0.5)], [("tiny_wan_a", 1.0), ("tiny_wan_a", 0.3)]),
}
# Of a model's weights that are loaded: all of them, about half (a block on the border has both kinds), none.
SHARES = (None, 0.5, 1e-6)
# A layer that gets a LoRA is quantized as it would have been with the LoRA in the checkpoint. Its error relative to ||W + delta|| is
# what quantizing W costs relative to ||W||, but for the largest values of the rows: at most 1.01 here. Adding the LoRA to dequantized
# weights would be 1.41.
WEIGHT_FACTOR = 1.05
# What a model makes of its layers' errors depends on its weights, so also on the LoRA: 0.88 to 1.18 here.
OUTPUT_FACTOR = 1.25


def load_part(model, share):
    model.unpatch_model(model.offload_device)
    memory = 0 if share is None else max(1, int(share * model.model_size()))
    model.patch_model(model.load_device, lowvram_model_memory=memory)
    assert model.model.model_lowvram is (share is not None)


def step(model) -> torch.Tensor:
    """One step of a model that is loaded: -> its prediction."""
    video = type(model.model.diffusion_model).__name__ == "WanModel"
    generator = torch.Generator().manual_seed(3)
    shapes = ((1, 16, 2, 8, 8) if video else (1, 16, 16, 16), (1, 20, 4096), (1, 2048))
    x, context, y = (torch.randn(*shape, generator=generator) for shape in shapes)
    kwargs = {} if video else {"y": y, "guidance": torch.tensor([3.5])}
    return model.model.apply_model(x, torch.tensor([0.7]), c_crossattn=context, transformer_options={"wrappers": model.wrappers}, **kwargs)


def int8_weights(model, names) -> dict[str, tuple[torch.Tensor, torch.Tensor]]:
    """(int8, scale) that the loaded model's layers multiply with, and then no function of the weight's."""
    result = {}
    for name in names:
        layer = model.model.get_submodule(name)
        with layer.lora_in_weight(model.load_device):
            assert not layer.weight_function
            result[name] = layer.weight._qdata.clone(), layer.weight._params.scale.clone()
    return result


def same(a, b) -> bool:
    return all(torch.equal(x, y) for name in a for x, y in zip(a[name], b[name], strict=True))


def errors(patched, float_model, names) -> dict[str, float]:
    """Relative error of each INT8 layer's weight against the float model's; both models are loaded whole."""
    return {name: difference(patched.model.get_submodule(name).weight.to(torch.float32).dequantize(),
                             float_model.model.get_submodule(name).weight) for name in names}


@pytest.fixture
def stack(lora):
    def stack(model, loras):
        for name, strength in loras:
            model = lora(model, name, strength)
        return model
    return stack


@pytest.fixture(scope="module")
def load_fp32(comfy, models_dir):
    def load_fp32(name):
        path = models_dir / "models" / "diffusion_models" / f"{name}.safetensors"
        return comfy.sd.load_diffusion_model(str(path), model_options={"dtype": torch.float32})
    return load_fp32


@pytest.mark.rotating
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
@pytest.mark.parametrize("method", ["rowwise", "convrot"])
@pytest.mark.parametrize("family", ["tiny_flux", "tiny_wan"])
def test_error_is_quantizations_own_and_bits_come_back(load, load_fp32, nodes, stack, graphs, family, method, compiled):
    oracle, model = load_fp32(family), load(family)
    quantized = nodes.INT8QuantizeModel(model, method=method)
    names = list(quantized.object_patches)
    load_part(oracle, None)
    load_part(quantized, None)
    bits = int8_weights(quantized, names)
    own, own_output = errors(quantized, oracle, names), difference(step(quantized), step(oracle))

    worst, worst_output = 0.0, 0.0
    for loras in LORAS[family]:
        with_lora = stack(oracle, loras)
        load_part(with_lora, None)
        want, first = step(with_lora), None
        for patched in (nodes.INT8QuantizeModel(stack(model, loras), method=method), stack(quantized, loras)):
            patched = nodes.CompileModel(patched, **CHEAP) if compiled else patched
            for share in SHARES:
                load_part(patched, share)
                worst_output = max(worst_output, difference(step(patched), want) / own_output)
                got = int8_weights(patched, names)
                if first is None:
                    first = got
                    worst = max([worst, *(error / own[name] for name, error in errors(patched, with_lora, names).items())])
                    assert not same(got, bits)
                assert same(got, first), "the order or the part that is loaded changes the result"
    print(f"{family} {method}: weights {worst:.3f}, output {worst_output:.3f} of quantization's own error")
    assert worst < WEIGHT_FACTOR
    assert worst_output < OUTPUT_FACTOR
    if compiled:
        assert graphs() <= 2

    for share in SHARES:
        load_part(quantized, share)
        assert same(int8_weights(quantized, names), bits)
