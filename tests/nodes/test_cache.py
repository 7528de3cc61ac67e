"""The compile cache on real models: built in the background, found after a restart, right with LoRA, offload and patches."""
from __future__ import annotations

import dataclasses

import pytest
import torch
from toys import difference, wait_for_builder

pytestmark = [pytest.mark.comfy, pytest.mark.rotating(3)]
NOISE = 0.02  # INT8 rounding of differences in the last bit
EXACT = 1e-4


@pytest.fixture(scope="module")
def cache_folder(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def restart(comfy, cache_folder, monkeypatch):
    """A cache as a new process opens it: nothing of it in memory."""
    from int8_compile.compile.comfyui import artifact_cache, compile_model

    monkeypatch.setenv("INT8_COMPILE_CACHE", "1")
    monkeypatch.setenv("INT8_COMPILE_CACHE_DIR", str(cache_folder))
    monkeypatch.setenv("INT8_COMPILE_CACHE_KEY_FILE", str(cache_folder.with_name("key of the cache") / "cache.key"))

    def restart():
        artifact_cache._cache.cache_clear()
        compile_model._COMPILED.clear()
        return artifact_cache.get_cache()
    restart()
    yield restart
    artifact_cache._cache.cache_clear()


def report(model):
    from int8_compile.compile.comfyui.compile_model import reports

    (found,) = reports(model)
    return found


@pytest.fixture(scope="module")
def built(request):
    """Which models' artifacts are there already."""
    return set()


@pytest.fixture
def artifacts(restart, built, load, nodes, sample):
    """artifacts(name, int8): makes sure that the model's artifacts are on disk, as a first run in the background leaves them."""
    def make(name, int8=False):
        model = load(name)
        model = nodes.INT8QuantizeModel(model, method="convrot") if int8 else model
        if (name, int8) not in built:
            cache = restart()
            first = nodes.CompileModel(model, background=True)
            sample(first)
            wait_for_builder(cache)
            built.add((name, int8))
        restart()
        return model
    return make


@pytest.mark.rotating
@pytest.mark.parametrize("name, int8", [("tiny_flux", False), ("tiny_flux", True), ("tiny_wan", False), ("tiny_wan", True)])
def test_a_restart_compiles_nothing_for_any_size_batch_or_prompt(artifacts, nodes, sample, name, int8):
    model = artifacts(name, int8)
    compiled = nodes.INT8LazyTorchCompile(model)
    for arguments in ({}, {"height": 24}, {"tokens": 33}, {"cfg": 3.0}):
        assert difference(sample(compiled, **arguments), sample(model, **arguments)) < (NOISE if int8 else EXACT)
    found = report(compiled)
    assert found.graphs == 0 and found.compiled_from_step == 1 and not found.failure and found.fallbacks == []
    assert len(found.artifacts) >= len(found.regions)


@pytest.mark.rotating
def test_batch_1_and_2_share_artifacts(artifacts, nodes, sample):
    model = artifacts("tiny_flux")
    compiled = nodes.CompileModel(model)
    for batch in (1, 2, 3):
        assert difference(sample(compiled, batch=batch), sample(model, batch=batch)) < EXACT
    assert report(compiled).graphs == 0


@pytest.mark.rotating
@pytest.mark.parametrize("int8", [False, True])
def test_loras_and_their_strength_change_what_artifacts_compute(artifacts, nodes, sample, lora, int8):
    model = artifacts("tiny_flux", int8)
    images = []
    for strength in (1.0, 0.3):
        patched = lora(model, strength=strength)
        compiled = nodes.CompileModel(patched)
        images.append(sample(compiled))
        assert difference(images[-1], sample(patched)) < (NOISE if int8 else EXACT)
        assert report(compiled).graphs == 0
    assert difference(images[0], images[1]) > 0.01
    compiled = nodes.CompileModel(model)
    assert difference(sample(compiled), sample(model)) < (NOISE if int8 else EXACT)


@pytest.mark.rotating
@pytest.mark.parametrize("int8", [False, True])
def test_offloaded_weights_are_fetched_for_artifacts(artifacts, nodes, lora, apply, int8):
    """Partly loaded as --lowvram does it, with a LoRA that is added on the way."""
    model = lora(artifacts("tiny_flux", int8))
    compiled = nodes.CompileModel(model)
    for share in (1e-6, 0.5, 1e-6):
        want = apply(model, share)
        assert difference(apply(compiled, share), want) < (NOISE if int8 else EXACT)
    assert report(compiled).graphs == 0 and report(compiled).artifacts


def test_an_int8_layer_that_was_changed_in_place_is_not_served_by_its_artifact(artifacts, nodes, sample):
    model = artifacts("tiny_flux", int8=True)
    compiled = nodes.CompileModel(model, background=True)
    image = sample(compiled)
    assert report(compiled).last_calls["artifact"] == 5
    layer = next(layer for name, layer in model.object_patches.items() if "single_blocks.1.linear1" in name)
    smoothing = torch.rand(layer.in_features) * 4 + 4
    params = layer.weight._params
    changes = {"smoothed": (lambda: layer.register_buffer("pre_quant_scale", smoothing), lambda: delattr(layer, "pre_quant_scale")),
               "not rotated": (lambda: setattr(layer.weight, "_params", dataclasses.replace(params, convrot=False)),
                               lambda: setattr(layer.weight, "_params", params))}
    for name, (change, back) in changes.items():
        change()
        want = sample(model)
        assert difference(want, image) > 5 * NOISE, name
        assert difference(sample(compiled), want) < NOISE, name
        assert report(compiled).last_calls["artifact"] == 4, name
        back()
        assert difference(sample(compiled), image) < NOISE and report(compiled).last_calls["artifact"] == 5, name


@pytest.mark.rotating
@pytest.mark.parametrize("method", ["CLIP", "VAE"])
def test_text_encoders_and_vaes_keep_artifacts_too(comfy, restart, nodes, models_dir, method):
    if method == "CLIP":
        whole = comfy.sd.load_clip([str(models_dir / "models" / "text_encoders" / "tiny_clip_l.safetensors")],
                                   clip_type=comfy.sd.CLIPType.SD3)

        def use(clip):
            return torch.cat(clip.encode_from_tokens(clip.tokenize("a red fox"), return_pooled=True)[:1])
    else:
        from benchmarks import digits

        whole = comfy.sd.VAE(sd=digits.vae())

        def use(vae):
            return vae.decode(torch.randn(1, 16, 8, 8, generator=torch.Generator().manual_seed(1)))
    want = use(whole)
    cache = restart()
    first = nodes.CompileModel(whole, is_patcher=False, background=True)
    assert difference(use(first), want) < EXACT
    wait_for_builder(cache)
    assert report(first.patcher).fallbacks == []
    restart()
    compiled = nodes.CompileModel(whole, is_patcher=False)
    assert difference(use(compiled), want) < EXACT
    found = report(compiled.patcher)
    assert found.artifacts and found.graphs == 0 and not found.failure


@pytest.mark.rotating
def test_an_artifact_of_rotated_layers_is_not_taken_for_others(artifacts, load, nodes, sample):
    artifacts("tiny_flux", int8=True)
    model = nodes.INT8QuantizeModel(load("tiny_flux"), method="rowwise")
    compiled = nodes.CompileModel(model, background=True)
    assert torch.equal(sample(compiled), sample(model)) and not report(compiled).artifacts


def test_patches_inside_blocks_run_without_artifacts(artifacts, nodes, sample):
    """An attention patch reads anything: in the background such steps stay eager."""
    model = artifacts("tiny_flux")
    patched = nodes.CompileModel(model, background=True).clone()
    plain = model.clone()

    def double(args, extra):
        out = args["img"] * 0.5
        return {**extra["original_block"](args), "img": out}
    for m in (patched, plain):
        m.set_model_patch_replace(double, "dit", "double_block", 0)
    around = sample(plain)
    assert difference(sample(patched), around) < 1e-3  # ComfyUI calls this one: its blocks do not see it
    for m in (patched, plain):
        m.set_model_attn1_output_patch(lambda attention, extra: attention * 0.5)
    assert torch.equal(sample(patched), sample(plain)) and not torch.equal(sample(plain), around)


def test_another_attention_is_another_program(artifacts, nodes, sample, monkeypatch):
    """As packs do that put their own attention into ComfyUI's modules."""
    import comfy.ldm.flux.math

    model = artifacts("tiny_flux")

    def attention(q, k, v, heads, **options):
        return torch.zeros(q.shape[0], q.shape[2], heads * q.shape[3])
    monkeypatch.setattr(comfy.ldm.flux.math, "optimized_attention", attention)
    compiled = nodes.CompileModel(model, background=True)
    assert torch.equal(sample(compiled), sample(model))
    assert not report(compiled).artifacts


@pytest.mark.rotating
def test_turned_off_nothing_is_written(restart, cache_folder, flux, nodes, sample, monkeypatch, tmp_path):
    monkeypatch.setenv("INT8_COMPILE_CACHE", "0")
    monkeypatch.setenv("INT8_COMPILE_CACHE_DIR", str(tmp_path / "off"))
    assert restart() is None
    sample(nodes.CompileModel(flux, backend="aot_eager"))
    assert not (tmp_path / "off").exists()


@pytest.mark.rotating
def test_a_folder_that_cannot_be_used_is_one_warning(restart, flux, nodes, sample, monkeypatch, caplog):
    monkeypatch.setenv("INT8_COMPILE_CACHE_DIR", "/proc/none")
    restart()
    image = sample(nodes.CompileModel(flux, backend="aot_eager"))
    assert difference(image, sample(flux)) < EXACT
    assert sum("cannot be used" in record.message for record in caplog.records) == 1


def test_after_a_bypass_lora_the_model_without_it_is_built(load, nodes, sample, bypass, restart, tmp_path, monkeypatch):
    monkeypatch.setenv("INT8_COMPILE_CACHE_DIR", str(tmp_path / "cache"))
    cache, model = restart(), load("tiny_flux")
    with_lora = nodes.CompileModel(bypass(model), background=True)
    plain = nodes.CompileModel(model, background=True)
    sample(with_lora)
    (said,) = {text.partition(": ")[2] for text in report(with_lora).warnings()}
    assert "a tensor that is neither a parameter nor a buffer" in said and "running uncompiled while it is so" in said
    sample(plain)
    assert len(report(plain).building) == 2
    wait_for_builder(cache)
    assert difference(sample(plain), sample(model)) < EXACT
    found = report(plain)
    assert found.last_calls["artifact"] == 5 and not found.warnings()
