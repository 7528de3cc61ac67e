"""Whether the blocks of a model are made of what they were made of, asked once a step: every module in its slot, every class, every hook,
and the dicts that hold them.

The loops run in C: a thousand modules take 0.2 ms. Modules are held weakly, and their dicts until one of them is freed: a layer that was
replaced, or a model that was deleted, can go with its weights.
"""
from __future__ import annotations

import itertools
import types
import weakref
from collections.abc import Callable
from operator import attrgetter, is_

import torch

from ...int8.artifact_layer import FOREIGN

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# What a module's own dict holds for good; some packs put another object there.
_HELD = "_parameters", "_buffers", "_modules"
_chain, _repeat = itertools.chain.from_iterable, itertools.repeat
_state_of = attrgetter("__dict__")
_item: Callable = dict.__getitem__


def attributes_of_tensors(tensors: list) -> frozenset[str]:
    """Names of what Python code has put on plain tensors, dynamo aside. Others than tensors may be among them."""
    if not any(map(getattr, tensors, _repeat("__dict__"), _repeat(None))):
        return frozenset()
    return frozenset(name for tensor in tensors if type(tensor) in (torch.Tensor, torch.nn.Parameter) for name in list(tensor.__dict__)
                     if "dynamo" not in name)


def has_own_forward(state: dict) -> bool:
    """Whether state, a module's own dict, holds the module's own method as forward: what core leaves of a bypass LoRA that it takes off
    (BypassForwardHook.eject). It changes nothing that the layer computes, and looks like another pack's."""
    forward = state.get("forward")
    return (type(forward) is types.MethodType and getattr(forward.__self__, "__dict__", None) is state
            and forward.__func__ is type(forward.__self__).forward)


class BlockTree:
    """The modules below root. on_gone: called when one of them is freed."""

    def __init__(self, root: torch.nn.Module, on_gone: Callable[[], None]):
        modules = list(root.modules())
        self._gone = False
        owner = weakref.ref(self)

        def gone(_):
            if (tree := owner()) is not None:
                tree._gone = True  # its id may be another module's from now on
                tree._states = tree._held = tree._children = tree._childless = []
                on_gone()
        self._references = [weakref.ref(module, gone) for module in modules]
        self._classes = list(map(type, modules))
        # Not held: where a method of root was patched and put back its dict has root's bound method, and would keep root for good.
        self._root = id(vars(root))
        self._states = list(map(vars, modules[1:]))
        self._held = [(name, [vars(module)[name] for module in modules]) for name in _HELD]
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
        root, *states = found = list(map(_state_of, modules))
        return (all(map(is_, map(type, modules), self._classes)) and list(_chain(self._children)) == self._names
                and id(root) == self._root and all(map(is_, states, self._states))
                and all(all(map(is_, map(_item, found, _repeat(name)), dicts)) for name, dicts in self._held))


class Hooks:
    """The forward hooks of a block's modules, and calls of their own (_call_impl), which dynamo does not see."""

    __slots__ = ("_dicts", "_states")

    def __init__(self, block: torch.nn.Module):
        self._states = [module.__dict__ for module in block.modules()]
        self._dicts = [state[name] for state in self._states for name in _HOOKS]

    def __bool__(self):
        return any(self._dicts) or any(map(dict.__contains__, self._states, itertools.repeat("_call_impl")))


class Interior:
    """What the modules inside blocks have on themselves now, wherever their dicts have been exchanged."""

    def __init__(self, blocks: list[torch.nn.Module]):
        self._states = [vars(module) for block in blocks for module in block.modules() if module is not block]
        self._blocks = list(map(vars, blocks))

    def has_hooks(self) -> bool:
        return any(any(map(_item, (*self._states, *self._blocks), _repeat(name))) for name in _HOOKS)

    def tensor_attributes(self) -> frozenset[str]:
        """Names of what Python code has put on the weights."""
        spaces = _chain(map(_item, (*self._states, *self._blocks), _repeat(name)) for name in ("_parameters", "_buffers"))
        return attributes_of_tensors(list(_chain(map(dict.values, spaces))))

    def drop_own_forwards(self) -> None:
        """See has_own_forward."""
        for state in (*self._states, *self._blocks):
            if has_own_forward(state):
                del state["forward"]

    def bypasses_foreign(self) -> bool:
        """Whether a layer of another pack (artifacts/foreign_layer.py) has a forward of its own, which calls what cannot be traced."""
        return any("forward" in state and FOREIGN in state for state in self._states)

    def is_compiled(self) -> bool:
        """Whether something stands in the slot of nn.Module.compile, and runs in the place of the module's forward."""
        return any(map(dict.get, self._states, _repeat("_compiled_call_impl")))
