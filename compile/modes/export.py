"""The mode export: ends what smoothquant, convrot and int8 began, and writes the file."""
from __future__ import annotations

import os
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ...int8.linear import Int8Linear, RotatedLinear
from .layers import check_record, replace
from .mode import Mode, NoConfig
from .registry import MODES


@dataclass(frozen=True)
class ExportConfig:
    """layers: what INT8 layers become: "int8": they stay; "float": plain Linear layers that hold the INT8 values, for a runtime without
    INT8. Layers that are only smoothed or rotated become what they were made of, exactly."""

    layers: Literal["int8", "float"] = "int8"


@MODES.register
class Export(Mode):
    """mode_kwargs: path, of the safetensors file that is written once all modes are applied; None: no file."""

    name = "export"
    config_class: ClassVar[type] = ExportConfig
    is_export_mode = True

    def convert(self, model, config, **_):
        folded = {name: _plain(layer) for name, layer in model.named_modules()
                  if isinstance(layer, RotatedLinear) or (isinstance(layer, Int8Linear) and config.layers == "float")}
        return replace(model, folded), {}

    def update_for_restore(self, config, metadata):
        return config, check_record(metadata, self.name, NoConfig)

    def restore(self, model, config, metadata):
        return self.convert(model, config)[0]

    def finish(self, model, config, path: str | os.PathLike | None = None, **_):
        if path is not None:
            from .files import save_model  # safetensors: ComfyUI has it; other users of this mode need not
            save_model(model, path)


def _plain(layer: RotatedLinear | Int8Linear) -> torch.nn.Linear:
    linear = torch.nn.Linear(layer.in_features, layer.out_features, layer.bias is not None, device="meta")
    linear.weight = torch.nn.Parameter(layer.dequantized(), requires_grad=False) if isinstance(layer, Int8Linear) else layer.weight
    linear.bias = layer.bias
    return linear
