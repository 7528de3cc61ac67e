"""A model as a patcher has it: with its own object patches, and without those of whichever clone was loaded last."""
from __future__ import annotations

import functools
from collections.abc import Iterable

import torch
from comfy.model_patcher import ModelPatcher

_MISSING = object()


def object_of(patcher, name: str):
    """What patcher's model has by that name once it is loaded. (get_model_object looks for the whole name alone: a block that is patched,
    or was by the clone that is loaded now, has other layers.) Raises AttributeError where there is none."""
    prefixes = [name]
    while "." in prefixes[-1]:
        prefixes.append(prefixes[-1].rpartition(".")[0])
    # Below a patch of its own may be what was there before, of which others patch a part by another name.
    below = any(prefix in patcher.object_patches for prefix in prefixes[1:])
    return _View(patcher, _all_names(patcher) if below else prefixes).get(name)


def model_of(patcher) -> torch.nn.Module:
    """patcher's model, as object_of has it; to look at: modules with others in them are shallow copies."""
    if not patcher.object_patches and not patcher.object_patches_backup:
        return patcher.model
    return _View(patcher, _all_names(patcher)).tree(patcher.model)


def _all_names(patcher) -> tuple[str, ...]:
    return *patcher.object_patches, *patcher.object_patches_backup


class _View:
    """What object patches change, without a change of the model. names: of those that count."""

    def __init__(self, patcher, names: Iterable[str]):
        self._model = patcher.model
        self._changed: dict[int, dict[str, object]] = {}  # by id of a module
        names = set(names)
        for patches, in_order in ((patcher.object_patches_backup, reversed), (patcher.object_patches, iter)):
            found = names.intersection(patches)
            for name in in_order([name for name in patches if name in found]) if len(found) > 1 else found:
                parent, _, last = name.rpartition(".")
                self._changed.setdefault(id(self.get(parent)), {})[last] = patches[name]

    def get(self, name: str):
        found = self._model
        for part in name.split(".") if name else ():
            value = self._changed.get(id(found), {}).get(part, _MISSING)
            found = getattr(found, part) if value is _MISSING else value
        return found

    def tree(self, module: torch.nn.Module) -> torch.nn.Module:
        changed = self._changed.get(id(module), {})
        children = {**module._modules, **{name: value for name, value in changed.items() if isinstance(value, torch.nn.Module)}}
        children = {name: child if child is None else self.tree(child) for name, child in children.items()}
        others = {name: value for name, value in changed.items() if name not in children}
        if not others and all(child is module._modules.get(name) for name, child in children.items()):
            return module
        made = object.__new__(type(module))
        made.__dict__ = {**vars(module), "_modules": children, "_parameters": dict(module._parameters), "_buffers": dict(module._buffers)}
        for name, value in others.items():
            setattr(made, name, value)
        return made


@functools.cache
def undo_in_reverse() -> None:
    """Makes ComfyUI take object patches off in the reverse of the order in which they were put on. Core does it in the same order: of a
    layer and of its forward, the model's layer would be back first and get the other layer's forward, for good."""
    original = ModelPatcher.unpatch_model

    @functools.wraps(original)
    def unpatch_model(self, *args, **kwargs):
        _turn_round(self.object_patches_backup)
        try:
            return original(self, *args, **kwargs)
        finally:
            _turn_round(self.object_patches_backup)  # an error has left them on

    ModelPatcher.unpatch_model = unpatch_model


def _turn_round(patches: dict) -> None:
    items = list(patches.items())
    patches.clear()
    patches.update(reversed(items))
