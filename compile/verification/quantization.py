"""How far INT8 layers take a block from what it computes with the float weights that they were made of."""
from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass

import torch

from ...int8.artifact_layer import HasFloatWeight, has_float_weight
from ...int8.kernels import ops
from ...int8.plan import sqnr_db
from ...int8.report import MOST_DB, as_number
from ..arguments import tensors_in
from .second_run import CallCopy
from .state import nothing_left

FAR_BELOW = 6.0  # dB: four times the noise power that was planned


@dataclass(frozen=True)
class QuantizationError:
    """Of one block on its true input. sqnr: dB of its result that lost most as INT8 against float. layers: {name: dB of that layer's output
    on the input that it has in float}, of the INT8 layers that it called. planned: {name: dB measured when it was quantized}."""

    sqnr: float
    layers: dict[str, float]
    planned: dict[str, float]

    def least_layer(self) -> tuple[float, str]:
        return min((round(db, 1), name) for name, db in self.layers.items())

    def far_below_plan(self) -> list[tuple[str, float, float]]:
        """(layer, dB, planned dB) of those that lose much more than when their quantization was chosen."""
        return [(name, db, self.planned[name]) for name, db in self.layers.items() if db < self.planned.get(name, 0.0) - FAR_BELOW]


def quantization_error(module: torch.nn.Module, args: tuple, kwargs: dict, results: list[torch.Tensor],
                       device: torch.device) -> QuantizationError | None:
    """Of module's call with args and kwargs, which gave results; leaves no trace. None where no layer has a float weight: its file was
    INT8 already, or all of them have a LoRA in their weights."""
    # A bypass LoRA's forward adds to what the layer makes of its input.
    layers = {name: layer for name, layer in module.named_modules() if has_float_weight(layer) and "forward" not in vars(layer)}
    if not layers:
        return None
    copy = CallCopy(args, kwargs)
    with nothing_left(module, device), _in_float(layers) as found:
        exact = list(tensors_in(module._call_impl(*copy.args, **copy.kwargs)))
    if not found:
        return None
    total = min((_db(*pair) for pair in zip(exact, results) if pair[0].is_floating_point()), default=MOST_DB)
    return QuantizationError(total, found, {name: layers[name].planned_sqnr for name in found if layers[name].planned_sqnr})


def _db(exact: torch.Tensor, found: torch.Tensor) -> float:
    return as_number(sqnr_db(exact.float(), found.float()))


@contextlib.contextmanager
def _in_float(layers: dict[str, HasFloatWeight]) -> Iterator[dict[str, float]]:
    """The layers compute with their float weights while it is entered; gives the dB of those that did."""
    found: dict[str, float] = {}

    def float_forward(name, layer, int8_forward):
        def forward(input, act="none"):
            result = int8_forward(input, act)
            weight = layer.float_weight(input.device)
            if weight is None:
                return result
            bias = None if layer.bias is None else layer.bias.to(input.device, input.dtype)
            exact = ops.float_linear(input, weight.to(input.dtype), bias, act, None)
            found[name] = min(_db(exact, result), found.get(name, MOST_DB))
            return exact
        return forward
    try:
        for name, layer in layers.items():
            vars(layer)["forward"] = float_forward(name, layer, layer.forward)
        yield found
    finally:
        for layer in layers.values():
            vars(layer).pop("forward", None)
