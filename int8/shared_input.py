"""One quantization of x for q, k and v where nothing is compiled (graph_pass.py does the same in graphs)."""
from __future__ import annotations

import sys
import weakref
from collections.abc import Iterable

import torch

from ..pack import PACKAGE
from .global_hooks import has_global_hooks
from .kernels import ops

# Whose code does not change x between two siblings: ComfyUI's.
TRUSTED = "comfy."
_BETWEEN = "torch.", f"{PACKAGE}."

Rows = tuple[torch.Tensor, torch.Tensor]


class SharedActivationQuant:
    """The rows that the last of some sibling layers quantized; held no longer than their input lives.

    Under inference mode a tensor does not count its changes, so that two siblings get the same values is not taken for granted: the
    first time that a layer meets its sibling's input it quantizes too, and shares from then on only if both came out equal. Where another
    pack's code calls the layers, or hooks stand around them, x may change in one prompt and not in another: nothing is shared.
    """

    def __init__(self):
        self._last: tuple | None = None

    def __deepcopy__(self, memo) -> SharedActivationQuant:
        return memo.setdefault(id(self), SharedActivationQuant())

    def quant_rows(self, layer: torch.nn.Module, x: torch.Tensor, group: int, act: str, pre_quant_scale: torch.Tensor | None,
                   kernel: str) -> Rows:
        """ops.quant_rows of x [..., K] as rows [M, K]. layer: who asks; it keeps whether it shares, in its attribute shares_input."""
        if layer._forward_pre_hooks or layer._forward_hooks or has_global_hooks() or not _caller().startswith(TRUSTED):
            self._last = None
            return ops.quant_rows(x.reshape(-1, x.shape[-1]), group, act, pre_quant_scale, kernel)
        version = None if x.is_inference() else x._version
        key = (version, group, act, pre_quant_scale is None, kernel)
        last = self._last
        met = last is not None and last[0]() is x and last[1] == key
        if met and layer.shares_input:
            return last[2]
        rows = ops.quant_rows(x.reshape(-1, x.shape[-1]), group, act, pre_quant_scale, kernel)
        if not met:
            self._last = (weakref.ref(x, self._forget), key, rows)
        elif layer.shares_input is None and not (x.is_cuda and torch.cuda.is_current_stream_capturing()):  # no value can be read there
            layer.shares_input = all(torch.equal(mine, theirs) for mine, theirs in zip(rows, last[2]))
        return rows

    def _forget(self, reference: weakref.ref) -> None:
        last = self._last
        if last is not None and last[0] is reference:
            self._last = None


def _caller() -> str:
    """The module of the function that has called a layer."""
    frame = sys._getframe(2)
    while frame is not None and (name := frame.f_globals.get("__name__") or "").startswith(_BETWEEN):
        frame = frame.f_back
    return name if frame is not None else ""


def share_inputs(layers: Iterable[tuple[str, torch.nn.Module, tuple]]) -> None:
    """Gives layers of one parent that quantize their input alike a SharedActivationQuant, as attribute shared_input.

    layers: (dotted name, layer, what must be equal besides the parent: the number of channels, the rotation, the smoothing).
    """
    siblings: dict[tuple, list[torch.nn.Module]] = {}
    for name, layer, alike in layers:
        siblings.setdefault((name.rpartition(".")[0], alike), []).append(layer)
    for group in siblings.values():
        if len(group) > 1:
            # Layers are reused by later models: a new sibling joins what the others share.
            shared = next((layer.shared_input for layer in group if layer.shared_input is not None), None) or SharedActivationQuant()
            for layer in group:
                layer.shared_input = shared
