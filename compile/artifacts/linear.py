"""A Linear whose input's layout depends on the batch, as one operation: F.linear asks torch whether the input is contiguous, as a part of
[batch, tokens, channels] is for a batch of 1 alone (Flux's double blocks, after their attention). What asks is compiled for each by itself.
"""
from __future__ import annotations

import functools

import torch

from .attention import NAMESPACE, is_exporting, is_tracing


@functools.cache
def keep_whole() -> None:
    """From now on, wherever this pack traces. Others get what torch makes of F.linear."""
    operator, key = torch.ops.aten.linear.default, torch._C.DispatchKey.CompositeImplicitAutograd
    if key in operator.py_kernels or not hasattr(operator, "_op_dk") or hasattr(getattr(torch.ops, NAMESPACE), "float_linear"):
        return  # another pack, or a sibling copy of this one, was first
    library = torch.library.Library(NAMESPACE, "FRAGMENT")
    library.define("float_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor", tags=(torch.Tag.pt2_compliant_tag,))
    library.impl("float_linear", torch.nn.functional.linear, "CompositeExplicitAutograd")
    torch.library.register_fake(f"{NAMESPACE}::float_linear", lambda x, weight, bias: x.new_empty((*x.shape[:-1], weight.shape[0])),
                                lib=library)
    _LIBRARIES.append(library)

    @operator.py_impl(key)
    def linear(x, weight, bias=None):
        if is_tracing() and not is_exporting() and not torch.is_grad_enabled() and x.dim() > 2 and not _is_contiguous(x):
            return getattr(torch.ops, NAMESPACE).float_linear(x, weight, bias)
        return operator._op_dk(key, x, weight, bias)


_LIBRARIES: list = []  # they take their operations with them


def _is_contiguous(x: torch.Tensor) -> bool:
    """Whether it is for all sizes, without a guard."""
    from torch.fx.experimental.symbolic_shapes import statically_known_true

    dense = 1
    for size, stride in zip(reversed(x.shape), reversed(x.stride())):
        if not statically_known_true(stride == dense):
            return False
        dense = dense * size
    return True
