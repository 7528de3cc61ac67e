"""Configurations of modes: frozen dataclasses, to and from JSON values."""
from __future__ import annotations

import dataclasses
import difflib
import functools
import json
import math
import types
import typing

from .errors import ModeConfigError, ModeRegistryError

_SCALARS = (bool, int, float, str, type(None))
_UNIONS = (typing.Union, types.UnionType)


@functools.cache
def _hints(cls: type) -> dict:
    return typing.get_type_hints(cls)


def check_config_class(cls: type) -> None:
    """Raises ModeRegistryError unless cls is a frozen dataclass whose fields all have a default and a type that JSON can hold: bool, int,
    float, str, None, Literal, a union or a tuple of those."""
    if not (isinstance(cls, type) and dataclasses.is_dataclass(cls) and cls.__dataclass_params__.frozen):
        raise ModeRegistryError(f"{getattr(cls, '__name__', cls)} must be a frozen dataclass: @dataclass(frozen=True).")
    for field in dataclasses.fields(cls):
        if field.default is dataclasses.MISSING and field.default_factory is dataclasses.MISSING:
            raise ModeRegistryError(f"{cls.__name__}.{field.name} needs a default: a mode can be applied without any configuration.")
        if not _is_json_type(_hints(cls)[field.name]):
            raise ModeRegistryError(f"{cls.__name__}.{field.name}: a configuration is saved as JSON, which cannot hold "
                                    f"{_hints(cls)[field.name]}. Use bool, int, float, str, None, Literal, or tuples of them.")


def _is_json_type(hint) -> bool:
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return all(isinstance(arg, _SCALARS) for arg in args)
    if origin in _UNIONS or origin is tuple:
        return all(arg is Ellipsis or _is_json_type(arg) for arg in args)
    return hint in _SCALARS


def parse_config(cls: type, values, owner: str):
    """An instance of cls from JSON values, an object whose keys are fields of cls. owner: whose it is, for messages.

    A tuple takes a JSON array; a tuple of pairs takes an object as well. Raises ModeConfigError for anything but an object, an unknown
    key (with its near matches), a value of another type, and whatever ValueError cls itself raises.
    """
    if not isinstance(values, dict):
        raise ModeConfigError(f"{owner}: the configuration must be an object, not {_show(values)}.")
    names = [field.name for field in dataclasses.fields(cls)]
    parsed = {}
    for key, value in values.items():
        if key not in names:
            near = difflib.get_close_matches(str(key)[:64], names, n=2)
            hint = f"Did you mean {' or '.join(near)}? " if near else ""
            raise ModeConfigError(f"{owner}: unknown key {_show(key)}. {hint}The keys are: {', '.join(names) or 'none'}.")
        try:
            parsed[key] = _convert(_hints(cls)[key], value)
        except (TypeError, OverflowError):
            raise ModeConfigError(f"{owner}: '{key}' takes {describe(_hints(cls)[key])}, not {_show(value)}.") from None
    try:
        return cls(**parsed)
    except ValueError as error:
        raise ModeConfigError(f"{owner}: {error}") from error


def _convert(hint, value):
    """value as the type hint; TypeError where it is none."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        if any(value == arg and type(value) is type(arg) for arg in args):
            return value
    elif origin in _UNIONS:
        for arg in args:
            try:
                return _convert(arg, value)
            except TypeError:
                pass
    elif origin is tuple:
        if isinstance(value, dict):
            value = list(value.items())
        if isinstance(value, (list, tuple)):
            if len(args) == 2 and args[1] is Ellipsis:
                return tuple(_convert(args[0], item) for item in value)
            if len(args) == len(value):
                return tuple(_convert(arg, item) for arg, item in zip(args, value))
    elif hint is float:
        if type(value) in (int, float) and math.isfinite(value):
            return float(value)
    elif type(value) is hint:
        return value
    raise TypeError


def dump_config(config) -> dict:
    """The JSON values of a configuration, all fields, in order."""
    return json.loads(json.dumps({field.name: getattr(config, field.name) for field in dataclasses.fields(config)}, allow_nan=False))


def describe(hint) -> str:
    """A type in the words of a message."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin is typing.Literal:
        return " or ".join(json.dumps(arg) for arg in args)
    if origin in _UNIONS:
        return " or ".join(describe(arg) for arg in args)
    if origin is tuple:
        if len(args) == 2 and args[1] is Ellipsis:
            return f"a list of ({describe(args[0])})" if typing.get_origin(args[0]) is tuple else f"a list of {describe(args[0])}"
        return ", ".join(describe(arg) for arg in args)
    return {bool: "true or false", int: "a whole number", float: "a number", str: "text", type(None): "null"}[hint]


def _show(value) -> str:
    try:
        text = json.dumps(value)
    except (TypeError, ValueError, RecursionError):
        text = f"a {type(value).__name__}"
    return text if len(text) <= 60 else f"{text[:57]}..."
