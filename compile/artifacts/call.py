"""The call of a block as an artefact sees it: tensors in order, everything else as constants."""
from __future__ import annotations

import importlib
import sys
import types
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..torch_internals.guard_filter import BOOKKEEPING
from .closures import EMPTY, code_at, code_digest, content_of, contents_of, function_at, is_at_its_place

CONSTANTS = (type(None), bool, int, float, str)
_ABSENT, _PRESENT = ["absent"], ["present"]
_ARGUMENT = "an argument is "
CELL = "closed over "  # before a name in the dict of the constants that a function closes over
LAYOUTS = {"c": torch.contiguous_format, "l": torch.channels_last, "L": torch.channels_last_3d}


class Unsupported(Exception):
    """What cannot be made an artefact of, and why."""


@dataclass
class Call:
    """structure: of the arguments, nested tuples of text and constants (tensors by their position). leaves: the tensors.
    options: the dicts of settings among the arguments (transformer_options), and of each function among them the constants that it closes
    over; what of these is read is a constant of the artefact, see OptionReads."""

    structure: tuple
    leaves: list[Tensor]
    options: list[dict]


def flatten(args: tuple, kwargs: dict, block: torch.nn.Module | None = None) -> Call:
    """block: what is called, whose modules functions among the arguments may keep. Raises Unsupported for an argument that is neither a
    tensor nor a simple value, nor a function that was made with such."""
    flat = _Flat(block)
    return Call((flat.shape_of(args), flat.shape_of(kwargs, True)), flat.leaves, flat.options)


class _Flat:
    def __init__(self, block: torch.nn.Module | None):
        self.leaves: list[Tensor] = []
        self.options: list[dict] = []
        self._block = block
        self._functions: list[types.FunctionType] = []

    def shape_of(self, value, is_kwargs: bool = False):
        if isinstance(value, Tensor):
            self.leaves.append(value)
            return "tensor"
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


def constant(value) -> tuple:
    """Equal only for what is the same: zeros, which compare equal, are texts, with their sign."""
    return type(value).__name__, str(value) if type(value) is float and value == 0.0 else value


def without_numbers(structure):
    """The structure of all calls that differ from this one's in a number only."""
    if isinstance(structure, tuple):
        return ("number",) if structure[:1] in (("int",), ("float",)) else tuple(map(without_numbers, structure))
    return structure


def rebuild(structure, leaves: Sequence, options: Sequence[dict], block: torch.nn.Module | None = None) -> tuple[tuple, dict]:
    """(args, kwargs), the inverse of flatten. A constant that a function closes over and that is not in its dict is missing there: code
    that reads it raises NameError. Raises Unsupported for a function that this process does not have."""
    tensors, dicts = iter(leaves), iter(options)

    def value(part):
        if part == "tensor":
            return next(tensors)
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


def closures_in(structure) -> Iterator[tuple[str, str, str]]:
    """(module, qualified name, digest of the code) of the functions in a structure that are made anew in each call of the model."""
    if isinstance(structure, tuple):
        if structure[:1] == ("closure",):
            yield structure[1:4]
        for part in structure:
            yield from closures_in(part)


def rebuild_result(structure, tensors: Iterator):
    """What a block returns, of its structure and its tensors."""
    if structure == "tensor":
        return next(tensors)
    kind, *items = structure
    if kind in ("tuple", "list"):
        return {"tuple": tuple, "list": list}[kind](rebuild_result(item, tensors) for item in items)
    if kind == "dict":
        return {key: rebuild_result(item, tensors) for key, item in items}
    return items[0]


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


class OptionReads(dict):
    """A dict of settings that notes what is read and written of it while a block is traced.

    What ComfyUI writes there for patches (guards.BOOKKEEPING) shows as there, but whoever computes with it or branches on it gets
    Unsupported: it differs from block to block and from step to step. read: keys; "" stands for all of them (its length or truth)."""

    def __init__(self, values: dict):
        super().__init__({key: _Untouchable(key) if key in BOOKKEEPING and value is not None else value for key, value in values.items()})
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
        copied = OptionReads({})
        dict.update(copied, dict.items(self))
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

    def writes(self) -> dict:
        """{key: constant} of what was written, for the caller to write again. Raises Unsupported for anything else that was changed."""
        changed = {key: value for key, value in dict.items(self) if key not in self._before or value is not self._before[key]}
        constants = {key: value for key, value in changed.items() if type(value) in CONSTANTS}
        if changed.keys() - constants.keys() or self._before.keys() - dict.keys(self):
            raise Unsupported("it changes transformer_options")
        return constants

    def constants(self) -> dict:
        """{key: value} of what was read and can change a result, values as option_value gives them; "": all keys, where they counted.
        Raises Unsupported."""
        found = {key: option_value(self._before, key) for key in sorted(self.read - {""})}
        return {**found, "": ["keys", *_keys(self._before)]} if "" in self.read else found


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
for _name in (*_COMPARE, *_CONVERT, *_COMPUTE, *(f"r{name}" for name in _COMPUTE)):
    setattr(_Untouchable, f"__{_name}__", _raise_used)


def option_value(options: dict, key: str):
    """options[key] as JSON: a constant, a container that is empty, that there is none, or (of bookkeeping) that there is one. Raises
    Unsupported for anything else."""
    value = dict.get(options, key, _ABSENT)
    if value is _ABSENT:
        return _ABSENT
    if key in BOOKKEEPING and value is not None:
        return _PRESENT
    if isinstance(value, CONSTANTS):
        return list(constant(value))
    if isinstance(value, (dict, list, tuple)) and not value:
        return ["empty", type(value).__name__]
    raise Unsupported(f"the block reads transformer_options['{key}'], which is a {type(value).__name__}")


def simple_options(options: dict) -> dict:
    """What of a dict of settings a trace in another process is given: of bookkeeping that it is there; the rest shows as absent there, and
    is compared before the artefact is used."""
    return {key: value if value is None or key not in BOOKKEEPING else True for key, value in options.items()
            if key in BOOKKEEPING or (_is_simple(value) and not _is_filled(value))}


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
            if key == "" and expected[0] == "keys":
                if expected[1:] != _keys(options):
                    return False
            elif expected != _ABSENT:
                return False
        elif key in BOOKKEEPING and value is not None:
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
        self._add(values)

    def _add(self, value):
        if isinstance(value, OptionReads):
            return  # it knows by itself
        if isinstance(value, types.FunctionType):
            if not any(value is known for known in self._functions):
                self._functions.append(value)
                cells = value.__closure__ or ()
                self._cells += [(cell, content_of(cell)) for cell in cells]
                for item in contents_of(value):
                    self._add(item)
            return
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
        if any(content_of(cell) is not content for cell, content in self._cells):
            raise Unsupported("it changes what a function that it gets closes over")
