"""LoRAs that ComfyUI's hooks put on INT8 layers while it samples: for one of the conditionings, for a part of the steps."""
from __future__ import annotations

import pytest
import torch
from toys import difference

pytestmark = [pytest.mark.comfy, pytest.mark.rotating(3)]
NOISE = 0.01  # the last bit of a product, which INT8 rounding blows up


@pytest.fixture
def hook(comfy, models_dir):
    import comfy.hooks

    def hook(strength=1.0, until=None, name="tiny_flux_a"):
        """until: percent of the steps after which there is none of it."""
        weights = comfy.utils.load_torch_file(str(models_dir / "models" / "loras" / f"{name}.safetensors"))
        made = comfy.hooks.create_hook_lora(weights, strength, 0.0)
        if until is not None:
            frames = comfy.hooks.HookKeyframeGroup()
            frames.add(comfy.hooks.HookKeyframe(1.0, start_percent=0.0))
            frames.add(comfy.hooks.HookKeyframe(0.0, start_percent=until))
            made.set_keyframes_on_hooks(frames)
        return made
    return hook


@pytest.fixture
def sample_hooked(comfy, conds):
    def sample_hooked(model, positive=None, negative=None, steps=3, cfg=2.0, callback=None):
        import comfy.hooks

        hooked = [comfy.hooks.set_hooks_for_conditioning(cond, hooks) if hooks else cond
                  for cond, hooks in zip(conds, (positive, negative))]
        latent = torch.zeros(1, 16, 16, 16)
        return comfy.sample.sample(model, comfy.sample.prepare_noise(latent, 1), steps, cfg, "euler", "simple", *hooked, latent,
                                   disable_pbar=True, seed=1, callback=callback)
    return sample_hooked


def of_both(hook):
    """One for all conditionings is what a LoRA of the model is."""
    made = hook()
    return made, made


CASES = {
    "both": of_both, "one": lambda hook: (hook(), None), "two": lambda hook: (hook(), hook(-1.0, name="tiny_flux_b")),
    "some steps": lambda hook: (hook(until=0.5), None), "two, some steps": lambda hook: (hook(until=0.5), hook(name="tiny_flux_b")),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("method", ["rowwise", "convrot", "smoothquant", "auto"])
def test_a_hook_lora_is_in_the_int8_layers_while_it_is_asked_for_and_gone_after(flux, nodes, sample_hooked, hook, case, method):
    expected, without = sample_hooked(flux, *CASES[case](hook)), sample_hooked(flux)
    quantized = nodes.INT8QuantizeModel(flux, method=method)
    plain = sample_hooked(quantized)
    got = sample_hooked(quantized, *CASES[case](hook))
    assert difference(got, expected) < 0.05 and difference(got, expected) < difference(expected, without) / 2
    assert torch.equal(sample_hooked(quantized), plain)
    assert torch.equal(sample_hooked(quantized, *CASES[case](hook)), got)
    assert torch.equal(sample_hooked(flux), without) and torch.equal(sample_hooked(flux, *CASES[case](hook)), expected)


@pytest.mark.parametrize("compiled", [False, True])
def test_an_interrupt_leaves_nothing_of_it(comfy, flux, nodes, sample_hooked, hook, compiled):
    import comfy.model_management

    def interrupt(step, *_):
        if step == 1:
            raise comfy.model_management.InterruptProcessingException
    quantized = nodes.INT8QuantizeModel(flux, method="convrot")
    plain, expected = sample_hooked(quantized), sample_hooked(quantized, *CASES["two"](hook))
    model = nodes.CompileModel(quantized, backend="aot_eager") if compiled else quantized
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        sample_hooked(model, *CASES["two"](hook), callback=interrupt)
    assert difference(sample_hooked(model), plain) < 1e-3 and difference(sample_hooked(model, *CASES["two"](hook)), expected) < 1e-3
    assert torch.equal(sample_hooked(quantized), plain)


def test_it_may_be_quantized_anew_while_hooks_are_in_the_weights(flux, nodes, sample_hooked, hook):
    """In the midst of a sampling with hooks the shared model holds their weights."""
    plain = sample_hooked(nodes.INT8QuantizeModel(flux, method="rowwise"))
    found = []

    def quantize(step, *_):
        found.append(nodes.INT8QuantizeModel(flux, method="convrot"))
    sample_hooked(flux, *of_both(hook), callback=quantize)
    expected = sample_hooked(nodes.INT8QuantizeModel(flux.clone(), method="convrot"))
    assert all(torch.equal(sample_hooked(model), expected) for model in found)
    assert torch.equal(sample_hooked(nodes.INT8QuantizeModel(flux, method="rowwise")), plain)


def test_what_a_merge_gets_meanwhile_has_nothing_of_them(flux, nodes, sample_hooked, hook):
    def weights(model):
        return {key: first[0].clone() for key, (first, *_) in model.get_key_patches("diffusion_model.").items()}
    quantized = nodes.INT8QuantizeModel(flux, method="convrot")
    before, found = weights(flux), []
    sample_hooked(quantized, *of_both(hook), callback=lambda *_: found.extend((weights(quantized), weights(flux))))
    assert len(found) == 6
    for meanwhile in found:
        assert meanwhile.keys() == before.keys() and all(torch.equal(meanwhile[key], value) for key, value in before.items())


@pytest.mark.parametrize("method", ["rowwise", "convrot", "smoothquant"])
def test_it_is_quantized_as_load_loras_is(flux, nodes, sample_hooked, hook, lora, method):
    quantized = nodes.INT8QuantizeModel(flux, method=method)
    sample_hooked(quantized)  # smoothquant's factors are those of the plain model
    got = sample_hooked(quantized, *of_both(hook))
    assert difference(got, sample_hooked(lora(quantized))) < NOISE


@pytest.mark.parametrize("case", ["two", "some steps"])
def test_on_a_first_prompt_that_measures_too(flux, nodes, sample_hooked, hook, case):
    expected = sample_hooked(flux, *CASES[case](hook))
    quantized = nodes.INT8QuantizeModel(flux, method="auto")
    first = sample_hooked(quantized, *CASES[case](hook))
    assert 0 < difference(first, expected) < 0.05
    plain = sample_hooked(quantized)
    assert 0 < difference(plain, sample_hooked(flux)) < 0.05
    assert torch.equal(sample_hooked(quantized, *CASES[case](hook)), first)


@pytest.mark.parametrize("case", ["one", "two, some steps"])
def test_behind_a_lora_and_compiled(flux, nodes, sample_hooked, hook, lora, graphs, case):
    eager = lora(nodes.INT8QuantizeModel(flux, method="convrot"), "tiny_flux_b", 0.5)
    expected, plain = sample_hooked(eager, *CASES[case](hook)), sample_hooked(eager)
    compiled = nodes.CompileModel(eager, backend="aot_eager")
    assert difference(sample_hooked(compiled, *CASES[case](hook)), expected) < 1e-3
    made = graphs()
    assert difference(sample_hooked(compiled), plain) < 1e-3
    assert difference(sample_hooked(compiled, *CASES[case](hook)), expected) < 1e-3 and graphs() == made


@pytest.mark.parametrize("hooked_first", [True, False])
def test_no_change_of_hooks_compiles_anything(flux, nodes, sample_hooked, hook, graphs, caplog, hooked_first):
    from int8_compile.compile.comfyui.compile_model import reports

    eager = nodes.INT8QuantizeModel(flux, method="convrot")
    compiled = nodes.CompileModel(eager, backend="aot_eager", fullgraph=True)
    made = []
    for case in ("one", "", "two", "", "some steps") if hooked_first else ("", "one", "", "two", "some steps"):
        hooks = CASES[case](hook) if case else ()
        assert difference(sample_hooked(compiled, *hooks), sample_hooked(eager, *hooks)) < 1e-3
        made.append(graphs())
    # Double blocks are compiled again for batch 1, which is the first that has hooks; nothing is for hooks.
    assert made == ([2, 2, 2, 2, 2] if hooked_first else [2, 3, 3, 3, 3])
    (found,) = reports(compiled)
    assert not found.failure and found.fallbacks == [] and "copy_()" not in caplog.text


@pytest.mark.parametrize("keep_layers", ["", "double_blocks.0.*"])
def test_of_a_file_that_is_quantized_while_it_is_read(flux, nodes, sample_hooked, hook, models_dir, keep_layers):
    """Its other layers are core's for models with quantized ones, which refuse what hooks do."""
    from int8_compile.compile.comfyui.int8_checkpoint import load_int8_model
    from int8_compile.int8.options import Int8Options

    path = models_dir / "models" / "diffusion_models" / "tiny_flux.safetensors"
    loaded = load_int8_model(str(path), Int8Options("rowwise", (keep_layers,) if keep_layers else ()))
    expected, plain = sample_hooked(flux, *CASES["two"](hook)), sample_hooked(loaded)
    assert difference(sample_hooked(loaded, *CASES["two"](hook)), expected) < 0.05
    assert torch.equal(sample_hooked(loaded), plain)


@pytest.mark.parametrize("method", ["convrot", "smoothquant"])
@pytest.mark.parametrize("side", [0, 1])
def test_one_that_makes_a_layer_larger_is_refused_and_leaves_nothing(flux, nodes, sample_hooked, hook, method, side):
    import comfy.hooks

    quantized = nodes.INT8QuantizeModel(flux, method=method)
    plain, without = sample_hooked(quantized), sample_hooked(flux)
    name = "diffusion_model.double_blocks.0.img_mlp.0"
    shape = list(dict(flux.model.named_modules())[name].weight.shape)
    shape[side] *= 2
    larger = {f"{name}.lora_up.weight": torch.randn(shape[0], 2), f"{name}.lora_down.weight": torch.randn(2, shape[1]),
              f"{name}.reshape_weight": torch.tensor(shape)}
    made = comfy.hooks.create_hook_lora(larger, 1.0, 0.0)
    with pytest.raises(ValueError, match=r"which is not for hooks\. Load it with Load LoRA"):
        sample_hooked(quantized, made)
    assert torch.equal(sample_hooked(quantized), plain) and torch.equal(sample_hooked(flux), without)


def test_of_a_file_that_is_int8(comfy, flux, nodes, sample_hooked, hook, tmp_path):
    from int8_compile.compile.comfyui.int8_checkpoint import load_int8_model, save_int8_model
    from int8_compile.int8.options import Int8Options

    save_int8_model(nodes.INT8QuantizeModel(flux, method="convrot"), tmp_path / "int8.safetensors")
    loaded = load_int8_model(str(tmp_path / "int8.safetensors"), Int8Options())
    expected, plain = sample_hooked(flux, *CASES["two"](hook)), sample_hooked(loaded)
    assert difference(sample_hooked(loaded, *CASES["two"](hook)), expected) < 0.05
    assert torch.equal(sample_hooked(loaded), plain)
