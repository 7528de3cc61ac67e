"""``1 in numbers`` in what torch.compile traces. Torch up to 2.11 takes a number that varies for unequal to every constant, and guards
nothing: code that asks for the order of cond_or_uncond is then traced wrongly once that has changed.

torch/_dynamo/utils.py, iter_contains; mended in torch 2.14.
"""
from __future__ import annotations

import contextlib
import inspect
import operator
from collections.abc import Callable
from contextlib import AbstractContextManager

from .replaced import replaced


def asked_of_numbers() -> AbstractContextManager[None]:
    """A context in which such a number is compared, and the answer guarded."""
    from torch._dynamo.variables import lists  # compile machinery: at the first compile, not at import

    plain = getattr(lists, "iter_contains", None)
    # What mended it has no such parameter any more.
    if plain is None or "check_tensor_identity" not in inspect.signature(plain).parameters:
        return contextlib.nullcontext()
    return replaced(lists, "iter_contains", _mended)


def _mended(plain: Callable) -> Callable:
    from torch._dynamo.variables import ConstantVariable, SymNodeVariable
    from torch._dynamo.variables.builder import SourcelessBuilder

    def iter_contains(items, search, tx, *args, **kwargs):
        items = [item.realize() for item in items]
        if search.is_python_constant() and isinstance(search.as_python_constant(), (int, float)):
            for item in items:
                if isinstance(item, SymNodeVariable):
                    equal = SourcelessBuilder.create(tx, operator.eq).call_function(tx, [item, search], {})
                    if equal.as_python_constant() if equal.is_python_constant() else equal.evaluate_expr(tx.output):
                        return ConstantVariable.create(True)
        return plain(items, search, tx, *args, **kwargs)
    return iter_contains
