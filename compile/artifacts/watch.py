"""Whether what was looked at is still the same, by identity: asked at every step or call."""
from __future__ import annotations

import abc
import functools
import itertools
import types
from operator import is_

import torch

from .closures import content_of

ABSENT = object()
_BUILTINS = (types.BuiltinFunctionType, types.MethodDescriptorType, types.WrapperDescriptorType, types.MethodWrapperType,
             types.GetSetDescriptorType, types.MemberDescriptorType, types.ClassMethodDescriptorType)
_CODE = (types.FunctionType, type, types.ModuleType, types.MethodType, staticmethod, classmethod, property, functools.partial,
         functools.cached_property, functools._lru_cache_wrapper, torch._ops.OpOverload, torch._ops.OpOverloadPacket, *_BUILTINS)
_get, _get_of_class = dict.get, types.MappingProxyType.get
_chain = itertools.chain.from_iterable


class Watch:
    """Everything that was looked at for a description, by identity: a description holds as long as nothing of it is another object.
    Asked at every step or call, so its loops run in C.

    values: gets that part of it which a program sets while it runs: numbers, texts, objects and what is in them; not functions and classes,
    nor what is an installed library's."""

    __slots__ = ("_attributes", "_bases", "_cells", "_class_bindings", "_dicts", "_functions", "_known", "_lists", "_registrations",
                 "_sizes", "_tables", "values")

    def __init__(self, values: Watch | None = None):
        self.values = values
        self._dicts: tuple[list, list, list] = [], [], []  # namespaces, names, values
        self._class_bindings: tuple[list, list, list] = [], [], []
        self._sizes: tuple[list, list] = [], []  # namespaces that must get no further names
        self._functions: list[tuple] = []  # function, its code, its defaults
        self._cells: list[tuple[types.CellType, object]] = []
        self._bases: list[tuple[type, tuple]] = []
        self._attributes: tuple[list, list, list] = [], [], []  # owners, names, values
        self._lists: tuple[list, list, list] = [], [], []  # lists, sets and deques; their sizes; their items
        self._tables: tuple[list, list, list] = [], [], []  # dicts; their sizes; their keys and values
        self._registrations: object = None
        self._known: set[tuple | int] = set()  # what is watched already

    def binding(self, space: dict | types.MappingProxyType, name: str, value, is_library: bool = False) -> None:
        """name in space is value, or not there (ABSENT)."""
        if (id(space), name) in self._known:
            return
        self._known.add((id(space), name))
        _append(self._dicts if isinstance(space, dict) else self._class_bindings, space, name, value)
        if self.values is not None and not (is_library or value is ABSENT or isinstance(value, _CODE)):
            self.values.binding(space, name, value)

    def size(self, space: dict | types.MappingProxyType, is_state: bool = False) -> None:
        """space gets no new name: one might come before what is looked up further on. is_state: of an object's attributes."""
        self._sizes[0].append(space)
        self._sizes[1].append(len(space))
        if self.values is not None and is_state:
            self.values.size(space)

    def function(self, function: types.FunctionType) -> None:
        self._functions.append((function, function.__code__, function.__defaults__, function.__kwdefaults__))
        self._cells += [(cell, content_of(cell)) for cell in function.__closure__ or ()]

    def bases(self, kind: type) -> None:
        self._bases.append((kind, kind.__mro__))

    def registrations(self) -> None:
        """No class is registered as another's (abc.ABC.register)."""
        self._registrations = abc.get_cache_token()

    def attribute(self, owner, name: str, value) -> None:
        """Of an object that keeps it elsewhere than in a dict (__slots__)."""
        _append(self._attributes, owner, name, value)
        if self.values is not None:
            self.values.attribute(owner, name, value)

    def container(self, container, is_code: bool = False) -> None:
        """A list, set, deque or dict. is_code: of a function's own attributes."""
        if id(container) in self._known:
            return
        self._known.add(id(container))
        if isinstance(container, (dict, types.MappingProxyType)):
            _append(self._tables, container, len(container), [*container, *container.values()])
        else:
            _append(self._lists, container, len(container), list(container))
        if self.values is not None and not is_code:
            self.values.container(container)

    def unchanged(self) -> bool:
        spaces, names, values = self._dicts
        if spaces and not all(map(is_, map(_get, spaces, names, _ABSENTS), values)):
            return False
        spaces, names, values = self._class_bindings
        if spaces and not all(map(is_, map(_get_of_class, spaces, names, _ABSENTS), values)):
            return False
        if self._registrations is not None and self._registrations != abc.get_cache_token():
            return False
        spaces, sizes = self._sizes
        if spaces and list(map(len, spaces)) != sizes:
            return False
        for function, code, defaults, keywords in self._functions:
            if function.__code__ is not code or function.__defaults__ is not defaults or function.__kwdefaults__ is not keywords:
                return False
        for cell, content in self._cells:
            if content_of(cell) is not content:
                return False
        for kind, bases in self._bases:
            if kind.__mro__ is not bases:
                return False
        owners, names, values = self._attributes
        if owners and not all(map(is_, map(getattr, owners, names, _ABSENTS), values)):
            return False
        lists, sizes, items = self._lists
        if lists and (list(map(len, lists)) != sizes or not all(map(is_, _chain(lists), _chain(items)))):
            return False
        tables, sizes, items = self._tables
        if tables:
            if list(map(len, tables)) != sizes:
                return False
            for table, item in zip(tables, items):
                if item and not all(map(is_, itertools.chain(table, table.values()), item)):
                    return False
        return True


def _append(columns: tuple[list, ...], *row) -> None:
    for column, item in zip(columns, row):
        column.append(item)


class _Forever:
    """An endless supply of ABSENT, for map()."""

    def __iter__(self):
        return self

    def __next__(self):
        return ABSENT


_ABSENTS = _Forever()
