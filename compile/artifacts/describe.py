"""What Python values are, in words that two processes agree on exactly where code compiled from them would be the same; and whether
they still are what they were.

Values are described by their content, to the end: what cannot be described is refused, never taken "by type".
"""
from __future__ import annotations

import abc
import collections
import enum
import functools
import hashlib
import logging
import pathlib
import re
import threading
import types
from _abc import _get_dump
from collections.abc import Iterable

import torch

from ..torch_internals.described import slots_of
from .closures import EMPTY, code_digest, content_of
from .origins import _TORCH, _function_of, is_own, is_pristine_package, path_of, place_of, portable
from .values import Unsupported
from .watch import _BUILTINS, ABSENT, Watch

# A block's state has some hundred values. More is data, which belongs into tensors.
MAX_VALUES = 20_000

_SCALARS = frozenset({bool, int, float, complex, str, bytes, type(None), type(Ellipsis), torch.dtype, torch.device, torch.layout,
                      torch.memory_format, torch.Size, range, re.Pattern, pathlib.PosixPath, pathlib.WindowsPath, pathlib.PurePosixPath,
                      pathlib.PureWindowsPath})
# They guard, log or order; nothing that is computed depends on them.
_IRRELEVANT = (logging.Logger, type(threading.Lock()), type(threading.RLock()), torch.Stream, torch.Event)
# What runs of a module without being named in its code.
_CALLED = frozenset({"forward", "_call_impl", "_wrapped_call_impl"})
_CONTAINERS = (list, tuple, dict, set, frozenset, collections.deque, types.MappingProxyType)
_OPS = (torch._ops.OpOverload, torch._ops.OpOverloadPacket)


class Names:
    """Names of attributes, and patterns with * of those that code puts together (f"scale_{i}"). All where items is None."""

    def __init__(self, items: Iterable[str] | None):
        self.items = None if items is None else sorted(items)
        self.exact = frozenset(item for item in self.items or () if "*" not in item)
        patterns = [re.escape(item).replace(r"\*", ".*") for item in self.items or () if "*" in item]
        self._pattern = re.compile("|".join(patterns)) if patterns else None

    def __contains__(self, name: str) -> bool:
        return (self.items is None or name in self.exact
                or (self._pattern is not None and self._pattern.fullmatch(name) is not None))


def as_its_class(value, name: str, names: Names) -> bool:
    """Whether an object's own attribute is the plain value that its class has under that name, which is described with the class: what an
    offload leaves behind (comfy_cast_weights)."""
    own = value.__dict__[name]
    of_class = next((vars(base)[name] for base in type(value).__mro__ if name in vars(base)), ABSENT)
    return name in names and type(own) is type(of_class) and isinstance(own, (bool, int, float, str)) and repr(own) == repr(of_class)


def _holds_something(module: torch.nn.Module) -> bool:
    """Whether a module has weights, parts, hooks or a call of its own."""
    return any(value for value in vars(module).values() if isinstance(value, dict)) or "forward" in vars(module)


class Describer:
    """describer(value) -> text. names: the attributes of objects and classes that count. watch: gets all that is looked at.
    modules: those that have a place in the block, by id -> its path. lenient: what cannot be described is named by its type; without, it
    is refused with Unsupported."""

    def __init__(self, names: Names, watch: Watch | None = None, modules: dict[int, str] | None = None, lenient: bool = False):
        self._names = names
        self._watch = watch or Watch()
        self._paths = modules or {}
        self._lenient = lenient
        self._known: dict[int, str] = {}  # by id, of objects that are being described or have been
        self._alive: list = []  # so that no id is given twice
        self.met: list[types.FunctionType] = []  # functions that were described
        self._count = 0

    def __call__(self, value) -> str:
        kind = type(value)
        if kind in _SCALARS:
            return f"{kind.__name__} {value!r}"
        if (known := self._known.get(id(value))) is not None:
            return known
        self._count += 1
        if self._count > MAX_VALUES:
            raise Unsupported(f"it depends on more than {MAX_VALUES} values")
        self._known[id(value)] = f"#{len(self._known)}"  # where it contains itself
        self._alive.append(value)
        text = self._describe(value, kind)
        if len(text) > 100:
            text = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:24]
        self._known[id(value)] = text
        return text

    def _describe(self, value, kind: type) -> str:
        if isinstance(value, enum.Enum):
            return f"enum {path_of(kind)}.{value.name} {self(value.value)} {' '.join(self._state(value))}"
        if isinstance(value, types.FunctionType):
            return self._function(value)
        if isinstance(value, type):
            return self._class(value)
        if isinstance(value, types.ModuleType):
            return f"module {portable(value.__name__)}"
        if isinstance(value, types.MethodType):
            return f"method {self(value.__func__)} of {self(value.__self__)}"
        if isinstance(value, torch.nn.Module):
            if id(value) in self._paths:
                return f"submodule {self._paths[id(value)]}"
            if is_pristine_package(kind.__module__) and not _holds_something(value):
                return self._layer(value)
            return self._refuse(f"the module {kind.__name__}, which is none of its own", value)
        if isinstance(value, (staticmethod, classmethod)):
            return f"{kind.__name__} {self(value.__func__)}"
        if isinstance(value, property):
            return f"property {self(value.fget)} {self(value.fset)} {self(value.fdel)}"
        if isinstance(value, functools.cached_property):
            return f"cached_property {self(value.func)}"
        if isinstance(value, (functools.partial, functools.partialmethod)):
            return f"partial {self(value.func)} {self(value.args)} {self(value.keywords)}"
        if isinstance(value, functools._lru_cache_wrapper):
            if is_pristine_package(value.__module__ or ""):
                return f"lru_cache {self(value.__wrapped__)}"
            return self._refuse(f"{value.__qualname__}, which keeps its results (functools.lru_cache)", value)
        if isinstance(value, _BUILTINS):
            owner = getattr(value, "__self__", None)
            of = "" if owner is None or isinstance(owner, (types.ModuleType, type)) else f" of {self(owner)}"
            return f"builtin {getattr(value, '__module__', None)}.{value.__qualname__}{of}"
        if isinstance(value, _OPS):
            return f"op {value}"
        if isinstance(value, slice):
            return f"slice {self(value.start)} {self(value.stop)} {self(value.step)}"
        if isinstance(value, torch.Tensor):
            if type(value) is torch.Tensor and not value.numel() and not value.is_meta:  # no values that could be others
                return f"empty tensor {value.dtype} {value.device} {list(value.shape)} {list(value.stride())}"
            return self._refuse("a tensor that is neither a parameter nor a buffer", value)
        if isinstance(value, _IRRELEVANT):
            return path_of(kind)
        return self._object(value, kind)

    def _object(self, value, kind: type) -> str:
        scalar = next((base for base in (int, float, complex, str, bytes) if isinstance(value, base)), None)
        if not isinstance(value, _CONTAINERS) and scalar is None and not hasattr(value, "__dict__") and _slots(value) is None:
            return self._refuse(f"a {kind.__name__}", value)
        content = [scalar.__repr__(value)] if scalar is not None else self._content(value)
        return f"{self(kind)} {' '.join([*content, *self._state(value)])}"

    def _state(self, value) -> list[str]:
        """Of an object's attributes."""
        content = []
        if isinstance(state := getattr(value, "__dict__", None), dict):
            self._watch.size(state, is_state=True)
            # It is compared and printed with all of them, in C.
            whole = isinstance(value, types.SimpleNamespace)
            for name in sorted(state if whole else filter(self._names.__contains__, list(state))):
                self._watch.binding(state, name, state[name])
                if whole or not as_its_class(value, name, self._names):
                    content.append(f"{name}={self(state[name])}")
        for name, item in sorted((_slots(value) or {}).items()):
            if name in self._names:
                self._watch.attribute(value, name, item)
                content.append(f"{name}={self(item)}")
        return content

    def _layer(self, layer: torch.nn.Module) -> str:
        """A layer of torch without weights (an activation), which code has as a default or a global."""
        state = vars(layer)
        self._watch.size(state, is_state=True)
        content = []
        for name in sorted(state):
            self._watch.binding(state, name, state[name])
            if isinstance(state[name], dict):
                self._watch.container(state[name])  # hooks may be added
            else:
                content.append(f"{name}={self(state[name])}")
        return f"layer {self(type(layer))} {' '.join(content)}"

    def _content(self, value) -> list[str]:
        """Of a container, which another thread may be filling."""
        if isinstance(value, (dict, types.MappingProxyType)):
            self._watch.container(value)
            known = dict(value) if isinstance(value, dict) else value.copy()
            return [f"{self(key)}: {self(item)}" for key, item in known.items()]
        if isinstance(value, (set, frozenset)):
            if isinstance(value, set):
                self._watch.container(value)
            return sorted(map(self, list(value)))
        if isinstance(value, (list, collections.deque)):
            self._watch.container(value)
        return list(map(self, list(value))) if isinstance(value, (list, tuple, collections.deque)) else []

    def _function(self, function: types.FunctionType) -> str:
        """By its code and by what it was made with; what its global names stand for counts where it is called, see cache_sources."""
        self._watch.function(function)
        self.met.append(function)
        parts = [f"function {portable(function.__module__ or '')}.{function.__qualname__}", code_digest(function.__code__)]
        parts += [self(value) for value in (function.__defaults__, function.__kwdefaults__) if value]
        parts += [self(content) for cell in function.__closure__ or () if (content := content_of(cell)) is not EMPTY]
        if function.__dict__:
            self._watch.container(function.__dict__, is_code=True)
            parts.append(self(function.__dict__))
        return " ".join(parts)

    def _class(self, kind: type) -> str:
        """By its name, and by the methods and attributes that count; of torch's and Python's own classes what others have put there."""
        self._watch.bases(kind)
        parts = [f"class {path_of(kind)}"]
        if isinstance(kind, abc.ABCMeta) and not is_pristine_package(kind.__module__):
            self._watch.registrations()
            registered = [reference() for reference in _get_dump(kind)[0]]
            parts += sorted(f"has {path_of(item)}" for item in registered if item is not None)
        if type(kind) is not type and not is_pristine_package(type(kind).__module__):
            parts.append(self(type(kind)))
        for base in kind.__mro__:
            if base is object:
                continue
            space, pristine = vars(base), is_pristine_package(base.__module__)
            # A layer of torch calls methods of its own (_conv_forward), and torch's functions through globals of its module (F).
            is_layer = pristine and base is not torch.nn.Module and issubclass(base, torch.nn.Module)
            self._watch.size(space)
            for name in sorted(space):
                if name == "__slotnames__":
                    continue  # pickle and copy leave it on each class that they have met
                value = space[name]
                function = _function_of(value)
                if not (name in self._names or name in _CALLED
                        or ((is_layer or name.startswith("__")) and isinstance(function, types.FunctionType))):
                    continue
                self._watch.binding(space, name, value)
                if not pristine:
                    parts.append(f"{name}={self(value)}")
                elif isinstance(function, types.FunctionType):
                    self._watch.function(function)
                    if not is_own(function, _TORCH):
                        parts.append(f"{name}={self(value)}")
                    elif not (base is torch.nn.Module and name in ("__init__", "__setstate__")):  # which dynamo wraps once it is used
                        parts.append(f"{name}={place_of(value)}")
                    if is_layer and name != "__init__":
                        parts += self._globals_of(function)
                elif isinstance(function, _BUILTINS):
                    parts.append(f"{name}={place_of(value)}")
                elif isinstance(function, (functools.partial, functools.partialmethod)):
                    parts.append(f"{name}={self(value)}")
        return " ".join(parts)

    def _globals_of(self, function: types.FunctionType) -> list[str]:
        """Which functions, classes and modules the global names of a function of torch stand for."""
        parts = []
        for name in function.__code__.co_names:
            if (value := function.__globals__.get(name, ABSENT)) is not ABSENT:
                self._watch.binding(function.__globals__, name, value, is_library=True)
                own = not isinstance(value, types.FunctionType) or is_own(value, _TORCH)
                parts.append(f"{name}={place_of(value) if own else self(value)}")
        return parts

    def _refuse(self, what: str, value) -> str:
        if self._lenient:
            return path_of(type(value))
        raise Unsupported(f"it depends on {what}, which cannot be described")


def _slots(value) -> dict | None:
    names = slots_of(type(value))
    return {name: getattr(value, name) for name in names if hasattr(value, name)} if names else None

