"""Another pack's attention (transformer_options["optimized_attention_override"]) as an operation of compiled code: it is called at run
time, with the arguments and the transformer_options that eager gives it. So it may depend on the step and the block, and keep a state.

While such a block runs, ``overridden`` stands in the override's place; what is traced is that. It is right for blocks that hand on the
transformer_options that they get, unchanged: ``probe`` finds that out where torch.compile traces, ``overridden`` itself during export,
where constants and sizes that the block has written there before (UNets) are arguments of the operation, too.
"""
from __future__ import annotations

import functools
import json
import operator
import threading
from collections.abc import Callable

import torch

from ...pack import PACKAGE
from . import attention
from .origins import is_comfyuis
from .values import Unsupported

OVERRIDE = "optimized_attention_override"
_blocks = threading.local()


class Overriding:
    """While it is entered, in this thread: a block with these transformer_options is called by what was compiled."""

    def __init__(self, options: dict):
        self.options = options
        self.override = options[OVERRIDE]

    def __enter__(self) -> Overriding:
        _blocks.__dict__.setdefault("stack", []).append(self)
        self.options[OVERRIDE] = overridden
        return self

    def __exit__(self, *_):
        _blocks.stack.pop()
        if self.options.get(OVERRIDE) is overridden:
            self.options[OVERRIDE] = self.override

    def is_unchanged(self, before: dict) -> bool:
        """Whether the transformer_options, as before but for the override, are what they were."""
        return self.options.keys() == before.keys() and all(self.options[key] is value or key == OVERRIDE for key, value in before.items())

    def call(self, function: Callable, args: tuple, kwargs: dict):
        """The override's result. It finds itself where it was put."""
        given, standing = kwargs.get("transformer_options"), self.options.get(OVERRIDE)
        if isinstance(given, dict) and given is not self.options and given.get(OVERRIDE) is standing:
            given[OVERRIDE] = self.override  # a copy
        self.options[OVERRIDE] = self.override
        try:
            return self.override(function, *args, **kwargs)
        finally:
            if self.options.get(OVERRIDE) is self.override:
                self.options[OVERRIDE] = standing

    def probe(self, call: Callable) -> tuple[bool, object]:
        """(whether overridden may stand for the override, call()): a block is called as it is, and what it hands on is looked at."""
        options, before, fits = self.options, dict(self.options), True

        def probing(function, *args, **kwargs):
            nonlocal fits
            fits = fits and kwargs.get("transformer_options") is options and self.is_unchanged(before)
            result = self.call(function, args, kwargs)
            fits = fits and attention.is_as_expected(result, *args, **kwargs)
            return result
        options[OVERRIDE] = probing
        try:
            result = call()
            return fits, result
        finally:
            if options.get(OVERRIDE) is probing:
                options[OVERRIDE] = overridden


def may_be_operation(override) -> bool:
    """Whether it is called in one way only. What ComfyUI's own do with a container is to free its memory sooner."""
    if override is None or not hasattr(override, "container_function"):
        return override is not None
    return is_comfyuis(getattr(override, "__module__", None) or "")


def takes_overrides(block: torch.nn.Module) -> bool:
    """Whether it is ComfyUI's, and runs its own code: such a block calls an override, and tells it things by its arguments only. What a
    pack's block does with one is not known."""
    return all(_is_known(type(module), module.__dict__.get("forward", type(module).forward)) for module in block.modules())


def _is_known(kind: type, forward: Callable) -> bool:
    return all(is_comfyuis(name) or f"{name}.".startswith(("torch.", f"{PACKAGE}."))
               for name in (kind.__module__, getattr(forward, "__module__", None) or ""))


def current() -> Overriding | None:
    """Of the block that is called in this thread."""
    stack = getattr(_blocks, "stack", None)
    return stack[-1] if stack else None


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
    return _call_now(function, args, kwargs)


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


def _call_now(function: Callable, args: tuple, kwargs: dict):
    return current().call(function, args, kwargs)


@functools.cache
def prepare() -> None:
    """Before torch.compile. Imports dynamo."""
    global _call_now
    _call_now = torch.compiler.disable(_call_now)


def call_override(function: str, tensors: tuple, given: dict, numbers: list[int]):
    """What the operation does."""
    name, positional, keywords, written = function.split(" ", 3)
    block, args = current(), (*tensors, given["heads"], given["mask"])[:int(positional)]
    given = {**given, "transformer_options": block.options, "_inside_attn_wrapper": True}
    block.options.update(_read(written, numbers))
    kwargs, standing = {key: given[key] for key in keywords.split(",")}, block.options.get(OVERRIDE)
    if standing is overridden:
        result = block.call(attention.function(name), args, kwargs)
    else:  # the override has taken itself away, or put another in its place
        result = (attention.function(name) if standing is None else functools.partial(standing, attention.function(name)))(*args, **kwargs)
    if not attention.is_as_expected(result, *tensors, **given):
        raise RuntimeError(f"another pack's {OVERRIDE} gave another kind of result than before")
    memory = result.untyped_storage().data_ptr()
    return result.clone() if any(memory == tensor.untyped_storage().data_ptr() for tensor in tensors) else result
