"""Compile in ComfyUI: an APPLY_MODEL wrapper on a clone, which compiles at the first sampling call.

Only there are device, LoRA, hooks, object patches and real shapes final (comfy.model_base.BaseModel.apply_model).
"""
from __future__ import annotations

import logging
import threading
import weakref
from dataclasses import dataclass
from typing import Protocol

import comfy.model_management
import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...int8.structure import repeated_blocks
from ..artifacts.stand_ins import reach_blocks
from ..block_calls import counted
from ..engine import CompiledModule
from ..errors import is_out_of_memory
from ..events import OnProgress
from ..gain import COMPILED, EAGER, CallTimes
from ..options import CompileOptions
from ..report import WEIGHTS, CompileReport
from ..torch_internals import warmup
from ..torch_internals.interrupt import Interrupted
from . import core as comfy_core
from .artifact_cache import get_cache
from .attention import add_functions
from .foreign_layers import adapt_layers
from .int8_layer import patch_linear_input_act
from .memory_compiler import cleaned_up_after, without_comfy_compiler
from .offload import around_block, is_offloaded
from .patched_method import PatchedMethod, patched_methods, put_method
from .target import check_target, overlap
from .trial import CALIBRATING, COMPILE_KEY, TIMED
from .verification_settings import verification_options

logger = logging.getLogger(__name__)

# core's TorchCompileModel and KJNodes put their wrapper under this key.
CORE_KEY = "torch.compile"
# What ComfyUI calls on the module of a VAE and of a text encoder (comfy.sd.VAE, comfy.sd.CLIP); a ControlNet's is called itself.
VAE_METHODS = ("encode", "decode", "encode_token_weights")
# BaseModel, VAE or text encoder -> {(target, options, device): _State}: branches of one model (two LoRAs) share what was compiled.
_COMPILED: weakref.WeakKeyDictionary[torch.nn.Module, dict] = weakref.WeakKeyDictionary()
_LOCK = threading.Lock()
# BaseModel with dynamic VRAM -> its copy without, as ModelPatcher.clone takes it (ModelPatcher.get_non_dynamic_delegate keeps it so too).
_NON_DYNAMIC: weakref.WeakKeyDictionary[torch.nn.Module, tuple] = weakref.WeakKeyDictionary()


@dataclass
class _State:
    """The compiled code of a model on a device. offloaded: its layers have been changed by an offload, now or before."""

    compiled: CompiledModule
    offloaded: bool = False


def _run(model: torch.nn.Module, target: str, options: CompileOptions, device: torch.device, root: torch.nn.Module, call,
         filter_guards: bool, on_progress: OnProgress | None, situation: dict | None = None, elsewhere: bool = False):
    """call() with what is repeated in root compiled; elsewhere: see CompiledModule.run."""
    state = _state_of(model, target, options, device)
    state.offloaded = state.offloaded or is_offloaded(model)
    try:
        with without_comfy_compiler(device, state.compiled.report):
            return state.compiled.run(root, cleaned_up_after(call), filter_guards=filter_guards, passthrough=_is_passthrough,
                                      on_progress=on_progress, around_block=around_block if state.offloaded else None,
                                      interrupted=comfy.model_management.processing_interrupted, situation=situation,
                                      elsewhere=elsewhere)
    except Interrupted:
        comfy.model_management.interrupt_current_processing(False)
        raise comfy.model_management.InterruptProcessingException from None


def _state_of(model: torch.nn.Module, target: str, options: CompileOptions, device: torch.device) -> _State:
    with _LOCK:
        states = _COMPILED.setdefault(model, {})
        key = (target, options, device)
        if key not in states:
            add_functions()
            patch_linear_input_act()  # as the builder's process does; later, with the first INT8 layers, it would make compiled code stale
            states[key] = _State(CompiledModule(options, device, get_cache(), verification_options()))
    return states[key]


class Judge(Protocol):
    """Decides whether what was compiled is used, by the times of steps; see optimize.Optimizer."""

    @property
    def is_open(self) -> bool: ...

    def runs_eager(self, times: CallTimes, size: str) -> bool: ...

    def timed(self, times: CallTimes, size: str, kind: str) -> None: ...

    @property
    def wants_trial(self) -> bool: ...

    def trial_broke_off(self) -> None: ...


class LazyCompile:
    """The APPLY_MODEL wrapper: compiles target (a dotted path below BaseModel, empty for all of it) of whatever BaseModel it is
    called with. Holds no module, so that a second model or another GPU's copy never runs the weights of the first. Copies of a patcher,
    deep ones too, have the same one.
    on_progress: see CompiledModule.run. No part of the options: nodes that compile alike share what was compiled. judge: asked before each
    step, None: every step runs compiled."""

    def __init__(self, target: str, options: CompileOptions, on_progress: OnProgress | None = None, judge: Judge | None = None):
        self.target = target
        self.options = options
        self.on_progress = on_progress
        self.judge = judge
        self.times = CallTimes()

    def __call__(self, executor, x, *args, **kwargs):
        model = executor.class_obj
        root = comfy.utils.get_attr(model, self.target) if self.target else model.diffusion_model
        # apply_model(x, t, c_concat, c_crossattn, control, transformer_options)
        transformer_options = args[4] if len(args) > 4 else kwargs.get("transformer_options", {})
        situation = _situation(model, x, *args[1:3], **kwargs)
        size = _size(situation)
        if CALIBRATING in transformer_options:
            begun = self.times.begin(x.device)
            result = executor(x, *args, **kwargs)
            self.times.end(begun, size, transformer_options.get(TIMED, ""))
            return result
        self.times.of_weights(situation[WEIGHTS])
        if CORE_KEY in transformer_options.get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {}):  # add_compile took off those before it
            return _run(model, self.target, self.options, x.device, root, lambda: executor(x, *args, **kwargs), False, self.on_progress,
                        situation, elsewhere=True)
        compiled = _state_of(model, self.target, self.options, x.device).compiled
        report = compiled.report
        is_eager = self.judge is not None and self.judge.runs_eager(self.times, size)
        is_counted = self.judge is not None and self.judge.is_open and (is_eager or bool(report.failure))
        if is_eager and not is_counted:
            return executor(x, *args, **kwargs)
        modules = compiled.blocks(root) if is_counted else []
        begun = self.times.begin(x.device)
        if is_counted:
            result, blocks = counted(modules, lambda: executor(x, *args, **kwargs))
            kind = EAGER if blocks else ""  # a cache node left all of it out
        else:
            before = _extra_work(report)
            result = _run(model, self.target, self.options, x.device, root, lambda: executor(x, *args, **kwargs),
                          not reach_blocks(transformer_options), self.on_progress, situation)
            kind, blocks = self._what_ran(report, x.device) if before == _extra_work(report) else "", sum(report.last_calls.values())
        self.times.end(begun, size, kind, blocks)
        if self.judge is None:
            self._gained(report, size)
        else:
            self.judge.timed(self.times, size, kind)
        return result

    def __deepcopy__(self, memo):
        return self

    def begin_image(self, patcher) -> None:
        """The ON_PRE_RUN callback."""
        self.times.new_image()

    def _gained(self, report: CompileReport, size: str) -> None:
        gain = self.times.gain(size)
        if gain is not None and gain.differs_from(report.gain):
            report.gain = gain
            if self.on_progress is not None:
                self.on_progress(report, "", None)

    def _what_ran(self, report: CompileReport, device: torch.device) -> str:
        """Empty where the last step says nothing of either."""
        if report.failure:
            return EAGER
        eager, calls = report.last_calls.get("eager", 0), sum(report.last_calls.values())
        if not calls or (report.building and self.options.background and (device.type == "cpu" or self.judge is not None)):
            return ""  # the builder computes on the same cores; what is not urgent waits, see Builder.sampling
        return COMPILED if eager < calls else EAGER


def _extra_work(report: CompileReport) -> tuple[int, ...]:
    """What a step that did more than compute has changed: it compiled, loaded, or checked something."""
    return report.graphs, len(report.artifacts), report.checks


def _size(situation: dict) -> str:
    """In words: what of a situation a step's time depends on."""
    latent, batch, prompt = (situation[name] for name in ("size of the latent", "batch", "prompt length"))
    return f"latent {'x'.join(map(str, latent))}, batch {batch}" + (f", prompt length {prompt}" if prompt else "")


class CompiledMethod(PatchedMethod):
    """The same call with target compiled. on_progress: as of LazyCompile."""

    def __init__(self, target: str, options: CompileOptions, device: torch.device, on_progress: OnProgress | None = None):
        self.target = target
        self.options = options
        self.device = device
        self.on_progress = on_progress

    def of(self, patcher):
        changed = super().of(patcher)
        changed.device = patcher.load_device
        return changed

    def __call__(self, *args, **kwargs):
        model = self.plain.__self__
        root = comfy.utils.get_attr(model, self.target) if self.target else model
        return _run(model, self.target, self.options, self.device, root, lambda: self.original(*args, **kwargs), True, self.on_progress)


def _situation(model: torch.nn.Module, x: torch.Tensor, c_concat=None, c_crossattn=None, **kwargs) -> dict:
    """What users change from image to image, of a call of BaseModel.apply_model."""
    prompt: tuple[int, ...] = getattr(c_crossattn, "shape", ())
    return {"size of the latent": tuple(x.shape[2:]), "batch": x.shape[0], "prompt length": prompt[1] if len(prompt) > 2 else None,
            WEIGHTS: getattr(model, "current_weight_patches_uuid", None)}


def _is_passthrough(error: Exception) -> bool:
    """Out of memory and interrupts are ComfyUI's to handle, not failures of compile."""
    return is_out_of_memory(error) or isinstance(error, (
        comfy.model_management.InterruptProcessingException, comfy.model_management.OOM_EXCEPTION))


def add_compile(patcher, target: str, options: CompileOptions, on_progress: OnProgress | None = None, judge: Judge | None = None) -> None:
    """Makes patcher (a clone of the caller's) compile target when it first samples. Compile wrappers of an overlapping target
    are taken off: compiling compiled code gains nothing. On a ComfyUI that the pack does not know the model stays uncompiled.
    judge: see LazyCompile."""
    if not comfy_core.usable(comfy_core.COMPILE):
        return
    _warm_up(patcher, target, options)
    adapt_layers(patcher, target, options)
    wrappers = patcher.wrappers.get(WrappersMP.APPLY_MODEL, {})
    for key in list(wrappers):
        if key == CORE_KEY or any(isinstance(w, LazyCompile) and overlap(w.target, target) for w in wrappers[key]):
            patcher.remove_wrappers_with_key(WrappersMP.APPLY_MODEL, key)
    key = f"{COMPILE_KEY}.{target}"
    lazy = LazyCompile(target, options, on_progress, judge)
    patcher.add_wrapper_with_key(WrappersMP.APPLY_MODEL, key, lazy)
    if judge is not None:
        patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, key, lazy.begin_image)


def add_method_compile(patcher, target: str, options: CompileOptions, on_progress: OnProgress | None = None) -> None:
    """Makes patcher (a clone, of a VAE, CLIP or ControlNet) compile target when it is first used, by object patches: on
    while this patcher is loaded, off when another clone is.

    Raises ValueError where nothing in target repeats: a whole VAE is not called as a module, and its parts are too many to compile.
    """
    module = check_target(patcher, target)
    if not repeated_blocks(module):
        raise ValueError(f"{options.title}: no repeated blocks to compile in {type(module).__name__}. Connect it without this node.")
    if not comfy_core.usable(comfy_core.COMPILE):
        return
    _warm_up(patcher, target, options)
    adapt_layers(patcher, target, options)
    methods = [name for name in VAE_METHODS if hasattr(patcher.model, name)]
    for name in methods or ["forward"]:  # a ControlNet's model has none of them: it is called
        put_method(patcher, name, CompiledMethod(target, options, patcher.load_device, on_progress))


def _warm_up(patcher, target: str, options: CompileOptions) -> None:
    """Imports the compiler in the background, unless artifacts of these blocks are there or another process will compile: importing slows
    the first image down."""
    cache = None if options.artifact_refusal else get_cache()
    names = {type(container._modules[key]).__name__ for _, container, key in repeated_blocks(check_target(patcher, target))}
    if cache is None or not (options.background or (names and all(map(cache.store.has, names)))):
        warmup.start(patcher.load_device.type)


def reports(patcher) -> list:
    """The CompileReport of every compile node in front of this patcher, for the devices it has run on."""
    groups = patcher.wrappers.get(WrappersMP.APPLY_MODEL, {}).values()
    wrappers: list[LazyCompile | CompiledMethod] = [w for group in groups for w in group if isinstance(w, LazyCompile)]
    wrappers += {(m.target, m.options): m for m in patched_methods(patcher, CompiledMethod)}.values()
    states = _COMPILED.get(patcher.model, {})
    return [state.compiled.report for w in wrappers for (target, options, _), state in states.items()
            if (target, options) == (w.target, w.options)]


def is_compiled_by_core(patcher) -> bool:
    """Whether a node that uses ComfyUI's own set_torch_compile_wrapper is in front of it."""
    return CORE_KEY in patcher.wrappers.get(WrappersMP.APPLY_MODEL, {})


def all_reports() -> list[tuple[str, CompileReport]]:
    """(class of the model, report) of all that is compiled in this process."""
    with _LOCK:
        return [(type(model).__name__, state.compiled.report) for model, states in list(_COMPILED.items()) for state in states.values()]


def non_dynamic_clone(patcher, title: str):
    """A clone without dynamic VRAM, whose weights are plain tensors that compiled code can read. The checkpoint is read once for a
    model: later clones share that copy, with the object patches (INT8 layers) and LoRA of the patcher that they are made of.

    Raises RuntimeError where this ComfyUI, or the loader of this model, cannot make one.
    """
    is_dynamic = getattr(patcher, "is_dynamic", None)  # cores before 0.15 have no dynamic VRAM
    if is_dynamic is None or not is_dynamic():
        return patcher.clone()
    refusal = f"{title}: this ComfyUI version does not support disable_dynamic clone."
    copy = _NON_DYNAMIC.get(patcher.model)
    try:
        clone = patcher.clone(disable_dynamic=True, model_override=copy) if copy else patcher.clone(disable_dynamic=True)
    except TypeError:
        raise RuntimeError(f"{refusal} Update ComfyUI, or set disable_dynamic_vram to false.") from None
    except RuntimeError as error:
        raise RuntimeError(f"{refusal} The loader of this model cannot load it a second time ({error}). Use a stock loader, "
                           "set disable_dynamic_vram to false, or start ComfyUI with --disable-dynamic-vram.") from error
    if hasattr(clone, "get_clone_model_override"):
        _NON_DYNAMIC[patcher.model] = clone.get_clone_model_override()
    return clone
