"""Guards on what is not there, as ``hasattr(block, "x")`` makes one. Torch 2.8 looks up what every guard is about before a guard_filter_fn
sees it: the compile of such a block fails with AttributeError.

torch/_dynamo/guards.py, make_guard_filter_entry; mended in torch 2.11.
"""
from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from contextlib import AbstractContextManager

from .replaced import replaced

ABSENT = object()  # what a GuardFilter is then given for a value


def absent_values() -> AbstractContextManager[None]:
    """A context in which the filter is given ABSENT."""
    from torch._dynamo import guards  # compile machinery: at the first compile, not at import

    # What mended it has moved the function out of its class.
    return contextlib.nullcontext() if hasattr(guards, "make_guard_filter_entry") else replaced(guards.GuardBuilder, "get", _mended)


def _mended(plain: Callable) -> Callable:
    def get(self, *args, **kwargs):
        try:
            return plain(self, *args, **kwargs)
        except Exception:
            # Whoever else asks, as guards on what is there do, is to hear of it.
            if sys._getframe(1).f_code.co_name != "make_guard_filter_entry":
                raise
            return ABSENT
    return get
