"""What other nodes do around the blocks goes on working: docs/questions.md's answers on ControlNet, step caches and TeaCache."""
from __future__ import annotations

import logging
from unittest import mock

import pytest
import torch
from toys import difference

from .conftest import random_conds
from .test_compile import CHEAP

pytestmark = [pytest.mark.comfy, pytest.mark.rotating(4)]
STEPS = 8


@pytest.fixture
def sample_steps(comfy):
    def sample_steps(model):
        latent = torch.zeros(1, 16, 16, 16)
        noise = comfy.sample.prepare_noise(latent, 1)
        return comfy.sample.sample(model, noise, STEPS, 1.0, "euler", "simple", *random_conds(), latent, disable_pbar=True, seed=1)
    return sample_steps


@pytest.mark.rotating
@pytest.mark.parametrize(("cache", "last"), [("EasyCacheNode", True), ("LazyCacheNode", False)], ids=["after compile", "before compile"])
def test_comfyuis_step_caches_skip_the_same_steps(flux, nodes, sample_steps, caplog, cache, last):
    from comfy_extras import nodes_easycache

    def cached(model):
        return getattr(nodes_easycache, cache).execute(model, 3.0, 0.15, 0.95, False)[0]

    def skipped():
        found = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
        caplog.clear()
        return found
    caplog.set_level(logging.INFO)
    eager = sample_steps(cached(flux))
    expected = skipped()
    assert expected and "skipped 0" not in expected[0]
    result = sample_steps(cached(nodes.CompileModel(flux, **CHEAP)) if last else nodes.CompileModel(cached(flux), **CHEAP))
    assert difference(result, eager) < 1e-3
    assert skipped() == expected


def test_a_forward_that_a_pack_puts_in_place_runs_compiled_blocks(flux, nodes, sample_steps, graphs):
    """TeaCache's way: a wrapper replaces the model's forward_orig for the call, and now and then gives back what was computed before."""
    def cached(model):
        model, kept, calls = model.clone(), {}, []
        network = model.get_model_object("diffusion_model")

        def forward(*args, **kwargs):
            calls.append(len(calls) % 2)
            if not calls[-1]:
                kept["last"] = type(network).forward_orig(network, *args, **kwargs)
            return kept["last"]

        def wrapper(apply, options):
            with mock.patch.object(network, "forward_orig", forward):
                return apply(options["input"], options["timestep"], **options["c"])
        model.set_model_unet_function_wrapper(wrapper)
        return model, calls
    model, calls = cached(flux)
    eager = sample_steps(model)
    assert len(calls) == STEPS
    model, calls = cached(nodes.CompileModel(flux, **CHEAP))
    assert difference(sample_steps(model), eager) < 1e-3
    assert len(calls) == STEPS and graphs() > 0


def test_what_a_controlnet_adds_between_blocks_arrives_and_costs_no_graph(comfy, flux, nodes, graphs):
    def step(model, control):
        comfy.model_management.load_models_gpu([model])
        generator = torch.Generator().manual_seed(3)
        x, context, y, added = (torch.randn(*shape, generator=generator)
                                for shape in ((1, 16, 16, 16), (1, 20, 4096), (1, 2048), (1, 64, flux.model.diffusion_model.hidden_size)))
        control = {"input": [added], "output": [0.5 * added]} if control else None
        return model.model.apply_model(x, torch.tensor([0.7]), c_crossattn=context, y=y, guidance=torch.tensor([3.5]), control=control,
                                       transformer_options={"wrappers": model.wrappers})
    plain, controlled = step(flux, False), step(flux, True)
    assert difference(controlled, plain) > 0.01
    compiled = nodes.CompileModel(flux, **CHEAP)
    assert difference(step(compiled, False), plain) < 1e-3
    before = graphs()
    assert before > 0 and difference(step(compiled, True), controlled) < 1e-3
    assert graphs() == before


@pytest.mark.parametrize("whole", [False, True], ids=["its blocks", "the whole model"])
def test_a_compile_node_behind_ours_compiles_alone_and_only_while_it_is_there(flux, nodes, sample, graphs, whole):
    """Core's TorchCompileModel, and KJNodes' with its blocks."""
    from comfy_api.torch_helpers import set_torch_compile_wrapper
    from int8_compile.compile.comfyui.compile_model import reports

    eager = sample(flux)
    ours = nodes.CompileModel(flux, **CHEAP)
    network = flux.model.diffusion_model
    keys = [f"diffusion_model.double_blocks.{index}" for index in range(len(network.double_blocks))]
    behind = ours.clone()
    set_torch_compile_wrapper(model=behind, backend="aot_eager", keys=None if whole else keys)
    assert difference(sample(behind), eager) < 1e-3
    (report,) = reports(ours)
    assert report.failure == "" and not report.graphs and "another node behind this one" in report.text()
    compiled = sample(ours)
    assert difference(compiled, eager) < 1e-3 and report.graphs == 2 and not report.last_calls["eager"]
    assert "another node" not in report.text()
    count = graphs()
    assert difference(sample(behind), eager) < 1e-3 and torch.equal(sample(ours), compiled) and not report.last_calls["eager"]
    assert report.graphs == 2 and graphs() == count and report.failure == ""
    # Before ours, which then compiles.
    before = flux.clone()
    set_torch_compile_wrapper(model=before, backend="aot_eager", keys=None if whole else keys)
    assert torch.equal(sample(nodes.CompileModel(before, **CHEAP)), compiled) and graphs() == count
