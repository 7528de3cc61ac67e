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
import sys
import types
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping

import torch

# It is asked at every call: how deep, how many of a container, and how many things are looked at for one function.
MAX_DEPTH, MOST_NESTED, MOST_ITEMS, MOST_THINGS = 4, 2, 64, 100
# Modules whose own classes are what they are.
OTHERS = ("builtins", "torch", "abc", "enum", "typing", "collections", "types")
FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
CONSTANTS = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device)
Place = tuple  # of text, and the code of functions on the way
Seen = dict[int, int]  # id of what was looked at -> the how manyth
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


@functools.cache
def _slots() -> frozenset[str]:
    return frozenset(vars(torch.nn.Module())) | {"_compiled_call_impl"}


def _parts(value) -> Mapping:
    """The items of a dict, the attributes of an object; of a module its layers, too, and none of torch's slots."""
    if isinstance(value, Mapping):
        return value
    if not isinstance(value, torch.nn.Module):
        return getattr(value, "__dict__", {})
    return {**{key: item for key, item in vars(value).items() if key not in _slots()}, **value._modules}


def _at(key) -> str:
    return f"[{key!r}]" if type(key) in CONSTANTS else f"[a {type(key).__name__}]"


def _itself(value) -> tuple:
    return type(value), id(value), [value]  # which is held, so that no other gets its id


def _described(value, seen: Seen, depth: int = 0) -> tuple:
    """Equal for what code that was traced takes for the same. What cannot be described, or takes too long, is the same only as itself."""
    if type(value) in CONSTANTS:
        return type(value), repr(value)
    if id(value) in seen:
        return "again", seen[id(value)]
    if depth > MAX_DEPTH or len(seen) >= MOST_THINGS:
        return _itself(value)
    seen[id(value)] = len(seen)
    try:
        return _description(value, seen, depth + 1) or _itself(value)
    except Exception:  # its own code raises
        return _itself(value)


def _description(value, seen: Seen, depth: int) -> tuple:
    function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    if isinstance(value, type) and depth <= MOST_NESTED:
        return type(value), _class(value, seen, depth)
    if isinstance(value, property):
        return type(value), _described(value.fget, seen, depth)
    if isinstance(function, types.FunctionType):
        return (type(value), function.__code__, _described(function.__defaults__, seen, depth),
                _described(function.__kwdefaults__, seen, depth),
                [_described(item, seen, depth) for name, item in _cells(function) if name != "__class__"])
    if isinstance(value, (tuple, list)) and len(value) <= MOST_THINGS:
        return type(value), [_described(item, seen, depth) for item in value]
    if isinstance(value, dict) and len(value) <= MOST_THINGS:
        return type(value), [(_described(key, seen, depth), _described(item, seen, depth)) for key, item in value.items()]
    return ()


def _class(kind: type, seen: Seen, depth: int) -> list:
    """Of a class: a function that is made anew for each prompt may make its classes anew, too."""
    found: list = []
    for base in (*inspect.getmro(kind), *inspect.getmro(type(kind))):
        if str(base.__module__).partition(".")[0] in OTHERS and _is_there(base):
            found.append((base.__module__, base.__qualname__))
        else:
            found += [(name, _described(item, seen, depth)) for name, item in vars(base).items() if name not in ("__dict__", "__weakref__")]
    return found


def _is_there(kind: type) -> bool:
    """Whether a class is where it says that it is from."""
    found = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind


def _classes(value, path: Place, seen: Seen, depth: int) -> Iterator[tuple[Place, object]]:
    """Of what a closure holds: (where, what guards do not tell)."""
    if type(value) in CONSTANTS or depth > MAX_DEPTH or len(seen) >= MOST_THINGS:
        return
    try:
        found = list(_classes_in(value, path, seen, depth))
    except Exception:  # its own code raises
        found = [(path, _itself(value))]
    yield from found


def _classes_in(value, path: Place, seen: Seen, depth: int) -> Iterator[tuple[Place, object]]:
    if isinstance(value, type):
        yield path, _described(value, {})
    elif isinstance(value, FUNCTIONS):
        yield from _of_function(value, path, seen, depth)
    elif not isinstance(value, (torch.Tensor, types.ModuleType)) and id(value) not in seen:
        seen[id(value)] = len(seen)
        if isinstance(value, (tuple, list, deque, set, frozenset)):
            parts: Iterable = enumerate(itertools.islice(value, MOST_ITEMS))
        else:
            yield path, type(value).__qualname__  # no class
            parts = itertools.islice(_parts(value).items(), MOST_ITEMS)
        for key, item in parts:
            yield from _classes(item, (*path, _at(key)), seen, depth + 1)


def _of_function(value, path: Place, seen: Seen, depth: int = 0) -> Iterator[tuple[Place, object]]:
    """The same of one of FUNCTIONS. depth: of functions in functions."""
    if isinstance(value, types.MethodType):
        yield from _of_function(value.__func__, path, seen, depth)
        yield from _classes(value.__self__, (*path, " self"), seen, depth + 1)
    elif isinstance(value, functools.partial):
        yield from _classes([value.func, value.args, value.keywords], path, seen, depth)
    elif depth < MAX_DEPTH and id(value) not in seen:
        seen[id(value)] = len(seen)
        path = *path, value.__code__  # of two functions dynamo tells the code
        yield (*path, " defaults"), _described(value.__defaults__, {})
        for name, item in (*vars(value).items(), *_cells(value)):
            yield from _classes(item, (*path, f" {name}"), seen, depth + 1)


def _facts(value, path: Place = ()) -> Iterator[tuple[Place, object]]:
    """(where in value, what guards do not tell)."""
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
    elif kind in FUNCTIONS:
        yield from _of_function(value, path, {})
    elif kind is dict or isinstance(value, torch.nn.Module):
        for key, item in _parts(value).items():
            if type(item) in FUNCTIONS:
                yield from _of_function(item, (*path, _at(key)), {})


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
