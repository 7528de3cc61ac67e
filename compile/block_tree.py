"""Whether the blocks of a model are made of what they were made of, asked once a step: every module in its slot, every class, every hook.

The loops run in C: a thousand modules take 0.1 to 0.2 ms. Modules are held weakly, so a layer that was replaced can go.
"""
from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from operator import is_

import torch
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# Of all modules; torch's own profiler and some packs use them.
_GLOBAL_HOOKS = tuple(getattr(torch_module, name) for name in ("_global_forward_hooks", "_global_forward_pre_hooks"))


def has_global_hooks() -> bool:
    return any(_GLOBAL_HOOKS)


class BlockTree:
    """The modules below root. on_gone: called when one of them is freed."""

    def __init__(self, root: torch.nn.Module, on_gone: Callable[[], None] | None = None):
        modules = list(root.modules())
        self._gone = False
        self._on_gone = on_gone
        owner = weakref.ref(self)

        def gone(_):
            tree = owner()
            if tree is not None:
                tree._gone = True  # its id may be another module's from now on
                if tree._on_gone is not None:
                    tree._on_gone()
        self._references = [weakref.ref(module, gone) for module in modules]
        self._classes = list(map(type, modules))
        self._children = [module._modules for module in modules if module._modules]
        self._names = list(itertools.chain.from_iterable(self._children))
        self._ids = self._child_ids()
        self._childless = [module._modules for module in modules if not module._modules]

    def _child_ids(self) -> list[int]:
        return list(map(id, itertools.chain.from_iterable(map(dict.values, self._children))))

    def is_current(self) -> bool:
        """Whether every slot holds the module that it held, and every module is of the class that it was."""
        return (not self._gone and self._child_ids() == self._ids and not any(self._childless)
                and list(itertools.chain.from_iterable(self._children)) == self._names
                and all(map(is_, [type(reference()) for reference in self._references], self._classes)))


class Hooks:
    """The forward hooks of a block's modules, and calls of their own (_call_impl), which dynamo does not see."""

    __slots__ = ("_dicts", "_states")

    def __init__(self, block: torch.nn.Module):
        self._states = [module.__dict__ for module in block.modules()]
        self._dicts = [state[name] for state in self._states for name in _HOOKS]

    def __bool__(self):
        return any(self._dicts) or any(map(dict.__contains__, self._states, itertools.repeat("_call_impl")))
