"""transformer_options during a trace: which keys it read, and whether another call's are the same."""
from __future__ import annotations

import types

import torch

from ..torch_internals.guard_filter import BOOKKEEPING
from . import records
from .attention_override import OVERRIDE, overridden
from .closures import content_of, contents_of
from .values import CONSTANTS, Unsupported, constant

_ABSENT, _PRESENT = ["absent"], ["present"]


class RecordingOptions(dict):
    """A dict of settings that notes what is read and written of it while a block is traced.

    What ComfyUI writes there for patches (guards.BOOKKEEPING) shows as there, but whoever computes with it or branches on it gets
    Unsupported: it differs from block to block and from step to step. read: keys; "" stands for all of them (its length or truth)."""

    def __init__(self, values: dict):
        super().__init__({key: _Untouchable(key) if key in BOOKKEEPING and value is not None else value for key, value in values.items()})
        if OVERRIDE in values:
            dict.__setitem__(self, OVERRIDE, overridden)
        self._is_copy = False
        self._before = dict(dict.items(self))
        self._written: set[str] = set()
        self.read: set[str] = set()

    def _reads(self, key):
        if key not in self._written:
            self.read.add(key)

    def _all(self):
        self.read.add("")
        self.read.update(self._before.keys())
        return self

    def __getitem__(self, key):
        self._reads(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self._reads(key)
        return super().get(key, default)

    def __contains__(self, key):
        self._reads(key)
        return super().__contains__(key)

    def __len__(self):
        return dict.__len__(self._all())

    def __bool__(self):
        return dict.__len__(self._all()) > 0

    def __eq__(self, other):
        return dict.__eq__(self._all(), other)

    def __ne__(self, other):
        return not self == other

    def __repr__(self):
        return dict.__repr__(self._all())

    __hash__ = None

    def pop(self, key, *default):
        if key in self:
            raise Unsupported("it changes transformer_options")
        return super().pop(key, *default)

    def popitem(self):
        raise Unsupported("it changes transformer_options")

    clear = popitem

    def __iter__(self):
        return dict.__iter__(self._all())

    def __reversed__(self):
        return dict.__reversed__(self._all())

    def keys(self):
        return dict.keys(self._all())

    def values(self):
        return dict.values(self._all())

    def items(self):
        return dict.items(self._all())

    def copy(self):
        """Reading the copy is reading this; writing into it is not."""
        copied = RecordingOptions({})
        dict.update(copied, dict.items(self))
        copied._is_copy = True
        copied._before, copied._written, copied.read = self._before, set(self._written), self.read
        return copied

    def __or__(self, other):
        copied = self.copy()
        copied.update(other)
        return copied

    def __ror__(self, other):
        return {**other, **self}

    def __ior__(self, other):
        self.update(other)
        return self

    def __setitem__(self, key, value):
        self._written.add(key)
        super().__setitem__(key, value)

    def setdefault(self, key, default=None):
        if key not in self:
            self[key] = default
        return self[key]

    def update(self, *others, **values):
        for key, value in dict(*others, **values).items():
            self[key] = value

    @property
    def is_given(self) -> bool:
        """Whether it is what the block got, no copy of it."""
        return not self._is_copy

    def writes(self) -> dict:
        """{key: constant, or a list or tuple of sizes} of what was written, for the caller to write again; also where it was there before:
        another call may have something else. Raises Unsupported for anything else that was changed."""
        changed = {key: value for key, value in dict.items(self) if key not in self._before or value is not self._before[key]
                   or (key in self._written and type(value) in CONSTANTS)}
        if (not all(type(value) in CONSTANTS or _is_sizes(value) for value in changed.values())
                or self._before.keys() - dict.keys(self)):
            raise Unsupported("it changes transformer_options")
        return changed

    def constants(self) -> dict:
        """{key: value} of what was read and can change a result, values as option_value gives them; "": all keys, where they counted.
        Raises Unsupported."""
        found = {key: option_value(self._before, key) for key in sorted(self.read - {""})}
        return {**found, "": ["keys", *_keys(self._before)]} if "" in self.read else found


def _is_sizes(value) -> bool:
    return type(value) in (list, tuple) and all(type(item) is int or isinstance(item, torch.SymInt) for item in value)


def _keys(options: dict) -> list[str]:
    return sorted(map(str, dict.keys(options)))


class _Untouchable:
    """Stands for a value in transformer_options that nothing may be computed from. It may be handed on, put into tuples and looked up."""

    def __init__(self, key: str):
        self.key = key

    def __hash__(self):
        return id(self)

    def __getitem__(self, index):
        return _Untouchable(self.key)

    def __bool__(self):
        raise self._used()

    def _used(self, *_, **__):
        return Unsupported(f"the block reads transformer_options['{self.key}']")

    def __getattr__(self, name):
        raise self._used()


def _raise_used(self, *_, **__):
    raise self._used()


_COMPARE = "eq", "ne", "lt", "le", "gt", "ge", "len", "iter", "contains", "call", "enter"
_CONVERT = "int", "float", "index", "str", "repr", "format", "array", "torch_function"
_COMPUTE = "add", "sub", "mul", "truediv", "floordiv", "mod", "pow", "neg", "abs", "and", "or", "xor"


def option_value(options: dict, key: str):
    """options[key] as JSON: a constant, a container that is empty, that there is none, or (of bookkeeping) that there is one. Raises
    Unsupported for anything else."""
    value = dict.get(options, key, _ABSENT)
    if value is _ABSENT:
        return _ABSENT
    if value is overridden or (key in BOOKKEEPING and value is not None):
        return _PRESENT
    if isinstance(value, CONSTANTS):
        return list(constant(value))
    if isinstance(value, (dict, list, tuple)) and not value:
        return ["empty", type(value).__name__]
    raise Unsupported(f"the block reads transformer_options['{key}'], which is a {type(value).__name__}")


def transformer_options_for_trace(options: dict) -> dict:
    """What of a dict of settings a trace in another process is given: of bookkeeping that it is there; the rest shows as absent there, and
    is compared before the artifact is used."""
    return {key: value if value is None or (key not in BOOKKEEPING and value is not overridden) else True
            for key, value in options.items() if key in BOOKKEEPING or value is overridden or (_is_simple(value) and not _is_filled(value))}


def _is_simple(value) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_simple(item) for key, item in value.items())
    return all(map(_is_simple, value)) if isinstance(value, (list, tuple)) else isinstance(value, CONSTANTS)


def _is_filled(value) -> bool:
    return isinstance(value, (dict, list, tuple)) and len(value) > 0


def transformer_options_match(options: dict, constants: dict) -> bool:
    for key, expected in constants.items():
        value = options.get(key, _ABSENT)
        if value is _ABSENT:
            if key == "" and expected[0] == "keys":
                if expected[1:] != _keys(options):
                    return False
            elif expected != _ABSENT:
                return False
        elif value is overridden or (key in BOOKKEEPING and value is not None):
            if expected != _PRESENT:
                return False
        elif isinstance(value, CONSTANTS):
            if expected != [*constant(value)]:
                return False
        elif not isinstance(value, (dict, list, tuple)) or value or expected != ["empty", type(value).__name__]:
            return False
    return True


class Containers:
    """The lists and dicts among the arguments of a call, and what functions among them close over, to see whether the call has changed
    one."""

    def __init__(self, *values):
        self._before: list[tuple] = []
        self._functions: list[types.FunctionType] = []
        self._cells: list[tuple[types.CellType, object]] = []
        self._records: list[tuple[object, dict]] = []
        self._add(values)

    def _add(self, value):
        if isinstance(value, RecordingOptions):
            return  # it knows by itself
        if isinstance(value, types.FunctionType):
            if not any(value is known for known in self._functions):
                self._functions.append(value)
                cells = value.__closure__ or ()
                self._cells += [(cell, content_of(cell)) for cell in cells]
                for item in contents_of(value):
                    self._add(item)
            return
        if records.is_record(value):
            items = records.attributes(value)
            self._records.append((value, items))
            for item in items.values():
                self._add(item)
        if isinstance(value, dict):
            self._before.append((value, [*value, *value.values()]))
        elif isinstance(value, list):
            self._before.append((value, list(value)))
        for item in value.values() if isinstance(value, dict) else value if isinstance(value, (list, tuple)) else ():
            self._add(item)

    def require_unchanged(self) -> None:
        """Raises Unsupported."""
        for container, before in self._before:
            now = [*container, *container.values()] if isinstance(container, dict) else container
            if len(now) != len(before) or any(a is not b for a, b in zip(now, before)):
                raise Unsupported(f"it changes a {type(container).__name__} that it gets")
        for record, before in self._records:
            after = records.attributes(record)
            if after.keys() != before.keys() or any(after[key] is not value for key, value in before.items()):
                raise Unsupported(f"it changes a {type(record).__name__} that it gets")
        if any(content_of(cell) is not content for cell, content in self._cells):
            raise Unsupported("it changes what a function that it gets closes over")
