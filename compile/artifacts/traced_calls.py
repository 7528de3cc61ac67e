"""Which functions a trace calls, and what it does that cannot be kept."""
from __future__ import annotations

import copy
import dataclasses
import enum
import gc
import os
import random
import sys
import threading
import time
import types
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from ...pack import PACKAGE
from .code_names import attribute_names, code_asks_of_integers, computed_names, has_alias, identifiers, written_globals
from .describe import Names
from .origins import _SKIPPED_FOLDERS, COMFYUI, _package_folder, are_comfyuis
from .values import Unsupported

# What torch calls while it traces.
_HELPERS = ("sympy", "mpmath", "numpy", "networkx", "triton", "typing_extensions", "filelock")
# Builtins whose answer differs from call to call.
_CLOCKS = {getattr(time, name) for name in ("time", "time_ns", "monotonic", "perf_counter", "perf_counter_ns", "monotonic_ns")}
# Builtins that answer from outside the process or its values.
_OUTSIDE = {open, id, input}
_OUTSIDE_MODULES = ("posix", "nt", "_io", "_thread", "_socket", "select")
# Files of Python's library that read all attributes of what they get (dataclasses.replace).
_BY_FIELD = frozenset({dataclasses.__file__, copy.__file__})
# What tells how a tensor lies in memory, and whether it needs a gradient.
_LAYOUT = frozenset({"is_contiguous", "stride", "as_strided", "as_strided_", "data_ptr", "storage_offset", "untyped_storage", "storage",
                     "is_non_overlapping_and_dense", "dim_order", "_is_view", "_base"})
_GRADIENT = frozenset({"requires_grad", "is_leaf", "grad_fn", "retains_grad"})


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
        computed = {code: computed_names(code) for code in self.functions.values()}
        if (None in computed.values() or any(code.co_filename in _BY_FIELD for code in self.library)
                or any(has_alias(module, code) for (module, _), code in self.functions.items())):
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
        return next((f"{module}.{code.co_name}" for (module, _), code in self.functions.items() if attribute_names(code) & _GRADIENT
                     and module.partition(".")[0] not in COMFYUI and not _package_folder(module)), "")

    def asks_of_integers(self) -> bool:
        """Whether code may do with an integer what is not so with a size that is traced: ask for its type, make a text of it, look it up.
        Any code but ComfyUI's may."""
        return not self.is_comfyuis() or any(code_asks_of_integers(module, code) for (module, _), code in self.functions.items())

    def is_comfyuis(self) -> bool:
        """ComfyUI's own code, and installed libraries that it calls."""
        return are_comfyuis(module for module, _ in self.functions)

    def require_pure(self) -> None:
        """Raises Unsupported where what the trace did would not be done again."""
        for code in self.functions.values():
            if written := written_globals(code):
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


@contextmanager
def not_recorded() -> Iterator[None]:
    """In the midst of a recording."""
    profile = sys.getprofile()
    sys.setprofile(None)
    try:
        yield
    finally:
        sys.setprofile(profile)


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
