"""Core's merging and saving nodes beside INT8 layers: a float model is never harmed by its INT8 clone, and no file is silently wrong."""
from __future__ import annotations

import itertools

import pytest
import torch
from safetensors import safe_open
from toys import difference

pytestmark = pytest.mark.comfy
# INT8's own error on these random models.
INT8 = 0.03
KINDS = ("float", "float, INT8 clone loaded", "INT8", "INT8, sampled", "INT8 with a LoRA, sampled")


@pytest.fixture
def pair(load):
    """Two models with other weights."""
    def pair():
        first, second = load(), load()
        generator = torch.Generator().manual_seed(5)
        for parameter in second.model.diffusion_model.parameters():
            parameter.data += 0.2 * parameter.abs().mean() * torch.randn(parameter.shape, generator=generator).to(parameter)
        return first, second
    return pair


@pytest.fixture
def made(nodes, sample, lora):
    """(what a merge gets of a model, the same in float)."""
    def made(model, kind, method):
        if kind == "float":
            return model, model
        source = lora(model) if "LoRA" in kind else model
        quantized = nodes.INT8QuantizeModel(source, method=method)
        if kind != "INT8":
            sample(quantized)
        return (model, model) if kind.startswith("float") else (quantized, source)
    return made


@pytest.fixture
def merge(comfy):
    from comfy_extras import nodes_model_merging as core
    from comfy_extras.nodes_model_merging_model_specific import ModelMergeFlux1

    return {
        "simple": lambda a, b: core.ModelMergeSimple().merge(a, b, 0.3)[0],
        "all of the second": lambda a, b: core.ModelMergeSimple().merge(a, b, 0.0)[0],
        "subtract": lambda a, b: core.ModelAdd().merge(a, core.ModelSubtract().merge(b, a, 0.5)[0])[0],
        "add": lambda a, b: core.ModelAdd().merge(a, b)[0],
        "blocks": lambda a, b: ModelMergeFlux1().merge(a, b, **{"img_in.": 1.0, "double_blocks.0.": 0.25, "single_blocks.": 0.5})[0],
        "twice": lambda a, b: core.ModelMergeSimple().merge(core.ModelMergeSimple().merge(a, b, 0.5)[0], b, 0.5)[0],
    }


def check(pair, made, merge, sample, first, second, method):
    want_first, want_second = pair()
    (a, float_a), (b, float_b) = made(want_first, first, method), made(want_second, second, method)
    merged = merge(a, b)
    # What a merge of models gives that never met INT8.
    clean_first, clean_second = pair()
    clean_a, clean_b = (made(clean, "float", method)[0] for clean in (clean_first, clean_second))
    clean_a.patches, clean_b.patches = float_a.patches, float_b.patches
    want = sample(merge(clean_a, clean_b))
    image = sample(merged)
    if first.startswith("float"):
        assert torch.equal(image, want)
    else:
        assert 0 < difference(image, want) < INT8
    assert torch.equal(sample(merged), image)
    for model, clean in ((want_first, clean_first), (want_second, clean_second)):
        clean.patches = {}
        assert torch.equal(sample(model), sample(clean))


@pytest.mark.rotating
@pytest.mark.parametrize(("first", "second"), itertools.product(KINDS, KINDS))
def test_a_merge_is_that_of_the_float_models_in_every_order(pair, made, merge, sample, first, second):
    check(pair, made, merge["simple"], sample, first, second, "convrot")


@pytest.mark.rotating
@pytest.mark.parametrize("node", ["all of the second", "subtract", "add", "blocks", "twice"])
@pytest.mark.parametrize(("first", "second"), [("float", "float, INT8 clone loaded"), ("float, INT8 clone loaded", "INT8, sampled"),
                                               ("INT8, sampled", "INT8 with a LoRA, sampled")])
def test_every_merging_node_is_right_beside_smoothed_layers(pair, made, merge, sample, first, second, node):
    check(pair, made, merge[node], sample, first, second, "smoothquant")


def test_a_branch_merged_with_its_own_int8_clone_is_itself(load, nodes, merge, sample):
    flux = load()
    image = sample(flux)
    sample(quantized := nodes.INT8QuantizeModel(flux, method="smoothquant"))
    assert difference(sample(merge["simple"](flux, quantized)), image) < 1e-5
    assert difference(sample(merge["simple"](quantized, flux)), image) < INT8
    assert torch.equal(sample(flux), image)


@pytest.fixture
def save(comfy, output_folder):
    """Core's Save Model and Checkpoint Save: -> the file."""
    from comfy_extras import nodes_model_merging as core

    class AnyVae:
        def get_sd(self):
            return {}

    def save(model, node="ModelSave"):
        if node == "ModelSave":
            core.ModelSave().save(model, f"models/{node}")
        else:
            core.save_checkpoint(model, vae=AnyVae(), filename_prefix=f"models/{node}", output_dir=str(output_folder))
        return max(output_folder.glob(f"models/{node}_*.safetensors"))
    return save


@pytest.mark.parametrize("node", ["ModelSave", "CheckpointSave"])
@pytest.mark.parametrize("sampled", [True, False], ids=["sampled", "new"])
@pytest.mark.parametrize("method", ["auto", "smoothquant", "convrot", "rowwise"])
def test_what_core_saves_is_the_int8_model_whatever_its_method(comfy, load, nodes, sample, save, lora, method, sampled, node):
    flux = load()
    quantized = lora(nodes.INT8QuantizeModel(flux, method=method))
    eager, before = sample(lora(flux)), sample(flux)
    image = sample(quantized) if sampled else None
    path = save(quantized, node)
    with safe_open(path, "pt") as file:
        keys = set(file.keys())
    assert any(key.endswith("comfy_quant") for key in keys) and not any("pre_quant_scale" in key for key in keys)
    loaded = comfy.sd.load_diffusion_model(str(path))
    assert difference(sample(loaded), eager) < INT8
    # The model goes on as it was.
    if sampled:
        assert torch.equal(sample(quantized), image)
    assert torch.equal(sample(flux), before)


def test_another_packs_saving_of_smoothed_layers_is_refused_by_name(load, nodes, sample):
    sample(smoothed := nodes.INT8QuantizeModel(load(), method="smoothquant"))
    with pytest.raises(ValueError, match="Use Save INT8 Model, or set method to convrot or rowwise"):
        smoothed.state_dict_for_saving()
    sample(rotated := nodes.INT8QuantizeModel(load(), method="convrot"))
    assert any(key.endswith("comfy_quant") for key in rotated.state_dict_for_saving())


def test_an_int8_file_as_what_is_merged_in_is_refused_by_name(comfy, load, nodes, sample, save, merge):
    path = save(nodes.INT8QuantizeModel(load(), method="convrot"))
    native = comfy.sd.load_diffusion_model(str(path))
    image = sample(native)
    for model in (native, nodes.INT8QuantizeModel(native)):
        with pytest.raises(ValueError, match=r"quantized in its file.* Load the bf16, fp16 or fp32 file, merge, and"):
            merge["simple"](load(), model)
        sample(model)
    # As the model that is merged into it works.
    other = load()
    for model in (native, nodes.INT8QuantizeModel(native)):
        assert difference(sample(merge["simple"](model, other)), sample(other)) < INT8
    assert torch.equal(sample(native), image)
