"""The mode convrot: a layer's input channels are rotated in groups, and its weight likewise (arXiv 2512.03673)."""
from __future__ import annotations

from typing import ClassVar

from ...int8.hadamard import group_size
from ...int8.linear import RotatedLinear
from .errors import ApplyModeError
from .layers import LayersConfig, check_record, float_linears, recorded, replace, select
from .mode import Mode
from .registry import MODES


@MODES.register
class ConvRot(Mode):
    """Rotates in the largest group that divides a layer's channels; a layer that none divides stays as it is."""

    name = "convrot"
    config_class: ClassVar[type] = LayersConfig
    # The scale of a channel means nothing once channels are mixed.
    next_prohibited_modes = frozenset({"smoothquant", "convrot"})
    export_mode = "export"

    def convert(self, model, config, **_):
        layers = float_linears(model)
        groups = {name: group_size(layers[name].in_features) for name in select(layers, config.keep_layers, self.name)}
        new = {name: rotated(layers[name], group) for name, group in groups.items() if group}
        if not new:
            raise ApplyModeError("convrot: no layer has a number of input channels that a multiple of 16 divides. Leave this mode out.")
        return replace(model, new), {"layers": [[name, groups[name], False] for name in new]}

    def update_for_restore(self, config, metadata):
        return config, check_record(metadata, self.name)

    def restore(self, model, config, metadata):
        return replace(model, {name: rotated(layer, group) for name, layer, group, _ in recorded(model, metadata, self.name)})


def rotated(layer, group: int) -> RotatedLinear:
    return RotatedLinear(layer.weight, layer.bias, getattr(layer, "pre_quant_scale", None), group)
