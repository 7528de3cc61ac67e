"""What to compile: each repeated block class once, shared by its instances."""
from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import torch

from ..int8.structure import repeated_blocks, signature
from .block_tree import BlockTree, ClassMethods, Hooks


@dataclass
class Region:
    """Modules that run the same program. name: their class. slots: where each is held, as (container, key). key: what they are made of (see
    int8.structure.signature)."""

    name: str
    modules: list[torch.nn.Module]
    slots: list[tuple[torch.nn.Module, str]] = field(default_factory=list)
    key: tuple = ()

    def is_current(self) -> bool:
        """False once an object patch has put another module in the place of one of these."""
        return all(container._modules.get(key) is module for (container, key), module in zip(self.slots, self.modules))

    @property
    def classes(self) -> list[type]:
        return list(dict.fromkeys(type(m) for m in self.modules[0].modules()))


def find_regions(root: torch.nn.Module, blocks_only: bool = True) -> list[Region]:
    """The repeated blocks of root grouped by structure (see int8.structure.signature); root itself where nothing repeats or
    blocks_only is False."""
    groups: dict[tuple, Region] = {}
    for _, container, key in repeated_blocks(root) if blocks_only else ():
        block = container._modules[key]
        found = signature(block)
        region = groups.setdefault(found, Region(type(block).__name__, [], key=found))
        region.modules.append(block)
        region.slots.append((container, key))
    return list(groups.values()) or [Region(type(root).__name__, [root], key=signature(root))]


class RegionSet(Sequence):
    """The regions of a root as it is now. on_gone: called when one of the modules in them is freed."""

    def __init__(self, root: torch.nn.Module, blocks_only: bool, on_gone: Callable[[], None]):
        self._regions = find_regions(root, blocks_only)
        self.blocks = [module for region in self for module in region.modules]
        slots = [slot for region in self for slot in region.slots]
        self._tree = BlockTree(slots, self.blocks, on_gone)
        self.methods = ClassMethods(kind for region in self for kind in region.classes)
        self.hooks = {id(module): Hooks(module) for module in self.blocks}

    def __len__(self):
        return len(self._regions)

    def __getitem__(self, index):
        return self._regions[index]

    @property
    def key(self) -> tuple:
        return tuple(region.key for region in self)

    def holds_blocks(self) -> bool:
        """Whether the blocks themselves are in their slots."""
        return all(region.is_current() for region in self)

    def is_current(self) -> bool:
        """Whether everything in the blocks is, too."""
        return self._tree.is_current()

    def method_state(self, region: Region) -> tuple:
        """What the classes in region's blocks answer with, at the last methods.update()."""
        return tuple(map(self.methods.state, region.classes))
