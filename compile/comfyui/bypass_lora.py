"""ComfyUI's bypass LoRAs (Load LoRA (Bypass)) on the layers that a model has when they are put on.

Core takes hold of a model's layers as its node runs: those of whichever clone was sampled last. Between float layers and the INT8 ones in
their place that is right by chance. It keeps which of them is on in objects that clones of the model share, also those that have a model of
their own (without dynamic VRAM, for another GPU). And it takes them off by setting layer.forward to the layer's own method, which then
looks like another pack's, and would be another layer's in a copy.
"""
from __future__ import annotations

import contextlib
import copy
import functools
import types
import weakref

import comfy.utils
import torch

from . import core as comfy_core

try:
    from comfy.weight_adapter import BypassInjectionManager, LoRAAdapter
    from comfy.weight_adapter.bypass import BypassForwardHook
except ImportError:  # a core without bypass LoRAs
    BypassInjectionManager = BypassForwardHook = None


@functools.cache
def patch_bypass_loras() -> None:
    """Makes them look for their layers, by name, each time that a model is loaded."""
    if BypassInjectionManager is None or not comfy_core.usable(comfy_core.BYPASS):
        return
    create = BypassInjectionManager.create_injections

    @functools.wraps(create)
    def create_injections(self, model: torch.nn.Module):
        injections, names = create(self, model), {id(layer): name for name, layer in model.named_modules()}
        hooks = _Hooks([(hook, names[id(hook.module)]) for hook in self.hooks if id(hook.module) in names])
        for injection in injections:
            injection.inject, injection.eject = hooks.inject, hooks.eject
        return injections

    BypassInjectionManager.create_injections = create_injections


class _Hooks:
    """Of one bypass LoRA: core's hooks and the names of their layers; on which models they are, each with hooks of its own."""

    def __init__(self, hooks: list):
        self._hooks = hooks
        self._on: weakref.WeakKeyDictionary[torch.nn.Module, list] = weakref.WeakKeyDictionary()

    def inject(self, patcher) -> None:
        if patcher.model in self._on:
            return
        placed = self._on[patcher.model] = []
        for hook, name in self._hooks:
            with contextlib.suppress(AttributeError):  # a patcher of another model than it was made for
                own = copy.copy(hook)
                own.module, own.original_forward = comfy.utils.get_attr(patcher.model, name), None
                if type(hook.adapter) is LoRAAdapter:
                    own.adapter = copy.copy(hook.adapter)
                    # A number would be a constant of compiled blocks, of which each strength would compile another.
                    own.adapter.multiplier = torch.tensor(float(hook.multiplier), dtype=torch.float64)
                placed.append(own)
        try:
            for hook in placed:
                hook.inject()
        except BaseException:  # no memory for its weights
            self.eject(patcher)
            raise

    def eject(self, patcher) -> None:
        for hook in self._on.pop(patcher.model, ()):
            hook.eject()
            if _is_own(hook.module, vars(hook.module).get("forward")):
                del hook.module.forward


def _is_own(layer: torch.nn.Module, forward) -> bool:
    return type(forward) is types.MethodType and forward.__self__ is layer and forward.__func__ is type(layer).forward


def state_without_bypass(layer: torch.nn.Module) -> dict:
    """layer's attributes, for a copy of it, which gets its bypass LoRAs when it is loaded."""
    state = dict(vars(layer))
    forward = state.get("forward")
    if _is_own(layer, forward) or (BypassForwardHook is not None and isinstance(getattr(forward, "__self__", None), BypassForwardHook)):
        del state["forward"]
    return state
