"""INT8 Quantize Model: at once where the method needs no measurement, else at the first sampling, from the model's own activations."""
from __future__ import annotations

import logging
import weakref
from collections import Counter

import comfy.model_management
import comfy.utils
import torch
from comfy.patcher_extension import WrappersMP

from . import comfy_core
from .calibrate import LayerStats, collect
from .comfy_ops import (
    PREFIX,
    adopt_native_layers,
    int8_layers,
    layers_to_quantize,
    pristine_parameter,
    put_int8_layers,
    require_native_int8,
)
from .comfy_recording import unrecorded
from .options import Int8Options
from .plan import LayerPlan, choose_methods, fit_size, measure_layer
from .quantize import eligible_linears
from .report import KEPT_BY_NAME, QuantizeReport, Tell, tell_nobody
from .structure import roles

logger = logging.getLogger(__name__)

KEY = "int8_quantize"
# In transformer_options while a model is calibrated: what it computes is only looked at, so nothing compiles it.
CALIBRATING = "int8_calibrating"
# Sigmas that are evaluated for a calibration, spread over the schedule.
STEPS = 3
# BaseModel -> {(layers, options): plans}: fixed once measured, for every branch (another LoRA) of the model.
_PLANS: weakref.WeakKeyDictionary[torch.nn.Module, dict] = weakref.WeakKeyDictionary()
# The same, {layer: plan} of a search that was interrupted: the next prompt goes on where it stopped.
_MEASURED: weakref.WeakKeyDictionary[torch.nn.Module, dict] = weakref.WeakKeyDictionary()


def quantize_model(patcher, options: Int8Options, tell: Tell = tell_nobody):
    """A clone of patcher (ModelPatcher) whose eligible Linear layers are INT8, now or from its first sampling on: the model that came
    in keeps its weights. Layers that are INT8 already stay as they are, as do all on a ComfyUI that the pack does not know. tell:
    called with what is under way, and with the report of it; when the model first samples too.

    Raises what layers_to_quantize and, for a method that needs no calibration, put_int8_layers raise.
    """
    require_native_int8()
    if not comfy_core.usable(comfy_core.INT8):
        tell(QuantizeReport(refusal=f"Left as it is: of ComfyUI {comfy_core.comfyui_version()} "
                            f"{'; '.join(comfy_core.changes(comfy_core.INT8))}. Update the pack."))
        return patcher.clone()
    planned = planned_layers(patcher)
    names = layers_to_quantize(patcher, options, planned)
    clone = adopt_native_layers(patcher.clone(), options.kernel)
    if not names:
        tell(QuantizeReport(native=len(int8_layers(clone))))
        return clone
    known = {*names, *planned, *int8_layers(patcher)}
    kept = tuple(name for name in eligible_linears(patcher.model.diffusion_model) if name not in known)
    if options.calibrated:
        tell(QuantizeReport(waiting=len(names), kept={KEPT_BY_NAME: list(kept)} if kept else {}))
        clone.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, QuantizeFirst(tuple(names), options, tell, kept))
    else:
        _put_and_tell(clone, [LayerPlan(name, options.method) for name in names], options, tell, kept)
    return clone


def _put_and_tell(patcher, plans: list[LayerPlan], options: Int8Options, tell: Tell, kept: tuple[str, ...]):
    before = patcher.model_size()
    put_int8_layers(patcher, plans, options.kernel, tell)
    tell(QuantizeReport.of(plans, before, patcher.model_size(), kept))


def planned_layers(patcher) -> list[str]:
    """Names below the diffusion model of the layers that are, or will be at the first sampling, quantized after a calibration."""
    return [name for w in patcher.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY) for name in w.names]


def plans(patcher) -> list[LayerPlan]:
    """Each layer's plan of a quantized patcher, with its measured numbers; empty before its first sampling."""
    wrappers = patcher.get_wrappers(WrappersMP.OUTER_SAMPLE, KEY)
    return [plan for w in wrappers for plan in _PLANS.get(patcher.model, {}).get((w.names, w.options), ())]


class QuantizeFirst:
    """The OUTER_SAMPLE wrapper: quantizes the patcher that is sampled, before it is. Once a model is measured the plans are fixed.
    kept: names that keep_layers matched, for the report."""

    def __init__(self, names: tuple[str, ...], options: Int8Options, tell: Tell = tell_nobody, kept: tuple[str, ...] = ()):
        self.names = names
        self.options = options
        self.tell = tell
        self.kept = kept

    def __call__(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        patcher = executor.class_obj.model_patcher
        if not any(PREFIX + name in patcher.object_patches for name in self.names):
            known = _PLANS.setdefault(patcher.model, {})
            key = (self.names, self.options)
            if key not in known:
                self.tell(None, f"looking at {min(STEPS, len(sigmas) - 1)} steps in high precision")
                stats = self._calibrate(executor, patcher, noise, latent_image, sampler, sigmas, args, kwargs)
                measured = _MEASURED.setdefault(patcher.model, {})
                known[key] = plan_model(patcher, self.names, stats, self.options, self.tell, measured.setdefault(key, {}))
                del measured[key]
            _put_and_tell(patcher, known[key], self.options, self.tell, self.kept)
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)

    def _calibrate(self, executor, patcher, noise, latent_image, sampler, sigmas, args, kwargs) -> dict[str, LayerStats]:
        """Samples in a few long steps over the whole schedule and looks at what the layers get. Leaves the guider and the random
        numbers as they were."""
        guider = executor.class_obj
        # outer_sample(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, latent_shapes)
        names = ("denoise_mask", "callback", "disable_pbar", "seed", "latent_shapes")
        arguments = {**dict(zip(names, args)), **kwargs, "callback": None, "disable_pbar": True}
        few = sigmas[torch.linspace(0, len(sigmas) - 1, min(STEPS + 1, len(sigmas))).long()]
        conds, options = guider.conds, guider.model_options["transformer_options"]
        device = patcher.load_device
        options[CALIBRATING] = True
        guider.conds = {key: [cond.copy() for cond in group] for key, group in conds.items()}
        try:
            # The layers as loading this patcher will put them: another clone's may be in the model now.
            with collect({name: patcher.get_model_object(PREFIX + name) for name in self.names}) as stats, unrecorded(device), \
                    torch.random.fork_rng([device] if device.type == "cuda" else []):
                executor(noise, latent_image, sampler, few, **arguments)
        finally:
            options.pop(CALIBRATING)
            guider.conds = conds
        return stats


def plan_model(patcher, names, stats: dict[str, LayerStats], options: Int8Options, tell: Tell = tell_nobody,
               known: dict[str, LayerPlan] | None = None) -> list[LayerPlan]:
    """A plan for each named layer of patcher from what it was fed; a layer at a time on the patcher's device. Changes nothing: this is
    the dry run as well. known: layers that are measured already; it gets those that are measured now, for an interrupted search."""
    known = {} if known is None else known
    progress = comfy.utils.ProgressBar(len(names))
    result = []
    for group in roles(patcher.model.diffusion_model, names):
        measured = []
        for name in group:
            comfy.model_management.throw_exception_if_processing_interrupted()
            tell(None, f"measuring {len(result) + len(measured)}/{len(names)}")
            if name in stats:
                if name not in known:
                    weight = pristine_parameter(patcher, f"{PREFIX}{name}.weight").to(patcher.load_device)
                    try:
                        known[name] = measure_layer(name, weight, stats[name], options)
                    except ValueError as error:
                        raise ValueError(f"INT8 Quantize Model: layer '{name}': {error}. Check the checkpoint file.") from error
                measured.append(known[name])
            else:  # not used with these inputs (ControlNet branches, unused embedders)
                result.append(LayerPlan(name, "rowwise" if options.method == "rowwise" else "convrot", reason="never called"))
            progress.update(1)
        if measured:
            choose_methods(measured, options)
            result += measured
    if options.max_mb:
        _fit_size(patcher, result, options)
    measured = [(plan.sqnr[plan.method], plan.name) for plan in result if plan.method in plan.sqnr]
    if measured:
        logger.info("INT8: %s measured %d layers: %s; least SQNR %.1f dB (%s)", options.method, len(measured),
                    ", ".join(f"{count} {method}" for method, count in Counter(p.method for p in result).items()), *min(measured))
    for plan in result:
        logger.debug("INT8: %s", plan)
    return result


def _fit_size(patcher, plans: list[LayerPlan], options: Int8Options) -> None:
    weights = {plan.name: pristine_parameter(patcher, f"{PREFIX}{plan.name}.weight") for plan in plans}
    saved = {name: weight.nbytes - weight.numel() - 4 * weight.shape[0] for name, weight in weights.items()}  # values, fp32 scales
    size = patcher.model_size()
    try:
        fit_size(plans, saved, size - int(options.max_mb * 2**20), roles(patcher.model.diffusion_model, weights))
    except ValueError as error:
        raise ValueError(f"INT8 Quantize Model: {error} to get from {size / 2**20:.1f} to max_mb = {options.max_mb:g}. Raise max_mb, lower "
                         "min_sqnr_db, or keep fewer layers.") from None
