"""What compiled code took for a constant and dynamo's guards do not tell from another: the signs of zeros, the order of an OrderedDict, the
defaults of a function, a class that it was made with."""
from __future__ import annotations

import ast
import contextlib
import functools
import math
import re
import types
import weakref
from collections import OrderedDict
from collections.abc import Iterator

import torch

MAX_DEPTH = 4
_BUILTINS = {"type": type, "dict": dict}
# Locals of the function that is compiled (torch_compiler), not of one that goes on below a graph break.
_OF_THE_CALL = re.compile(r"\bL\['(module|args|kwargs)'\]")
_OF_THE_ARGUMENTS = re.compile(r"\bL\['(args|kwargs)'\]")


def _get(node: ast.expr, scope: dict):
    """What a source of dynamo's stands for: names, attributes, items and calls of _BUILTINS. Raises TypeError for any other."""
    if isinstance(node, ast.Constant):
        return node.value
    if isinstance(node, ast.Name):
        return scope[node.id]
    if isinstance(node, ast.Attribute):
        return getattr(_get(node.value, scope), node.attr)
    if isinstance(node, ast.Subscript):
        return _get(node.value, scope)[_get(node.slice, scope)]
    if isinstance(node, ast.UnaryOp) and isinstance(node.op, ast.USub):
        return -_get(node.operand, scope)
    if isinstance(node, ast.Call) and not node.keywords:
        owner = node.func.value if isinstance(node.func, ast.Attribute) else node.func
        if isinstance(owner, ast.Name) and owner.id in _BUILTINS:
            return _get(node.func, scope)(*(_get(argument, scope) for argument in node.args))
    raise TypeError


class _Class:
    """Equal for one that would compute the same."""

    def __init__(self, kind: type):
        self._kind = weakref.ref(kind)

    @functools.cached_property
    def description(self) -> list:
        kind = self._kind()
        return [] if kind is None else [(name, _described(value)) for base in kind.__mro__ for name, value in vars(base).items()
                                        if name not in ("__dict__", "__weakref__")]

    def __eq__(self, other):
        return isinstance(other, _Class) and (self._kind() is other._kind() is not None or self.description == other.description)

    __hash__ = None  # type: ignore[assignment]


def _described(value):
    function = getattr(value, "__func__", value)
    if isinstance(function, types.FunctionType):
        return function.__code__, repr(function.__defaults__), repr(function.__kwdefaults__), function.__closure__
    return type(value), repr(value)


def _facts(value, path: str = "", depth: int = 0) -> Iterator[tuple[str, object]]:
    """(where in value, what guards do not tell). depth: of functions in functions."""
    kind = type(value)
    if kind is float and value == 0.0:
        yield path, math.copysign(1.0, value)
    elif kind is complex:
        yield from _facts(value.real, f"{path}.real")
        yield from _facts(value.imag, f"{path}.imag")
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _facts(item, f"{path}[{index}]")
    elif kind is OrderedDict and len(value) > 1:
        yield f"{path} order", [repr(key) for key in value]
    elif kind is types.MethodType:
        yield from _facts(value.__func__, path, depth)
    elif kind is types.FunctionType and depth < MAX_DEPTH:
        yield f"{path} defaults", [(type(item), repr(item)) for item in value.__defaults__ or ()]
        for name, cell in zip(value.__code__.co_freevars, value.__closure__ or ()):
            with contextlib.suppress(ValueError):  # it is empty yet
                if isinstance(cell.cell_contents, (types.FunctionType, types.MethodType)):
                    yield from _facts(cell.cell_contents, f"{path} {name}", depth + 1)
                elif isinstance(cell.cell_contents, type):
                    yield f"{path} {name}", _Class(cell.cell_contents)


class Unguarded:
    """Of the values that a block was compiled with."""

    def __init__(self):
        self._known: dict[str, tuple[ast.expr, dict[str, object]]] = {}  # by how dynamo gets a value from the block's call

    def add(self, source: str, value) -> None:
        if not _OF_THE_CALL.search(source):
            return
        facts = dict(_facts(value))
        # A number that comes with a call may be a zero another time, in the same graph: that takes it for 0.0.
        if source in self._known or facts or (type(value) is float and _OF_THE_ARGUMENTS.search(source)):
            if source not in self._known:
                self._known[source] = ast.parse(source, mode="eval").body, {}
            for path, fact in facts.items():
                known = self._known[source][1].setdefault(path, fact)
                if isinstance(known, _Class):
                    known.description  # noqa: B018 - while it lives

    def disagreement(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> str:
        """What is another one than when the block was compiled, empty for nothing. Asked at every call."""
        scope = {"L": {"module": module, "args": args, "kwargs": kwargs}, **_BUILTINS}
        for source, facts in self._known.values():
            try:
                value = _get(source, scope)
            except (AttributeError, LookupError, TypeError):
                continue  # dynamo's guards see that
            for path, fact in _facts(value):
                # What was not there then is seen by dynamo's guards, but for the sign of a zero.
                if fact != facts.get(path, 1.0 if isinstance(fact, float) else fact):
                    return f"{ast.unparse(source)}{path}"
        return ""

    def __bool__(self):
        return bool(self._known)
