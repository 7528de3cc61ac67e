"""Which Python code an artefact was made from, so that it is used only where that code is what would run.

While a block is traced, every function called outside torch is noted. A function's fingerprint covers its bytecode, constants and
defaults, and what its global names stand for: other functions by name and bytecode, numbers and texts by value. So an edited file, another
pack's monkeypatch of ComfyUI and another attention function all show, in the process that would use the artefact.
"""
from __future__ import annotations

import functools
import hashlib
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

_SCALARS = (bool, int, float, str, bytes, type(None), torch.dtype, torch.device)
_SKIPPED_FOLDERS = tuple(str(Path(file).parent) for file in (torch.__file__, functools.__file__))
# What torch calls while it traces.
_HELPERS = ("sympy", "mpmath", "numpy", "networkx", "triton", "typing_extensions", "filelock")
PACK = "int8_compile"
_ROOT = __name__.rpartition(".compile.")[0]


@contextmanager
def recording() -> Iterator[dict[tuple[str, str], types.FunctionType | types.CodeType]]:
    """Gives a dict that fills with {(module, qualified name): code} of the functions called in this thread."""
    found: dict[tuple[str, str], types.CodeType] = {}
    skipped: dict[str, bool] = {}

    def profile(frame, event, _):
        if event != "call":
            return
        code = frame.f_code
        module = frame.f_globals.get("__name__", "")
        if code.co_filename not in skipped:
            skipped[code.co_filename] = _is_skipped(code.co_filename, module)
        if not skipped[code.co_filename]:
            # Python 3.10 has no qualified names in code: its functions are known by their file alone.
            name = module, getattr(code, "co_qualname", f"<locals>.{code.co_name}")
            if name not in found and not _in_import(frame):
                found[name] = code
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield found
    finally:
        sys.setprofile(before)


def _in_import(frame) -> bool:
    """Whether the function runs because something is imported just now."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _is_skipped(path: str, module: str) -> bool:
    """Of torch, Python or this pack, whose versions are in the key of the environment, or of what they call."""
    if "site-packages" in path:
        return module.partition(".")[0] in ("torch", *_HELPERS)
    return path.startswith(("<", *_SKIPPED_FOLDERS)) or f"{module}.".startswith(f"{_ROOT}.")


def sources_of(found: dict[tuple[str, str], types.CodeType]) -> list[list[str]]:
    """[[module, qualified name, fingerprint]] of what was recorded. A function that has no place of its own (a closure) is known by its
    file. Modules of this pack are named from its root, whatever ComfyUI calls that."""
    result = {}
    for module, name in found:
        function = None if _is_installed(module) else _resolve(module, name)[0]
        if function is None:
            name, value = "", _file_digest(module)
        else:
            value = fingerprint(function)
        result[_portable(module), name] = value
    return [[*key, value] for key, value in sorted(result.items())]


class Sources:
    """The functions that an artefact was made from, as they are in this process."""

    def __init__(self, recorded: list[list[str]]):
        self._recorded = recorded
        self._names: list[tuple[dict, str, object]] | None = None

    def mismatch(self) -> str:
        """The first function that is another one here, empty where all are the same."""
        if self._names is not None and all(space.get(name) is value for space, name, value in self._names):
            return ""
        names: list[tuple[dict, str, object]] = []
        for module, name, expected in self._recorded:
            local = _local(module)
            if not name:
                if _file_digest(local) != expected:
                    return module
                continue
            function, place = _resolve(local, name)
            if function is None or fingerprint(function, names) != expected:
                return f"{module}.{name}"
            names.append(place)
        self._names = names
        return ""


def fingerprint(function: Callable, names: list | None = None) -> str:
    """names: gets (namespace, name, value) of every global that was looked at."""
    parts: list[str] = []
    _describe(_unwrap(function), parts, names if names is not None else [])
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:24]


def _describe(function: types.FunctionType, parts: list[str], names: list):
    code = function.__code__
    parts.append(_code_digest(code))
    parts += [describe(v) for v in (*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).items())]
    parts += [describe(cell.cell_contents) for cell in function.__closure__ or () if _filled(cell)]
    used = _names_of(code)
    modules = [function.__globals__]
    seen = set()
    for space in modules:
        for name in used:
            value = space.get(name, _ABSENT)
            if value is _ABSENT or name == "__builtins__":
                continue
            names.append((space, name, value))
            if isinstance(value, types.ModuleType):
                # What is reached through a module (comfy.model_management.cast_to) is looked up there.
                if value.__name__ not in seen and not _is_installed(value.__name__):
                    seen.add(value.__name__)
                    modules.append(value.__dict__)
            else:
                parts.append(f"{name}={describe(value)}")


_ABSENT = object()


@functools.lru_cache(4096)
def _names_of(code: types.CodeType) -> tuple[str, ...]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= set(_names_of(constant))
    return tuple(sorted(names))


@functools.lru_cache(4096)
def _code_digest(code: types.CodeType) -> str:
    constants = [_code_digest(c) if isinstance(c, types.CodeType) else repr(sorted(map(repr, c))) if isinstance(c, frozenset) else repr(c)
                 for c in code.co_consts]
    whole = repr((code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars, code.co_flags))
    return hashlib.sha256(whole.encode()).hexdigest()[:24]


def describe(value) -> str:
    """What counts of a global, default or closed-over value: functions and classes by name and code, scalars by value, the rest by type."""
    if isinstance(value, _SCALARS):
        return repr(value)
    if isinstance(value, functools.partial):
        return f"partial {describe(value.func)} {value.args!r} {sorted(value.keywords.items())!r}"
    if isinstance(value, (tuple, frozenset)) and all(isinstance(item, _SCALARS) for item in value):
        return repr(sorted(map(repr, value)) if isinstance(value, frozenset) else value)
    target = _unwrap(value.fget if isinstance(value, property) else value)
    if isinstance(target, types.FunctionType):
        # A wrapper of this pack's own is known by the version of the pack.
        ours = getattr(value, "__globals__", {}).get("__name__", "").startswith(f"{_ROOT}.")
        outer = _code_digest(value.__code__) if isinstance(value, types.FunctionType) and not ours else ""
        return f"{_portable(target.__module__ or '')}.{target.__qualname__} {_code_digest(target.__code__)} {outer}"
    kind = value if isinstance(value, (type, types.BuiltinFunctionType)) else type(value)
    return f"{_portable(kind.__module__)}.{kind.__qualname__}"


def _unwrap(function):
    """The function below functools.partial, bound methods, staticmethod and functools.wraps."""
    for _ in range(10):
        inner = (getattr(function, "__wrapped__", None) or getattr(function, "__func__", None)
                 or (function.func if isinstance(function, functools.partial) else None))
        if inner is None:
            break
        function = inner
    return function


def _filled(cell) -> bool:
    try:
        cell.cell_contents  # noqa: B018 (raises where it is empty)
    except ValueError:
        return False
    return True


def _resolve(module: str, name: str) -> tuple[types.FunctionType | None, tuple]:
    """(the function of that name here, or None where names do not lead to it; (namespace, name, value) of where it was found)."""
    place = ({}, "", None)
    target = sys.modules.get(module)
    for part in name.split("."):
        if not isinstance(target, (types.ModuleType, type)):
            return None, place
        place = (vars(target), part, vars(target).get(part))
        target = place[2]
    target = _unwrap(target.fget if isinstance(target, property) else target)
    return (target if isinstance(target, types.FunctionType) else None), place


def _is_installed(module: str) -> bool:
    """Whether it is torch's, Python's or an installed package's."""
    path = getattr(sys.modules.get(module), "__file__", None)
    return path is None or "site-packages" in path or path.startswith(_SKIPPED_FOLDERS)


@functools.lru_cache(1024)
def _file_digest(module: str) -> str:
    path = getattr(sys.modules.get(module), "__file__", None)
    try:
        if module not in sys.modules:  # an installed package that this process has not needed yet
            path = getattr(importlib.util.find_spec(module), "origin", None)
        return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:24] if path else ""
    except (OSError, ImportError, ValueError):
        return ""


def _portable(module: str) -> str:
    return PACK + module.removeprefix(_ROOT) if module == _ROOT or module.startswith(f"{_ROOT}.") else module


def _local(module: str) -> str:
    return _ROOT + module.removeprefix(PACK) if module == PACK or module.startswith(f"{PACK}.") else module
