"""Functions that a block is called with and that are made anew in each call of the model (Qwen-Image 2.1's attention): known by the code
that they share, by their defaults and by what they close over."""
from __future__ import annotations

import contextlib
import dis
import functools
import hashlib
import inspect
import sys
import types
from collections.abc import Iterable, Iterator

import torch

from ..torch_internals.guard_filter import BOOKKEEPING

_PLAIN = (torch.Tensor, torch.nn.Module, type, types.ModuleType)


@functools.lru_cache(8192)
def code_digest(code: types.CodeType) -> str:
    constants = [code_digest(c) if isinstance(c, types.CodeType) else repr(sorted(map(repr, c))) if isinstance(c, frozenset) else repr(c)
                 for c in code.co_consts]
    whole = repr((code.co_code, constants, code.co_names, code.co_varnames, code.co_freevars, code.co_flags))
    return hashlib.sha256(whole.encode()).hexdigest()[:24]


def function_at(module: str, name: str):
    """What a module has by that dotted name, None where it has nothing."""
    value = sys.modules.get(module)
    for part in name.split("."):
        value = getattr(value, part, None)
    return value


def code_at(module: str, name: str, digest: str) -> types.CodeType | None:
    """The code of a function that another function makes, by its qualified name (with <locals>). None where it is not there."""
    outer = function_at(module, name.partition(".<locals>.")[0])
    outer = outer.fget if isinstance(outer, property) else inspect.unwrap(getattr(outer, "__func__", outer))
    code = getattr(outer, "__code__", None)
    return None if code is None else next((inner for inner in _nested(code) if code_digest(inner) == digest), None)


def _nested(code: types.CodeType) -> Iterator[types.CodeType]:
    """code and the code of the functions that it makes."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _nested(constant)


@functools.lru_cache(1024)
def is_at_its_place(module: str, name: str, code: types.CodeType) -> bool:
    """Whether another process, which imports the module, finds the code of this function, which another one has made."""
    return ".<locals>." in name and code_at(module, name, code_digest(code)) is not None


EMPTY = object()


def content_of(cell: types.CellType):
    """EMPTY for none."""
    try:
        return cell.cell_contents
    except ValueError:
        return EMPTY


def contents_of(function: types.FunctionType) -> list:
    """What it was made with: its defaults, and what it closes over."""
    found = [*(function.__defaults__ or ()), *(function.__kwdefaults__ or {}).values()]
    return found + [content for cell in function.__closure__ or () if (content := content_of(cell)) is not EMPTY]


def closed_over(values: Iterable) -> list:
    """What the functions among values, the arguments of a call, were made with: to the end of their containers and of the functions among
    that; transformer_options aside. Almost always empty."""
    functions = [value for value in values if type(value) is types.FunctionType and (value.__closure__ or value.__defaults__)]
    found, seen = [], set()
    waiting = [item for function in functions for item in contents_of(function)]
    while waiting:
        value = waiting.pop()
        if id(value) in seen:
            continue
        seen.add(id(value))
        if type(value) is types.FunctionType:
            waiting += contents_of(value)
        elif type(value) in (list, tuple):
            waiting += value
        elif type(value) is dict:
            # Transformer_options hold what is not the block's: wrappers and callbacks, this pack's among them.
            waiting += value.values() if BOOKKEEPING.isdisjoint(value) else ()
        else:
            found.append(value)
    return found


def kept_object(values: Iterable) -> str:
    """The class of an object among what was closed over that is no part of a model, and may be written to: a cache. Empty for none."""
    return next((type(value).__name__ for value in values if isinstance(getattr(value, "__dict__", None), dict)
                 and not isinstance(value, _PLAIN)), "")


class CellReads:
    """While it is entered, in this thread: which names functions of these codes read of what they close over."""

    def __init__(self, codes: Iterable[types.CodeType]):
        codes = dict.fromkeys(inner for code in codes for inner in _nested(code))
        self._reads = {code: {instruction.offset: instruction.argval for instruction in dis.get_instructions(code)
                              if "DEREF" in instruction.opname} for code in codes}
        self.names: set[str] = set()
        self._stack = contextlib.ExitStack()

    def __enter__(self):
        if not self._reads:
            return self
        if hasattr(sys, "monitoring"):
            self._monitor(sys.monitoring)
        else:
            self._stack.callback(sys.settrace, sys.gettrace())
            sys.settrace(self._call)
        return self

    def __exit__(self, *_):
        self._stack.close()

    def _monitor(self, monitoring):  # Python 3.12: what traces calls can no longer ask for instructions
        tool = next(number for number in reversed(range(6)) if monitoring.get_tool(number) is None)
        monitoring.use_tool_id(tool, __name__)
        self._stack.callback(monitoring.free_tool_id, tool)
        monitoring.register_callback(tool, monitoring.events.INSTRUCTION, self._note)
        self._stack.callback(monitoring.register_callback, tool, monitoring.events.INSTRUCTION, None)
        for code in self._reads:
            monitoring.set_local_events(tool, code, monitoring.events.INSTRUCTION)
            self._stack.callback(monitoring.set_local_events, tool, code, 0)

    def _call(self, frame, event, argument):
        if frame.f_code not in self._reads:
            return None
        frame.f_trace_opcodes = True
        return self._instruction

    def _instruction(self, frame, event, argument):
        if event == "opcode":
            self._note(frame.f_code, frame.f_lasti)
        return self._instruction

    def _note(self, code: types.CodeType, offset: int):
        if name := self._reads[code].get(offset):
            self.names.add(name)
