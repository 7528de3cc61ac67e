"""The call of a block as an artefact sees it: tensors in order, everything else as constants."""
from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .guards import BOOKKEEPING

CONSTANTS = (type(None), bool, int, float, str)
_ABSENT = ["absent"]
LAYOUTS = {"c": torch.contiguous_format, "l": torch.channels_last, "L": torch.channels_last_3d}


class Unsupported(Exception):
    """What cannot be made an artefact of, and why."""


@dataclass
class Call:
    """structure: of the arguments, nested tuples of text and constants (tensors by their position). leaves: the tensors.
    options: the dicts of settings among the arguments (transformer_options), which are constants; see OptionReads."""

    structure: tuple
    leaves: list[Tensor]
    options: list[dict]


def flatten(args: tuple, kwargs: dict) -> Call:
    """Raises Unsupported for an argument that is neither a tensor nor a simple value."""
    leaves: list[Tensor] = []
    options: list[dict] = []
    return Call((_shape_of(args, leaves, options), _shape_of(dict(sorted(kwargs.items())), leaves, options, True)), leaves, options)


def _shape_of(value, leaves: list, options: list, is_kwargs: bool = False):
    if isinstance(value, Tensor):
        leaves.append(value)
        return "tensor"
    if isinstance(value, CONSTANTS):
        return type(value).__name__, value
    if isinstance(value, types.FunctionType):
        if function_at(value.__module__, value.__qualname__) is not value:
            raise Unsupported(f"an argument is the function {value.__qualname__}, which its name does not lead to")
        return "function", value.__module__, value.__qualname__
    if isinstance(value, (tuple, list)):
        return (type(value).__name__, *[_shape_of(item, leaves, options) for item in value])
    if isinstance(value, dict):
        if not is_kwargs and not any(isinstance(item, Tensor) for key, item in value.items() if key not in BOOKKEEPING):
            options.append(value)
            return "options"
        return ("dict", *[(key, _shape_of(item, leaves, options)) for key, item in value.items()])
    raise Unsupported(f"an argument is a {type(value).__name__}")


def rebuild(structure, leaves: Sequence, options: Sequence[dict]) -> tuple[tuple, dict]:
    """(args, kwargs), the inverse of flatten."""
    tensors, dicts = iter(leaves), iter(options)

    def value(part):
        if part == "tensor":
            return next(tensors)
        if part == "options":
            return next(dicts)
        kind, *items = part
        if kind == "function":
            importlib.import_module(items[0])
            return function_at(*items)
        if kind in ("tuple", "list"):
            return {"tuple": tuple, "list": list}[kind](value(item) for item in items)
        if kind == "dict":
            return {key: value(item) for key, item in items}
        return items[0]
    args, kwargs = structure
    return value(args), value(kwargs)


def function_at(module: str, name: str):
    """What a module has by that dotted name, None where it has nothing."""
    value = sys.modules.get(module)
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def as_tuples(value):
    """JSON's lists as the tuples that structures are made of."""
    return tuple(as_tuples(item) for item in value) if isinstance(value, list) else value


def layout(tensor: Tensor) -> str:
    """The key in LAYOUTS of how tensor is laid out, "" for any other way."""
    if tensor.is_contiguous():
        return "c"
    if tensor.dim() == 4 and tensor.is_contiguous(memory_format=torch.channels_last):
        return "l"
    return "L" if tensor.dim() == 5 and tensor.is_contiguous(memory_format=torch.channels_last_3d) else ""


class OptionReads(dict):
    """A dict of settings that notes what is read of it while a block is traced."""

    def __init__(self, values: dict):
        super().__init__(values)
        self.read: set[str] = set()

    def __getitem__(self, key):
        self.read.add(key)
        return super().__getitem__(key)

    def get(self, key, default=None):
        self.read.add(key)
        return super().get(key, default)

    def __contains__(self, key):
        self.read.add(key)
        return super().__contains__(key)

    def pop(self, key, *default):
        self.read.add(key)
        return super().pop(key, *default)

    def setdefault(self, key, default=None):
        self.read.add(key)
        return super().setdefault(key, default)

    def _all(self):
        self.read.update(super().keys())
        return self

    def __iter__(self):
        return dict.__iter__(self._all())

    def keys(self):
        return dict.keys(self._all())

    def values(self):
        return dict.values(self._all())

    def items(self):
        return dict.items(self._all())

    def copy(self):
        # Reading the copy is reading this.
        copied = OptionReads(dict.copy(self))
        copied.read = self.read
        return copied

    def constants(self) -> dict:
        """{key: value} of what was read and can change a result, values as option_value gives them. Raises Unsupported."""
        return {key: option_value(self, key) for key in sorted(self.read - BOOKKEEPING)}


def option_value(options: dict, key: str):
    """options[key] as JSON: a constant, a container that is empty, or that there is none. Raises Unsupported for anything else."""
    value = dict.get(options, key, _ABSENT)
    if value is _ABSENT:
        return _ABSENT
    if isinstance(value, CONSTANTS):
        return [type(value).__name__, value]
    if isinstance(value, (dict, list, tuple)) and not value:
        return ["empty", type(value).__name__]
    raise Unsupported(f"the block reads transformer_options['{key}'], which is a {type(value).__name__}")


def simple_options(options: dict) -> dict:
    """What of a dict of settings a trace in another process is given: the rest shows as absent there, and is compared before the
    artefact is used."""
    return {key: value for key, value in options.items() if _is_simple(value) and (key in BOOKKEEPING or not _is_filled(value))}


def _is_simple(value) -> bool:
    if isinstance(value, dict):
        return all(isinstance(key, str) and _is_simple(item) for key, item in value.items())
    return all(map(_is_simple, value)) if isinstance(value, (list, tuple)) else isinstance(value, CONSTANTS)


def _is_filled(value) -> bool:
    return isinstance(value, (dict, list, tuple)) and len(value) > 0


def options_match(options: dict, constants: dict) -> bool:
    for key, expected in constants.items():
        value = options.get(key, _ABSENT)
        if value is _ABSENT:
            if expected != _ABSENT:
                return False
        elif isinstance(value, CONSTANTS):
            if expected != [type(value).__name__, value]:
                return False
        elif not isinstance(value, (dict, list, tuple)) or value or expected != ["empty", type(value).__name__]:
            return False
    return True
