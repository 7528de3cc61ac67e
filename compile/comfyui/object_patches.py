"""Layers that are put in the place of a model's, where other packs patch what is in a layer."""
from __future__ import annotations

from comfy.patcher_extension import CallbacksMP

KEY = "int8_compile.object_patches"


def undo_in_reverse(patcher) -> None:
    """From now on patcher and its clones take off their object patches in the reverse of the order in which they were put on. Core does it
    in the same order: of a layer and of its forward, the model's layer would be back first and get the other layer's forward, for good."""
    for moment in (CallbacksMP.ON_LOAD, CallbacksMP.ON_PRE_RUN):  # a clone of what is loaded is patched without being loaded
        if _in_reverse not in patcher.get_callbacks(moment, KEY):
            patcher.add_callback_with_key(moment, KEY, _in_reverse)


def _in_reverse(patcher, *_) -> None:
    order = {name: index for index, name in enumerate(patcher.object_patches)}
    backups = sorted(patcher.object_patches_backup.items(), key=lambda backup: -order.get(backup[0], -1))
    patcher.object_patches_backup.clear()
    patcher.object_patches_backup.update(backups)
