"""What to compile: each repeated block class once, shared by its instances."""
from __future__ import annotations

import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch

from ..int8.structure import repeated_blocks, signature
from .artifacts.origins import is_comfyuis
from .torch_internals.block_tree import BlockTree, Hooks, Interior


@dataclass
class Region:
    """Modules that run the same program. name: their class. key: what they are made of (see int8.structure.signature)."""

    name: str
    modules: list[torch.nn.Module]
    key: tuple = ()


def find_regions(root: torch.nn.Module, blocks_only: bool = True) -> list[Region]:
    """The repeated blocks of root grouped by structure (see int8.structure.signature); root itself where nothing repeats or
    blocks_only is False."""
    groups: dict[tuple, Region] = {}
    for _, container, key in repeated_blocks(root) if blocks_only else ():
        block = container._modules[key]
        found = signature(block)
        region = groups.setdefault(found, Region(type(block).__name__, [], key=found))
        region.modules.append(block)
    return list(groups.values()) or [Region(type(root).__name__, [root], key=signature(root))]


class HeldRegion:
    """A region whose modules may be freed."""

    def __init__(self, region: Region):
        self.name, self.key = region.name, region.key
        self._references = list(map(weakref.ref, region.modules))

    @property
    def modules(self) -> list[torch.nn.Module]:
        return [module for reference in self._references if (module := reference()) is not None]

    def numbers(self) -> tuple[str, ...]:
        """The names of attributes of ComfyUI's blocks that are integers and differ from block to block (Wan VACE's block_id)."""
        modules = self.modules
        if not modules or not all(is_comfyuis(type(module).__module__) for module in modules):
            return ()
        states = [module.__dict__ for module in modules]
        return tuple(name for name, value in states[0].items() if type(value) is int and not hasattr(type(modules[0]), name) and any(
            state.get(name) != value and type(state.get(name)) is int for state in states))


class RegionSet(Sequence):
    """The regions of a root as it is now. on_gone: called when one of the modules in them is freed."""

    def __init__(self, root: torch.nn.Module, blocks_only: bool, on_gone: Callable[[], None]):
        self._regions = list(map(HeldRegion, find_regions(root, blocks_only)))
        self._interior: Interior | None = Interior(self.blocks)
        self._hooks = {id(module): Hooks(module) for module in self.blocks}
        owner = weakref.ref(self)

        def gone():
            if (regions := owner()) is not None:
                regions._hooks, regions._interior = {}, None
            on_gone()
        self._tree = BlockTree(root, gone)

    def __len__(self):
        return len(self._regions)

    def __getitem__(self, index):
        return self._regions[index]

    @property
    def blocks(self) -> list[torch.nn.Module]:
        return [module for region in self for module in region.modules]

    @property
    def key(self) -> tuple:
        return tuple(region.key for region in self)

    def look_inside(self) -> tuple[set[int], frozenset[str]]:
        """At the start of a step: (ids of the blocks in which another pack has compiled a module or bypasses a layer, names of
        attributes of weights)."""
        interior = self._interior or Interior(self.blocks)
        interior.drop_own_forwards()
        if interior.has_hooks():
            self._hooks = {}  # where they are may be a dict that was not there before
        foreign = {id(block) for block in self.blocks for own in [Interior([block])] if own.is_compiled() or own.bypasses_foreign()
                   } if interior.is_compiled() or interior.bypasses_foreign() else set()
        return foreign, interior.tensor_attributes()

    def has_hooks(self, block: torch.nn.Module) -> bool:
        """Whether a module in block has forward hooks."""
        hooks = self._hooks.get(id(block))
        return bool(Hooks(block) if hooks is None else hooks)

    def is_current(self) -> bool:
        """Whether the blocks and everything in them are in their places."""
        return self._tree.is_current()
