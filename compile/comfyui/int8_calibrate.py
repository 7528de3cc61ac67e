"""INT8 Quantize Model: at once where the method needs no measurement, else at the first sampling, from the model's own activations."""
from __future__ import annotations

import contextlib
import logging
import sys
import weakref
from dataclasses import dataclass, field

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher
from comfy.patcher_extension import CallbacksMP, WrappersMP, add_wrapper_with_key

from ...int8.calibrate import LayerStats, collect
from ...int8.echo import echo
from ...int8.options import Int8Options
from ...int8.plan import LayerPlan
from ...int8.quantize import eligible_linears
from ...int8.report import KEPT_BY_NAME, ProgressCallback, QuantizeReport, no_progress
from ..comparison import ENOUGH
from ..gain import BESIDE, WITHOUT
from . import core as comfy_core
from .foreign_layers import as_it_computes
from .int8_layer import compute_dtype_of, is_encoder, prefix_of, require_native_int8, root_of
from .int8_lora import Int8Lora, prepare_for_hooks
from .int8_model import adopt_native_layers, int8_layers, layers_to_quantize, put_int8_layers
from .int8_plan import plan_model
from .int8_source import source_of_layers
from .object_patches import object_of
from .trial import CALIBRATING, TIMED_STEPS, Trial, is_running

logger = logging.getLogger(__name__)

QUANTIZE_KEY = "int8_quantize"


@dataclass
class _Findings:
    """What is known of a model's layers for some options. stats: what they were fed, to be measured. measured: {layer: plan} of a search
    that was interrupted: the next prompt goes on where it stopped. plans: fixed, for every branch (another LoRA) of the model."""

    stats: dict[str, LayerStats] | None = None
    measured: dict[str, LayerPlan] = field(default_factory=dict)
    plans: list[LayerPlan] | None = None


# BaseModel -> {(layers, options, layers that other packs put there, dtype between layers): what was found}.
_FINDINGS: weakref.WeakKeyDictionary[torch.nn.Module, dict[tuple, _Findings]] = weakref.WeakKeyDictionary()


def quantize_model(patcher, options: Int8Options, on_progress: ProgressCallback = no_progress):
    """A clone of patcher (ModelPatcher, of a MODEL or a CLIP) whose eligible Linear layers are INT8, now or from its first use on: the
    model that came in keeps its weights. Layers that are INT8 already stay as they are, as do all on a ComfyUI that the pack does not know.
    on_progress: called with what is under way, and with the report of it; when the model first samples too.

    Raises what layers_to_quantize and, for a method that needs no calibration, put_int8_layers raise.
    """
    require_native_int8()
    if not comfy_core.usable(comfy_core.INT8):
        on_progress(QuantizeReport(refusal=f"Left as it is: of ComfyUI {comfy_core.comfyui_version()} "
                            f"{'; '.join(comfy_core.changes(comfy_core.INT8))}. Update the pack."))
        return patcher.clone()
    planned = planned_layers(patcher)
    names = layers_to_quantize(patcher, options, planned)
    clone = adopt_native_layers(patcher.clone(), options.kernel)
    if not names:
        on_progress(QuantizeReport(native=len(int8_layers(clone))))
        return clone
    known = {*names, *planned, *int8_layers(patcher)}
    kept = tuple(name for name in eligible_linears(root_of(patcher)) if name not in known)
    if options.calibrated:
        from .int8_encoder import QuantizeEncoder  # it derives from what is below

        on_progress(QuantizeReport(waiting=len(names), kept={KEPT_BY_NAME: list(kept)} if kept else {},
                                   first_use="prompt" if is_encoder(clone) else "sampling"))
        kind = QuantizeEncoder if is_encoder(clone) else QuantizeFirst
        kind(clone, tuple(names), options, on_progress, kept).attach(clone)
    else:
        put_and_tell(clone, [LayerPlan(name, options.method) for name in names], options, on_progress, kept)
    return clone


def put_and_tell(patcher, plans: list[LayerPlan], options: Int8Options, on_progress: ProgressCallback, kept: tuple[str, ...]):
    """put_int8_layers, with its report."""
    plans = [as_it_computes(patcher, plan) for plan in plans]
    before, source = patcher.model_size(), source_of_layers(patcher, [plan.name for plan in plans if plan.method != "float"])
    put_int8_layers(patcher, plans, options.kernel, on_progress)
    report = QuantizeReport.of(plans, before, patcher.model_size(), kept, is_encoder(patcher))
    report.source = source
    on_progress(report)


def planned_layers(patcher) -> list[str]:
    """Names below the root of the layers that are, or will be at the first use, quantized after a calibration."""
    return [name for w in quantizers(patcher) for name in w.names]


def plans(patcher) -> list[LayerPlan]:
    """Each layer's plan of a quantized patcher, with its measured numbers; empty before its first sampling."""
    return [plan for w in quantizers(patcher) for plan in w.findings(patcher).plans or ()]


def quantizers(patcher) -> list[Quantizer]:
    """What patcher's nodes wait for a first use with, in order."""
    return patcher.get_wrappers(WrappersMP.OUTER_SAMPLE, QUANTIZE_KEY)


class Quantizer:
    """Quantizes layers of a patcher by what they are fed at its first use. Once a model is measured the plans are fixed.

    names: of the layers, below the root. kept: names that keep_layers matched, for the report.
    """

    def __init__(self, patcher, names: tuple[str, ...], options: Int8Options, on_progress: ProgressCallback = no_progress,
                 kept: tuple[str, ...] = ()):
        self.names = names
        self.options = options
        self.on_progress = on_progress
        self.kept = kept
        # Layers and weights that another pack put in the place of the model's share no plans with them.
        prefix = prefix_of(patcher)
        theirs = [prefix + name + key for name in names for key in ("", ".weight") if prefix + name + key in patcher.object_patches]
        self._key = names, options, tuple((name, weakref.ref(patcher.object_patches[name])) for name in theirs)

    def attach(self, patcher) -> None:
        patcher.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, QUANTIZE_KEY, self)
        prepare_for_hooks(patcher)

    def findings(self, patcher) -> _Findings:
        return _FINDINGS.setdefault(patcher.model, {}).setdefault((*self._key, compute_dtype_of(patcher)), _Findings())

    def waits(self, patcher) -> bool:
        """Whether nothing has been seen of patcher's layers yet."""
        found = self.findings(patcher)
        return found.stats is None and found.plans is None and not self.is_quantized(patcher)

    def is_quantized(self, patcher) -> bool:
        return any(isinstance(patcher.object_patches.get(prefix_of(patcher) + name), Int8Lora) for name in self.names)

    def collect(self, patcher):
        """See calibrate.collect. The layers are those that loading this patcher puts: another clone's may be in the model now."""
        return collect({name: object_of(patcher, prefix_of(patcher) + name) for name in self.names})

    def keep(self, patcher, stats: dict[str, LayerStats]) -> None:
        """A run in which no layer was called says nothing: the next one is looked at instead."""
        if stats:
            self.findings(patcher).stats = stats

    def plan(self, patcher) -> bool:
        """Measures patcher's layers if what they are fed is known and they are not measured yet; says whether it did."""
        found = self.findings(patcher)
        if found.stats is None:
            return False
        found.plans = plan_model(patcher, self.names, found.stats, self.options, self.on_progress, found.measured)
        found.stats, found.measured = None, {}
        return True

    def quantize(self, patcher) -> bool:
        """Puts INT8 layers into patcher if what they are fed is known and they are not there yet; says whether it did."""
        if self.is_quantized(patcher):
            return False
        self.plan(patcher)
        plans = self.findings(patcher).plans
        if plans is None:
            return False
        put_and_tell(patcher, plans, self.options, self.on_progress, self.kept)
        return self.is_quantized(patcher)


class QuantizeFirst(Quantizer):
    """Of a MODEL: quantizes the patchers that are sampled, before they are.

    The OUTER_SAMPLE wrapper of the guider's model measures all models that the guider holds, in a short run of its own. A model that no
    such wrapper reaches (core asks the first model of a guider only), or whose short run fails, is watched while the image is made, and is
    INT8 from the next one on.
    """

    _watch: contextlib.ExitStack | None = None
    _seen: dict[str, LayerStats] = {}

    def attach(self, patcher) -> None:
        super().attach(patcher)
        # In model_options: of a guider's second model these are the only wrappers that core calls.
        add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, QUANTIZE_KEY, _quantize_before_load, patcher.model_options, is_model_options=True)
        for call, callback in ((CallbacksMP.ON_PRE_RUN, self._begin), (CallbacksMP.ON_PREPARE_STATE, self._step),
                               (CallbacksMP.ON_CLEANUP, self._end)):
            patcher.add_callback_with_key(call, QUANTIZE_KEY, callback)

    def __call__(self, executor, noise, latent_image, sampler, sigmas, *args, **kwargs):
        guider = executor.class_obj
        patchers = _patchers(guider)
        # A training run is no image: its sampler changes what it trains.
        if len(sigmas) > 1 and not comfy.model_management.in_training:
            _measure(Trial(guider, patchers, noise, latent_image, sampler, sigmas, args, kwargs), patchers, len(sigmas) - 1)
        for patcher in patchers:
            _quantize_known(patcher)
        return executor(noise, latent_image, sampler, sigmas, *args, **kwargs)

    def _begin(self, patcher) -> None:
        if self._watch is None and self.waits(patcher):
            self._watch = contextlib.ExitStack()
            self._seen = self._watch.enter_context(self.collect(patcher))

    def _step(self, patcher, timestep, model_options) -> None:
        if self._watch is not None:
            self.on_progress(None, "looking at this sampling in high precision; INT8 from the next one on")
            model_options.setdefault("transformer_options", {})[CALIBRATING] = True

    def _end(self, patcher) -> None:
        watch, self._watch = self._watch, None
        if watch is not None:
            watch.close()
            if sys.exc_info()[0] is None:  # else the run broke off, and some layers were not called yet
                self.keep(patcher, self._seen)
            self._seen = {}


def _patchers(guider) -> list[ModelPatcher]:
    """Those that guider holds, each once: DualModelGuider has two."""
    found = {}
    for value in vars(guider).values():
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, ModelPatcher):
                found[id(item)] = item
    return list(found.values())


def _measure(trial: Trial, patchers: list[ModelPatcher], steps: int) -> None:
    """What is not known yet: what the layers get, what becomes of them, and what a step takes just before they change and just after; each
    twice, in turns, since the machine may have other work for a moment."""
    new, is_float = [], True
    for patcher in patchers:
        for wrapper in quantizers(patcher):
            if wrapper.is_quantized(patcher):
                is_float = False
            else:
                new.append((wrapper, patcher))
    if waiting := [(wrapper, patcher) for wrapper, patcher in new if wrapper.waits(patcher)]:
        _look(trial, waiting)
    is_new = sum(wrapper.plan(patcher) for wrapper, patcher in new) > 0
    if not new or not is_float or not (is_new or trial.is_wanted):
        return
    as_they_came = trial.of({id(patcher): patcher.clone() for patcher in patchers})
    try:
        seconds = trial.time_steps(WITHOUT)
        changed = sum(wrapper.quantize(patcher) for wrapper, patcher in new) > 0
        if changed and (0.0 < seconds < ENOUGH or (seconds and trial.is_judged)):
            is_long = seconds >= ENOUGH
            trial.time_steps(BESIDE, is_first=not is_long or steps == 1)  # of two long ones the second is enough
            most = 1 if is_long else TIMED_STEPS
            as_they_came.time_steps(WITHOUT, most=most)
            trial.time_steps(BESIDE, most=most)
    except BaseException:
        for judge in trial.judges:
            judge.trial_broke_off()
        raise


def _quantize_known(patcher) -> None:
    for quantizer in quantizers(patcher):
        quantizer.quantize(patcher)


def _quantize_before_load(executor, model, *args, **kwargs):
    """The PREPARE_SAMPLING wrapper. A function: other packs copy model_options deeply."""
    if not is_running():
        _quantize_known(model)
    return executor(model, *args, **kwargs)


def _look(trial: Trial, waiting: list[tuple[Quantizer, ModelPatcher]]) -> None:
    """Samples in a few long steps over the whole schedule and keeps what the layers get."""
    try:
        with contextlib.ExitStack() as stack:
            stats = [stack.enter_context(wrapper.collect(patcher)) for wrapper, patcher in waiting]
            for wrapper, _ in waiting:
                wrapper.on_progress(None, f"looking at {len(trial.few) - 1} steps in high precision")
            trial.run(trial.few)
    except (comfy.model_management.InterruptProcessingException, comfy.model_management.OOM_EXCEPTION):
        raise
    except Exception as error:  # it may need what another node's wrapper gives it
        logger.warning("INT8 Quantize Model: this model does not run without the wrappers of other nodes (%s: %s). Its layers are looked "
                       "at while the image is made, and are INT8 from the next one on.", type(error).__name__, echo(str(error)))
        return
    for (wrapper, patcher), seen in zip(waiting, stats):
        wrapper.keep(patcher, seen)
