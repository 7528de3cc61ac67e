"""velocator and xelerate: compilers of third parties, used when their package is importable.

The velocator distribution installs the package xelerate (Comfy-WaveSpeed, velocator_nodes.py), whose compile function takes
torch.compile's arguments.
"""
from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Callable

import torch

OPTIONAL_BACKENDS = ("velocator", "xelerate")


def package_of(backend: str) -> str:
    """The importable package of an optional backend. Raises RuntimeError where there is none."""
    for package in dict.fromkeys((backend, "xelerate")):
        if importlib.util.find_spec(package) is not None:
            return package
    raise RuntimeError(f"{backend} is not installed. Install the {backend} package, or set backend to inductor.")


def compile_optional(fn: Callable, backend: str, mode: str, options: dict, **arguments) -> Callable:
    """fn compiled by an optional backend; arguments: fullgraph and dynamic as in torch.compile."""
    package = package_of(backend)
    if importlib.util.find_spec(package).submodule_search_locations and importlib.util.find_spec(f"{package}.compilers"):
        compiler = importlib.import_module(f"{package}.compilers.xelerate_compiler").xelerate_compile
        return compiler(fn, backend="xelerate", mode=None if mode == "default" else mode, options=options or None, **arguments)
    importlib.import_module(package)  # registers a torch backend of its name
    return torch.compile(fn, backend=backend, options=options or None, **arguments)
