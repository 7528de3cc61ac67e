"""Which functions a trace calls, and the names of what their code can read."""
from __future__ import annotations

import abc
import ast
import builtins
import copy
import dataclasses
import dis
import enum
import functools
import gc
import inspect
import numbers
import operator
import os
import random
import re
import sys
import textwrap
import threading
import time
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ...pack import PACKAGE
from .describe import Names
from .origins import _SKIPPED_FOLDERS, COMFYUI, _package_folder, is_comfyuis
from .values import Unsupported

# What torch calls while it traces.
_HELPERS = ("sympy", "mpmath", "numpy", "networkx", "triton", "typing_extensions", "filelock")
# Builtins whose answer differs from call to call.
_CLOCKS = {getattr(time, name) for name in ("time", "time_ns", "monotonic", "perf_counter", "perf_counter_ns", "monotonic_ns")}
# Builtins that answer from outside the process or its values.
_OUTSIDE = {open, id, input}
_OUTSIDE_MODULES = ("posix", "nt", "_io", "_thread", "_socket", "select")
# What reads attributes by names that the code does not contain.
_BY_NAME = ("getattr", "hasattr", "setattr", "delattr")
_READERS = (*(getattr(builtins, name) for name in _BY_NAME), operator.attrgetter, operator.methodcaller, vars)
# Files of Python's library that read all attributes of what they get (dataclasses.replace).
_BY_FIELD = frozenset({dataclasses.__file__, copy.__file__})
# What tells how a tensor lies in memory, and whether it needs a gradient.
_LAYOUT = frozenset({"is_contiguous", "stride", "as_strided", "as_strided_", "data_ptr", "storage_offset", "untyped_storage", "storage",
                     "is_non_overlapping_and_dense", "dim_order", "_is_view", "_base"})
_GRADIENT = frozenset({"requires_grad", "is_leaf", "grad_fn", "retains_grad"})
# What asks for a class, and what makes a text of a number.
_TYPES = frozenset({"isinstance", "type", "issubclass", "__class__"})
_TEXTS = frozenset({"str", "repr", "format", "ascii", "dumps"})
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

    def asks_of_integers(self) -> bool:
        """Whether code may do with an integer what is not so with a size that is traced: ask for its type, make a text of it, look it up.
        Any code but ComfyUI's may."""
        return not self.is_comfyuis() or any(_asks_of_integers(module, code) for (module, _), code in self.functions.items())

    def is_comfyuis(self) -> bool:
        """ComfyUI's own code, and installed libraries that it calls."""
        return all(is_comfyuis(module) or _package_folder(module) for module, _ in self.functions)

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
    # A copy is made in one go. list(items()) is not: a collection in its midst runs finalizers, and then another thread may import.
    return {file: name for name, module in sys.modules.copy().items() if (file := getattr(module, "__file__", None))}


@contextmanager
def recording() -> Iterator[Recording]:
    """Gives a Recording that fills with the functions called in this thread, outside torch, Python and this pack."""
    found = Recording()
    origins: dict[str, _Origin] = {}  # of files

    def origin_of(frame) -> _Origin:
        path = frame.f_code.co_filename
        if (origin := origins.get(path)) is None:
            origin = origins[path] = _origin(path, frame.f_globals.get("__name__", ""))
        return origin

    def caller_counts(frame) -> bool:
        """Whether a function of Python's library works for the code that is traced: by the first frame outside the library."""
        frame = frame.f_back
        while frame is not None and (origin := origin_of(frame)) is _Origin.LIBRARY:
            frame = frame.f_back
        return frame is not None and origin is _Origin.TRACED

    thread, collecting, skipped = threading.get_ident(), False, _Origin.SKIPPED

    # Callbacks and finalizers of the garbage collector are other packs', and run wherever it does.
    def collection_begins(phase, info):
        nonlocal collecting
        if phase == "start" and threading.get_ident() == thread:
            collecting = True

    def collection_ends(phase, info):
        nonlocal collecting
        if phase == "stop" and threading.get_ident() == thread:
            collecting = False

    def profile(frame, event, value):  # hundreds of thousands of times in a trace: torch's own first
        if collecting or (event != "call" and event != "c_call"):
            return
        origin = origins.get(frame.f_code.co_filename) or origin_of(frame)
        if origin is skipped:
            return
        if event == "call":
            code = frame.f_code
            if origin is _Origin.TRACED:
                # Python 3.10 has no qualified names in code: its functions are known by their file alone.
                name = frame.f_globals.get("__name__", ""), getattr(code, "co_qualname", f"<locals>.{code.co_name}")
                if name not in found.functions and not _in_import(frame):
                    found.functions[name] = code
            elif caller_counts(frame):
                found.library.add(code)
                if frame.f_globals is os.__dict__ and code.co_name in ("__getitem__", "getenv"):
                    found._refuse("it reads an environment variable")
                elif frame.f_globals is random.__dict__:
                    found._refuse(f"it draws random numbers (random.{code.co_name})")
        elif origin is _Origin.TRACED or caller_counts(frame):
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
    gc.callbacks.insert(0, collection_begins)
    gc.callbacks.append(collection_ends)
    sys.setprofile(profile)
    try:
        yield found
    finally:
        sys.setprofile(before)
        gc.callbacks.remove(collection_begins)
        gc.callbacks.remove(collection_ends)


class _Origin(enum.Enum):
    """Whose a file is: of the code that is traced, Python's own (or generated), or what is left out of a recording."""

    TRACED = enum.auto()
    LIBRARY = enum.auto()
    SKIPPED = enum.auto()


def _origin(path: str, module: str) -> _Origin:
    if not _is_skipped(path, module):
        return _Origin.TRACED
    return _Origin.LIBRARY if path.startswith((_SKIPPED_FOLDERS[1], "<")) and "site-packages" not in path else _Origin.SKIPPED


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


def _written_globals(code: types.CodeType) -> str:
    """The first global that code assigns to, empty for none."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            return instruction.argval
    return next((found for c in code.co_consts if isinstance(c, types.CodeType) and (found := _written_globals(c))), "")


def _asks_of_integers(module: str, code: types.CodeType) -> bool:
    names = _global_names(code)
    if not names.isdisjoint(_TEXTS) or _makes_texts(code) or _matches_classes(code):
        return True
    space = getattr(sys.modules.get(module), "__dict__", {})
    return not names.isdisjoint(_TYPES) and any(_means_integer(name, space.get(name)) for name in names)


def _means_integer(name: str, value) -> bool:
    """Whether a global is int, what int derives from, or a tuple of such."""
    if isinstance(value, tuple):
        return any(_means_integer("", item) for item in value)
    return name == "int" or value is int or value is numbers or (isinstance(value, abc.ABCMeta) and issubclass(int, value))


@functools.lru_cache(4096)
def _makes_texts(code: types.CodeType) -> bool:
    """Whether it has an f-string with something in it."""
    return any(instruction.opname.startswith(("FORMAT_", "CONVERT_VALUE")) for instruction in dis.get_instructions(code)) or any(
        map(_makes_texts, (constant for constant in code.co_consts if isinstance(constant, types.CodeType))))


@functools.lru_cache(4096)
def _global_names(code: types.CodeType) -> frozenset[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= _global_names(constant)
    return frozenset(names)
