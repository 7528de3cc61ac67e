"""Another pack's attention (transformer_options["optimized_attention_override"]) as an operation of compiled code: it is called at run
time, with the arguments and the transformer_options that eager gives it. So it may depend on the step and the block, and keep a state.

While such a block runs, ``overridden`` stands in the override's place; what is traced is that. It is right for blocks that hand on the
transformer_options that they get, unchanged: ``StandIns.probe`` finds that out where torch.compile traces, ``overridden`` itself during
export, where constants and sizes that the block has written there before (UNets) are arguments of the operation, too.
"""
from __future__ import annotations

import functools
import json
import operator
from collections.abc import Callable

import torch

from ..torch_internals.guard_filter import OVERRIDE
from . import attention, current_block
from .values import Unsupported


def overridden(function: Callable, *args, **kwargs):
    """In the place of an override. Raises Unsupported during export where the operation would be given other transformer_options."""
    name = attention.name_of(function)
    # Between two graphs it is called as Python.
    is_traced = attention.is_exporting() or torch.compiler.is_dynamo_compiling()
    if attention.is_tracing() and is_traced and attention.takes(name, args, kwargs):
        written = "[]"
        numbers: list = []
        if attention.is_exporting():
            if not getattr(kwargs["transformer_options"], "is_given", False):
                raise Unsupported("it hands on other transformer_options than it gets")
            written, numbers = _written(kwargs["transformer_options"].writes())
        return attention.call_operation(f"{name} {len(args)} {','.join(kwargs)} {written}", *args, **{**kwargs, "numbers": numbers})
    if attention.is_exporting():
        raise Unsupported(f"it calls the attention {getattr(function, '__name__', function)} in a way of its own")
    return current_block.call_now("call", function, args, kwargs)


def _written(values: dict) -> tuple[str, list]:
    """(JSON, numbers) of what a block has written into its transformer_options before it calls attention (UNets)."""
    kinds: list[list] = []
    numbers: list = []
    for key, value in values.items():
        if isinstance(value, (list, tuple)) or type(value) in (int, torch.SymInt):
            kinds.append([key, type(value).__name__ if isinstance(value, (list, tuple)) else "int", len(numbers)])
            numbers += value if isinstance(value, (list, tuple)) else [value]
            kinds[-1].append(len(numbers))
        else:
            kinds.append([key, "constant", value])
    return json.dumps(kinds), numbers


def _read(written: str, numbers: list[int]) -> dict:
    """The inverse."""
    make: dict[str, Callable] = {"list": list, "tuple": tuple, "int": operator.itemgetter(0)}
    return {key: make[kind](numbers[place[0]:place[1]]) if kind in make else place[0] for key, kind, *place in json.loads(written)}


def call_override(function: str, tensors: tuple, given: dict, numbers: list[int]):
    """What the operation does."""
    name, positional, keywords, written = function.split(" ", 3)
    block, args = current_block.current(), (*tensors, given["heads"], given["mask"])[:int(positional)]
    given = {**given, "transformer_options": block.options, "_inside_attn_wrapper": True}
    block.options.update(_read(written, numbers))
    kwargs, standing = {key: given[key] for key in keywords.split(",")}, block.options.get(OVERRIDE)
    if standing is overridden:
        result = block.call(attention.function(name), args, kwargs)
    else:  # the override has taken itself away, or put another in its place
        successor = attention.function(name) if standing is None else functools.partial(standing, attention.function(name))
        result = block.call_successor(successor, args, kwargs)
    if not attention.is_as_expected(result, *tensors, **given):
        raise RuntimeError(f"another pack's {OVERRIDE} gave another kind of result than before")
    return result
