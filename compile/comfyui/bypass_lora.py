"""ComfyUI's bypass LoRAs (Load LoRA (Bypass)) on the layers that a model has when they are put on.

Core takes hold of a model's layers as its node runs: those of whichever clone was sampled last. Between float layers and the INT8 ones in
their place that is right by chance.
"""
from __future__ import annotations

import contextlib
import functools

import comfy.utils
import torch

from . import core as comfy_core

try:
    from comfy.weight_adapter import BypassInjectionManager
except ImportError:  # a core without bypass LoRAs
    BypassInjectionManager = None


@functools.cache
def patch_bypass_loras() -> None:
    """Makes them look for their layers, by name, each time that a model is loaded."""
    if BypassInjectionManager is None or not comfy_core.usable(comfy_core.BYPASS):
        return
    create = BypassInjectionManager.create_injections

    @functools.wraps(create)
    def create_injections(self, model: torch.nn.Module):
        injections, names = create(self, model), {id(layer): name for name, layer in model.named_modules()}
        hooks = [(hook, names[id(hook.module)]) for hook in self.hooks if id(hook.module) in names]
        for injection in injections:
            injection.inject = functools.partial(_inject, injection.inject, hooks)
        return injections

    BypassInjectionManager.create_injections = create_injections


def _inject(inject, hooks: list, patcher) -> None:
    for hook, name in hooks:
        if hook.original_forward is None:  # on no layer now
            with contextlib.suppress(AttributeError):  # a patcher of another model than it was made for
                hook.module = comfy.utils.get_attr(patcher.model, name)
    inject(patcher)
