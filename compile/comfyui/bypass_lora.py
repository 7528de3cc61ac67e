"""ComfyUI's bypass LoRAs (Load LoRA (Bypass)) on the layers that a model has when they are put on.

Core takes hold of a model's layers as its node runs: those of whichever clone was sampled last. Between float layers and the INT8 ones in
their place that is right by chance. It keeps which of them is on in objects that clones of the model share, also those that have a model of
their own (without dynamic VRAM, for another GPU). And it takes them off by setting layer.forward to the layer's own method, which then
looks like another pack's, and would be another layer's in a copy.
"""
from __future__ import annotations

import copy
import functools
import weakref
from collections.abc import Callable

import comfy.utils
import torch

from ..torch_internals.block_tree import has_own_forward
from . import core as comfy_core

try:
    from comfy.weight_adapter import BypassInjectionManager, LoHaAdapter, LoKrAdapter, LoRAAdapter
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
        injections = create(self, model)
        places = self.__dict__.setdefault("int8_compile_places", _Places(self.hooks))
        places.were_made_for(model)
        for injection in injections:
            injection.inject, injection.eject = places.inject, places.eject
        return injections

    BypassInjectionManager.create_injections = create_injections


class _Places:
    """Where the hooks of one manager are: these themselves on the model that they were made for, copies of them on any other that has such
    layers (but not to train it: core trains a copy of a model without its bypass LoRAs). What else core's allow stays: hooks that somebody
    else puts on or takes off, changed adapters, no patcher."""

    def __init__(self, hooks: list):
        self._hooks = hooks  # the manager's list, which core fills anew
        self._names: dict[int, str] = {}  # id of a hook -> its layer
        self._root: Callable[[], torch.nn.Module | None] = lambda: None
        self._copies: weakref.WeakKeyDictionary[torch.nn.Module, list] = weakref.WeakKeyDictionary()
        self._trained: weakref.WeakSet[torch.nn.Module] = weakref.WeakSet()  # without copies, as in core

    def __deepcopy__(self, memo) -> _Places:
        return self  # as core's functions are, which its methods stand for

    def were_made_for(self, root: torch.nn.Module) -> None:
        names = {id(layer): name for name, layer in root.named_modules()}
        self._names = {id(hook): names[id(hook.module)] for hook in self._hooks if id(hook.module) in names}
        self._root = weakref.ref(root)

    def inject(self, patcher) -> None:
        if torch.is_grad_enabled() and (model := _model_of(patcher)) is not None:
            self._trained.add(model)
        try:
            for hook in self._of(patcher):
                _vary_strength(hook.adapter)
                hook.inject()
        except BaseException:  # no memory for its weights
            self.eject(patcher)
            raise

    def eject(self, patcher) -> None:
        for hook in self._of(patcher):
            is_on = hook.original_forward is not None
            hook.eject()
            if is_on and has_own_forward(vars(hook.module)):
                del hook.module.forward
        if (model := _model_of(patcher)) is not None:
            self._copies.pop(model, None)
            self._trained.discard(model)

    def _of(self, patcher) -> list:
        """The hooks for patcher's model: those that are off, for the layers that it has now."""
        model = _model_of(patcher)
        if model in self._trained:
            model = self._root()
        layers = [self._layer(hook, model) for hook in self._hooks]
        if model is not self._root() and any(layer is not None for layer in layers):
            if model not in self._copies:
                self._copies[model] = [_copy(hook, layer) for hook, layer in zip(self._hooks, layers) if layer is not None]
            return self._copies[model]
        for hook, layer in zip(self._hooks, layers):
            if layer is not None and hook.original_forward is None:
                hook.module = layer
        return self._hooks

    def _layer(self, hook, model: torch.nn.Module | None) -> torch.nn.Module | None:
        try:
            return comfy.utils.get_attr(model, self._names[id(hook)])
        except (KeyError, AttributeError):
            return None


def _model_of(patcher) -> torch.nn.Module | None:
    return getattr(patcher, "model", None)


def _copy(hook, layer: torch.nn.Module):
    own = copy.copy(hook)
    own.module, own.original_forward = layer, None
    return own


def _vary_strength(adapter) -> None:
    """A number would be a constant of compiled blocks, of which each strength would compile another. Only for those that do nothing but
    multiply with it; alpha, which may be a tensor too, would be in another type then."""
    if (type(adapter) in (LoRAAdapter, LoHaAdapter, LoKrAdapter) and type(adapter.multiplier) in (int, float)
            and not isinstance(adapter.weights[2], torch.Tensor)):
        adapter.multiplier = torch.tensor(float(adapter.multiplier), dtype=torch.float64)


def is_own_forward(layer: torch.nn.Module, forward) -> bool:
    """Whether forward is what layer's class computes, or a bypass LoRA's."""
    owner = getattr(forward, "__self__", None)
    return (owner is layer and getattr(forward, "__func__", None) is type(layer).forward) or (
        BypassForwardHook is not None and isinstance(owner, BypassForwardHook))


def state_without_bypass(layer: torch.nn.Module) -> dict:
    """layer's attributes, for a copy of it, which gets its bypass LoRAs when it is loaded."""
    state = dict(vars(layer))
    if "forward" in state and is_own_forward(layer, state["forward"]):
        del state["forward"]
    return state
