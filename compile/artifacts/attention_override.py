"""Another pack's attention (transformer_options["optimized_attention_override"]) as an operation of compiled code: it is called at run
time, with the arguments and the transformer_options that eager gives it. So it may depend on the step and the block, and keep a state.

While such a block runs, ``overridden`` stands in the override's place; what is traced is that. It is right for blocks that hand on the
transformer_options that they get, unchanged: ``probe`` finds that out where torch.compile traces, ``overridden`` itself during export.
"""
from __future__ import annotations

import functools
import threading
from collections.abc import Callable

import torch

from . import attention
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

    def call(self, function: Callable, args: tuple, kwargs: dict):
        """The override's result. It finds itself where it was put."""
        given = kwargs.get("transformer_options")
        if isinstance(given, dict) and given is not self.options and given.get(OVERRIDE) is self.options[OVERRIDE]:
            given[OVERRIDE] = self.override  # a copy
        self.options[OVERRIDE] = self.override
        try:
            return self.override(function, *args, **kwargs)
        finally:
            if self.options.get(OVERRIDE) is self.override:
                self.options[OVERRIDE] = overridden

    def probe(self, call: Callable) -> tuple[bool, object]:
        """(whether overridden may stand for the override, call()): a block is called as it is, and what it hands on is looked at."""
        options, before, fits = self.options, {**self.options, OVERRIDE: None}, True

        def probing(function, *args, **kwargs):
            nonlocal fits
            now = {**options, OVERRIDE: None}
            fits = (fits and kwargs.get("transformer_options") is options and now.keys() == before.keys()
                    and all(now[key] is value for key, value in before.items()))
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


def current() -> Overriding | None:
    """Of the block that is called in this thread."""
    stack = getattr(_blocks, "stack", None)
    return stack[-1] if stack else None


def overridden(function: Callable, *args, **kwargs):
    """In the place of an override. Raises Unsupported during export where the operation would be given other transformer_options."""
    name = attention.name_of(function)
    if attention.is_tracing() and attention.takes(name, args, kwargs):
        if attention.is_exporting() and not getattr(kwargs.get("transformer_options"), "is_as_given", False):
            raise Unsupported("it hands on other transformer_options than it gets")
        return attention.call_operation(f"{name} {len(args)} {','.join(kwargs)}", *args, **kwargs)
    if attention.is_exporting():
        raise Unsupported(f"it calls the attention {getattr(function, '__name__', function)} in a way of its own")
    return _call_now(function, args, kwargs)


def _call_now(function: Callable, args: tuple, kwargs: dict):
    return current().call(function, args, kwargs)


@functools.cache
def prepare() -> None:
    """Before torch.compile. Imports dynamo."""
    global _call_now
    _call_now = torch.compiler.disable(_call_now)


def call_override(function: str, tensors: tuple, given: dict):
    """What the operation does."""
    name, positional, keywords = function.split(" ")
    block, args = current(), (*tensors, given["heads"], given["mask"])[:int(positional)]
    given = {**given, "transformer_options": block.options, "_inside_attn_wrapper": True}
    result = block.call(attention.function(name), args, {key: given[key] for key in keywords.split(",")})
    if not attention.is_as_expected(result, *tensors, **given):
        raise RuntimeError(f"another pack's {OVERRIDE} gave another kind of result than before")
    memory = result.untyped_storage().data_ptr()
    return result.clone() if any(memory == tensor.untyped_storage().data_ptr() for tensor in tensors) else result
