"""Weights of a model in another memory layout."""
from __future__ import annotations

import uuid

import torch

from .int8_model import keep_apart
from .int8_source import pristine_parameter
from .target import check_target


def set_memory_format(patcher, target: str, memory_format: torch.memory_format) -> int:
    """Gives patcher (a clone) copies of target's 4-D weights (channels_last), 5-D weights (channels_last_3d) or both
    (contiguous_format) in that layout, as object patches: the upstream model keeps its own. Returns how many.

    Weights that have that layout already are left alone.
    """
    dims = {torch.channels_last: (4,), torch.channels_last_3d: (5,), torch.contiguous_format: (4, 5)}[memory_format]
    root = f"{target}." if target else ""
    count = 0
    for name, parameter in check_target(patcher, target).named_parameters():
        if parameter.dim() not in dims:
            continue
        weight = pristine_parameter(patcher, root + name)
        if not weight.is_contiguous(memory_format=memory_format):
            copy = weight.detach().contiguous(memory_format=memory_format)
            patcher.add_object_patch(root + name, torch.nn.Parameter(copy, requires_grad=False))
            count += 1
    if count:
        keep_apart(patcher)
        # A new identity of the weights: ComfyUI then reloads when it changes between this model and its other clones.
        patcher.patches_uuid = uuid.uuid4()
    return count
