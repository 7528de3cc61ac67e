"""Whether the blocks of a model are made of what they were made of, asked once a step: every module in its slot, every class, every hook,
and the dicts that hold them.

The loops run in C: a thousand modules take 0.2 ms. Modules are held weakly, and their dicts until one of them is freed: a layer that was
replaced, or a model that was deleted, can go with its weights.
"""
from __future__ import annotations

import itertools
import weakref
from collections.abc import Callable
from operator import is_, itemgetter

import torch
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# What a module's own dict holds for good; some packs put another object there.
_held = itemgetter("_parameters", "_buffers", "_modules", *_HOOKS)
_chain = itertools.chain.from_iterable
# Of all modules; torch's own profiler and some packs use them.
_GLOBAL_HOOKS = tuple(getattr(torch_module, name) for name in ("_global_forward_hooks", "_global_forward_pre_hooks"))


def has_global_hooks() -> bool:
    return any(_GLOBAL_HOOKS)


class BlockTree:
    """The modules below root. on_gone: called when one of them is freed."""

    def __init__(self, root: torch.nn.Module, on_gone: Callable[[], None]):
        modules = list(root.modules())
        self._gone = False
        owner = weakref.ref(self)

        def gone(_):
            if (tree := owner()) is not None:
                tree._gone = True  # its id may be another module's from now on
                tree._states = tree._dicts = tree._children = tree._childless = []
                on_gone()
        self._references = [weakref.ref(module, gone) for module in modules]
        self._classes = list(map(type, modules))
        self._states = list(map(vars, modules))
        self._dicts = list(_chain(map(_held, self._states)))
        self._children = [module._modules for module in modules if module._modules]
        self._names = list(_chain(self._children))
        self._ids = self._child_ids()
        self._childless = [module._modules for module in modules if not module._modules]

    def _child_ids(self) -> list[int]:
        return list(map(id, _chain(map(dict.values, self._children))))

    def is_current(self) -> bool:
        """Whether every slot holds the module that it held, every module is of the class that it was, and has the dicts that it had."""
        if self._gone or self._child_ids() != self._ids or any(self._childless):
            return False
        modules = [reference() for reference in self._references]
        return (list(_chain(self._children)) == self._names and all(map(is_, map(type, modules), self._classes))
                and all(map(is_, map(getattr, modules, itertools.repeat("__dict__"), itertools.repeat(None)), self._states))
                and all(map(is_, _chain(map(_held, self._states)), self._dicts)))


class Hooks:
    """The forward hooks of a block's modules, and calls of their own (_call_impl), which dynamo does not see."""

    __slots__ = ("_dicts", "_states")

    def __init__(self, block: torch.nn.Module):
        self._states = [module.__dict__ for module in block.modules()]
        self._dicts = [state[name] for state in self._states for name in _HOOKS]

    def __bool__(self):
        return any(self._dicts) or any(map(dict.__contains__, self._states, itertools.repeat("_call_impl")))


class InnerCalls:
    """The slots of nn.Module.compile inside blocks: what stands there runs in the place of the module's forward, and is another's."""

    def __init__(self, blocks: list[torch.nn.Module]):
        self._states = [vars(module) for block in blocks for module in block.modules() if module is not block]

    def __bool__(self):
        return any(map(dict.get, self._states, itertools.repeat("_compiled_call_impl")))


def has_inner_call(block: torch.nn.Module) -> bool:
    return bool(InnerCalls([block]))
