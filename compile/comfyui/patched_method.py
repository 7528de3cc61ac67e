"""What stands in the place of methods of VAEs, text encoders and ControlNets while their patcher is loaded: object patches."""
from __future__ import annotations

import copy
import types
from collections.abc import Callable
from typing import Any

from comfy.patcher_extension import CallbacksMP

_KEY = "int8_methods"


class PatchedMethod:
    """original: what it stands in the place of: the module's bound method, or another PatchedMethod around it."""

    rank = 0  # the highest is called first
    original: Callable

    @property
    def plain(self) -> Callable:
        """The module's own."""
        return self.original.plain if isinstance(self.original, PatchedMethod) else self.original

    def around(self, original: Callable):
        """The same around another method."""
        changed = copy.copy(self)
        changed.original = original
        return changed

    def of(self, patcher):
        """The same for a clone of its patcher, which may be of another model."""
        if isinstance(self.original, PatchedMethod):
            return self.around(self.original.of(patcher))
        if isinstance(self.original, types.MethodType):
            return self.around(types.MethodType(self.original.__func__, patcher.model))
        return self.around(self.original)


def put_method(patcher, name: str, method: PatchedMethod) -> None:
    """Puts method around patcher's method of that name, instead of one of its class that is there, and in order of rank with others."""
    original: Any = patcher.get_model_object(name)
    methods = {type(method): method}
    while isinstance(original, PatchedMethod):
        methods.setdefault(type(original), original)
        original = original.original
    for wanted in sorted(methods.values(), key=lambda wanted: wanted.rank):
        original = wanted.around(original)
    patcher.add_object_patch(name, original)
    if _bind not in patcher.get_callbacks(CallbacksMP.ON_CLONE, _KEY):
        patcher.add_callback_with_key(CallbacksMP.ON_CLONE, _KEY, _bind)


def patched_methods(patcher, kind: type) -> list:
    """Those of a class that patcher has, whatever is around them."""
    found = []
    for method in patcher.object_patches.values():
        while isinstance(method, PatchedMethod):
            found += [method] if isinstance(method, kind) else []
            method = method.original
    return found


def _bind(patcher, clone) -> None:
    """The ON_CLONE callback."""
    for name, method in list(clone.object_patches.items()):
        if isinstance(method, PatchedMethod):
            clone.object_patches[name] = method.of(clone)
