"""The float values that INT8 layers are made of: a layer's own weights, of whatever type they are loaded in."""
from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable

import torch

from .int8_layer import prefix_of

try:
    from comfy.quant_ops import QuantizedTensor
except ImportError:  # cores without native quantization have no INT8 layers
    QuantizedTensor = None

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# What the rounding of a format costs against the weights that it was made of, as SQNR in dB (of normally distributed values).
FP8_DB = {torch.float8_e4m3fn: 31, torch.float8_e5m2: 25}
# Core's layouts of more than four bits a value whose layers multiply with what dequantize() gives, and of these the type of the values.
LAYOUTS = {"TensorCoreFP8Layout": torch.float8_e4m3fn, "TensorCoreFP8E4M3Layout": torch.float8_e4m3fn,
           "TensorCoreFP8E5M2Layout": torch.float8_e5m2, "TensorCoreMXFP8Layout": torch.float8_e4m3fn}


def pristine_parameter(patcher, name: str) -> torch.Tensor | None:
    """A parameter as loaded from the file: without the LoRA, or the swapped layer, of a clone that is active in the shared model."""
    if name in patcher.object_patches or name in patcher.object_patches_backup:
        return patcher.get_model_object(name)
    layer, key = name.rsplit(".", 1)
    if layer not in patcher.object_patches_backup and name in patcher.backup:
        return patcher.backup[name].weight
    return getattr(patcher.get_model_object(layer), key)


def pristine_weight(patcher, name: str) -> torch.Tensor:
    """pristine_parameter of the weight, in its own type, of the layer of that name below the root."""
    return pristine_parameter(patcher, f"{prefix_of(patcher)}{name}.weight")


def rounded_as(weight: torch.Tensor) -> torch.dtype | None:
    """The type that weight's values were rounded to before they are quantized to INT8; None for floats of 16 bits and more.

    Raises ValueError, with what it is, for a weight whose float values are not known here.
    """
    if QuantizedTensor is not None and isinstance(weight, QuantizedTensor):
        if weight._layout_cls not in LAYOUTS:
            raise ValueError(weight._layout_cls)
        return LAYOUTS[weight._layout_cls]
    if type(weight) in (torch.Tensor, torch.nn.Parameter):
        if weight.dtype in FLOATS:
            return None
        if weight.dtype in FP8_DB:
            return weight.dtype
    raise ValueError(type(weight).__name__ if weight.dtype.is_floating_point and weight.element_size() > 1 else weight.dtype)


def float_values(layer: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """The weight [N, K], or bias [N], of layer in float, as layer multiplies with it; fp8 in bf16, which holds it exactly."""
    if QuantizedTensor is not None and isinstance(weight, QuantizedTensor):
        smoothing = getattr(layer, "pre_quant_scale", None)
        values = weight.dequantize()
        return values if smoothing is None else (values.float() * smoothing.to(values.device)).to(values.dtype)
    return weight.to(torch.bfloat16) if weight.dtype in FP8_DB else weight


def source_of(patcher, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, bias) in float of the layer of that name below the root, as loaded from the file."""
    full = prefix_of(patcher) + name
    layer = patcher.get_model_object(full)
    weight, bias = (pristine_parameter(patcher, f"{full}.{key}") for key in ("weight", "bias"))
    return float_values(layer, weight), None if bias is None else float_values(layer, bias)


def source_of_layers(patcher, names: Iterable[str]) -> str:
    """In words: what the layers of these names were rounded to before; empty for nothing."""
    weights = [pristine_weight(patcher, name) for name in names]
    found = {LAYOUTS.get(getattr(weight, "_layout_cls", ""), weight.dtype) for weight in weights} & FP8_DB.keys()
    return ", ".join(f"{str(dtype).removeprefix('torch.')} weights, whose own rounding (about {FP8_DB[dtype]} dB) stays"
                     for dtype in sorted(found, key=str))


def weight_of(layer: torch.nn.Module) -> Callable[[], torch.Tensor | None]:
    """Gives layer's weight in float for as long as the model keeps the layer: its memory and its moves stay the model's."""
    reference = weakref.ref(layer)

    def weight():
        alive = reference()
        return None if alive is None else float_values(alive, alive.weight)
    return weight
