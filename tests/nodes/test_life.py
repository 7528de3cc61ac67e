"""INT8 Quantize Model in ComfyUI's own life: beside cache nodes and other packs' wrappers, in prompts without steps, with guiders of two
models, in branches of one model."""
from __future__ import annotations

import logging

import pytest
import torch
from toys import difference

from .conftest import random_conds

pytestmark = [pytest.mark.comfy, pytest.mark.rotating(3)]
STEPS = 8
LATENT = (1, 16, 16, 16)


@pytest.fixture
def sample_steps(comfy):
    def sample_steps(model, steps=STEPS, cfg=1.0, **more):
        noise = comfy.sample.prepare_noise(latent := torch.zeros(LATENT), 1)
        return comfy.sample.sample(model, noise, steps, cfg, "euler", "simple", *random_conds(), latent, disable_pbar=True, seed=1, **more)
    return sample_steps


@pytest.fixture
def guide(comfy):
    """Samples with a guider, as SamplerCustomAdvanced does."""
    def guide(guider, steps=4):
        latent = torch.zeros(LATENT)
        sigmas = comfy.samplers.calculate_sigmas(guider.model_patcher.get_model_object("model_sampling"), "simple", steps)
        return guider.sample(comfy.sample.prepare_noise(latent, 1), latent, comfy.samplers.sampler_object("euler"), sigmas,
                             disable_pbar=True, seed=1)
    return guide


@pytest.fixture
def dual(comfy):
    from comfy_extras.nodes_custom_sampler import DualModelGuider

    return lambda model, negative: DualModelGuider.execute(model, random_conds()[0], 3.0, negative, random_conds()[1])[0]


def planned(model) -> dict:
    from int8_compile.compile.comfyui.int8_calibrate import plans

    return {plan.name: (plan.method, plan.sqnr) for plan in plans(model)}


def int8_names(model) -> set[str]:
    from int8_compile.compile.comfyui.int8_model import int8_layers

    return set(int8_layers(model))


def eligible(model) -> set[str]:
    from int8_compile.int8.quantize import eligible_linears

    return set(eligible_linears(model.model.diffusion_model))


@pytest.fixture
def expected(load, nodes, sample_steps):
    """The plan of the model by itself."""
    sample_steps(alone := nodes.INT8QuantizeModel(load()))
    return planned(alone)


@pytest.mark.parametrize("where", ["before", "behind"])
@pytest.mark.parametrize("cache", ["EasyCacheNode", "LazyCacheNode"])
def test_a_cache_node_changes_no_plan_and_the_first_prompt_skips_what_later_ones_skip(load, nodes, sample_steps, expected, caplog, cache,
                                                                                     where):
    from comfy_extras import nodes_easycache

    def cached(model):
        return getattr(nodes_easycache, cache).execute(model, 3.0, 0.15, 0.95, False)[0]

    def skipped():
        found = [record.getMessage() for record in caplog.records if "skipped" in record.getMessage()]
        caplog.clear()
        return found
    caplog.set_level(logging.INFO)
    flux = load()
    model = nodes.INT8QuantizeModel(cached(flux)) if where == "before" else cached(nodes.INT8QuantizeModel(flux))
    first = sample_steps(model)
    of_first = skipped()
    assert planned(model) == expected
    assert torch.equal(sample_steps(model), first)
    assert len(of_first) == 1 and of_first == skipped() and "skipped 0" not in of_first[0]


class Witness:
    """Another pack's node: counts what it sees at every place that ComfyUI offers."""

    def __init__(self):
        self.calls = {}

    def _see(self, place):
        self.calls[place] = self.calls.get(place, 0) + 1

    def wrapper(self, place):
        def wrapper(executor, *args, **kwargs):
            self._see(place)
            return executor(*args, **kwargs)
        return wrapper

    def attach(self, model):
        from comfy.patcher_extension import CallbacksMP, WrappersMP

        model = model.clone()
        for place in (WrappersMP.OUTER_SAMPLE, WrappersMP.SAMPLER_SAMPLE, WrappersMP.PREDICT_NOISE, WrappersMP.CALC_COND_BATCH,
                      WrappersMP.APPLY_MODEL, WrappersMP.DIFFUSION_MODEL):
            model.add_wrapper_with_key(place, "witness", self.wrapper(place))
        for place in (CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_PREPARE_STATE, CallbacksMP.ON_CLEANUP):
            model.add_callback_with_key(place, "witness", lambda *_, place=place: self._see(place))
        model.set_model_sampler_pre_cfg_function(lambda args: self._see("pre cfg") or args["conds_out"])
        model.set_model_sampler_post_cfg_function(lambda args: self._see("post cfg") or args["denoised"])
        model.set_model_unet_function_wrapper(lambda call, args: self._see("unet") or call(args["input"], args["timestep"], **args["c"]))
        return model


@pytest.mark.parametrize("where", ["before", "behind"])
def test_no_other_node_sees_a_step_of_the_calibration(load, nodes, sample_steps, expected, where):
    witness = Witness()
    flux = load()
    model = nodes.INT8QuantizeModel(witness.attach(flux)) if where == "before" else witness.attach(nodes.INT8QuantizeModel(flux))
    first = sample_steps(model)
    seen, witness.calls = witness.calls, {}
    assert torch.equal(sample_steps(model), first)
    assert seen == witness.calls and seen["outer_sample"] == 1 and seen["diffusion_model"] == STEPS and len(seen) == 12
    assert planned(model) == expected


def test_a_model_that_does_not_run_without_another_nodes_wrapper_is_looked_at_while_the_first_image_is_made(
        load, nodes, sample_steps, monkeypatch, caplog):
    """As IC-Light, whose first layer has channels that its wrapper fills."""
    from comfy.patcher_extension import WrappersMP

    def attach(model):
        model = model.clone()
        model.model_options["transformer_options"]["needed"] = needed = {"run": False}

        def wrapper(executor, *args, **kwargs):
            needed["run"] = True
            try:
                return executor(*args, **kwargs)
            finally:
                needed["run"] = False
        model.add_wrapper_with_key(WrappersMP.APPLY_MODEL, "needed", wrapper)
        model.set_model_patch(lambda *args: (_ for _ in ()).throw(KeyError("channels")) if not needed["run"] else args[0], "post_input")
        return model
    flux = load()
    eager = sample_steps(attach(flux))
    model = nodes.INT8LazyTorchCompile(nodes.INT8QuantizeModel(attach(flux)), backend="cudagraphs")
    assert torch.equal(sample_steps(model), eager)
    assert sum("does not run without" in record.getMessage() for record in caplog.records) == 1
    assert not int8_names(model)
    second = sample_steps(model)
    assert int8_names(model) == eligible(flux) == planned(model).keys()
    assert 0 < difference(second, eager) < 0.02
    assert torch.equal(sample_steps(model), second)


WITHOUT_STEPS = {"no sigmas": {"sigmas": torch.tensor([])}, "one sigma": {"sigmas": torch.tensor([1.0])},
                 "start_at_step = steps": {"start_step": STEPS}, "start_at_step > steps": {"start_step": STEPS + 5},
                 "end_at_step = 0": {"last_step": 0}, "denoise = 0": {"denoise": 0.0}}


@pytest.mark.parametrize("kind", WITHOUT_STEPS)
def test_a_prompt_without_steps_decides_nothing(load, nodes, sample_steps, expected, kind):
    model = nodes.INT8QuantizeModel(load())
    image = sample_steps(model, **WITHOUT_STEPS[kind])
    assert image.shape == LATENT and planned(model) == {} and not int8_names(model)
    sample_steps(model)
    assert planned(model) == expected


@pytest.mark.parametrize("kind", [{"denoise": 0.05}, {"start_step": STEPS - 1}, {"start_step": STEPS - 1, "force_full_denoise": True},
                                  {"last_step": 1}], ids=str)
def test_one_step_is_enough_to_measure_every_layer_that_it_calls(load, nodes, sample_steps, expected, kind):
    sample_steps(model := nodes.INT8QuantizeModel(load()), **kind)
    found = planned(model)
    assert found.keys() == expected.keys() and int8_names(model) == expected.keys()
    assert {name for name, (_, sqnr) in found.items() if sqnr} == {name for name, (_, sqnr) in expected.items() if sqnr}


def test_steps_that_call_no_layer_decide_nothing(comfy, load, nodes, sample_steps, expected):
    """A sampler that is done before it asks the model."""
    model = nodes.INT8QuantizeModel(load())
    idle = comfy.samplers.KSAMPLER(lambda model, x, sigmas, **_: x)
    positive, negative = random_conds()
    latent = torch.zeros(LATENT)
    comfy.sample.sample_custom(model, comfy.sample.prepare_noise(latent, 1), 1.0, idle, torch.tensor([1.0, 0.5, 0.0]), positive, negative,
                               latent, disable_pbar=True, seed=1)
    assert planned(model) == {} and not int8_names(model)
    sample_steps(model)
    assert planned(model) == expected


@pytest.mark.rotating
@pytest.mark.parametrize("method", ["auto", "smoothquant", "convrot"])
def test_both_models_of_a_dual_guider_are_int8_from_its_first_prompt_on(load, nodes, guide, dual, method):
    first, second = load(), load()
    second.model.diffusion_model.img_in.weight.data *= 1.25  # other weights
    eager = guide(dual(first, second))
    models = [nodes.INT8QuantizeModel(model, method=method) for model in (first, second)]
    images = [guide(dual(*models)) for _ in range(3)]
    for model in models:
        assert int8_names(model) == eligible(first)
    assert torch.equal(images[0], images[1]) and torch.equal(images[0], images[2])
    assert 0 < difference(images[0], eager) < 0.05
    # Clones, as a prompt with another LoRA makes them.
    again = [model.clone() for model in models]
    assert torch.equal(guide(dual(*again)), images[0]) and all(map(int8_names, again))
    assert torch.equal(guide(dual(first, second)), eager)


def test_one_model_on_both_inputs_of_a_dual_guider_is_measured_once(load, nodes, guide, dual):
    model = nodes.INT8QuantizeModel(flux := load())
    image = guide(dual(model, model))
    assert int8_names(model) == eligible(flux)
    assert torch.equal(guide(dual(model, model)), image)


def test_a_second_model_behind_a_float_first_one_is_int8_from_the_second_prompt_on(load, nodes, guide, dual):
    """Nothing of the second model's is asked before its first steps: they are what is looked at."""
    first, second = load(), load()
    eager = guide(dual(first, second))
    quantized = nodes.INT8QuantizeModel(second)
    assert torch.equal(guide(dual(first, quantized)), eager)
    image = guide(dual(first, quantized))
    assert int8_names(quantized) == eligible(second) and not int8_names(first)
    assert 0 < difference(image, eager) < 0.05
    assert torch.equal(guide(dual(first, quantized.clone())), image)


def test_a_second_model_is_measured_beside_a_first_one_that_is_known(load, nodes, guide, dual):
    first, second = nodes.INT8QuantizeModel(load()), nodes.INT8QuantizeModel(load())
    guide(dual(first, first))
    image = guide(dual(first, second))
    assert int8_names(second) == int8_names(first)
    assert torch.equal(guide(dual(first, second)), image)


def test_every_model_that_a_guider_holds_is_quantized(comfy, load, nodes, guide):
    """A guider of another pack, with models in a list."""
    class Mean(comfy.samplers.CFGGuider):
        def __init__(self, *models):
            super().__init__(models[0])
            self.others = list(models[1:])

        def outer_sample(self, noise, *args, **kwargs):
            for model in self.others:
                conds = {key: [cond.copy() for cond in group] for key, group in self.conds.items()}
                comfy.sampler_helpers.prepare_sampling(model, noise.shape, conds, model.model_options)
            return super().outer_sample(noise, *args, **kwargs)

        def predict_noise(self, x, timestep, model_options, seed=None):
            out = super().predict_noise(x, timestep, model_options, seed)
            for model in self.others:
                model.pre_run()
                out = out + comfy.samplers.calc_cond_batch(model.model, [self.conds["positive"]], x, timestep, model_options)[0]
                model.cleanup()
            return out / (1 + len(self.others))
    models = [nodes.INT8QuantizeModel(load()) for _ in range(3)]
    guider = Mean(*models)
    guider.set_conds(*random_conds())
    image = guide(guider)
    assert all(int8_names(model) == int8_names(models[0]) for model in models) and int8_names(models[0])
    assert torch.equal(guide(guider), image)


def test_branches_of_one_model_share_no_plan_that_differs(load, nodes, sample_steps, lora):
    """Each branch has what the same settings give on a model of its own, whatever was measured before."""
    kinds = [{"method": "auto"}, {"method": "smoothquant"}, {"method": "rowwise", "min_sqnr_db": 30.0},
             {"method": "auto", "kernel": "torch"}, {"method": "auto", "keep_layers": "double_blocks.0.*"},
             {"method": "smoothquant", "min_sqnr_db": 36.0}]
    shared = load()
    branches = [nodes.INT8QuantizeModel(shared, **kind) for kind in kinds]
    images = [sample_steps(branch, 2) for branch in branches]
    for kind, branch, image in zip(kinds, branches, images):
        sample_steps(alone := nodes.INT8QuantizeModel(load(), **kind), 2)
        assert {name: method for name, (method, _) in planned(branch).items()} == {n: m for n, (m, _) in planned(alone).items()}, kind
        assert torch.equal(sample_steps(branch, 2), image), kind
    assert len({tuple(sorted((n, m) for n, (m, _) in planned(branch).items())) for branch in branches}) >= 4


def test_another_strength_upstream_keeps_the_plan_and_changes_the_image(load, nodes, sample_steps, lora):
    flux = load()
    images = {}
    for strength in (1.0, 0.5, 1.0):
        model = nodes.INT8QuantizeModel(lora(flux, strength=strength))
        image = sample_steps(model, 2)
        assert difference(image, sample_steps(lora(flux, strength=strength), 2)) < 0.02
        images.setdefault(strength, []).append((image, planned(model)))
    (first, plan), (again, plan_again) = images[1.0]
    (half, plan_half), = images[0.5]
    assert torch.equal(first, again) and not torch.equal(first, half) and plan == plan_again == plan_half


def test_a_layer_that_another_pack_put_in_shares_neither_plan_nor_int8_weight_with_the_models_own(comfy, load, nodes, sample_steps):
    name = "diffusion_model.double_blocks.0.img_mlp.0"
    flux = load()
    ours = nodes.INT8QuantizeModel(flux)
    image = sample_steps(ours, 2)
    for target in (name, f"{name}.weight"):
        other = flux.clone()
        layer = comfy.ops.disable_weight_init.Linear(*flux.get_model_object(f"{name}.weight").shape[::-1], dtype=torch.float32)
        layer.weight = torch.nn.Parameter(flux.get_model_object(f"{name}.weight").float() * -2, requires_grad=False)
        layer.bias = torch.nn.Parameter(flux.get_model_object(f"{name}.bias").float(), requires_grad=False)
        other.add_object_patch(target, layer if target == name else layer.weight)
        for method in ("convrot", "auto"):
            quantized = nodes.INT8QuantizeModel(other, method=method)
            assert difference(sample_steps(quantized, 2), sample_steps(other, 2)) < 0.02, (target, method)
    assert torch.equal(sample_steps(ours, 2), image)
