"""Which Python code and which values an artefact was made from, so that it is used only where that is what would run.

While a block is traced, every function called outside torch is noted. Each is known by the file it is from (an update or an edit makes
another), by its own code as it is in the process, and by what its global names stand for, described to the end (see describe). So an edited
file, another pack's monkeypatch of ComfyUI or of torch, another attention function and a changed setting all show, in the process that
would use the artefact. What a trace reads that no description can hold (the clock, random numbers, the environment) is refused by name.
"""
from __future__ import annotations

import ast
import builtins
import copy
import dataclasses
import dis
import enum
import functools
import hashlib
import importlib.util
import inspect
import operator
import os
import random
import re
import sys
import textwrap
import time
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from ...pack import PACKAGE
from .call import Unsupported
from .closures import code_at
from .describe import ABSENT, Describer, Names, Watch, is_own, is_pristine_package, local, place_of, portable

_SKIPPED_FOLDERS = tuple(str(Path(file).parent) for file in (torch.__file__, functools.__file__))
COMFYUI = ("comfy", "comfy_api", "comfy_extras", "comfy_execution")  # packaged forks have it in site-packages
# What torch calls while it traces.
_HELPERS = ("sympy", "mpmath", "numpy", "networkx", "triton", "typing_extensions", "filelock")
# When this process had its code: a file that changed later is not what runs here.
_STARTED = time.time()
# Builtins whose answer differs from call to call.
_CLOCKS = {getattr(time, name) for name in ("time", "time_ns", "monotonic", "perf_counter", "perf_counter_ns", "monotonic_ns")}
# Builtins that answer from outside the process or its values.
_OUTSIDE = {open, id, input}
_OUTSIDE_MODULES = ("posix", "nt", "_io", "_thread", "_socket", "select")
# What reads attributes by names that the code does not contain.
_BY_NAME = ("getattr", "hasattr", "setattr", "delattr")
_READERS = (*(getattr(builtins, name) for name in _BY_NAME), operator.attrgetter, operator.methodcaller, vars)
_FUNCTIONS = (types.FunctionType, functools.partial, types.MethodType, types.BuiltinFunctionType, types.MethodDescriptorType,
              types.WrapperDescriptorType, types.GetSetDescriptorType)
# What gives a global or a module by a text.
_BY_TEXT = ("globals", "import_module", "__import__", "modules")
# Files of Python's library that read all attributes of what they get (dataclasses.replace).
_BY_FIELD = frozenset({dataclasses.__file__, copy.__file__})
# What tells how a tensor lies in memory, and whether it needs a gradient.
_LAYOUT = frozenset({"is_contiguous", "stride", "as_strided", "as_strided_", "data_ptr", "storage_offset", "untyped_storage", "storage",
                     "is_non_overlapping_and_dense", "dim_order", "_is_view", "_base"})
_GRADIENT = frozenset({"requires_grad", "is_leaf", "grad_fn", "retains_grad"})
_ALL_NAMES = ("vars", "globals", "locals", "eval", "exec", "__dict__", "__getattribute__", "__getattr__", "__builtins__", "attrgetter",
              "methodcaller")


@dataclasses.dataclass
class Recording:
    """What was seen of a trace. functions: {(module, qualified name): code}. library: code of Python's library, and what that generated
    (a dataclass's __eq__), that these called. effects: what it did that cannot be kept, in words. asks_layout: of a tensor."""

    functions: dict[tuple[str, str], types.CodeType] = dataclasses.field(default_factory=dict)
    library: set[types.CodeType] = dataclasses.field(default_factory=set)
    effects: set[str] = dataclasses.field(default_factory=set)
    asks_layout: bool = False

    @classmethod
    def of(cls, traced: Iterable[types.CodeType]) -> Recording:
        """Of the code that dynamo has traced, apart from torch's, Python's and this pack's."""
        modules = _modules_by_file()
        found = {(modules.get(code.co_filename, ""), getattr(code, "co_qualname", f"<locals>.{code.co_name}")): code for code in traced}
        return cls({(module, name): code for (module, name), code in found.items() if module and not _is_skipped(code.co_filename, module)})

    def _refuse(self, reason: str) -> None:
        self.effects.add(reason)

    def names(self) -> Names:
        """Of the attributes and globals that the code can read."""
        computed = {code: _computed_names(code) for code in self.functions.values()}
        if (None in computed.values() or any(code.co_filename in _BY_FIELD for code in self.library)
                or any(_has_alias(module, code) for (module, _), code in self.functions.items())):
            return Names(None)
        return Names({name for code, patterns in computed.items() for name in (*identifiers(code), *patterns)}.union(
            *map(identifiers, self.library)))

    def update(self, other: Recording) -> None:
        self.functions.update(other.functions)
        self.library |= other.library
        self.effects |= other.effects
        self.asks_layout |= other.asks_layout

    def names_layout(self) -> bool:
        """Whether code may ask how a tensor lies in memory."""
        names = self.names()
        return any(name in names for name in _LAYOUT)

    def gradient_reader(self) -> str:
        """The first function that asks whether a tensor needs a gradient, empty for none. ComfyUI and libraries ask for training alone."""
        return next((f"{module}.{code.co_name}" for (module, _), code in self.functions.items() if _attributes(code) & _GRADIENT
                     and module.partition(".")[0] not in COMFYUI and not _package_folder(module)), "")

    def require_pure(self) -> None:
        """Raises Unsupported where what the trace did would not be done again."""
        for code in self.functions.values():
            if written := _written_globals(code):
                self._refuse(f"it writes the global {written}")
        if reader := self.gradient_reader():
            self._refuse(f"{reader} asks whether a tensor needs a gradient")
        if self.effects:
            raise Unsupported(min(self.effects))


def _modules_by_file() -> dict[str, str]:
    return {file: name for name, module in list(sys.modules.items()) if (file := getattr(module, "__file__", None))}


@contextmanager
def recording() -> Iterator[Recording]:
    """Gives a Recording that fills with the functions called in this thread, outside torch, Python and this pack."""
    found = Recording()
    skipped: dict[str, bool] = {}

    def is_skipped(frame) -> bool:
        path = frame.f_code.co_filename
        if path not in skipped:
            skipped[path] = _is_skipped(path, frame.f_globals.get("__name__", ""))
        return skipped[path]

    def profile(frame, event, value):
        if event == "call":
            code = frame.f_code
            if not is_skipped(frame):
                # Python 3.10 has no qualified names in code: its functions are known by their file alone.
                name = frame.f_globals.get("__name__", ""), getattr(code, "co_qualname", f"<locals>.{code.co_name}")
                if name not in found.functions and not _in_import(frame):
                    found.functions[name] = code
                return
            if _is_library(frame) and _caller_counts(frame, is_skipped):
                found.library.add(code)
            if frame.f_globals is os.__dict__ and code.co_name in ("__getitem__", "getenv") and _caller_counts(frame, is_skipped):
                found._refuse("it reads an environment variable")
            elif frame.f_globals is random.__dict__ and _caller_counts(frame, is_skipped):
                found._refuse(f"it draws random numbers (random.{code.co_name})")
        elif event == "c_call" and (not is_skipped(frame) or (_is_library(frame) and _caller_counts(frame, is_skipped))):
            owner, module = getattr(value, "__self__", None), getattr(value, "__module__", None)
            found.asks_layout |= value.__name__ in _LAYOUT
            if ((value in _OUTSIDE or module in _OUTSIDE_MODULES or getattr(owner, "__module__", "") == "datetime")
                    and value is not os.fspath and not _in_import(frame)):
                found._refuse(f"it asks something outside of it ({value.__name__})")
            if isinstance(owner, random.Random) or type(owner).__module__.startswith("numpy.random"):
                found._refuse(f"it draws random numbers ({value.__name__})")
            elif value in _CLOCKS or (getattr(value, "__module__", None) == "time" and value.__name__ != "sleep"):
                found._refuse(f"it reads the clock (time.{value.__name__})")
    before = sys.getprofile()
    sys.setprofile(profile)
    try:
        yield found
    finally:
        sys.setprofile(before)


def _caller_counts(frame, is_skipped) -> bool:
    """Whether a function of Python's library works for the code that is traced, not for torch: by the first frame outside the library."""
    frame = frame.f_back
    while frame is not None and _is_library(frame):
        frame = frame.f_back
    return frame is not None and not is_skipped(frame)


def _is_library(frame) -> bool:
    """Whether it is Python's own, or generated."""
    path = frame.f_code.co_filename
    return path.startswith((_SKIPPED_FOLDERS[1], "<")) and "site-packages" not in path


def _in_import(frame) -> bool:
    """Whether the function runs because something is imported just now."""
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib"):
            return True
        frame = frame.f_back
    return False


def _is_skipped(path: str, module: str) -> bool:
    """Whether it is torch's, Python's or this pack's, whose versions are in the key of the environment, or what they call."""
    if "site-packages" in path:
        return module.partition(".")[0] in ("torch", *_HELPERS)
    return path.startswith(("<", *_SKIPPED_FOLDERS)) or f"{module}.".startswith(f"{PACKAGE}.")


@functools.lru_cache(4096)
def identifiers(code: types.CodeType) -> frozenset[str]:
    """Names of attributes and globals, and texts that may be one (getattr)."""
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, str) and len(constant) < 200:
            names.update(part for part in constant.split(".") if part.isidentifier())
        elif isinstance(constant, types.CodeType):
            names |= identifiers(constant)
        elif isinstance(constant, tuple):
            names.update(item for item in constant if isinstance(item, str) and item.isidentifier())
    return frozenset(names)


@functools.lru_cache(4096)
def _computed_names(code: types.CodeType) -> frozenset[str] | None:
    """Patterns of the names that code puts together to read an attribute; None where nothing is known of one."""
    names = _global_names(code)
    if names.intersection(_ALL_NAMES) or _matches_classes(code):
        return None
    if not names.intersection(_BY_NAME):
        return frozenset()
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(code)))
    except (OSError, TypeError, SyntaxError, ValueError):
        return None
    nodes = list(ast.walk(tree))
    calls = [node for node in nodes if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _BY_NAME]
    called = {id(call.func) for call in calls}
    if any(_name_of(node) in _BY_NAME and id(node) not in called for node in nodes):
        return None  # passed on, or under another name
    patterns = {_pattern(call.args[1]) if len(call.args) > 1 else "*" for call in calls}
    return None if "*" in patterns else frozenset(pattern for pattern in patterns if "*" in pattern)


@functools.lru_cache(4096)
def _matches_classes(code: types.CodeType) -> bool:
    """Whether it has a match statement that names the class of an object, whose attributes it reads by the names that the class gives."""
    return any(instruction.opname == "MATCH_CLASS" for instruction in dis.get_instructions(code)) or any(
        map(_matches_classes, (constant for constant in code.co_consts if isinstance(constant, types.CodeType))))


@functools.lru_cache(4096)
def _attributes(code: types.CodeType) -> frozenset[str]:
    """Names of attributes and globals, and texts by themselves (getattr), not those of keywords."""
    return _global_names(code).union(*(_attributes(c) if isinstance(c, types.CodeType) else [c] for c in code.co_consts
                                       if isinstance(c, (str, types.CodeType))))


def _has_alias(module: str, code: types.CodeType) -> bool:
    """Whether code calls what reads attributes by name under another name that its module gave it."""
    space = getattr(sys.modules.get(module), "__dict__", {})
    return any(any(space.get(name) is reader for reader in _READERS) for name in _global_names(code).difference(_BY_NAME))


def _name_of(node: ast.AST) -> str:
    return node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else (
        node.name if isinstance(node, ast.alias) else "")


def _pattern(name: ast.expr) -> str:
    """What is known of a text: its constant parts, and * for the others."""
    if isinstance(name, ast.Constant):
        return str(name.value)
    if isinstance(name, ast.JoinedStr):
        return re.sub(r"\*+", "*", "".join(map(_pattern, name.values)))
    if isinstance(name, ast.BinOp) and isinstance(name.op, ast.Add):
        return re.sub(r"\*+", "*", _pattern(name.left) + _pattern(name.right))
    return "*"


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
        for name in sorted(_global_names(code)):
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
        if space == "aten" or named:
            found.append(key)
    return sorted(found)


def _written_globals(code: types.CodeType) -> str:
    """The first global that code assigns to, empty for none."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            return instruction.argval
    return next((found for c in code.co_consts if isinstance(c, types.CodeType) and (found := _written_globals(c))), "")


def sources_of(recorded: Recording, names: Names, lenient: bool = False,
               closures: Iterable[tuple[str, str, str]] = ()) -> list[list[str]]:
    """[[module, qualified name, fingerprint]] of the functions, and [[module, "", digest of its file]] of all that they are from. A
    function that has no place of its own (a closure) is known by its file. Modules of this pack are named from its root.

    lenient: of code that this process itself has traced, whose files and odd values dynamo looks after. closures: (module, qualified name,
    digest of the code) of functions that the trace was given: what their global names stand for counts too, see Sources. Raises
    Unsupported without lenient."""
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


class Sources:
    """The functions that an artefact was made from, as they are in this process. names: see Recording.names."""

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
    used = _global_names(function.__code__)
    used = sorted(identifiers(function.__code__) if used.intersection(_BY_TEXT) else used)
    spaces: list[tuple[dict, str]] = [(function.__globals__, _package_folder(function.__module__ or ""))]
    # What is imported inside the function is a local name there.
    spaces += [(vars(module), _package_folder(name)) for name in used if name not in function.__globals__
               and isinstance(module := sys.modules.get(name), types.ModuleType)]
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


@functools.lru_cache(1024)
def _package_folder(module: str) -> str:
    """Of an installed library, which is known by its version or its files; empty for the modules of ComfyUI, wherever it is, and of packs,
    whose values are described."""
    package = module.partition(".")[0]
    path = getattr(sys.modules.get(package), "__file__", None)
    if is_pristine_package(module):
        return str(Path(path).parent) if path and package == "torch" else _SKIPPED_FOLDERS[1]
    return str(Path(path).parent) if path and "site-packages" in path and package not in COMFYUI else ""


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


@functools.lru_cache(4096)
def _global_names(code: types.CodeType) -> frozenset[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return frozenset(names)


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
