"""Which layers to quantize, and their weights in INT8. Works on any nn.Module."""
from __future__ import annotations

import difflib
import fnmatch
import functools
import json
from collections.abc import Iterable
from pathlib import Path

import torch

from .echo import echo
from .hadamard import group_size
from .kernels import cpu, reference
from .structure import is_linear, repeated_blocks

# Below this a layer is too small for INT8 to save time or memory.
MIN_FEATURES = 64
PRESET = "preset:"  # begins a line of keep_layers that names one


def eligible_linears(model: torch.nn.Module) -> list[str]:
    """Names of the Linear layers of the repeated blocks; of the whole model where nothing repeats."""
    roots = [(f"{name}.", container.get_submodule(key)) for name, container, key in repeated_blocks(model)] or [("", model)]
    return [prefix + name for prefix, root in roots for name, m in root.named_modules()
            if is_linear(m) and min(m.weight.shape) >= MIN_FEATURES]


def drop_kept(names: Iterable[str], keep_layers: Iterable[str], prefix: str = "diffusion_model.") -> list[str]:
    """names without those that a glob of keep_layers, which may begin with prefix, or a glob of a preset in it, matches from start to end.

    Raises ValueError for a glob or a preset that matches no layer, with the nearest name: a typo must not quantize what the
    user wanted to protect.
    """
    names = list(names)
    kept = set()
    for glob in keep_layers:
        pattern = glob.removeprefix(prefix)
        matched = [name for each in _of_preset(glob) or [pattern] for name in fnmatch.filter(names, each)]
        if not matched and glob.startswith(PRESET):
            raise ValueError(f"keep_layers: '{echo(glob)}' is for another family of models: it matches no layer that would be quantized.")
        if not matched:
            near = difflib.get_close_matches(pattern, names, n=1, cutoff=0.0)
            raise ValueError(f"keep_layers: '{echo(glob)}' matches no layer that would be quantized. "
                             f"Names are matched whole; the nearest is '{near[0] if near else 'none'}'.")
        kept.update(matched)
    return [name for name in names if name not in kept]


@functools.cache
def presets() -> dict[str, list[str]]:
    """{family: globs} of layers that practitioners leave in high precision (what the loaders INT8-Fast and the INT8 Toolkit leave out,
    November 2026), of those that are in repeated blocks. presets.json."""
    return json.loads(Path(__file__).with_name("presets.json").read_text("utf-8"))


def _of_preset(glob: str) -> list[str]:
    """The globs that a preset stands for, none where glob is no preset. Raises ValueError for an unknown one."""
    if not glob.startswith(PRESET):
        return []
    if (family := glob.removeprefix(PRESET)) not in presets():
        raise ValueError(f"keep_layers: there is no preset '{echo(family)}'. There are: {', '.join(presets())}.")
    return presets()[family]


def quantize_weight(weight: torch.Tensor, rotate: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
    """weight [N, K] float -> (int8 [N, K], scale [N, 1] fp32, ConvRot group or 0), math in fp32.

    rotate: with ConvRot, in the largest group that divides K. Raises ValueError for NaN or infinity.
    """
    group = group_size(weight.shape[1]) if rotate else 0
    # On the CPU the native kernel: a tenth of the time, and no fp32 copies of a large layer.
    q, s = (cpu if weight.device.type == "cpu" else reference).quant_rows(weight, group)
    if not torch.isfinite(s).all():
        raise ValueError("the weight has NaN or infinite values")
    return q, s[:, None], group
