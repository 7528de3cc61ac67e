"""Which Python code and which values an artifact was made from, so that it is used only where that is what would run.

While a block is traced, every function called outside torch is noted. Each is known by the file it is from (an update or an edit makes
another), by its own code as it is in the process, and by what its global names stand for, described to the end (see describe). So an edited
file, another pack's monkeypatch of ComfyUI or of torch, another attention function and a changed setting all show, in the process that
would use the artifact. What a trace reads that no description can hold (the clock, random numbers, the environment) is refused by name.
"""
from __future__ import annotations

import builtins
import enum
import functools
import hashlib
import importlib.util
import os
import sys
import time
import types
from collections.abc import Iterable
from pathlib import Path

import torch

from .closures import code_at
from .code_names import global_names, identifiers, imported_names
from .describe import Describer, Names
from .origins import _SKIPPED_FOLDERS, _package_folder, is_own, is_pristine_package, local, place_of, portable
from .traced_calls import Recording
from .values import Unsupported
from .watch import ABSENT, Watch

# When this process had its code: a file that changed later is not what runs here.
_STARTED = time.time()
_FUNCTIONS = (types.FunctionType, functools.partial, types.MethodType, types.BuiltinFunctionType, types.MethodDescriptorType,
              types.WrapperDescriptorType, types.GetSetDescriptorType)
# What gives a global or a module by a text.
_BY_TEXT = ("globals", "import_module", "__import__", "modules")


def cached_function(traced: Iterable[types.CodeType]) -> str:
    """The first function among the code that dynamo has traced that stands behind functools.lru_cache, which dynamo looks through: an
    object that it gives twice would be two. Empty for none. What an installed library caches is its own affair."""
    for (module, name), code in Recording.of(traced).functions.items():
        bindings = _resolve(module, name)[1] or _resolve(module, code.co_name)[1]
        values = [getattr(value, "__func__", value) for *_, value in bindings]
        if any(isinstance(value, functools._lru_cache_wrapper) for value in values) and not _package_folder(module):
            return f"{module}.{code.co_name}"
    return ""


def made_by_metaclass(traced: Iterable[types.CodeType]) -> str:
    """The first class that the code that dynamo has traced names whose metaclass has a __call__ of its own; empty for none."""
    for (module, _), code in Recording.of(traced).functions.items():
        space = vars(sys.modules[module])
        for name in sorted(global_names(code)):
            kind = type(space.get(name))
            if issubclass(kind, type) and kind.__call__ is not type.__call__ and not is_pristine_package(kind.__module__):
                return f"{module}.{name} is made by its metaclass ({kind.__name__}.__call__)"
    return ""


def replaced_operators(names: Names | None = None) -> list[str]:
    """Torch's own operators for which another pack has registered a kernel, and, of those that code with names can call, libraries'."""
    found = []
    for key in list(torch.library._impls):
        space, operator_name, dispatch = key.split("/", 2)
        # Torch runs those for autograd when it traces, and calls those of attention's kernels as eager does.
        if dispatch in ("Meta", "MPS") or dispatch.startswith("Autograd") or "scaled_dot_product" in operator_name:
            continue
        named = names is not None and names.items is not None and {space, operator_name.partition(".")[0]} <= names.exact
        if (space == "aten" or named) and not _is_torchs_kernel(f"{space}::{operator_name}", dispatch):
            found.append(key)
    return sorted(found)


def _is_torchs_kernel(operator_name: str, dispatch: str) -> bool:
    """Whether a file of torch has registered it: from 2.12 on some of its operators have kernels in Triton (torch/_native/registry.py)."""
    try:
        table = torch._C._dispatch_dump(operator_name)
    except RuntimeError:  # gone meanwhile
        return False
    line = next((line for line in table.split("\n") if line.startswith((f"{dispatch}: ", f"{dispatch}[alias]: "))), "")
    return f" registered at {os.path.join(_SKIPPED_FOLDERS[0], '')}" in line


def sources_of(recorded: Recording, names: Names, lenient: bool = False,
               closures: Iterable[tuple[str, str, str]] = ()) -> list[list[str]]:
    """[[module, qualified name, fingerprint]] of the functions, and [[module, "", digest of its file]] of all that they are from. A
    function that has no place of its own (a closure) is known by its file. Modules of this pack are named from its root.

    lenient: of code that this process itself has traced, whose files and odd values dynamo looks after. closures: (module, qualified name,
    digest of the code) of functions that the trace was given: what their global names stand for counts too, see CodeFingerprint.
    Raises Unsupported without lenient."""
    result = {} if lenient else {(portable(module), ""): _file_digest(module) for module, _ in recorded.functions}
    called = frozenset((portable(module), name) for module, name in recorded.functions)
    covered: set[types.CodeType] = set()
    for module, name in recorded.functions:
        function = _resolve(module, name)[0]
        if function is not None:
            result[portable(module), name] = _fingerprint(function, Describer(names, lenient=lenient), called, covered=covered)
        else:
            result.setdefault((portable(module), name), "")  # no place of its own
    for module, name, digest in closures:
        if (function := _closure(module, name, digest)) is None:
            raise Unsupported(f"the function {name}, which it gets, is another one now")
        describe = Describer(names, lenient=lenient)
        result[portable(module), f"{name}{_WITH_CODE}{digest}"] = _fingerprint(function, describe, called, covered=covered)
    result["torch", "Tensor"] = _patched_functions(names, Watch())
    return [[*key, value] for key, value in sorted(result.items())]


class CodeFingerprint:
    """The functions that an artifact was made from, as they are in this process. names: see Recording.names."""

    def __init__(self, recorded: list[list[str]], names: Names, lenient: bool = False):
        self._recorded = recorded
        self._names = names
        self._lenient = lenient
        self._watch: Watch | None = None
        self._mismatch = ""

    @property
    def called(self) -> frozenset[tuple[str, str]]:
        return frozenset((module, name) for module, name, _ in self._recorded if name)

    def mismatch(self) -> str:
        """The first function that is another one here, empty where all are the same. Fast where nothing has changed since."""
        if self._watch is None or not self._watch.unchanged():
            self._watch = Watch(Watch())
            try:
                self._mismatch = self._look()
            except Unsupported as error:
                self._mismatch = f"code of which {error}"
        return self._mismatch

    def values_unchanged(self) -> bool:
        """Whether the values that it was made from, as far as a program sets them while it runs, are those of the last look. Asked at every
        call."""
        return self._watch is not None and self._watch.values.unchanged()

    def _look(self) -> str:
        called = self.called
        for module, name, expected in self._recorded:
            if name and not expected and (module, name) != ("torch", "Tensor"):
                continue
            if not name:
                if _file_digest(local(module)) != expected:
                    return module
            elif (module, name) == ("torch", "Tensor"):
                if _patched_functions(self._names, self._watch) != expected:
                    return "torch.Tensor"
            else:
                bindings: list[tuple]
                if _WITH_CODE in name:
                    function, bindings = _closure(local(module), *name.split(_WITH_CODE)), []
                else:
                    function, bindings = _resolve(local(module), name)
                for binding in bindings:
                    self._watch.binding(*binding)
                describe = Describer(self._names, self._watch, lenient=self._lenient)
                if function is None or _fingerprint(function, describe, called, self._watch) != expected:
                    return f"{module}.{name}"
        return ""


_WITH_CODE = " with code "


def _closure(module: str, name: str, digest: str) -> types.FunctionType | None:
    """A function that another one makes, without what it closes over: that belongs to the call that gets it."""
    code = code_at(module, name, digest)
    if code is None:
        return None
    function = types.FunctionType(code, vars(sys.modules[module]), code.co_name, None, tuple(types.CellType() for _ in code.co_freevars))
    function.__module__, function.__qualname__ = module, name
    return function


def _fingerprint(function: types.FunctionType, describe: Describer, called: frozenset[tuple[str, str]], watch: Watch | None = None,
                 covered: set[types.CodeType] | None = None) -> str:
    """Of a function and of what its global names stand for; and of those that it leads to (behind a decorator, in a table of lambdas) and
    that the trace called. called: (module, qualified name) of these."""
    watch = watch or Watch()
    parts = [describe(function)]
    seen = [function]
    _add_globals(function, describe, watch, parts)
    for met in describe.met:  # grows
        if met not in seen and (portable(met.__module__ or ""), met.__qualname__) in called:
            seen.append(met)
            _add_globals(met, describe, watch, parts)
    return hashlib.sha256("\n".join(parts).encode(errors="backslashreplace")).hexdigest()[:24]


def _add_globals(function: types.FunctionType, describe: Describer, watch: Watch, parts: list[str]) -> None:
    names = global_names(function.__code__)
    used = sorted(identifiers(function.__code__) if names.intersection(_BY_TEXT) else names)
    spaces: list[tuple[dict, str]] = [(function.__globals__, _package_folder(function.__module__ or ""))]
    # What is imported inside the function is a local name there. An attribute may be called like a module that only a server has loaded
    # (ComfyUI's args.cuda_malloc).
    imported = imported_names(function.__code__)
    spaces += [(vars(module), _package_folder(name)) for name in used if name not in function.__globals__
               and (name in imported or name not in names) and isinstance(module := sys.modules.get(name), types.ModuleType)]
    for space, folder in spaces:
        for name in used:
            value = space.get(name, ABSENT)
            if name == "__builtins__" or (value is ABSENT and space is not function.__globals__):
                continue
            watch.binding(space, name, value, bool(folder))
            if value is ABSENT and name in vars(builtins):
                value = vars(builtins)[name]
                watch.binding(vars(builtins), name, value)
                if getattr(value, "__module__", None) == "builtins" and not isinstance(value, types.FunctionType):
                    continue
            if isinstance(value, types.ModuleType):
                # What is reached through a module (comfy.model_management.cast_to, torch.nn.functional.silu) is looked up there.
                if all(value.__dict__ is not seen for seen, _ in spaces):
                    spaces.append((value.__dict__, _package_folder(value.__name__)))
            elif value is not ABSENT and not (folder and _is_its_own(value, folder)):
                parts.append(f"{name}={describe(value)}")
            elif value is not ABSENT:
                parts.append(f"{name}={place_of(value)}")


def _is_its_own(value, folder: str) -> bool:
    """Whether a library's value is known with the library: its functions as long as nothing else stands in their place; its classes,
    tables and objects. Not its numbers and texts (math.pi)."""
    if isinstance(value, (types.FunctionType, functools.partial, types.MethodType)):
        return is_own(value, folder)
    return not isinstance(value, (bool, int, float, str, type(None), enum.Enum))


def _patched_functions(names: Names, watch: Watch) -> str:
    """What stands in the place of torch's functions, others' or another of torch's: in torch.nn.functional, which torch's own layers call,
    and of torch.Tensor's methods the operators and those of these names."""
    watch.size(torch.library._impls)
    found = replaced_operators(names)
    for space, all_names in ((vars(torch.nn.functional), True), (vars(torch.Tensor), False), (vars(torch.Tensor.__base__), False)):
        watch.size(space)
        for name in sorted(space):
            value = space[name]
            if not (all_names or name in names or name.startswith("__")):
                continue
            function = value.fget if isinstance(value, property) else value
            if isinstance(function, _FUNCTIONS):
                watch.binding(space, name, value)
                own = is_own(function, _SKIPPED_FOLDERS[0])
                found.append(f"{name}={place_of(value) if own else Describer(names, watch, lenient=True)(value)}")
    return hashlib.sha256(" ".join(found).encode(errors="backslashreplace")).hexdigest()[:24]


def _unwrap_descriptor(function):
    """The function below a property, a staticmethod or a classmethod. What functools.wraps has put around one stays: it is what runs."""
    if isinstance(function, property):
        function = function.fget
    return getattr(function, "__func__", function)


def _resolve(module: str, name: str) -> tuple[types.FunctionType | None, list[tuple]]:
    """(the function of that name here, or None where names do not lead to it; the bindings on the way: namespace, name, value)."""
    bindings = []
    target = sys.modules.get(module)
    for part in name.split("."):
        if not isinstance(target, (types.ModuleType, type)):
            return None, bindings
        space = vars(target)
        value = space.get(part, ABSENT)
        bindings.append((space, part, value))
        target = value
    target = _unwrap_descriptor(target)
    return (target if isinstance(target, types.FunctionType) else None), bindings


@functools.lru_cache(1024)
def _file_digest(module: str) -> str:
    """Of the file that a module is from; that it has changed since this process started is part of it."""
    path = getattr(sys.modules.get(module), "__file__", None)
    try:
        if module not in sys.modules:  # an installed package that this process has not needed yet
            path = getattr(importlib.util.find_spec(module), "origin", None)
        if not path:
            return ""
        digest = hashlib.sha256(Path(path).read_bytes()).hexdigest()[:24]
        info = os.stat(path)
    except (OSError, ImportError, ValueError):
        return ""
    changed = max(info.st_mtime, info.st_ctime if os.name == "posix" else 0) > _STARTED and module in sys.modules
    return f"{digest} of {os.getpid()}" if changed else digest
