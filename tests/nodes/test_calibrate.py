"""Methods that look at the model's own activations, at its first sampling."""
from __future__ import annotations

import threading
from types import MappingProxyType

import pytest
import torch
from toys import difference

from .conftest import Ops

pytestmark = pytest.mark.comfy


def snr_db(got, want) -> float:
    return -20 * torch.log10(torch.tensor(difference(got, want))).item()


@pytest.mark.parametrize("family", ["tiny_flux", "tiny_wan"])
def test_auto_is_measured_at_the_first_sampling_and_as_good_as_convrot(load, nodes, sample, family):
    from int8_compile.compile.comfyui.int8_calibrate import plans

    model = load(family)
    eager = sample(model)
    quantized = nodes.INT8QuantizeModel(model)
    assert not quantized.object_patches and plans(quantized) == []
    first = sample(quantized)
    found = plans(quantized)
    assert len(quantized.object_patches) == len(found) > 10
    for plan in found:
        print(plan)
        assert plan.sqnr[plan.method] >= plan.sqnr["convrot"]
    assert torch.equal(sample(quantized), first)
    print(snr_db(first, eager), snr_db(sample(nodes.INT8QuantizeModel(model, method="convrot")), eager))
    assert torch.equal(sample(model), eager)


@pytest.fixture
def on_a_gpu(monkeypatch):
    """on_a_gpu({N: milliseconds in float and as INT8}): what is decided there, by times of layers of N output channels; others gain."""
    from int8_compile.compile.comfyui import int8_plan

    leaves_slower = int8_plan._leaves_slower
    monkeypatch.setattr(int8_plan, "_leaves_slower", lambda options, device: leaves_slower(options, torch.device("cuda")))

    def on_a_gpu(times):
        def measured(device, dtype, rows, k, n, *_):
            if isinstance(error := times.get(n, (1.0, 0.5)), Exception):
                raise error
            return times.get(n, (1.0, 0.5))
        monkeypatch.setattr(int8_plan, "linear_times", measured)
    return on_a_gpu


def test_auto_leaves_layers_in_high_precision_that_a_gpu_computes_slower_as_int8(flux, nodes, sample, on_a_gpu):
    """By more than noise. What cannot be timed becomes INT8, and so does everything where a method is named."""
    from int8_compile.compile.comfyui.int8_calibrate import plans

    on_a_gpu({768: (1.0, 1.2), 256: (1.0, 1.02), 1024: (), 1536: torch.OutOfMemoryError("out of memory")})
    sample(auto := nodes.INT8QuantizeModel(flux))
    found = plans(auto)
    assert {plan.shape[0] for plan in found} >= {256, 768, 1024, 1536}
    assert {plan.shape[0] for plan in found if plan.method == "float"} == {768}
    assert {plan.reason for plan in found if plan.method == "float"} == {"no faster as INT8"}
    assert {f"diffusion_model.{plan.name}" for plan in found if plan.method != "float"} == set(auto.object_patches)
    sample(smooth := nodes.INT8QuantizeModel(flux, method="smoothquant"))
    assert all(plan.method != "float" for plan in plans(smooth))


def test_auto_makes_all_layers_int8_on_a_cpu_and_for_a_size(flux, nodes, sample, monkeypatch):
    from int8_compile.compile.comfyui import int8_plan
    from int8_compile.compile.comfyui.int8_calibrate import plans
    from int8_compile.int8.options import Int8Options

    monkeypatch.setattr(int8_plan, "linear_times", None)  # asking would fail
    sample(auto := nodes.INT8QuantizeModel(flux))
    assert plans(auto) and all(plan.method != "float" for plan in plans(auto))
    assert not int8_plan._leaves_slower(Int8Options(max_mb=20.0), torch.device("cuda"))


def test_smoothquant_helps_where_channels_are_extreme_and_is_exact_in_float(flux, nodes, sample):
    """One channel of every block's input a hundred times larger: what trained models have."""
    from int8_compile.compile.comfyui.int8_calibrate import plans

    for block in flux.model.diffusion_model.double_blocks:
        block.img_mlp[0].weight[:, 5] *= 0.01
        block.img_mod.lin.bias.reshape(6, -1)[4, 5] += 100  # its scale
    eager = sample(flux)
    image = sample(smooth := nodes.INT8QuantizeModel(flux, method="smoothquant"))
    layers = [plan for plan in plans(smooth) if plan.name.endswith("img_mlp.0")]
    assert all(plan.method == "smoothquant" and plan.sqnr["smoothquant"] > plan.sqnr["convrot"] + 1 for plan in layers), layers
    assert snr_db(image, eager) > 30


def test_layers_below_min_sqnr_db_stay_in_high_precision(flux, nodes, sample):
    from int8_compile.compile.comfyui.int8_calibrate import plans

    sample(every := nodes.INT8QuantizeModel(flux, method="rowwise", min_sqnr_db=1.0))
    limit = sorted(plan.sqnr["rowwise"] for plan in plans(every))[len(plans(every)) // 2]
    sample(half := nodes.INT8QuantizeModel(flux, method="rowwise", min_sqnr_db=limit))
    kept = {plan.name for plan in plans(half) if plan.method == "float"}
    assert 0 < len(kept) < len(plans(half)) and all("below" in plan.reason for plan in plans(half) if plan.name in kept)
    assert set(half.object_patches) == {f"diffusion_model.{p.name}" for p in plans(half) if p.name not in kept}


@pytest.mark.rotating
def test_calibration_compiles_nothing_and_methods_cost_no_graphs(flux, nodes, sample, graphs):
    """Equal blocks get equal methods, so they stay one program."""
    quantized = nodes.INT8QuantizeModel(flux)
    compiled = nodes.CompileModel(quantized, backend="aot_eager")
    image = sample(compiled)
    assert graphs() == 2
    assert difference(image, sample(quantized)) < 1e-3


def test_a_branch_with_a_lora_shares_the_plans(flux, nodes, sample, lora, monkeypatch):
    from int8_compile.compile.comfyui import int8_calibrate

    quantized = nodes.INT8QuantizeModel(flux)
    sample(quantized)
    monkeypatch.setattr(int8_calibrate, "collect", None)  # a second calibration would fail
    branch = lora(quantized)
    assert snr_db(sample(branch), sample(lora(flux))) > 35
    again = nodes.INT8QuantizeModel(lora(flux))
    assert snr_db(sample(again), sample(lora(flux))) > 35


def test_calibration_leaves_random_numbers_and_prompts_as_they_were(flux, nodes, comfy, conds):
    """Negative prompt, CFG and a sampler that draws noise: the calibrating run and the next give the same image."""
    quantized = nodes.INT8QuantizeModel(flux)

    def image():
        noise = comfy.sample.prepare_noise(latent := torch.zeros(2, 16, 16, 16), 5)
        return comfy.sample.sample(quantized, noise, 4, 3.0, "euler_ancestral", "simple", *conds, latent, disable_pbar=True, seed=5)

    torch.manual_seed(0)
    first = image()
    torch.manual_seed(0)
    assert torch.equal(image(), first)


def test_an_interrupted_calibration_leaves_the_model_float_and_is_made_up_for(flux, nodes, sample):
    import comfy.model_management as mm

    eager = sample(flux)
    quantized = nodes.INT8QuantizeModel(flux)
    mm.interrupt_current_processing()
    with pytest.raises(mm.InterruptProcessingException):
        sample(quantized)
    assert not quantized.object_patches and torch.equal(sample(flux), eager)
    assert snr_db(sample(quantized), eager) > 35 and quantized.object_patches


def test_an_interrupted_search_goes_on_where_it_stopped(load, sample):
    import comfy.model_management as mm
    from int8_compile.compile.comfyui.int8_calibrate import plans, quantize_model
    from int8_compile.int8.options import Int8Options

    def stop(report, text=""):
        if text.startswith("measuring 9/"):
            mm.interrupt_current_processing()

    def sampled(model, **on_progress):
        quantized = quantize_model(model, Int8Options(method="auto"), **on_progress)
        with Ops() as ops:
            image = sample(quantized)
        return image, ops.counts["int8_compile::quant_rows"], {plan.name: plan.method for plan in plans(quantized)}

    want, whole, methods = sampled(load())
    model = load()
    with pytest.raises(mm.InterruptProcessingException):
        sampled(model, on_progress=stop)
    image, rest, found = sampled(model)
    # Each layer is measured with four kinds of quantization.
    assert whole - rest == 4 * 10 and found == methods and torch.equal(image, want)


def timed(flux, nodes, min_sqnr_db=100.0):
    """A model whose steps are timed before and after it becomes INT8; of which no layer is exact enough for that."""
    return nodes.CompileModel(nodes.INT8QuantizeModel(flux, method="convrot", min_sqnr_db=min_sqnr_db), backend="eager")


def test_a_sampler_that_writes_into_its_sigmas_gets_the_images_own_once(flux, nodes, comfy, conds):
    from comfy.k_diffusion.sampling import sample_euler

    def euler(model, x, sigmas, **kwargs):
        sigmas[1:-1] *= 0.95
        return sample_euler(model, x, sigmas, extra_args=kwargs.get("extra_args"), callback=kwargs.get("callback"), disable=True)

    def image(model):
        guider = comfy.samplers.CFGGuider(model)
        guider.set_conds(*conds)
        guider.set_cfg(1.0)
        sigmas = comfy.samplers.calculate_sigmas(model.get_model_object("model_sampling"), "simple", 4)
        latent = torch.zeros(1, 16, 16, 16)
        noise = comfy.sample.prepare_noise(latent, 1)
        return guider.sample(noise, latent, comfy.samplers.KSAMPLER(euler), sigmas, disable_pbar=True, seed=1)

    assert torch.equal(image(timed(flux, nodes)), image(flux))


@pytest.mark.parametrize("kind", ["without", "beside"])
def test_what_fails_while_steps_are_timed_fails_no_image(flux, nodes, sample, monkeypatch, kind):
    from int8_compile.compile.comfyui.trial import TIMED, Trial

    run = Trial.run

    def fails(self, sigmas, wrappers=None, options=MappingProxyType({})):
        if options.get(TIMED) == kind:
            raise torch.OutOfMemoryError("another pack's")
        run(self, sigmas, wrappers, options)

    monkeypatch.setattr(Trial, "run", fails)
    model = timed(flux, nodes)
    assert torch.equal(sample(model), sample(flux)) and torch.equal(sample(model), sample(flux))


def test_steps_are_not_timed_beside_the_warm_up(flux, nodes, sample, monkeypatch):
    """It imports the compiler on the same cores."""
    from int8_compile.compile.comfyui import trial
    from int8_compile.compile.torch_internals import warmup

    ready, over = threading.Event(), threading.Event()
    ready.set()
    monkeypatch.setattr(warmup, "_ready", {"cpu": ready})
    monkeypatch.setattr(warmup, "_over", {"cpu": over})
    threading.Timer(0.5, over.set).start()
    run, seen = trial.Trial.run, []
    monkeypatch.setattr(trial.Trial, "run", lambda self, sigmas, wrappers=None, options=MappingProxyType({}): (
        seen.append((options.get(trial.TIMED), over.is_set())), run(self, sigmas, wrappers, options)))
    sample(timed(flux, nodes, 20.0))
    assert seen[0] == (None, False) and {is_over for kind, is_over in seen if kind} == {True} and {"without", "beside"} <= dict(seen).keys()


def timed_kinds(monkeypatch) -> list[str]:
    """What runs beside images are timed as, from now on; "search" where layers are measured."""
    from int8_compile.compile.comfyui import int8_calibrate, trial

    time_steps, plan_model, seen = trial.Trial.time_steps, int8_calibrate.plan_model, []
    monkeypatch.setattr(trial.Trial, "time_steps", lambda self, kind, *args, **kwargs: (
        seen.append(kind), time_steps(self, kind, *args, **kwargs))[1])
    monkeypatch.setattr(int8_calibrate, "plan_model", lambda *args: (seen.append("search"), plan_model(*args))[1])
    return seen


def test_steps_are_timed_just_before_the_layers_change_and_just_after(flux, nodes, sample, monkeypatch):
    """The search between takes a minute in large models; a machine may have other work then. Another LoRA times nothing again."""
    seen = timed_kinds(monkeypatch)
    model = timed(flux, nodes, 20.0)
    sample(model)
    sample(model)
    sample(timed(flux, nodes, 20.0))
    assert seen == ["search", "without", "beside", "without", "beside"]


def test_a_model_is_timed_as_it_came_though_the_first_search_was_interrupted(load, nodes, sample, monkeypatch):
    import comfy.model_management as mm
    from int8_compile.compile.comfyui import int8_plan

    seen = timed_kinds(monkeypatch)
    measure, calls = int8_plan.measure_layer, []

    def stops(*args, **kwargs):
        calls.append(1)
        if len(calls) == 3:
            mm.interrupt_current_processing()
            mm.throw_exception_if_processing_interrupted()
        return measure(*args, **kwargs)
    monkeypatch.setattr(int8_plan, "measure_layer", stops)
    model = timed(load(), nodes, 20.0)
    with pytest.raises(mm.InterruptProcessingException):
        sample(model)
    sample(model)
    assert seen == ["search", "search", "without", "beside", "without", "beside"]


def test_layers_are_measured_in_each_dtype_that_a_model_computes_in(load, sample, monkeypatch):
    """ModelComputeDtype, before the node or behind it."""
    from int8_compile.compile.comfyui.int8_calibrate import quantize_model
    from int8_compile.int8.options import Int8Options

    seen, model = timed_kinds(monkeypatch), load()
    for dtype in (None, torch.bfloat16, torch.bfloat16):
        changed = model.clone()
        if dtype is not None:
            changed.set_model_compute_dtype(dtype)
        sample(quantize_model(changed, Int8Options(method="convrot", min_sqnr_db=20.0)))
    assert seen.count("search") == 2
