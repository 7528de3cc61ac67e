"""What of a model is compiled: a module, by its dotted path."""
from __future__ import annotations

import difflib

import torch

from ...int8.echo import echo


def check_target(patcher, target: str) -> torch.nn.Module:
    """The module at a dotted path of the patched model. Raises ValueError with the nearest path that exists."""
    if not target:
        return patcher.model
    try:
        module = patcher.get_model_object(target)
    except AttributeError:
        module = None
    if not isinstance(module, torch.nn.Module):
        names = [name for name, _ in patcher.model.named_modules() if name]
        near = difflib.get_close_matches(target, names, n=1, cutoff=0.0)
        what = "does not exist in this model" if module is None else "is not a module that can be compiled"
        raise ValueError(f"object_to_patch: '{echo(target)}' {what}. The nearest path is '{near[0]}'; "
                         "'diffusion_model' is the whole diffusion model.")
    return module


def overlap(a: str, b: str) -> bool:
    """Whether one is in the other."""
    a, b = (f"{path}." if path else "" for path in (a, b))
    return a.startswith(b) or b.startswith(a)
