"""What compiled code took for a constant and dynamo's guards do not tell from another: the signs of zeros, the order of an OrderedDict, the
defaults of a function, a class that it was made with."""
from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import itertools
import math
import re
import types
from collections import OrderedDict
from collections.abc import Iterator

import torch

MAX_DEPTH, MOST_NESTED, MOST_ITEMS = 3, 2, 16  # it is asked at every call
# Modules whose classes are what they are.
OTHERS = ("builtins", "torch", "abc", "enum", "typing", "collections", "types")
FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
Place = tuple  # of text, and the code of functions on the way
CONSTANTS: tuple = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
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


def _cells(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    """What its closure holds by now, by name."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        with contextlib.suppress(ValueError):  # it is empty yet
            yield name, cell.cell_contents


def _parts(value) -> dict:
    """The items of a dict, the attributes of an object; without torch's slots of a module."""
    parts = value if isinstance(value, dict) else getattr(value, "__dict__", {})
    return {key: item for key, item in parts.items() if not key.startswith("_")} if isinstance(value, torch.nn.Module) else parts


def _class(kind: type, depth: int = 0) -> list:
    """Equal for one that computes the same: a function that is made anew for each prompt may make its classes anew, too."""
    found: list = []
    for base in (*inspect.getmro(kind), *inspect.getmro(type(kind))):
        if str(base.__module__).partition(".")[0] in OTHERS:
            found.append((base.__module__, base.__qualname__))
        else:
            found += [(name, _described(value, depth)) for name, value in vars(base).items() if name not in ("__dict__", "__weakref__")]
    return found


def _classes(value, path: Place, depth: int = 0) -> Iterator[tuple[Place, object]]:
    """Of what a closure holds."""
    if isinstance(value, type):
        yield path, _class(value)
    elif depth > MOST_NESTED or isinstance(value, (*CONSTANTS, torch.Tensor, types.ModuleType)):
        return
    elif isinstance(value, FUNCTIONS):
        yield from _facts(value, path, depth)
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value[:MOST_ITEMS]):
            yield from _classes(item, (*path, f"[{index}]"), depth + 1)
    else:
        yield path, type(value).__qualname__  # no class
        for key, item in itertools.islice(_parts(value).items(), MOST_ITEMS):
            yield from _classes(item, (*path, f"[{key!r}]"), depth + 1)


def _described(value, depth: int = 0) -> tuple:
    """Equal for what code that was traced takes for the same."""
    function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    if depth > MAX_DEPTH:
        pass
    elif isinstance(value, type) and depth < MOST_NESTED:
        return type(value), _class(value, depth + 1)
    elif isinstance(value, property):
        return type(value), _described(value.fget, depth + 1)
    elif isinstance(function, types.FunctionType):
        return (type(value), function.__code__, _described(function.__defaults__), _described(function.__kwdefaults__),
                [_described(item, depth + 1) for name, item in _cells(function) if name != "__class__"])
    elif isinstance(value, (tuple, list)):
        return type(value), [_described(item, depth + 1) for item in value]
    elif isinstance(value, dict):
        return type(value), [(_described(key, depth + 1), _described(item, depth + 1)) for key, item in value.items()]
    elif type(value) in CONSTANTS:
        return type(value), repr(value)
    return type(value), id(value), [value]  # which is held, so that no other gets its id


def _facts(value, path: Place = (), depth: int = 0) -> Iterator[tuple[Place, object]]:
    """(where in value, what guards do not tell). depth: of functions in functions."""
    kind = type(value)
    if kind is float and value == 0.0:
        yield path, math.copysign(1.0, value)
    elif kind is complex:
        yield from _facts(value.real, (*path, ".real"))
        yield from _facts(value.imag, (*path, ".imag"))
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _facts(item, (*path, f"[{index}]"))
    elif kind is OrderedDict and len(value) > 1:
        yield (*path, " order"), [repr(key) for key in value]
    elif kind is dict or isinstance(value, torch.nn.Module):
        for key, item in _parts(value).items():
            if isinstance(item, FUNCTIONS):
                yield from _facts(item, (*path, f"[{key!r}]"), depth)
    elif kind is types.MethodType:
        yield from _facts(value.__func__, path, depth)
        yield from _classes(value.__self__, (*path, " self"), depth + 1)
    elif kind is functools.partial:
        yield from _classes([value.func, value.args, value.keywords], path, depth)
    elif kind is types.FunctionType and depth < MAX_DEPTH and value.__code__ not in path:
        path = *path, value.__code__  # of two functions dynamo tells the code
        yield (*path, " defaults"), _described(value.__defaults__)
        yield from _classes(vars(value), path, depth + 1)
        for name, item in _cells(value):
            yield from _classes(item, (*path, f" {name}"), depth + 1)


class Unguarded:
    """Of the values that a block was compiled with."""

    def __init__(self):
        self._known: dict[str, tuple[ast.expr, dict[Place, object]]] = {}  # by how dynamo gets a value from the block's call

    def add(self, source: str, value) -> None:
        if not _OF_THE_CALL.search(source):
            return
        facts = dict(_facts(value))
        # A number that comes with a call may be a zero another time, in the same graph: that takes it for 0.0.
        if source in self._known or facts or (type(value) is float and _OF_THE_ARGUMENTS.search(source)):
            if source not in self._known:
                self._known[source] = ast.parse(source, mode="eval").body, {}
            for path, fact in facts.items():
                self._known[source][1].setdefault(path, fact)

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
                    return ast.unparse(source) + "".join(part for part in path if isinstance(part, str))
        return ""

    def __bool__(self):
        return bool(self._known)
