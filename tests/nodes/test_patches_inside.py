"""Patches and wrappers that come and go inside the call of a compiled model, where nobody told the compile node."""
from __future__ import annotations

import pytest
import torch

from benchmarks.small_families import SMALL

pytestmark = pytest.mark.comfy


def half(executor, *args, **kwargs):
    return executor(*args, **kwargs) * 0.5


def negative(executor, *args, **kwargs):
    return -executor(*args, **kwargs)


def smaller(q, context, value, extra_options):
    return value * 0.5


def weaker(n, extra_options):
    return n * 0.25


def by_block(function, q, k, v, *args, transformer_options=None, **kwargs):
    index = transformer_options["transformer_index"]
    return function(q, k, v, *args, transformer_options=transformer_options, **kwargs) * (index + 1)


PATCHES = {
    "attention replaced in one block": {"patches_replace": {"attn1": {("input", 1): smaller}}},
    "its output patched": {"patches": {"attn1_output_patch": [weaker]}},
    "an override": {"optimized_attention_override": lambda function, q, k, v, *args, **kwargs: q * 0.5},
    "an override that reads the block": {"optimized_attention_override": by_block},
    "an unknown key": {"another packs": 1},
}


@pytest.fixture
def unet(comfy):
    return SMALL["SD1.5"]


@pytest.fixture(autouse=True)
def inference():
    with torch.inference_mode():
        yield


def run(compiled, family, model):
    return compiled.run(model, lambda: family.call(model, tokens=7), filter_guards=True, passthrough=lambda error: False)


@pytest.fixture
def compiled():
    from int8_compile.compile.engine import CompiledModule
    from int8_compile.compile.options import CompileOptions

    return CompiledModule(CompileOptions(backend="eager", mark_sizes=True))


@pytest.mark.rotating
def test_patches_that_a_wrapper_inside_puts_into_the_options_are_run_and_gone_with_it(unet, compiled):
    model, options = unet.build(), {}
    forward = model.forward

    def wrapped(x, timesteps, *args, transformer_options, **kwargs):
        return forward(x, timesteps, *args, transformer_options={**transformer_options, **options}, **kwargs)
    model.forward = wrapped
    plain = unet.call(model, tokens=7)
    assert torch.equal(run(compiled, unet, model), plain)
    for name, patches in PATCHES.items():
        options.update(patches)
        want = unet.call(model, tokens=7)
        assert name == "an unknown key" or not torch.equal(want, plain)
        assert torch.equal(run(compiled, unet, model), want), name
        options.clear()
        assert torch.equal(run(compiled, unet, model), plain), name
    graphs = compiled.report.graphs
    assert torch.equal(run(compiled, unet, model), plain) and compiled.report.graphs == graphs and not compiled.report.failure


@pytest.mark.rotating
def test_an_attention_of_another_pack_may_read_what_comfyui_has_read_before(unet, compiled, monkeypatch):
    import comfy.ldm.modules.attention as core

    attend = core.optimized_attention

    def other(q, k, v, *args, transformer_options=None, **kwargs):
        names = {"input": 1.0, "middle": 0.5, "output": 0.25}
        return attend(q, k, v, *args, **kwargs) * names[transformer_options["block"][0]]
    monkeypatch.setattr(core, "optimized_attention", other)
    model = unet.build()
    for _ in range(2):
        assert torch.equal(run(compiled, unet, model), unet.call(model, tokens=7))
    assert not compiled.report.failure


@pytest.mark.rotating
@pytest.mark.parametrize("guard_filter", [True, False])
def test_wrappers_inside_a_model_that_is_compiled_whole_come_and_go(flux, sample, guard_filter):
    from comfy.patcher_extension import WrappersMP
    from int8_compile.compile.comfyui.compile_model import add_compile, reports
    from int8_compile.compile.options import CompileOptions

    def image(wrapper, compiled):
        model = flux.clone()
        if wrapper is not None:
            model.add_wrapper_with_key(WrappersMP.DIFFUSION_MODEL, "a pack", wrapper)
        if compiled:
            add_compile(model, "diffusion_model", CompileOptions(backend="eager", mark_sizes=True, blocks_only=False,
                                                                 guard_filter=guard_filter))
        return sample(model), model
    for wrapper in (None, half, negative, None, half):
        got, model = image(wrapper, True)
        assert torch.equal(got, image(wrapper, False)[0]), wrapper
    (report,) = reports(model)
    assert report.graphs == 3 and not report.failure
