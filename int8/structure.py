"""What repeats in a model: the blocks of a transformer or UNet, found by structure, not by name."""
from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator

import torch

from .artifact_layer import FOREIGN, has_artifact_replacement

CONTAINERS = (torch.nn.ModuleList, torch.nn.ModuleDict, torch.nn.Sequential)
# A repeated activation or norm is not worth a region of its own.
MIN_LINEARS = 2


def signature(module: torch.nn.Module) -> tuple:
    """What two blocks must share to run the same program: the class of every submodule, what an INT8 layer does with its weight, and the
    shape, dtype and density of every parameter and buffer that it reads. Never a value."""
    modules = tuple((name, type(m), _replacement(m)) for name, m in module.named_modules())
    foreign = tuple(f"{name}." for name, m in module.named_modules() if FOREIGN in vars(m))  # which read their own
    tensors = tuple((name, tuple(t.shape), t.dtype, t.is_contiguous()) for name, t in (*module.named_parameters(), *module.named_buffers())
                    if not name.startswith(foreign))
    return modules, tensors


def _replacement(module: torch.nn.Module) -> str:
    """Rotation, kernel and parts of a layer of this pack (compile/comfyui/int8_layer.py), which its class does not tell."""
    if not has_artifact_replacement(module):
        return ""
    try:
        return repr(module.artifact_replacement()[1])
    except AttributeError:  # its weight is a float tensor just now
        return "float"


def _is_block(module: torch.nn.Module) -> bool:
    linears = sum(is_linear(m) or isinstance(m, torch.nn.modules.conv._ConvNd) for m in module.modules())
    # A bare Module that only holds others (a level of a VAE) is never called.
    return type(module) is not torch.nn.Module and not isinstance(module, CONTAINERS) and linears >= MIN_LINEARS


def is_linear(module: torch.nn.Module) -> bool:
    """torch.nn.Linear, or a class in its place such as ComfyUI's mixed-precision Linear."""
    weight = getattr(module, "weight", None)
    return hasattr(module, "in_features") and isinstance(weight, torch.Tensor) and weight.dim() == 2


def repeated_blocks(root: torch.nn.Module) -> list[tuple[str, torch.nn.Module, str]]:
    """The outermost children of ModuleLists, ModuleDicts and Sequentials, at any depth, whose class occurs as such a child more
    than once in root: its blocks. (A UNet repeats its blocks over many short lists.)

    Gives (name of the block below root, its container, its key there). A block inside a block is not listed.
    """
    counts = Counter(type(child) for module in root.modules() if isinstance(module, CONTAINERS)
                     for child in module.children() if _is_block(child))
    return list(_outermost(root, "", counts))


def _outermost(module: torch.nn.Module, path: str, counts: Counter) -> Iterator[tuple[str, torch.nn.Module, str]]:
    for key, child in module.named_children():
        name = f"{path}.{key}" if path else key
        if isinstance(module, CONTAINERS) and _is_block(child) and counts[type(child)] > 1:
            yield name, module, key
        else:
            yield from _outermost(child, name, counts)


def equivalent_layers(root: torch.nn.Module, names: Iterable[str]) -> list[list[str]]:
    """names of layers below root, grouped: those that are the same layer of structurally equal blocks stand together."""
    blocks = {f"{name}.": signature(container._modules[key]) for name, container, key in repeated_blocks(root)}
    groups: dict[tuple, list[str]] = {}
    for name in names:
        prefix = next((block for block in blocks if name.startswith(block)), "")
        groups.setdefault((blocks.get(prefix), name.removeprefix(prefix)), []).append(name)
    return list(groups.values())
