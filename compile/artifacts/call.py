"""The call of a block as an artifact sees it: tensors in order, everything else as constants."""
from __future__ import annotations

import functools
import importlib
import sys
import types
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..torch_internals.guard_filter import BOOKKEEPING
from . import records
from .closures import EMPTY, code_at, code_digest, content_of, function_at, is_at_its_place
from .option_reads import _COMPARE, _COMPUTE, _CONVERT, _raise_used, _Untouchable
from .values import CONSTANTS, Unsupported, constant

_ARGUMENT = "an argument is "
NUMBER = "attribute "  # before the name of a block's attribute, a number that differs from block to block: it stands as an argument
CELL = "closed over "  # before a name in the dict of the constants that a function closes over
LAYOUTS = {"c": torch.contiguous_format, "l": torch.channels_last, "L": torch.channels_last_3d}


@dataclass
class Call:
    """structure: of the arguments, nested tuples of text and constants (tensors by their position). leaves: the tensors, and for each
    integer that may be a size an empty tensor of so many rows; sizes: where these are. options: the dicts of settings among the arguments
    (transformer_options), and of each function among them the constants that it closes over; what of these is read is a constant of the
    artifact, see RecordingOptions."""

    structure: tuple
    leaves: list[Tensor]
    options: list[dict]
    sizes: list[int]


def flatten(args: tuple, kwargs: dict, block: torch.nn.Module | None = None, device: torch.device | None = None) -> Call:
    """block: what is called, whose modules functions among the arguments may keep. device: integers from 2 on may be sizes, on that; None:
    they are constants. Raises Unsupported for an argument that is neither a tensor nor a simple value, nor a function that was made with
    such."""
    flat = _Flat(block, device)
    return Call((flat.shape_of(args), flat.shape_of(kwargs, True)), flat.leaves, flat.options, flat.sizes)


def may_be_size(value) -> bool:
    """Whether one program can serve it and others: torch traces no size of 0 or 1 as one of many."""
    return type(value) is int and 2 <= value < 1 << 31


@functools.lru_cache(1024)
def _rows(position: int, count: int, device: torch.device) -> Tensor:
    # position: no two arguments of a call are one tensor.
    with torch.inference_mode(False):
        return torch.empty((count, 0), dtype=torch.bool, device=device)


class _Flat:
    def __init__(self, block: torch.nn.Module | None, device: torch.device | None):
        self.leaves: list[Tensor] = []
        self.options: list[dict] = []
        self.sizes: list[int] = []
        self._block = block
        self._device = device
        self._functions: list[types.FunctionType] = []
        self._records: list = []

    def shape_of(self, value, is_kwargs: bool = False):
        if isinstance(value, Tensor):
            self.leaves.append(value)
            return "tensor"
        if self._device is not None and may_be_size(value):
            self.sizes.append(len(self.leaves))
            self.leaves.append(_rows(len(self.leaves), value, self._device))
            return "size"
        if isinstance(value, CONSTANTS):
            return constant(value)
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if type(value) in (tuple, list, torch.Size):
            return (type(value).__name__, *map(self.shape_of, value))
        if type(value) is dict:
            if not is_kwargs and not any(isinstance(item, Tensor) for key, item in value.items() if key not in BOOKKEEPING):
                known = next((index for index, options in enumerate(self.options) if options is value), None)
                if known is not None:
                    return "same options", known
                self.options.append(value)
                return "options"
            return ("dict", *[(key, self.shape_of(item)) for key, item in value.items()])
        if isinstance(value, torch.nn.Module):
            return "submodule", self._path(value)
        if records.is_record(value):
            if any(value is known for known in self._records):
                raise Unsupported(f"{_ARGUMENT}a {type(value).__name__}, which is there twice")
            self._records.append(value)
            items = records.attributes(value)
            if any(isinstance(item, (dict, list)) for item in items.values()):  # it may collect something there
                raise Unsupported(f"{_ARGUMENT}a {type(value).__name__}")
            return "record", *records.place(value), *[(key, self.shape_of(item)) for key, item in items.items()]
        raise Unsupported(f"{_ARGUMENT}a {type(value).__name__}")

    def _function(self, function: types.FunctionType) -> tuple:
        module, name, code = function.__module__, function.__qualname__, function.__code__
        if function_at(module, name) is function:
            return "function", module, name
        what = f"{_ARGUMENT}the function {name}"
        if function.__globals__ is not getattr(sys.modules.get(module), "__dict__", None) or not is_at_its_place(module, name, code):
            raise Unsupported(f"{what}, which its name does not lead to")
        if function.__dict__:
            raise Unsupported(f"{what}, which has attributes")
        if any(function is known for known in self._functions):
            raise Unsupported(f"{what}, which is there twice or calls itself")
        self._functions.append(function)
        constants: dict = {}
        self.options.append(constants)
        keywords = function.__kwdefaults__ or {}
        defaults = [self._kept(what, item) for item in (*(function.__defaults__ or ()), *keywords.values())]
        cells = [self._cell(what, name, cell, constants) for name, cell in zip(code.co_freevars, function.__closure__ or ())]
        return "closure", module, name, code_digest(code), (*keywords,), (*defaults,), (*cells,)

    def _cell(self, what: str, name: str, cell: types.CellType, constants: dict) -> tuple | str:
        if (value := content_of(cell)) is EMPTY:
            return "empty"
        if isinstance(value, CONSTANTS):
            constants[CELL + name] = value
            return "constant"
        return self._kept(what, value)

    def _kept(self, what: str, value):
        try:
            return self.shape_of(value)
        except Unsupported as error:
            raise Unsupported(f"{what}, which keeps {str(error).removeprefix(_ARGUMENT)}") from None

    def _path(self, module: torch.nn.Module) -> str:
        named = self._block.named_modules() if self._block is not None else ()
        for path, known in named:
            if known is module:
                return path
        raise Unsupported(f"{_ARGUMENT}the module {type(module).__name__}, which is none of the block's own")


def without_numbers(structure):
    """The structure of all calls that differ from this one's in a number only that is no size."""
    if isinstance(structure, tuple):
        return ("number",) if structure[:1] == ("float",) else tuple(map(without_numbers, structure))
    return structure


def rebuild(structure, leaves: Sequence, options: Sequence[dict], block: torch.nn.Module | None = None) -> tuple[tuple, dict]:
    """(args, kwargs), the inverse of flatten. A constant that a function closes over and that is not in its dict is missing there: code
    that reads it raises NameError. Raises Unsupported for a function that this process does not have."""
    tensors, dicts = iter(leaves), iter(options)

    def value(part):
        if part == "tensor":
            return next(tensors)
        if part == "size":
            return next(tensors).shape[0]
        if part == "options":
            return next(dicts)
        kind, *items = part
        if kind == "same options":
            return options[items[0]]
        if kind == "submodule":
            return block.get_submodule(items[0])
        if kind == "function":
            importlib.import_module(items[0])
            return function_at(*items)
        if kind == "closure":
            return closure(*items)
        if kind in ("tuple", "list", "Size"):
            return {"tuple": tuple, "list": list, "Size": torch.Size}[kind](value(item) for item in items)
        if kind == "dict":
            return {key: value(item) for key, item in items}
        if kind == "record":
            return records.make(*items[:2], {key: value(item) for key, item in items[2:]})
        return float(items[0]) if kind == "float" else items[0]

    def closure(module: str, name: str, digest: str, keywords: tuple, defaults: tuple, cells: tuple) -> types.FunctionType:
        importlib.import_module(module)
        constants = next(dicts)
        code = code_at(module, name, digest)
        if code is None:
            raise Unsupported(f"the function {name} is another one in a new process (another pack's patch?)")
        made = list(map(value, defaults))
        positional = len(made) - len(keywords)
        kept = [cell(CELL + name, part, constants) for name, part in zip(code.co_freevars, cells)]
        function = types.FunctionType(code, vars(sys.modules[module]), code.co_name, tuple(made[:positional]), tuple(kept))
        function.__qualname__ = name
        if keywords:
            function.__kwdefaults__ = dict(zip(keywords, made[positional:]))
        return function

    def cell(name: str, part, constants: dict) -> types.CellType:
        if part == "empty" or (part == "constant" and not dict.__contains__(constants, name)):
            return types.CellType()
        return types.CellType(constants[name] if part == "constant" else value(part))
    args, kwargs = structure
    return value(args), value(kwargs)


def with_numbers(block: torch.nn.Module, names: Sequence[str], kwargs: dict) -> dict:
    """kwargs, and the block's attributes of these names that may be sizes."""
    return {**kwargs, **{NUMBER + name: value for name in names if may_be_size(value := block.__dict__.get(name))}}


def set_numbers(block: torch.nn.Module, kwargs: dict) -> dict:
    """The inverse: kwargs without them. They are set on block."""
    for key in kwargs:
        if key.startswith(NUMBER):
            setattr(block, key.removeprefix(NUMBER), kwargs[key])
    return {key: value for key, value in kwargs.items() if not key.startswith(NUMBER)}


def numbers_in(structure) -> frozenset[str]:
    """The names of these in a call's structure."""
    return frozenset(key.removeprefix(NUMBER) for key, _ in structure[1][1:] if key.startswith(NUMBER))


def closures_in(structure) -> Iterator[tuple[str, str, str]]:
    """(module, qualified name, digest of the code) of the functions in a structure that are made anew in each call of the model."""
    if isinstance(structure, tuple):
        if structure[:1] == ("closure",):
            yield structure[1:4]
        for part in structure:
            yield from closures_in(part)


def rebuild_result(structure, tensors: Iterator, sizes: Callable[[str], int]):
    """What a block returns, of its structure and its tensors. sizes: the value of an expression of its inputs' sizes."""
    if structure == "tensor":
        return next(tensors)
    kind, *items = structure
    if kind in ("tuple", "list"):
        return {"tuple": tuple, "list": list}[kind](rebuild_result(item, tensors, sizes) for item in items)
    if kind == "dict":
        return {key: rebuild_result(item, tensors, sizes) for key, item in items}
    return sizes(str(items[0])) if kind == "size" else items[0]


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


def lies_as(tensor: Tensor, kind: str) -> bool:
    """Whether tensor lies in memory exactly as a new one of that kind of LAYOUTS does."""
    fresh = torch.empty(tensor.shape, device="meta", memory_format=LAYOUTS[kind])
    return tensor.stride() == fresh.stride() and tensor.storage_offset() == 0 and not tensor._is_view()


for _name in (*_COMPARE, *_CONVERT, *_COMPUTE, *(f"r{name}" for name in _COMPUTE)):
    setattr(_Untouchable, f"__{_name}__", _raise_used)

