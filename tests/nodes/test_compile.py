from __future__ import annotations

import pytest
import torch
from toys import difference

pytestmark = [pytest.mark.comfy, pytest.mark.rotating(4)]
CHEAP = {"backend": "aot_eager"}


@pytest.mark.parametrize("family", ["tiny_flux", "tiny_wan"])
def test_compiled_models_sample_the_same(load, nodes, sample, graphs, family):
    model = load(family)
    eager = sample(model)
    assert difference(sample(nodes.CompileModel(model, **CHEAP)), eager) < 1e-3
    assert graphs() > 0


def test_nothing_is_compiled_before_the_first_sampling_call(flux, nodes, sample, graphs, lora):
    quantized = nodes.INT8QuantizeModel(flux)
    lazy = nodes.INT8LazyTorchCompile(lora(quantized))
    compiled = nodes.CompileModel(flux, **CHEAP)
    assert graphs() == 0
    sample(compiled)
    after = graphs()
    assert after >= 1
    lazy.wrappers["apply_model"] = {k: [_cheap(w) for w in v] for k, v in lazy.wrappers["apply_model"].items()}
    sample(lazy)
    assert graphs() > after


def _cheap(wrapper):
    """The same wrapper with a backend that compiles fast."""
    import dataclasses
    return type(wrapper)(wrapper.target, dataclasses.replace(wrapper.options, backend="aot_eager"))


def test_int8_layers_and_lora_are_in_place_when_it_compiles(flux, nodes, sample, lora, graphs):
    model = lora(nodes.INT8QuantizeModel(flux))
    eager = sample(model)
    compiled = nodes.CompileModel(model, dynamic=True, **CHEAP)
    assert torch.allclose(sample(compiled), eager, rtol=1e-4, atol=1e-4)
    assert graphs() == 2


def test_another_lora_or_strength_compiles_nothing_new(flux, nodes, sample, lora, graphs):
    quantized = nodes.INT8QuantizeModel(flux)
    for name, strength in (("tiny_flux_a", 1.0), ("tiny_flux_b", 0.5), ("tiny_flux_a", 0.3)):
        branch = lora(quantized, name, strength)
        assert difference(sample(nodes.CompileModel(branch, **CHEAP)), sample(branch)) < 1e-3
    assert graphs() == 2


@pytest.mark.parametrize("method", ["rowwise", "convrot", "smoothquant"])
def test_another_batch_of_an_int8_model_compiles_nothing_new(flux, nodes, sample, graphs, method):
    quantized = nodes.INT8QuantizeModel(flux, method=method)
    sample(quantized)  # smoothquant looks at the first sampling
    for batch in (1, 2, 1, 3):
        assert difference(sample(nodes.CompileModel(quantized, **CHEAP), batch=batch), sample(quantized, batch=batch)) < 1e-3
    assert graphs() == 2


def test_the_report_says_what_was_compiled_for_what_users_change(flux, nodes, sample, lora):
    from int8_compile.compile.comfyui.compile_model import reports

    def image(model, **given):
        compiled = nodes.CompileModel(model, **CHEAP)
        sample(compiled, **given)
        return reports(compiled)[0]
    assert image(flux).changes == []
    for given, said in (({}, []), ({"height": 24}, ["new size of the latent 24x16: nothing compiled"]),
                        ({"tokens": 24}, ["new prompt length 24: nothing compiled"]), ({"batch": 2}, ["new batch 2: nothing compiled"]),
                        ({"batch": 3, "width": 32}, ["new size of the latent 16x32, batch 3: nothing compiled"]), ({"height": 24}, [])):
        before = list(reports(nodes.CompileModel(flux, **CHEAP))[0].changes)
        report = image(flux, **given)
        assert report.changes == [*before, *said], given
    report = image(lora(flux))
    assert report.changes[-1] == "new LoRA or strength: nothing compiled" and report.changes[-1] in report.text()
    assert image(lora(flux), batch=4).changes[-1].startswith("new batch 4") and len(report.changes) <= 6
    for height in (16, 24):
        each = nodes.INT8LazyTorchCompile(flux, dynamic="false", backend="aot_eager")
        sample(each, height=height)
    assert reports(each)[0].changes == ["new size of the latent 24x16: 2 graphs compiled"]


def test_the_upstream_model_is_untouched_and_gets_its_bits_back(flux, nodes, sample):
    before = sample(flux)
    wrappers, uuid = {k: dict(v) for k, v in flux.wrappers.items()}, flux.patches_uuid
    for compiled in (nodes.CompileModel(flux, **CHEAP), nodes.INT8LazyTorchCompile(flux)):
        assert compiled is not flux
    sample(nodes.CompileModel(flux, **CHEAP))
    assert (flux.wrappers, flux.patches_uuid) == (wrappers, uuid)
    assert all(m._compiled_call_impl is None for m in flux.model.modules())
    assert torch.equal(sample(flux), before)


def test_disable_passes_the_model_on_uncompiled(flux, nodes, sample, graphs):
    model = nodes.CompileModel(flux, disable=True)
    assert torch.equal(sample(model), sample(flux)) and graphs() == 0 and model is not flux


@pytest.mark.parametrize("path, regions", [
    ("diffusion_model", [("DoubleStreamBlock", 2), ("SingleStreamBlock", 3)]),
    ("", [("DoubleStreamBlock", 2), ("SingleStreamBlock", 3)]),
    ("diffusion_model.single_blocks", [("SingleStreamBlock", 3)]),
    ("diffusion_model.single_blocks.1", [("SingleStreamBlock", 1)]),
    ("diffusion_model.final_layer", [("LastLayer", 1)]),
])
def test_object_to_patch_chooses_what_is_compiled(load, nodes, sample, path, regions):
    from int8_compile.compile.comfyui.compile_model import reports

    model = load()
    compiled = nodes.CompileModel(model, object_to_patch=path, **CHEAP)
    assert difference(sample(compiled), sample(model)) < 1e-3
    (report,) = reports(compiled)
    assert report.regions == regions and report.graphs >= 1 and not report.failure


@pytest.mark.rotating
def test_blocks_only_off_compiles_the_model_as_one(flux, nodes, sample):
    from int8_compile.compile.comfyui.compile_model import reports

    lazy = nodes.INT8LazyTorchCompile(flux, compile_transformer_blocks_only=False)
    lazy.wrappers["apply_model"] = {k: [_cheap(w) for w in v] for k, v in lazy.wrappers["apply_model"].items()}
    assert difference(sample(lazy), sample(flux)) < 1e-3
    assert reports(lazy)[0].regions == [("Flux", 1)]


def test_a_path_that_does_not_exist_names_the_nearest(flux, nodes):
    message = r"'diffusion_model\.double_block' does not exist.*nearest path is 'diffusion_model\.double_blocks'"
    with pytest.raises(ValueError, match=message):
        nodes.CompileModel(flux, object_to_patch="diffusion_model.double_block", **CHEAP)
    with pytest.raises(ValueError, match="'model_type' is not a module"):
        nodes.CompileModel(flux, object_to_patch="model_type", **CHEAP)


def test_chained_nodes_on_the_same_object_do_not_compile_twice(flux, nodes):
    twice = nodes.CompileModel(nodes.INT8LazyTorchCompile(flux), **CHEAP)
    assert list(twice.wrappers["apply_model"]) == ["int8_compile.diffusion_model"]
    parts = nodes.CompileModel(flux, object_to_patch="diffusion_model.double_blocks", **CHEAP)
    parts = nodes.CompileModel(parts, object_to_patch="diffusion_model.single_blocks", **CHEAP)
    assert len(parts.wrappers["apply_model"]) == 2
    assert len(nodes.CompileModel(parts, **CHEAP).wrappers["apply_model"]) == 1


def test_memory_format_changes_only_weights_of_its_rank_on_the_clone(wan, nodes, sample):
    conv = wan.model.diffusion_model.patch_embedding.weight
    assert conv.dim() == 5 and conv.is_contiguous()
    eager = sample(wan)
    patched = nodes.CompileModel(wan, memory_format="channels_last_3d", disable=True)
    assert set(patched.object_patches) == {"diffusion_model.patch_embedding.weight"}
    weight = patched.object_patches["diffusion_model.patch_embedding.weight"]
    assert weight.is_contiguous(memory_format=torch.channels_last_3d) and torch.equal(weight, conv)
    assert difference(sample(patched), eager) < 1e-5
    assert wan.model.diffusion_model.patch_embedding.weight is conv or torch.equal(sample(wan), eager)
    assert torch.equal(sample(wan), eager)
    assert wan.model.diffusion_model.patch_embedding.weight.is_contiguous()
    assert not nodes.CompileModel(wan, memory_format="channels_last", disable=True).object_patches
    assert not nodes.CompileModel(wan, memory_format="contiguous_format", disable=True).object_patches


@pytest.mark.parametrize("inputs, message", [
    ({"memory_format": "channels_first"}, "^Invalid memory format"),
    ({"options": "{"}, "^Compilation failed due to invalid options"),
    ({"options": '{"max_autotun": true}'}, "^Compilation failed due to invalid options.*max_autotune"),
    ({"backend": "velocator"}, "^velocator is not installed"),
    ({"backend": "xelerate"}, "^xelerate is not installed"),
    ({"backend": "nonsense"}, "^Unknown backend 'nonsense'"),
    ({"is_patcher": False}, "set is_patcher to true"),
])
def test_bad_input_is_refused_before_anything_runs(flux, nodes, inputs, message):
    with pytest.raises((ValueError, RuntimeError), match=message):
        nodes.CompileModel(flux, **inputs)


@pytest.fixture
def clip(comfy, models_dir):
    path = models_dir / "models" / "text_encoders" / "tiny_clip_l.safetensors"
    return comfy.sd.load_clip([str(path)], clip_type=comfy.sd.CLIPType.SD3)


def test_a_text_encoder_compiles_on_a_clone_and_encodes_the_same(clip, nodes, graphs):
    from int8_compile.compile.comfyui.compile_model import reports

    def encode(clip):
        return clip.encode_from_tokens(clip.tokenize("a red fox"))

    eager = encode(clip)
    compiled = nodes.CompileModel(clip, is_patcher=False, **CHEAP)
    assert graphs() == 0 and "encode_token_weights" not in clip.patcher.object_patches
    assert difference(encode(compiled), eager) < 1e-3
    assert graphs() >= 1 and reports(compiled.patcher)[0].regions == [("CLIPLayer", 12)]
    after = graphs()
    assert torch.equal(encode(clip), eager) and graphs() == after
    assert difference(encode(compiled), eager) < 1e-3 and graphs() == after


def test_a_vae_compiles_on_a_clone_and_codes_the_same(vae, nodes, graphs):
    latent, pixels = torch.randn(1, 16, 8, 8), torch.rand(1, 64, 64, 3)
    eager = vae.decode(latent), vae.encode(pixels)
    compiled = nodes.CompileModel(vae, is_patcher=False, dynamic=True, **CHEAP)
    assert graphs() == 0 and not vae.patcher.object_patches
    for got, want in zip((compiled.decode(latent), compiled.encode(pixels)), eager):
        assert difference(got, want) < 1e-3
    assert graphs() >= 1
    after = graphs()
    assert torch.equal(vae.decode(latent), eager[0]) and graphs() == after
    again = nodes.CompileModel(compiled, is_patcher=False, **CHEAP)
    assert all(not isinstance(m.original, type(m)) for m in again.patcher.object_patches.values())


@pytest.fixture
def controlnet(comfy):
    import comfy.cldm.cldm
    import comfy.controlnet
    import comfy.ops

    from benchmarks.tiny_models import fill

    model = comfy.cldm.cldm.ControlNet(
        image_size=32, in_channels=4, hint_channels=3, model_channels=32, num_res_blocks=[2, 2], channel_mult=[1, 2], num_heads=2,
        use_spatial_transformer=True, transformer_depth=[1, 1, 1, 1], transformer_depth_middle=1, context_dim=64, legacy=False,
        dtype=torch.float32, device="cpu", operations=comfy.ops.disable_weight_init)
    return comfy.controlnet.ControlNet(fill(model, 11).eval(), load_device=torch.device("cpu"))


@pytest.mark.rotating
def test_a_controlnet_compiles_on_a_copy_and_controls_the_same(controlnet, nodes, graphs):
    from comfy.model_management import load_models_gpu
    from int8_compile.compile.comfyui.compile_model import reports

    def control(net):
        load_models_gpu([net.control_model_wrapped])
        generator = torch.Generator().manual_seed(5)
        x, hint, context = (torch.randn(*shape, generator=generator) for shape in ((2, 4, 8, 8), (2, 3, 64, 64), (2, 7, 64)))
        out = net.control_model(x=x, hint=hint, timesteps=torch.tensor([500.0, 500.0]), context=context)
        return torch.cat([t.flatten() for key in sorted(out) for t in out[key]])

    eager = control(controlnet)
    compiled = nodes.CompileModel(controlnet, is_patcher=False, **CHEAP)
    assert compiled is not controlnet and not controlnet.control_model_wrapped.object_patches and graphs() == 0
    assert difference(control(compiled), eager) < 1e-3
    assert graphs() >= 1 and not reports(compiled.control_model_wrapped)[0].failure
    after = graphs()
    assert torch.equal(control(controlnet), eager) and graphs() == after
    assert difference(control(compiled.copy()), eager) < 1e-3


def test_types_that_cannot_be_compiled_are_refused_by_name(clip, vae, nodes):
    for model, kind in ((clip, "CLIP"), (vae, "VAE")):
        with pytest.raises(ValueError, match=f"This input is a {kind}.*set is_patcher to false"):
            nodes.CompileModel(model)
    with pytest.raises(ValueError, match="cannot compile a int, only a MODEL, CLIP, VAE or ControlNet"):
        nodes.CompileModel(3)


def test_a_failed_compile_gives_the_eager_image_and_one_warning(flux, nodes, sample, monkeypatch, caplog):
    """openxla is listed by torch, and torch_xla is not installed: it fails at the first call."""
    eager = sample(flux)
    compiled = nodes.CompileModel(flux, backend="openxla")
    assert torch.equal(sample(compiled), eager) and torch.equal(sample(compiled), eager)
    assert caplog.text.count("compile failed; running uncompiled") == 1


def test_patches_that_read_transformer_options_are_respected(flux, nodes, sample):
    """An attention override that depends on the block: baking the first block's number in would change the image."""
    def override(attention, *args, transformer_options=None, **kwargs):
        return attention(*args, transformer_options=transformer_options, **kwargs) * (1 + 0.2 * transformer_options["block_index"])

    patched = flux.clone()
    patched.model_options["transformer_options"]["optimized_attention_override"] = override
    eager = sample(patched)
    assert difference(eager, sample(flux)) > 0.01
    assert difference(sample(nodes.CompileModel(patched, **CHEAP)), eager) < 1e-3


def test_two_models_at_once_keep_their_own_weights(load, nodes, sample):
    high, low = load("tiny_wan"), load("tiny_wan")
    for p in low.model.diffusion_model.parameters():
        p.mul_(0.9)
    want = sample(high), sample(low)
    compiled = nodes.CompileModel(high, **CHEAP), nodes.CompileModel(low, **CHEAP)
    assert difference(*want) > 0.01
    for _ in range(2):
        for model, image in zip(compiled, want):
            assert difference(sample(model), image) < 1e-3


def test_a_wrapper_that_meets_another_model_compiles_that_one(load, nodes, sample):
    """DualModelGuider hands the first model's options to the second: core's own compile wrapper then runs wrong weights."""
    from int8_compile.compile.comfyui.compile_model import reports

    a, b = load("tiny_wan"), load("tiny_wan")
    for p in b.model.diffusion_model.parameters():
        p.mul_(0.9)
    want = sample(b)
    compiled = nodes.CompileModel(a, **CHEAP)
    stranger = b.clone()
    stranger.wrappers["apply_model"] = compiled.wrappers["apply_model"]
    assert difference(sample(stranger), want) < 1e-3
    assert reports(stranger)[0].graphs >= 1


@pytest.mark.rotating
def test_dual_model_guider_runs_each_model_with_its_own_weights(load, nodes, conds):
    """The real guider: with both models compiled, and with one, whose wrapper the guider then hands to the other."""
    from comfy_extras.nodes_custom_sampler import Guider_DualModel

    a, b = load("tiny_wan"), load("tiny_wan")
    for p in b.model.diffusion_model.parameters():
        p.mul_(0.9)

    def guide(positive, negative):
        guider = Guider_DualModel(positive, negative)
        guider.set_conds(*conds)
        guider.set_cfg(3.0)
        noise = torch.randn(1, 16, 2, 8, 8, generator=torch.Generator().manual_seed(3))
        return guider.sample(noise, torch.zeros_like(noise), comfy_sampler(), torch.tensor([1.0, 0.5, 0.0]), disable_pbar=True, seed=3)

    want, one_model = guide(a, b), guide(a, a)
    assert difference(one_model, want) > 0.01
    compiled = nodes.CompileModel(a, **CHEAP)
    assert difference(guide(compiled, nodes.CompileModel(b, **CHEAP)), want) < 1e-3
    assert difference(guide(compiled, b), want) < 1e-3
    assert difference(guide(compiled, a), one_model) < 1e-3


def comfy_sampler():
    import comfy.samplers
    return comfy.samplers.sampler_object("euler")


@pytest.mark.rotating
def test_a_multigpu_clone_compiles_for_itself_and_samples_the_same(flux, nodes, sample):
    """ModelPatcher.deepclone_multigpu, on the one device of this machine: a fresh model with the wrappers of the first."""
    from int8_compile.compile.comfyui.compile_model import reports

    eager = sample(flux)
    first = nodes.CompileModel(flux, **CHEAP)
    second = first.deepclone_multigpu(new_load_device=torch.device("cpu"))
    assert second.model is not flux.model
    for model in (first, second, first):
        assert difference(sample(model), eager) < 1e-3
    assert reports(second) and reports(first)[0] is not reports(second)[0]
    assert [r.graphs for r in (*reports(first), *reports(second))] == [2, 2]


def test_lazy_compile_without_dynamic_vram_needs_a_core_that_can(flux, nodes, monkeypatch):
    """The CPU loader is never dynamic; a dynamic patcher's refusals must come in the contract's words."""
    from comfy.model_patcher import ModelPatcher

    class Dynamic(ModelPatcher):
        def is_dynamic(self):
            return True

    flux.__class__ = Dynamic
    flux.cached_patcher_init = None
    refusal = "^INT8 Lazy Torch Compile: this ComfyUI version does not support disable_dynamic clone."
    with pytest.raises(RuntimeError, match=refusal):
        nodes.INT8LazyTorchCompile(flux)
    monkeypatch.setattr(Dynamic, "clone", lambda self: None, raising=False)
    with pytest.raises(RuntimeError, match=refusal):
        nodes.INT8LazyTorchCompile(flux)
    monkeypatch.undo()
    assert nodes.INT8LazyTorchCompile(flux, disable_dynamic_vram=False).wrappers["apply_model"]
