"""What to compile: each repeated block class once, shared by its instances."""
from __future__ import annotations

from dataclasses import dataclass, field

import torch

from ..int8.structure import repeated_blocks, signature


@dataclass
class Region:
    """Modules that run the same program. name: their class. slots: where each is held, as (container, key)."""

    name: str
    modules: list[torch.nn.Module]
    slots: list[tuple[torch.nn.Module, str]] = field(default_factory=list)

    def is_current(self) -> bool:
        """False once an object patch has put another module in the place of one of these."""
        return all(container._modules[key] is module for (container, key), module in zip(self.slots, self.modules))


def find_regions(root: torch.nn.Module, blocks_only: bool = True) -> list[Region]:
    """The repeated blocks of root grouped by structure (see int8.structure.signature); root itself where nothing repeats or
    blocks_only is False."""
    groups: dict[tuple, Region] = {}
    for _, container, key in repeated_blocks(root) if blocks_only else ():
        block = container._modules[key]
        region = groups.setdefault(signature(block), Region(type(block).__name__, []))
        region.modules.append(block)
        region.slots.append((container, key))
    return list(groups.values()) or [Region(type(root).__name__, [root])]
