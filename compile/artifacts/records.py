"""Small objects among the arguments of a block that only keep values (Flux's ModulationOut): taken apart, and made again without calling
anything of their class."""
from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Callable

from .values import Unsupported

_HEAP_TYPE = 1 << 9  # Py_TPFLAGS_HEAPTYPE: made by a class statement
# What decides how attributes are read, and when an object ends.
_OWN_WAYS = frozenset({"__getattribute__", "__getattr__", "__torch_function__", "__del__"})


def is_record(value) -> bool:
    """Whether an object is but its attributes: of a class that is found by its name, derives from nothing of Python's, and has only
    functions. What else its class holds could be read instead of an attribute."""
    kind = type(value)
    return kind.__flags__ & _HEAP_TYPE != 0 and _slots_of(kind) is not None


def attributes(value) -> dict:
    """{name: value}, in a fixed order. Raises Unsupported where one hides behind something of the class."""
    kind = type(value)
    if any(name in vars(base) for base in kind.__mro__ for name in getattr(value, "__dict__", ())):
        raise Unsupported(f"an argument is a {kind.__name__} whose class has an attribute of the same name")
    return state(value)


def state(value) -> dict:
    """The same, hidden or not."""
    return dict(getattr(value, "__dict__", {})) | {
        name: getattr(value, name) for name in _slots_of(type(value)) or () if hasattr(value, name)}


def place(value) -> tuple[str, str]:
    return type(value).__module__, type(value).__qualname__


def make(module: str, name: str, values: dict) -> object:
    """Raises Unsupported where this process has no such class."""
    importlib.import_module(module)
    kind = _class_at(module, name)
    if kind is None:
        raise Unsupported(f"an argument is a {name}, which a new process does not have")
    return filled(object.__new__(kind), values)


def filled(record, values: dict) -> object:
    """record, with these attributes; a frozen dataclass too."""
    for key, value in values.items():
        object.__setattr__(record, key, value)
    return record


def classes_in(structure) -> list[type]:
    """The classes of the records in a call's structure, as far as this process has them."""
    if not isinstance(structure, tuple):
        return []
    found = []
    if structure[:1] == ("record",):
        found += [kind] if (kind := _class_at(*structure[1:3])) is not None else []
    return list(dict.fromkeys((*found, *(kind for part in structure for kind in classes_in(part)))))


def _class_at(module: str, name: str) -> type | None:
    found: object = sys.modules.get(module)
    for part in name.split("."):
        found = getattr(found, part, None)
    return found if isinstance(found, type) else None


def _names(kind: type) -> tuple[str, ...]:
    return tuple(vars(kind))


def _slots_of(kind: type) -> tuple[str, ...] | None:
    cached: Callable = _slots
    return cached(kind, *map(_names, kind.__mro__[:-1]))


@functools.lru_cache(256)
def _slots(kind: type, *_names) -> tuple[str, ...] | None:
    """The slots of its instances; None where they are no records. _names: of all that its classes have, as a key."""
    slots = []
    if type(kind) is not type or kind.__base__ is None or _class_at(kind.__module__, kind.__qualname__) is not kind:
        return None
    for base in kind.__mro__[:-1]:
        if type(base) is not type or not _OWN_WAYS.isdisjoint(vars(base)) or base.__module__ in sys.stdlib_module_names:
            return None
        for name, value in vars(base).items():
            if isinstance(value, types.MemberDescriptorType):
                slots.append(name)
            elif name[:2] != "__" and not isinstance(value, (types.FunctionType, classmethod, staticmethod)):
                return None
    return tuple(slots)
