"""What things are that a function was made with, in words that are equal where code that was traced takes one for the other."""
from __future__ import annotations

import contextlib
import functools
import inspect
import sys
import types
from collections import deque
from collections.abc import Iterable, Iterator, Mapping

import torch

# It is asked at every call: how deep, how deep classes, how many things, how long a list of constants is looked at.
MAX_DEPTH, MOST_NESTED, MOST_THINGS, MOST_CONSTANTS = 4, 2, 100, 1000
# Modules whose own classes are what they are.
OTHERS = ("builtins", "torch", "abc", "enum", "typing", "collections", "types")
CONSTANTS = frozenset({bool, int, float, complex, str, bytes, type(None), range, slice, torch.dtype, torch.device, torch.Size})
PLAIN = CONSTANTS | {torch.Tensor, torch.nn.Parameter}
CONTAINERS = (tuple, list, deque, set, frozenset)
Seen = dict[int, tuple[int, object]]  # id of what was looked at -> the how manyth, and it: no other gets its id meanwhile


def cells(function: types.FunctionType) -> Iterator[tuple[str, object]]:
    """What its closure holds by now, by name."""
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or ()):
        with contextlib.suppress(ValueError):  # it is empty yet
            yield name, cell.cell_contents


@functools.cache
def _of_torch() -> frozenset[str]:
    return frozenset(vars(torch.nn.Module())) | {"_compiled_call_impl"}


def slots_of(kind: type) -> tuple[str, ...]:
    """Names of attributes that are in no __dict__."""
    found = [vars(base).get("__slots__", ()) for base in kind.__mro__]
    names = [name for slots in found for name in ((slots,) if isinstance(slots, str) else slots)]
    return tuple(name for name in names if name not in ("__dict__", "__weakref__"))


_slots = functools.lru_cache(1024)(slots_of)


def attributes_of(value) -> Mapping:
    """Of an object; of a module its layers, too, and none of torch's own."""
    if isinstance(value, torch.nn.Module):
        return {**{key: item for key, item in vars(value).items() if key not in _of_torch()}, **value._modules}
    held = getattr(value, "__dict__", {})
    slots = {name: getattr(value, name) for name in _slots(type(value)) if hasattr(value, name)}  # type: ignore[arg-type]
    return {**slots, **held} if slots else held


def items_of(value) -> Iterable[tuple[object, object]]:
    return value.items() if isinstance(value, Mapping) else enumerate(value) if isinstance(value, CONTAINERS) else ()


@functools.lru_cache(1024)
def _global_names(code: types.CodeType) -> frozenset[str]:
    return frozenset(code.co_names).union(*(_global_names(inner) for inner in code.co_consts if isinstance(inner, types.CodeType)))


def own_globals(function: types.FunctionType) -> list[tuple[str, object]]:
    """What its global names stand for where they are not those of a module (exec): dynamo looks them up in the module of that name."""
    space = function.__globals__
    if vars(sys.modules.get(space.get("__name__", ""), types)) is space:
        return []
    return [(name, space[name]) for name in sorted(_global_names(function.__code__)) if name in space]


def itself(value) -> tuple:
    return type(value), id(value), [value]  # which is held, so that no other gets its id


def described(value, seen: Seen, depth: int = 0) -> tuple:
    """Equal for what code that was traced takes for the same. What cannot be described, or takes too long, is the same only as itself."""
    if type(value) in CONSTANTS:
        return type(value), value if isinstance(value, (str, bytes)) else repr(value)  # -0.0, nan
    if id(value) in seen:
        return "again", seen[id(value)][0]
    if type(value) in (tuple, list) and MOST_THINGS < len(value) <= MOST_CONSTANTS and CONSTANTS.issuperset(map(type, value)):
        return type(value), repr(value)
    if depth > MAX_DEPTH or len(seen) >= MOST_THINGS:
        return itself(value)
    seen[id(value)] = len(seen), value
    try:
        return _description(value, seen, depth + 1) or itself(value)
    except Exception:  # its own code raises
        return itself(value)


def _description(value, seen: Seen, depth: int) -> tuple:
    def all_of(values) -> list:
        return [described(item, seen, depth) for item in values]
    kind = type(value)
    function = value.__func__ if isinstance(value, (staticmethod, classmethod)) else value
    if isinstance(value, type):
        return (kind, _class(value, seen, depth)) if depth <= MOST_NESTED else ()
    if isinstance(value, property):
        return kind, all_of([value.fget])
    if isinstance(function, types.FunctionType):
        return (kind, function.__code__, all_of([function.__defaults__, function.__kwdefaults__]),
                all_of(item for name, item in (*cells(function), *own_globals(function)) if name != "__class__"))
    if isinstance(value, types.MethodType):
        return kind, all_of([value.__func__, value.__self__])
    if isinstance(value, functools.partial):
        return kind, all_of([value.func, value.args, value.keywords])
    if isinstance(value, torch.Tensor):
        # Its values are an input of what is compiled.
        return (kind, value.dtype, value.device, value.shape, value.stride(), value.requires_grad) if kind in PLAIN else ()
    if isinstance(value, (int, float, types.MemberDescriptorType, types.GetSetDescriptorType)):
        return kind, repr(value)
    if isinstance(value, (torch.nn.Module, types.ModuleType)):
        return ()
    if isinstance(value, (*CONTAINERS, Mapping)) and len(value) > MOST_THINGS:
        return ()
    attributes = attributes_of(value)
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
            found += [(name, described(item, seen, depth)) for name, item in vars(base).items() if name not in ("__dict__", "__weakref__")]
    return found


def _is_there(kind: type) -> bool:
    """Whether a class is where it says that it is from."""
    found = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind
