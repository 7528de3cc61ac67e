"""What compiled code took for a constant and dynamo's guards do not tell from another: the signs of zeros, the order of an OrderedDict, the
defaults of a function, a class that it was made with."""
from __future__ import annotations

import ast
import functools
import itertools
import math
import re
import types
from collections import OrderedDict
from collections.abc import Iterator, Mapping

import torch

from .described import (
    CONSTANTS,
    CONTAINERS,
    MAX_DEPTH,
    MOST_CONSTANTS,
    MOST_THINGS,
    PLAIN,
    Seen,
    attributes_of,
    cells,
    described,
    items_of,
    itself,
    own_globals,
)

# It is asked at every call: how many of a container, of the layers of a module, of what a block may call, of numbers are looked at.
MOST_ITEMS, MOST_OF_MODULES, MOST_CALLED, MOST_NUMBERS = 64, 30, 200, 10_000
FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
MADE = (type, *FUNCTIONS)
Place = tuple  # of text, and the code of functions on the way
Walked = dict[object, list[tuple[Place, object]]]  # by id of what a block may call: its facts
_BUILTINS = {"type": type, "dict": dict, "list": list}
# Dynamo tells defaults itself.
_TELLS_DEFAULTS = tuple(map(int, re.findall("[0-9]+", torch.__version__)[:2])) >= (2, 14)
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


def _at(key) -> str:
    return f"[{key!r}]" if type(key) in CONSTANTS else f"[a {type(key).__name__}]"


def _classes(value, path: Place, seen: Seen, depth: int) -> Iterator[tuple[Place, object]]:
    """Of what a closure holds: (where, what guards do not tell). Far away, and after many things, only of classes and functions."""
    if type(value) in PLAIN:
        return
    found: list[tuple[Place, object]]
    try:
        if depth <= MAX_DEPTH and len(seen) < MOST_THINGS:
            found = list(_classes_in(value, path, seen, depth))
        else:
            found = [(path, described(value, {}))] if isinstance(value, MADE) else []
    except Exception:  # its own code raises
        found = [(path, itself(value))]
    yield from found


def _classes_in(value, path: Place, seen: Seen, depth: int) -> Iterator[tuple[Place, object]]:
    if isinstance(value, type):
        yield path, described(value, seen)
    elif isinstance(value, FUNCTIONS):
        yield from _of_function(value, path, seen, depth)
    elif not isinstance(value, (torch.Tensor, types.ModuleType)) and id(value) not in seen:
        seen[id(value)] = len(seen), value
        items, attributes, is_module = items_of(value), attributes_of(value), isinstance(value, torch.nn.Module)
        if type(value) not in CONTAINERS:
            yield path, type(value).__qualname__  # no class
        if attributes and isinstance(value, (*CONTAINERS, Mapping)):  # dynamo knows the items alone
            yield (*path, " attributes"), [described(item, seen) for item in (*attributes, *attributes.values())]
        parts = itertools.chain(items, attributes.items())
        for key, item in itertools.islice(parts, MOST_ITEMS):
            if is_module and len(seen) >= MOST_OF_MODULES:
                return
            yield from _classes(item, (*path, _at(key)), seen, depth + 1)
        if rest := [item for _, item in itertools.islice(parts, MOST_CONSTANTS) if isinstance(item, MADE)]:
            yield (*path, " and more"), [described(item, seen) for item in rest]


def _of_function(value, path: Place, seen: Seen, depth: int = 0) -> Iterator[tuple[Place, object]]:
    """The same of one of FUNCTIONS. depth: of functions in functions."""
    if isinstance(value, types.MethodType):
        path = *path, getattr(value.__func__, "__code__", " method")
        yield path, ""
        yield from _of_function(value.__func__, path, seen, depth)
        if not isinstance(value.__self__, torch.nn.Module):  # of a block the engine and dynamo look at
            yield from _classes(value.__self__, (*path, " self"), seen, depth + 1)
    elif isinstance(value, functools.partial):
        path = *path, getattr(value.func, "__code__", " partial")
        yield path, ""
        yield from _classes([value.func, value.args, value.keywords], path, seen, depth)
    elif id(value) not in seen:
        seen[id(value)] = len(seen), value
        path = *path, value.__code__  # of two functions dynamo tells the code
        made_with = [] if _TELLS_DEFAULTS else [value.__name__, value.__qualname__, value.__defaults__, value.__kwdefaults__]
        yield path, [described(item, seen) for item in (*made_with, *itertools.chain(*own_globals(value)))]
        for name, item in (*vars(value).items(), *cells(value)):
            yield from _classes(item, (*path, f" {name}"), seen, depth + 1)


def _facts(value, walked: Walked) -> dict[Place, object]:
    """{where in value: what guards do not tell}. walked: of values that live meanwhile."""
    try:
        return dict(_facts_in(value, (), walked, set()))
    except Exception:  # it holds itself, or its own code raises
        return {(): itself(value)}


def _facts_in(value, path: Place, walked: Walked, lists: set[int]) -> Iterator[tuple[Place, object]]:
    kind = type(value)
    if kind is float and value == 0.0:
        yield path, math.copysign(1.0, value)
    elif kind is complex:
        yield from _facts_in(value.real, (*path, ".real"), walked, lists)
        yield from _facts_in(value.imag, (*path, ".imag"), walked, lists)
    elif isinstance(value, (tuple, list)):
        if id(value) not in lists and len(value) <= MOST_NUMBERS:
            lists.add(id(value))
            for index, item in enumerate(value):
                yield from _facts_in(item, (*path, f"[{index}]"), walked, lists)
    elif kind is OrderedDict and len(value) > 1:
        yield (*path, " order"), [repr(key) for key in value]
    elif kind is dict:
        for key, item in value.items():
            yield from _of_call(item, (*path, _at(key)), walked)
    elif isinstance(value, torch.nn.Module):
        for key, item in vars(value).items():
            if isinstance(item, FUNCTIONS):
                yield from _of_call(item, (*path, _at(key)), walked)
    else:
        yield from _of_call(value, path, walked)


def _of_call(value, path: Place, walked: Walked) -> Iterator[tuple[Place, object]]:
    """Of what a block may call."""
    if not isinstance(value, FUNCTIONS):
        if not callable(value) or isinstance(value, torch.nn.Module) or not isinstance(type(value).__call__, types.FunctionType):
            return
        value = value.__call__
    # A bound method is made anew by each look.
    of = (id(value.__func__), id(value.__self__)) if isinstance(value, types.MethodType) else id(value)
    if of not in walked:
        if len(walked) >= MOST_CALLED:
            return
        walked[of] = list(_of_function(value, (), {}))
    for place, fact in walked[of]:
        yield (*path, *place), fact


def _is_gone(path: Place, fact, facts: dict[Place, object]) -> bool:
    """Whether what was at path in a function is not there though the function is. Objects of another class dynamo tells."""
    codes = [index for index, part in enumerate(path) if isinstance(part, types.CodeType)]
    return path not in facts and not isinstance(fact, str) and bool(codes) and path[:codes[-1] + 1] in facts


class Unguarded:
    """Of the values that a block was compiled with."""

    def __init__(self):
        self._known: dict[str, tuple[ast.expr, dict[Place, object]]] = {}  # by how dynamo gets a value from the block's call

    def add(self, source: str, value) -> None:
        if not _OF_THE_CALL.search(source):
            return
        facts = _facts(value, {})
        # A number that comes with a call may be a zero another time, in the same graph: that takes it for 0.0.
        if source in self._known or facts or (type(value) is float and _OF_THE_ARGUMENTS.search(source)):
            if source not in self._known:
                try:
                    self._known[source] = ast.parse(source, mode="eval").body, {}
                except (SyntaxError, RecursionError, MemoryError):
                    return  # too deep, an attribute that is called like a word of Python
            for path, fact in facts.items():
                self._known[source][1].setdefault(path, fact)

    def disagreement(self, module: torch.nn.Module, args: tuple, kwargs: dict) -> str:
        """What is another one than when the block was compiled, empty for nothing. Asked at every call."""
        scope, walked = {"L": {"module": module, "args": args, "kwargs": kwargs}, **_BUILTINS}, Walked()
        for source, facts in self._known.values():
            try:
                value = _get(source, scope)
            except Exception:  # an object's own code may raise anything
                continue  # dynamo's guards see that
            found = _facts(value, walked)
            # What was not there then is seen by dynamo's guards, but for the sign of a zero.
            others = (path for path, fact in found.items() if fact != facts.get(path, 1.0 if isinstance(fact, float) else fact))
            gone = (path for path, fact in facts.items() if _is_gone(path, fact, found))
            for path in itertools.chain(others, gone):
                return ast.unparse(source) + "".join(part for part in path if isinstance(part, str))
        return ""

    def __bool__(self):
        return bool(self._known)
