"""ComfyUI's memory compiler (since 0.34; on by default with dynamic VRAM on CUDA) and compiled code, which do not go together.

It records what a model's forward allocates, and expects the same at the next step. What torch.compile allocates while it compiles,
measures or captures is not like that. Models ask whether it is on before their blocks run, so it is off before the model is called.
"""
from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator

import comfy.cli_args
import torch

from ..int8 import comfy_core
from ..int8.comfy_recording import abort_recording, clean_up, outside_recording, prefetch_module
from .report import CompileReport

NOTE = ("ComfyUI's memory compiler (--disable-comfy-compiler) is off for this model while it runs compiled: the peak of its VRAM may "
        "differ.")


class _Switch:
    """args.disable_comfy_compiler, set while any thread runs compiled code. ComfyUI reads it at every model call."""

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
def without_comfy_compiler(device: torch.device, report: CompileReport | None = None) -> Iterator[None]:
    """Run what is inside, a compiled call, with no recording of ComfyUI: none is opened by the model, and one that is open already does
    not see it. Afterwards, also after an exception, all is as before; threads do not undo each other's.

    report: gets a note that the memory compiler is off, once. A model whose compile has failed runs as without the pack.
    """
    if (report is not None and report.failure) or not _SWITCH.take(device):
        yield
        return
    try:
        if report is not None and NOTE not in report.notes:
            report.notes.append(NOTE)
        with outside_recording():
            yield
    finally:
        _SWITCH.release()


def cleaned_up_after(call: Callable) -> Callable:
    """call, which closes what it has left open of ComfyUI when it fails: what is called next, eager, is like a first run."""
    def run():
        try:
            return call()
        except BaseException:
            if _SWITCH.holders > 1:
                abort_recording()  # another thread's model needs what was fetched for it
            else:
                clean_up()
            raise
    return run
