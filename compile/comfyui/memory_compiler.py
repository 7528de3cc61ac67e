"""ComfyUI's memory compiler (since 0.34; on by default with dynamic VRAM on CUDA) and compiled code, which do not go together.

It records what a model's forward allocates, and expects the same at the next step. What torch.compile allocates while it compiles,
measures or captures is not like that. Models ask whether it is on before their blocks run, so it is off before the model is called.
"""
from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch

from ..report import CompileReport
from .allocation_recording import clean_up, unrecorded

NOTE = ("ComfyUI's memory compiler (--disable-comfy-compiler) is off for this model while it runs compiled: the peak of its VRAM may "
        "differ.")


@contextlib.contextmanager
def without_comfy_compiler(device: torch.device, report: CompileReport | None = None) -> Iterator[None]:
    """Run what is inside, a compiled call, with no recording of ComfyUI: none is opened by the model, and one that is open already does
    not see it. Afterwards, also after an exception, all is as before; threads do not undo each other's.

    report: gets a note that the memory compiler is off, once. A model whose compile has failed runs as without the pack.
    """
    if report is not None and report.failure:
        yield
        return
    with unrecorded(device) as is_taken:
        if is_taken and report is not None and NOTE not in report.notes:
            report.notes.append(NOTE)
        yield


def cleaned_up_after(call: Callable) -> Callable:
    """call, which closes what it has left open of ComfyUI when it fails: what is called next, eager, is like a first run."""
    def run():
        try:
            return call()
        except BaseException:
            clean_up()
            raise
    return run
