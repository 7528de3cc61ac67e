"""Whether the blocks of a model are made of what they were made of, asked once a step: every module in its slot, every class, hook and
method. What compiled code was made from is found by this, or made anew.

The loops run in C: a thousand modules take 0.1 to 0.2 ms. Modules are held weakly, so a layer that was replaced can go.
"""
from __future__ import annotations

import itertools
import types
import weakref
from collections.abc import Callable, Iterable, Sequence
from operator import attrgetter, is_

import torch
from torch.nn.modules import module as torch_module

_HOOKS = ("_forward_pre_hooks", "_forward_hooks")
# Of all modules; torch's own profiler and some packs use them.
_GLOBAL_HOOKS = tuple(getattr(torch_module, name) for name in ("_global_forward_hooks", "_global_forward_pre_hooks"))
_DESCRIPTORS = (types.FunctionType, staticmethod, classmethod, property)
_values = dict.values


def has_global_hooks() -> bool:
    return any(_GLOBAL_HOOKS)


class BlockTree:
    """The modules in blocks, from the slots of the blocks themselves down. on_gone: called when one of them is freed."""

    def __init__(self, slots: Iterable[tuple[torch.nn.Module, str]], blocks: Sequence[torch.nn.Module],
                 on_gone: Callable[[], None] | None = None):
        self._slots = [container._modules for container, _ in slots], [key for _, key in slots]
        modules = list(dict.fromkeys(m for block in blocks for m in block.modules()))
        # Of a module that is freed neither its dict of submodules nor its id may be taken for another's.
        self._gone = False
        self._on_gone = on_gone
        owner = weakref.ref(self)

        def gone(_):
            tree = owner()
            if tree is not None:
                tree._gone = True
                if tree._on_gone is not None:
                    tree._on_gone()
        self._modules = [weakref.ref(module, gone) for module in modules]
        self._blocks = list(map(id, blocks))
        self._children = [children for module in modules if (children := module._modules)]
        self._child_ids = list(map(id, itertools.chain.from_iterable(map(_values, self._children))))
        self._names = list(itertools.chain.from_iterable(self._children))
        self._classes = list(map(type, modules))
        self._childless = [module._modules for module in modules if not module._modules]

    def is_current(self) -> bool:
        """Whether every slot holds the module that it held, and every module is of the class that it was."""
        if self._gone:
            return False
        containers, keys = self._slots
        return (list(map(id, map(dict.get, containers, keys))) == self._blocks
                and list(map(id, itertools.chain.from_iterable(map(_values, self._children)))) == self._child_ids
                and not any(self._childless)
                and list(itertools.chain.from_iterable(self._children)) == self._names
                and all(map(is_, map(type, [reference() for reference in self._modules]), self._classes)))


class Hooks:
    """The forward hooks of a block's modules."""

    __slots__ = ("_dicts",)

    def __init__(self, block: torch.nn.Module):
        self._dicts = [module.__dict__[name] for module in block.modules() for name in _HOOKS]

    def __bool__(self):
        return any(self._dicts)


class ClassMethods:
    """The functions that classes answer with, those of their bases included: another pack may replace one at any time. classes: of modules.

    The state of a class is a value that is equal exactly where the same code with the same values around it would run: a patch that is
    taken off, or made anew with the same content, is known again."""

    def __init__(self, classes: Iterable[type]):
        bases = dict.fromkeys(base for kind in classes for base in kind.__mro__ if base is not object)
        self._spaces = {base: vars(base) for base in bases}
        self._states: dict[type, tuple] = {}
        self._look()

    def _look(self) -> None:
        spaces = list(self._spaces.values())
        found = [(space, name, value) for space in spaces for name, value in space.items() if isinstance(value, _DESCRIPTORS)]
        self._sizes = spaces, list(map(len, spaces))
        self._found = [space for space, _, _ in found], [name for _, name, _ in found], [value for _, _, value in found]
        functions = [function for value in self._found[2] if isinstance(function := _function_of(value), types.FunctionType)]
        self._codes = functions, [function.__code__ for function in functions]
        self._states = {}

    def update(self) -> None:
        """Once a step: finds out whether a function has been replaced."""
        spaces, sizes = self._sizes
        functions, codes = self._codes
        if (list(map(len, spaces)) != sizes or not all(map(is_, map(types.MappingProxyType.get, *self._found[:2]), self._found[2]))
                or not all(map(is_, map(_code, functions), codes))):
            self._look()

    def state(self, kind: type) -> tuple:
        """Of a class at the last update, its bases included."""
        if kind not in self._states:
            self._states[kind] = tuple((base, name, _identity(value)) for base in kind.__mro__ if base is not object
                                       for name, value in self._spaces[base].items() if isinstance(value, _DESCRIPTORS))
        return self._states[kind]


_code = attrgetter("__code__")


def _function_of(value):
    return value.fget if isinstance(value, property) else getattr(value, "__func__", value)


def _identity(value) -> tuple:
    function = _function_of(value)
    if not isinstance(function, types.FunctionType):
        return (_Same(function),)
    contents = [_Same(cell.cell_contents) if _is_filled(cell) else None for cell in function.__closure__ or ()]
    return function.__code__, *contents, *map(_Same, function.__defaults__ or ()), *map(_Same, (function.__kwdefaults__ or {}).values())


def _is_filled(cell: types.CellType) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (raises where it is empty)
    except ValueError:
        return False
    return True


class _Same:
    """Equal to another for the same object only. Holds it weakly where that can be: a patch may have a model in its closure."""

    __slots__ = ("_hash", "_reference")

    def __init__(self, value):
        self._hash = id(value)
        try:
            self._reference = weakref.ref(value)
        except TypeError:
            self._reference = lambda: value

    def __hash__(self):
        return self._hash

    def __eq__(self, other):
        value = self._reference()
        return isinstance(other, _Same) and value is not None and value is other._reference()
