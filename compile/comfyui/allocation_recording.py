"""ComfyUI's recordings of allocations (its memory compiler, since 0.34) and what must not be in them.

A recording belongs to a thread. From its second pass on, a model's allocations must come in the recorded order and sizes.
"""
from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections.abc import Iterator

import comfy.cli_args
import torch

from . import core as comfy_core

logger = logging.getLogger(__name__)

# Where ComfyUI keeps {thread: its recording}, newest first.
_RECORDINGS = ("MALLOC_GRAPHS", "ACTIVE_MALLOC_GRAPHS")


def prefetch_module():
    """Return comfy.model_prefetch, which has all of it; None on a ComfyUI without one, and where no model has been called yet."""
    return sys.modules.get("comfy.model_prefetch")


class _Switch:
    """args.disable_comfy_compiler, set while any thread runs what must not be recorded. ComfyUI reads it at every model call."""

    def __init__(self):
        self._lock = threading.Lock()
        self._before = False  # what it is when nobody holds it
        self.holders = 0

    def take(self, device: torch.device) -> bool:
        """Switch it off, unless it is off already by the user's choice or is not in this ComfyUI. Returns whether it was taken."""
        args = comfy.cli_args.args
        with self._lock:
            if not self.holders:
                if not is_on(device):
                    return False
                self._before = args.disable_comfy_compiler
                args.disable_comfy_compiler = True
            self.holders += 1
            return True

    def release(self) -> None:
        with self._lock:
            self.holders -= 1
            if not self.holders:
                comfy.cli_args.args.disable_comfy_compiler = self._before


_SWITCH = _Switch()


def is_on(device: torch.device) -> bool:
    """Whether ComfyUI would record a model on device now."""
    enabled = getattr(prefetch_module(), "malloc_graph_enabled", None)
    return (enabled is not None and hasattr(comfy.cli_args.args, "disable_comfy_compiler")
            and comfy_core.usable(comfy_core.COMPILER) and bool(enabled(device)))


@contextlib.contextmanager
def unrecorded(device: torch.device) -> Iterator[bool]:
    """No recording of ComfyUI inside: none is begun by a model, and one that is open already does not see it. Afterwards, also after an
    exception, all is as before; threads do not undo each other's. Gives whether ComfyUI would have recorded."""
    if not _SWITCH.take(device):
        yield False
        return
    try:
        with outside_recording():
            yield True
    finally:
        _SWITCH.release()


@contextlib.contextmanager
def outside_recording() -> Iterator[None]:
    """Keep what is allocated inside out of this thread's recording, if one is open.

    Core's own pause is a switch, and a call of comfy_kitchen inside, which pauses too, would switch it back on. So the recording is also
    taken out of core's sight: nothing inside finds one to resume, end or abort.
    """
    module = prefetch_module()
    recordings = next((found for name in _RECORDINGS if (found := getattr(module, name, None)) is not None), None)
    thread = threading.get_ident()
    recording = None if recordings is None else recordings.get(thread)
    # It stays between two steps, when nothing is recorded; the first versions could not pause one.
    if recording is None or not getattr(recording, "_comfy_active", True) or not hasattr(recording, "pause"):
        yield
        return
    recording.pause()
    del recordings[thread]
    try:
        yield
    finally:
        if thread in recordings:  # begun inside, and not ended
            abort_recording()
        recordings[thread] = recording
        recording.resume()


def abort_recording() -> None:
    """End this thread's recording as core does after an error. What fails here is logged: there is another error to be told of."""
    _attempt("cleanup_malloc_graph")


def clean_up() -> None:
    """Do what core does after a node that failed: end this thread's recording, and give back what was fetched ahead for its blocks. The
    latter not while other threads run, whose models need what was fetched for them."""
    _attempt("cleanup_malloc_graph" if _SWITCH.holders > 1 else "cleanup_prefetch_queues")


def _attempt(name: str) -> None:
    function = getattr(prefetch_module(), name, None)
    if function is None:
        return
    try:
        function()
    except Exception:
        logger.warning("INT8 Compile: ComfyUI's %s failed after an error.", name, exc_info=True)
