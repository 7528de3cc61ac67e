"""What stands in the transformer_options of the block that is called in this thread, see stand_ins."""
from __future__ import annotations

import contextlib
import functools
import threading
from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from .stand_ins import StandIns

_blocks = threading.local()


def enter(stand_ins: StandIns) -> None:
    _blocks.__dict__.setdefault("stack", []).append(stand_ins)


def leave() -> None:
    _blocks.stack.pop()


def current() -> StandIns | None:
    stack = getattr(_blocks, "stack", None)
    return stack[-1] if stack else None


def settings(tensors: Iterable[torch.Tensor]) -> contextlib.AbstractContextManager:
    """For torch.compile, while a block is called by what it compiled, with these tensors."""
    block = current()
    return contextlib.nullcontext() if block is None else block.settings(tensors)


def call_now(method: str, *args):
    """The result of that method of current(): between two graphs, where it is called as Python."""
    return getattr(current(), method)(*args)


@functools.cache
def prepare() -> None:
    """Before torch.compile. Imports dynamo."""
    global call_now
    call_now = torch.compiler.disable(call_now)
