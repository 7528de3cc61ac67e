"""What stands in the slot of nn.Module.compile of each block while a step is under way."""
from __future__ import annotations

import sys
import threading
from collections.abc import Callable, Iterable

import torch

_MODULE = torch.nn.Module
_MODULE_CALL = _MODULE._wrapped_call_impl.__code__
_LOCK = threading.Lock()  # of models that share blocks


class Slots:
    """The calls that are in ``_compiled_call_impl`` of some blocks during a step."""

    def __init__(self):
        self._is_over = False
        self._before: list[tuple[torch.nn.Module, OwnCall, OwnCall | None]] = []

    def fill(self, blocks: Iterable[torch.nn.Module], call_block: Callable, around_block: Callable | None) -> int:
        """Puts call_block(block, args, kwargs) there, within around_block(call). Returns how many blocks another pack has compiled: they
        are left as they are."""
        foreign = 0
        with _LOCK:
            for block in blocks:
                previous = block.__dict__.get("_compiled_call_impl")
                if previous is not None and not isinstance(previous, OwnCall):
                    foreign += 1
                    continue
                own: OwnCall = _BlockCall(call_block, block, self)
                if around_block:
                    own = _WrappedCall(around_block(own), self)
                self._before.append((block, own, previous))
                block.__dict__["_compiled_call_impl"] = own
        return foreign

    def put_back(self) -> None:
        """What was there before. Another thread's step, of a model that shares blocks, may have begun since, and stays; or may have ended,
        and is not put back."""
        with _LOCK:
            self._is_over = True
            for block, own, previous in self._before:
                if block.__dict__.get("_compiled_call_impl") is not own:
                    continue
                if previous is None or (previous.slots is not None and previous.slots._is_over):
                    block.__dict__.pop("_compiled_call_impl", None)
                else:
                    block.__dict__["_compiled_call_impl"] = previous
            self._before.clear()  # the calls hold this, and the compiled module


def counted(blocks: Iterable[torch.nn.Module], call: Callable) -> tuple[object, int]:
    """(call(), how many calls of blocks it has made: as they are)."""
    calls = []

    def call_block(block, args, kwargs):
        calls.append(block)
        return block._call_impl(*args, **kwargs)
    slots = Slots()
    try:
        foreign = slots.fill(blocks, call_block, None)
        return call(), len(calls) + foreign
    finally:
        slots.put_back()


class OwnCall:
    """What this pack puts into ``_compiled_call_impl``. Anything else there is another pack's."""

    __slots__ = ()
    slots: Slots | None = None  # of the step that it is there for; None where it stays


class _BlockCall(OwnCall):
    """The call of one block."""

    __slots__ = ("_call_block", "module", "slots")

    def __init__(self, call_block: Callable, module: torch.nn.Module, slots: Slots):
        self._call_block = call_block
        self.module = module
        self.slots = slots

    def __call__(self, *args, **kwargs):
        caller = sys._getframe(1)
        if caller.f_code is _MODULE_CALL and (called := caller.f_locals["self"]) is not self.module:
            return called._call_impl(*args, **kwargs)  # a copy of the block by its __dict__, as torch's replicas are
        return self._call_block(self.module, args, kwargs)


class _WrappedCall(OwnCall):
    """The same with something around it, see CompiledModule.run."""

    __slots__ = ("_call", "slots")

    def __init__(self, call: Callable, slots: Slots):
        self._call = call
        self.slots = slots

    def __call__(self, *args, **kwargs):
        return self._call(*args, **kwargs)
