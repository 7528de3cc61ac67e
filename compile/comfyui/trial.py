"""Sampling beside an image: to look at what a model's layers get, and to time its steps."""
from __future__ import annotations

import contextlib
import contextvars
import copy
import itertools
import logging
import time
from collections.abc import Iterable, Mapping
from types import MappingProxyType

import comfy.model_management
import torch
from comfy.model_patcher import ModelPatcher, create_model_options_clone
from comfy.patcher_extension import CallbacksMP, WrappersMP

from ...int8.echo import echo
from ..comparison import ENOUGH
from ..torch_internals import warmup
from ..torch_internals.interrupt import Interrupted
from .allocation_recording import unrecorded

logger = logging.getLogger(__name__)

COMPILE_KEY = "int8_compile"  # begins the keys of the wrappers that compile; see compile_model.py
# In transformer_options while a model is calibrated: what it computes is only looked at, so nothing compiles it.
CALIBRATING = "int8_calibrating"
# With it, in a run that nothing looks at: as what its steps are timed, see gain.py.
TIMED = "int8_timed"
LOOKED_AT = 3  # sigmas that are evaluated for a calibration, spread over the schedule
# So many steps at a time until they have taken so many seconds, so many times: each kind twice, and gain.MOST_KEPT of it are kept.
TIMED_STEPS, SECONDS, MOST_TIMED = 2, ENOUGH / 2, 6
# What of a guider's model_options a run is with: what the model computes (patches, attention), not what watches or changes its steps (cache
# nodes' wrappers, callbacks, functions before and after CFG), whose state belongs to the image that comes after.
_KEPT_OPTIONS = ("transformer_options", "context_handler", "registered_hooks", "disable_cfg1_optimization")
_KEPT_WRAPPERS = (WrappersMP.PREPARE_SAMPLING,)  # about loading, as the callbacks that are not these:
_RUN_CALLBACKS = (CallbacksMP.ON_PRE_RUN, CallbacksMP.ON_PREPARE_STATE, CallbacksMP.ON_APPLY_HOOKS, CallbacksMP.ON_CLEANUP)


_RUNNING = contextvars.ContextVar("int8_compile_trial", default=False)


def is_running() -> bool:
    """Whether what is sampled now is a trial."""
    return _RUNNING.get()


class Trial:
    """Runs of what guider is about to sample. They leave the guider, the random numbers and what other nodes know of the sampling as they
    were. patchers: the guider's. args, kwargs: as of outer_sample, after sigmas."""

    def __init__(self, guider, patchers: Iterable[ModelPatcher], noise, latent_image, sampler, sigmas: torch.Tensor, args: tuple,
                 kwargs: dict):
        # outer_sample(noise, latent_image, sampler, sigmas, denoise_mask, callback, disable_pbar, seed, latent_shapes)
        names = ("denoise_mask", "callback", "disable_pbar", "seed", "latent_shapes")
        self._arguments = {**dict(zip(names, args)), **kwargs, "callback": None, "disable_pbar": True}
        self._guider = guider
        self._patchers = patchers
        self._inputs = noise, latent_image, sampler
        self._sigmas = sigmas
        self.few = sigmas[torch.linspace(0, len(sigmas) - 1, min(LOOKED_AT + 1, len(sigmas))).long()]  # over the whole schedule

    def run(self, sigmas: torch.Tensor, wrappers: dict | None = None, options: Mapping = MappingProxyType({})) -> None:
        """wrappers: of model_options, in the place of all others. options: of transformer_options, besides."""
        device = self._guider.model_patcher.load_device
        token = _RUNNING.set(True)
        try:
            self._run(device, sigmas, wrappers or {}, options)
        finally:
            _RUNNING.reset(token)

    def _run(self, device: torch.device, sigmas: torch.Tensor, wrappers: dict, options: Mapping) -> None:
        with _without_run_callbacks(self._patchers), unrecorded(device), torch.random.fork_rng([device] if device.type == "cuda" else []):
            inputs = (value.clone() if isinstance(value, torch.Tensor) else value for value in (*self._inputs, sigmas))
            _twin(self._guider, wrappers, options).outer_sample(*inputs, **self._arguments)  # a sampler may write into them

    @property
    def judges(self) -> list:
        wrappers = [wrapper for group in _wrappers_that_time(self._guider.model_options).values() for wrapper in group]
        return [wrapper.judge for wrapper in wrappers if wrapper.judge is not None]

    @property
    def is_judged(self) -> bool:
        """Whether something is decided by what it times."""
        return bool(self.judges)

    @property
    def is_wanted(self) -> bool:
        """Whether something is decided by what it has not timed yet."""
        return any(judge.wants_trial for judge in self.judges)

    def of(self, patchers: dict[int, ModelPatcher]) -> Trial:
        """The same with others in the place of the guider's patchers, by their ids."""
        other = copy.copy(self)
        other._guider, other._patchers = copy.copy(self._guider), patchers.values()
        for name, value in vars(self._guider).items():
            if isinstance(value, ModelPatcher):
                setattr(other._guider, name, patchers.get(id(value), value))
        return other

    def time_steps(self, kind: str, is_first: bool = False, most: int = TIMED_STEPS) -> float:
        """Has the compile nodes' wrappers time steps as kind; seconds of one. 0 where there is no such node, or a run fails: the image is
        made without. is_first: with one before that is not timed, since layers do more when they are first called. most: at a time."""
        timers = _wrappers_that_time(self._guider.model_options)
        if not timers:
            return 0.0
        with contextlib.suppress(Interrupted):  # the run says so
            warmup.wait(comfy.model_management.processing_interrupted, entirely=True)
        try:
            if is_first:
                self.run(self._sigmas[:2])
            steps, begun = 0, time.perf_counter()
            for _ in itertools.takewhile(lambda _: time.perf_counter() < begun + SECONDS, range(MOST_TIMED)):
                self.run(self._sigmas[:most + 1], {WrappersMP.APPLY_MODEL: timers}, {TIMED: kind})
                steps += min(most, len(self._sigmas) - 1)
            return (time.perf_counter() - begun) / steps
        except comfy.model_management.InterruptProcessingException:
            raise
        except Exception as error:
            logger.info("INT8 Quantize Model: steps are not timed: %s: %s", type(error).__name__, echo(str(error)))
            return 0.0


def _twin(guider, wrappers: dict, transformer_options: Mapping):
    """guider with conds and model_options of its own: bare ones, with these wrappers and transformer_options."""
    twin = copy.copy(guider)
    twin.conds = {key: [cond.copy() for cond in group] for key, group in guider.conds.items()}
    twin.model_options = _bare_options(guider.model_options)
    options = twin.model_options["transformer_options"]
    options.update(transformer_options)
    options["wrappers"].update(wrappers)
    return twin


def _bare_options(model_options: dict) -> dict:
    options = create_model_options_clone({key: model_options[key] for key in _KEPT_OPTIONS if key in model_options})
    transformer_options = options.setdefault("transformer_options", {})
    wrappers = transformer_options.get("wrappers", {})
    transformer_options.update({CALIBRATING: True, "wrappers": {kind: wrappers[kind] for kind in _KEPT_WRAPPERS if kind in wrappers},
                                "callbacks": {}})
    if "context_handler" in options:
        options["context_handler"] = copy.copy(options["context_handler"])
    return options


def _wrappers_that_time(model_options: dict) -> dict:
    """Those of the compile nodes, which call the model as it is while it is calibrated."""
    wrappers = model_options.get("transformer_options", {}).get("wrappers", {}).get(WrappersMP.APPLY_MODEL, {})
    return {key: group for key, group in wrappers.items() if key.startswith(COMPILE_KEY)}


@contextlib.contextmanager
def _without_run_callbacks(patchers: Iterable[ModelPatcher]):
    callbacks = [(patcher, patcher.callbacks) for patcher in patchers]
    try:
        for patcher, calls in callbacks:
            patcher.callbacks = {call: {} if call in _RUN_CALLBACKS else groups for call, groups in calls.items()}
        yield
    finally:
        for patcher, calls in callbacks:
            patcher.callbacks = calls
