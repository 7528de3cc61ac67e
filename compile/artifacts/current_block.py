"""What stands in the transformer_options of the block that is called in this thread, see stand_ins."""
from __future__ import annotations

import threading
from typing import TYPE_CHECKING

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
