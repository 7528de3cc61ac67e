"""What the code of a function can read: names of attributes and globals, as far as they stand in it."""
from __future__ import annotations

import abc
import ast
import builtins
import dis
import functools
import inspect
import numbers
import operator
import re
import sys
import textwrap
import types

# What reads attributes by names that the code does not contain.
_BY_NAME = ("getattr", "hasattr", "setattr", "delattr")
_READERS = (*(getattr(builtins, name) for name in _BY_NAME), operator.attrgetter, operator.methodcaller, vars)
# What asks for a class, and what makes a text of a number.
_TYPES = frozenset({"isinstance", "type", "issubclass", "__class__"})
_TEXTS = frozenset({"str", "repr", "format", "ascii", "dumps"})
_ALL_NAMES = ("vars", "globals", "locals", "eval", "exec", "__dict__", "__getattribute__", "__getattr__", "__builtins__", "attrgetter",
              "methodcaller")


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
def computed_names(code: types.CodeType) -> frozenset[str] | None:
    """Patterns of the names that code puts together to read an attribute; None where nothing is known of one."""
    names = global_names(code)
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
def attribute_names(code: types.CodeType) -> frozenset[str]:
    """Names of attributes and globals, and texts by themselves (getattr), not those of keywords."""
    return global_names(code).union(*(attribute_names(c) if isinstance(c, types.CodeType) else [c] for c in code.co_consts
                                       if isinstance(c, (str, types.CodeType))))


def has_alias(module: str, code: types.CodeType) -> bool:
    """Whether code calls what reads attributes by name under another name that its module gave it."""
    space = getattr(sys.modules.get(module), "__dict__", {})
    return any(any(space.get(name) is reader for reader in _READERS) for name in global_names(code).difference(_BY_NAME))


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


def written_globals(code: types.CodeType) -> str:
    """The first global that code assigns to, empty for none."""
    for instruction in dis.get_instructions(code):
        if instruction.opname in ("STORE_GLOBAL", "DELETE_GLOBAL"):
            return instruction.argval
    return next((found for c in code.co_consts if isinstance(c, types.CodeType) and (found := written_globals(c))), "")


def code_asks_of_integers(module: str, code: types.CodeType) -> bool:
    names = global_names(code)
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
def global_names(code: types.CodeType) -> frozenset[str]:
    names = set(code.co_names)
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            names |= global_names(constant)
    return frozenset(names)


@functools.lru_cache(4096)
def imported_names(code: types.CodeType) -> frozenset[str]:
    """Names of the modules that code imports when it runs, with the packages that they are in."""
    names: set[str] = set()
    for instruction in dis.get_instructions(code):
        if instruction.opname == "IMPORT_NAME":
            parts = str(instruction.argval).split(".")
            names.update(".".join(parts[:end]) for end in range(1, len(parts) + 1))
    return frozenset(names.union(*(imported_names(constant) for constant in code.co_consts if isinstance(constant, types.CodeType))))
