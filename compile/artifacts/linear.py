"""A Linear whose input's layout depends on the batch, as one operation: F.linear asks torch whether the input is contiguous, as a part of
[batch, tokens, channels] is for a batch of 1 alone (Flux's double blocks, after their attention). What asks is compiled for each by itself.
"""
from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterator

import torch

from .attention import NAMESPACE


@contextlib.contextmanager
def kept_whole() -> Iterator[None]:
    """In this thread, where nothing but a compile of this pack's own is under way: torch keeps other compilers' results by what they are
    given, in which F.linear is F.linear."""
    _define()
    _calls.whole = True
    try:
        yield
    finally:
        _calls.whole = False


@functools.cache
def _define() -> None:
    operator, key = torch.ops.aten.linear.default, torch._C.DispatchKey.CompositeImplicitAutograd
    if key in operator.py_kernels or not hasattr(operator, "_op_dk") or hasattr(getattr(torch.ops, NAMESPACE), "float_linear"):
        return  # another pack, or a sibling copy of this one, was first
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define("float_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("float_linear", _taken_apart, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::float_linear", lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
                                lib=library)
    _LIBRARIES.append(library)

    @operator.py_impl(key)
    def linear(x, weight, bias=None):
        if weight.dim() == 2 and _is_to_be_whole(x):
            return getattr(torch.ops, NAMESPACE).float_linear(x, weight, bias)
        return operator._op_dk(key, x, weight, bias)


def _taken_apart(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    whole, _calls.whole = getattr(_calls, "whole", False), False  # a mode that runs it in a trace would come back here
    try:
        return torch.nn.functional.linear(x, weight, bias)
    finally:
        _calls.whole = whole


_calls = threading.local()
_LIBRARIES: list = []  # they take their operations with them


def dense(x: torch.Tensor) -> torch.Tensor:
    """x, of a Linear that takes it apart by rows: where that would ask, a copy that asks nothing."""
    return x.clone(memory_format=torch.contiguous_format) if _is_to_be_whole(x) else x


def _is_to_be_whole(x: torch.Tensor) -> bool:
    return getattr(_calls, "whole", False) and not torch.is_grad_enabled() and _is_part_of_tokens(x)


def _is_part_of_tokens(x: torch.Tensor) -> bool:
    """Whether it is [batch, some of the tokens, channels] of what is dense; told without a guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    if x.dim() != 3:
        return False
    of_batch, of_tokens, of_channels = x.stride()
    return (statically_known_true(of_channels == 1) and statically_known_true(of_tokens == x.shape[2])
            and not statically_known_true(of_batch == 0) and not statically_known_true(of_batch == x.shape[1] * x.shape[2]))
