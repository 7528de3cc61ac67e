"""Where a function, a class or a module is from, in names that are the same in another process."""
from __future__ import annotations

import functools
import pathlib
import sys
import types
from collections.abc import Iterable
from pathlib import Path

import torch

from ...pack import NAME, PACKAGE
from .watch import _BUILTINS


def _function_of(value):
    return value.fget if isinstance(value, property) else getattr(value, "__func__", value)


def path_of(kind: type) -> str:
    return f"{portable(kind.__module__)}.{kind.__qualname__}"


def place_of(value) -> str:
    """Where a library's function, class or module says that it is from: another one of the library's, put in its place, says another."""
    if isinstance(value, types.ModuleType):
        return f"module {portable(value.__name__)}"
    if isinstance(value, type):
        return f"class {path_of(value)}"
    function = _function_of(value)
    if not isinstance(function, (types.FunctionType, *_BUILTINS)):
        return path_of(type(value))
    code = getattr(function, "__code__", None)
    names = [getattr(function, key, None) for key in ("__module__", "__qualname__", "__name__")]
    return " ".join(map(str, [type(value).__name__, *names, *([code.co_name] if code else [])]))


_PYTHON = str(pathlib.Path(functools.__file__).parent)
_TORCH = str(pathlib.Path(torch.__file__).parent)


def is_pristine_package(module: str) -> bool:
    """Whether a module is torch's or Python's own, whose versions are in the key of the environment."""
    if module.partition(".")[0] in ("torch", "builtins"):
        return True
    path = getattr(sys.modules.get(module), "__file__", None)
    if path is None:
        return module in sys.builtin_module_names or module in getattr(sys, "stdlib_module_names", ())
    return "site-packages" not in path and path.startswith(_PYTHON)


def is_own(function: object, folder: str) -> bool:
    """Whether a function of a package that lies in folder is the package's, not one that something else has put in its place."""
    if isinstance(function, types.FunctionType):
        file = function.__code__.co_filename
        return file.startswith((folder, _TORCH, "<frozen ")) or (file.startswith(_PYTHON) and "site-packages" not in file)
    return not isinstance(function, (functools.partial, types.MethodType))


def portable(module: str) -> str:
    """A module's name, from this pack's root whatever ComfyUI calls that."""
    return NAME + module.removeprefix(PACKAGE) if module == PACKAGE or module.startswith(f"{PACKAGE}.") else module


def local(module: str) -> str:
    return PACKAGE + module.removeprefix(NAME) if module == NAME or module.startswith(f"{NAME}.") else module


_SKIPPED_FOLDERS = tuple(str(Path(file).parent) for file in (torch.__file__, functools.__file__))
COMFYUI = ("comfy", "comfy_api", "comfy_extras", "comfy_execution")  # packaged forks have it in site-packages


def is_comfyuis(module: str) -> bool:
    """Whether a module is ComfyUI's own. What its code does with sizes and options is known (benchmarks/families.py); what a pack's does is
    not."""
    return module.partition(".")[0] in COMFYUI


@functools.lru_cache(1024)
def _package_folder(module: str) -> str:
    """Of an installed library, which is known by its version or its files; empty for the modules of ComfyUI, wherever it is, and of packs,
    whose values are described."""
    package = module.partition(".")[0]
    path = getattr(sys.modules.get(package), "__file__", None)
    if is_pristine_package(module):
        return str(Path(path).parent) if path and package == "torch" else _SKIPPED_FOLDERS[1]
    return str(Path(path).parent) if path and "site-packages" in path and package not in COMFYUI else ""


def are_comfyuis(modules: Iterable[str]) -> bool:
    """ComfyUI's own, and installed libraries that it calls."""
    return all(is_comfyuis(module) or _package_folder(module) for module in modules)
