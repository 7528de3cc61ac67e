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
import weakref
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator, Mapping

import torch

# It is asked at every call: how deep, how many of a container, and how many things are looked at for one function.
MAX_DEPTH, MOST_NESTED, MOST_ITEMS, MOST_THINGS, MOST_OF_MODULES, MOST_CONSTANTS = 4, 2, 64, 100, 30, 1000
# Modules whose own classes are what they are.
OTHERS = ("builtins", "torch", "abc", "enum", "typing", "collections", "types")
FUNCTIONS = (types.FunctionType, types.MethodType, functools.partial)
CONSTANTS = frozenset({bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device})
PLAIN = CONSTANTS | {torch.Tensor, torch.nn.Parameter}
CONTAINERS = (tuple, list, deque, set, frozenset)
Place = tuple  # of text, and the code of functions on the way
Walked = dict[object, list[tuple[Place, object]]]  # by id of what a block may call: its facts
Seen = dict[int, tuple[int, object]]  # id of what was looked at -> the how manyth, and it: no other gets its id meanwhile
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
def _of_torch() -> frozenset[str]:
    return frozenset(vars(torch.nn.Module())) | {"_compiled_call_impl"}


@functools.lru_cache(1024)
def _slots(kind: type) -> tuple[str, ...]:
    """Names of attributes that are in no __dict__."""
    found = [vars(base).get("__slots__", ()) for base in kind.__mro__ if not str(base.__module__).startswith("torch")]
    names = [name for slots in found for name in ((slots,) if isinstance(slots, str) else slots)]
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


def _attributes(value) -> Mapping:
    """Of an object; of a module its layers, too, and none of torch's own."""
    if isinstance(value, torch.nn.Module):
        return {**{key: item for key, item in vars(value).items() if key not in _of_torch()}, **value._modules}
    held = getattr(value, "__dict__", {})
    slots = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}  # type: ignore[arg-type]
    return {**slots, **held} if slots else held


def _items(value) -> Iterable[tuple[object, object]]:
    return value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, CONTAINERS) else ()


@functools.lru_cache(1024)
def _global_names(code: types.CodeType) -> frozenset[str]:
    return frozenset(code.co_names).union(*(_global_names(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))


def _own_globals(function: types.FunctionType) -> list[tuple[str, object]]:
    """What its global names stand for where they are not those of a module (exec): dynamo looks them up in the module of that name."""
    space = function.__globals__
    if vars(sys.modules.get(space.get("__name__", ""), types)) is space:
        return []
    return [(name, space[name]) for name in sorted(_global_names(function.__code__)) if name in space]


def _at(key) -> str:
    return f"[{key!r}]" if type(key) in CONSTANTS else f"[a {type(key).__name__}]"


def _itself(value) -> tuple:
    return type(value), id(value), [value]  # which is held, so that no other gets its id


def _described(value, seen: Seen, depth: int = 0) -> tuple:
    """Equal for what code that was traced takes for the same. What cannot be described, or takes too long, is the same only as itself."""
    if type(value) in CONSTANTS:
        return type(value), repr(value)
    if id(value) in seen:
        return "again", seen[id(value)][0]
    if type(value) in (tuple, list) and MOST_THINGS < len(value) <= MOST_CONSTANTS and CONSTANTS.issuperset(map(type, value)):
        return type(value), tuple(value)
    if depth > MAX_DEPTH or len(seen) >= MOST_THINGS:
        return _itself(value)
    seen[id(value)] = len(seen), value
    try:
        return _description(value, seen, depth + 1) or _itself(value)
    except Exception:  # its own code raises
        return _itself(value)


def _description(value, seen: Seen, depth: int) -> tuple:
    def all_of(values) -> list:
        return [_described(item, seen, depth) for item in values]
    kind = type(value)
    function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    if isinstance(value, type):
        return (kind, _class(value, seen, depth)) if depth <= MOST_NESTED else ()
    if isinstance(value, property):
        return kind, all_of([value.fget])
    if isinstance(function, types.FunctionType):
        return (kind, function.__code__, all_of([function.__defaults__, function.__kwdefaults__]),
                all_of(item for name, item in (*_cells(function), *_own_globals(function)) if name != "__class__"))
    if isinstance(value, types.MethodType):
        return kind, all_of([value.__func__, value.__self__])
    if isinstance(value, functools.partial):
        return kind, all_of([value.func, value.args, value.keywords])
    if isinstance(value, torch.Tensor):
        # Its values are an input of what is compiled.
        return (kind, value.dtype, value.device, value.shape, value.stride(), value.requires_grad) if kind is torch.Tensor else ()
    if isinstance(value, (torch.nn.Module, types.ModuleType)):
        return ()
    if isinstance(value, (*CONTAINERS, Mapping)) and len(value) > MOST_THINGS:
        return ()
    attributes = _attributes(value)
    if isinstance(value, Mapping):
        items = [item for pair in value.items() for item in pair]
    elif isinstance(value, CONTAINERS):
        items = sorted(value, key=repr) if isinstance(value, (set, frozenset)) else list(value)
    elif attributes:
        items = []
    else:
        return ()  # of code in C
    return all_of([] if kind in (*CONTAINERS, dict) else [kind]), kind.__name__, all_of([*items, *attributes, *attributes.values()])


def _class(kind: type, seen: Seen, depth: int) -> list:
    """Of a class: a function that is made anew for each prompt may make its classes anew, too."""
    found: list = [kind.__name__]
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
    if type(value) in PLAIN:
        return
    try:
        found = list(_classes_in(value, path, seen, depth)) if depth <= MAX_DEPTH and len(seen) < MOST_THINGS else [(path, _itself(value))]
    except Exception:  # its own code raises
        found = [(path, _itself(value))]
    yield from found


def _classes_in(value, path: Place, seen: Seen, depth: int) -> Iterator[tuple[Place, object]]:
    if isinstance(value, type):
        yield path, _described(value, seen)
    elif isinstance(value, FUNCTIONS):
        yield from _of_function(value, path, seen, depth)
    elif isinstance(value, weakref.ref):
        yield from _classes(value(), path, seen, depth)
    elif not isinstance(value, (torch.Tensor, types.ModuleType)) and id(value) not in seen:
        seen[id(value)] = len(seen), value
        items, attributes, is_module = _items(value), _attributes(value), isinstance(value, torch.nn.Module)
        if type(value) not in CONTAINERS:
            yield path, type(value).__qualname__  # no class
        if attributes and isinstance(value, (*CONTAINERS, Mapping)):  # dynamo knows the items alone
            yield (*path, " attributes"), [_described(item, seen) for item in attributes.items()]
        parts = iter((*items, *attributes.items()))
        for key, item in itertools.islice(parts, MOST_ITEMS):
            if is_module and len(seen) >= MOST_OF_MODULES:
                return
            yield from _classes(item, (*path, _at(key)), seen, depth + 1)
        if not is_module and (rest := [item for _, item in parts if type(item) not in PLAIN]):
            yield (*path, " and more"), [_itself(item) for item in rest]


def _of_function(value, path: Place, seen: Seen, depth: int = 0) -> Iterator[tuple[Place, object]]:
    """The same of one of FUNCTIONS. depth: of functions in functions."""
    if isinstance(value, types.MethodType):
        path = *path, getattr(value.__func__, "__code__", " method")
        yield path, ""
        yield from _of_function(value.__func__, path, seen, depth)
        yield from _classes(value.__self__, (*path, " self"), seen, depth + 1)
    elif isinstance(value, functools.partial):
        path = *path, getattr(value.func, "__code__", " partial")
        yield path, ""
        yield from _classes([value.func, value.args, value.keywords], path, seen, depth)
    elif depth < MAX_DEPTH and id(value) not in seen:
        seen[id(value)] = len(seen), value
        path = *path, value.__code__  # of two functions dynamo tells the code
        made_with = value.__defaults__, value.__kwdefaults__, *_own_globals(value)
        yield path, [value.__name__, value.__qualname__, *(_described(item, seen) for item in made_with if item)]
        for name, item in (*vars(value).items(), *_cells(value)):
            yield from _classes(item, (*path, f" {name}"), seen, depth + 1)


def _facts(value, walked: Walked) -> dict[Place, object]:
    """{where in value: what guards do not tell}. walked: of values that live meanwhile."""
    try:
        return dict(_facts_in(value, (), walked))
    except Exception:  # it holds itself, or its own code raises
        return {(): _itself(value)}


def _facts_in(value, path: Place, walked: Walked) -> Iterator[tuple[Place, object]]:
    kind = type(value)
    if kind is float and value == 0.0:
        yield path, math.copysign(1.0, value)
    elif kind is complex:
        yield from _facts_in(value.real, (*path, ".real"), walked)
        yield from _facts_in(value.imag, (*path, ".imag"), walked)
    elif isinstance(value, (tuple, list)):
        for index, item in enumerate(value):
            yield from _facts_in(item, (*path, f"[{index}]"), walked)
    elif kind is OrderedDict and len(value) > 1:
        yield (*path, " order"), [repr(key) for key in value]
    elif kind is dict or isinstance(value, torch.nn.Module):
        for key, item in (value if kind is dict else _attributes(value)).items():
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
            except (AttributeError, LookupError, TypeError):
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
