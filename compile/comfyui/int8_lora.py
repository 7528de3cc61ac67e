"""A LoRA on an INT8 layer: added to the float weight that the layer was made from, and quantized once more. (Where dynamic VRAM streams
the layer core adds it to the dequantized weight.)

W + delta then costs what W did. Added to the dequantized weight instead, as where that float weight is gone, the noise of two
quantizations adds up: 3.0 dB in the weight, 1.75 dB at the layer's output. Core's own way also rounds stochastically, in the type it
computes in: 4.6 to 5.3 dB and 3.0 to 3.4 dB.
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable
from typing import Any

import comfy.float
import comfy.hooks
import comfy.model_management
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from ...int8.hadamard import rotate
from ...int8.kernels import reference
from ..artifacts.origins import is_comfyuis

try:
    from comfy.model_patcher import LowVramPatch
    from comfy.quant_ops import QuantizedTensor
except ImportError:  # a core without native quantization, or with another LowVramPatch, has no INT8 layers (core.py)
    LowVramPatch, QuantizedTensor = object, None

# A weight is what a float weight was quantized to if no value is further away, in steps. Half a step is the rounding; the rest is for
# another device's arithmetic (TF32 in the rotation).
MAX_STEPS = 0.6
# Rows that are quantized at a time: bounds the fp32 temporaries.
ROWS = 2048


class _SmoothedPatch(LowVramPatch):
    """A LoRA that dynamic VRAM adds to a smoothed weight, made for the weight as it was before."""

    def __init__(self, patch: LowVramPatch, pre_quant_scale: torch.Tensor):
        self.__dict__.update(patch.__dict__)
        self.pre_quant_scale = pre_quant_scale

    def __call__(self, weight):
        scale = self.pre_quant_scale.to(weight.device)
        return (super().__call__(weight * scale) / scale).to(weight.dtype)


class Int8Lora:
    """What ComfyUI asks of a layer to patch its weight. Mixed into its mixed-precision Linear; weight: QuantizedTensor in
    TensorWiseINT8Layout, stored as rotate(W / pre_quant_scale).

    source: gives the float weight [N, K] that the layer was made from, or None where it is gone. planned_sqnr: see
    artifact_layer.HasFloatWeight.
    """

    planned_sqnr = 0.0

    source: Callable[[], torch.Tensor | None] = staticmethod(lambda: None)
    # Dynamic VRAM seeds its stochastic rounding with string_to_seed(seed_key). Of "" that is 0: round to nearest.
    seed_key = property(lambda self: "", lambda self, _: None)

    def convert_weight(self, weight, inplace=False, **kwargs):
        """weight as the float W [N, K] that a LoRA was made for, in fp32; a new tensor (ModelPatcher.patch_weight_to_device)."""
        if not isinstance(weight, QuantizedTensor):
            return weight
        source = self.source()
        if source is not None:
            original = source.to(weight.device, torch.float32, copy=True)
            if self._is_quantized_from(weight, original):
                return original
        result = torch.empty(weight.shape, dtype=torch.float32, device=weight.device)
        group, scale = _group(weight), weight._params.scale.expand(weight.shape[0], 1)
        for rows in _row_slices(weight):
            result[rows] = rotate(weight._qdata[rows] * scale[rows], group)
        smoothing = self._smoothing(weight.device)
        return result if smoothing is None else result.mul_(smoothing)

    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, **kwargs):
        """The other way: weight [N, K] float, patched, becomes the layer's. Rounded to nearest, with scales of its own. inplace_update:
        until core writes over it what it has kept (hook LoRAs); then the weight of before is back (write_back_to_int8). Raises ValueError
        for one of another shape, in place."""
        own = self._parameters["weight"]
        if inplace_update and weight.shape != own.shape:
            raise ValueError(f"A hook LoRA makes a weight of {list(weight.shape)} out of one of {list(own.shape)}, which is not for hooks. "
                             "Load it with Load LoRA.")
        if isinstance(own, QuantizedTensor):
            patched = self._quantized(weight)
        else:  # another pack's, float, in its place
            patched = comfy.float.stochastic_rounding(weight, own.dtype, seed=seed or 0)
        if return_weight:
            return patched
        if inplace_update and not isinstance(own, QuantizedTensor):
            own.data.copy_(patched)
            return
        if inplace_update:
            _before.setdefault(self, []).append(own)
        self.weight = torch.nn.Parameter(patched, requires_grad=False)

    def float_weight(self, device: torch.device) -> torch.Tensor | None:
        """See artifact_layer.HasFloatWeight."""
        source, weight = self.source(), self._parameters["weight"]
        if source is None or self.weight_function or self.bias_function or not isinstance(weight, QuantizedTensor):
            return None
        original = source.to(device, torch.float32, copy=True)
        return original if self._is_quantized_from(weight.to(device), original) else None

    @contextlib.contextmanager
    def lora_in_weight(self, device: torch.device):
        """The layer with the LoRA of a partial load in its INT8 weight, instead of added to the dequantized weight at every call:
        computed once on device, kept where the layer's weight is for as long as the patch lives."""
        patches, weight = self.weight_function, self._parameters["weight"]
        if len(patches) != 1 or not isinstance(patches[0], LowVramPatch) or not isinstance(weight, QuantizedTensor):
            yield
            return
        patched = self.__dict__.setdefault("_patched_weights", weakref.WeakKeyDictionary())
        if patches[0] not in patched:
            patched[patches[0]] = _pinned(self._quantized(patches[0](self.convert_weight(weight.to(device)))).to(weight.device), patches[0])
        self._parameters["weight"], self.weight_function = patched[patches[0]], []
        try:
            yield
        finally:
            self._parameters["weight"], self.weight_function = weight, patches

    @property
    def weight_lowvram_function(self):
        """The LoRA where dynamic VRAM streams the layer (ModelPatcherDynamic.load), None for none."""
        return self.__dict__.get("_weight_lowvram_function")

    @weight_lowvram_function.setter
    def weight_lowvram_function(self, patch):
        smoothing = getattr(self, "pre_quant_scale", None)
        self.__dict__["_weight_lowvram_function"] = patch if patch is None or smoothing is None else _SmoothedPatch(patch, smoothing)

    def _smoothing(self, device: torch.device) -> torch.Tensor | None:
        scale = getattr(self, "pre_quant_scale", None)
        return None if scale is None else scale.to(device, torch.float32)

    def _stored(self, weight: torch.Tensor, group: int) -> torch.Tensor:
        """Rows [n, K] of W as they are before rounding."""
        smoothing = self._smoothing(weight.device)
        return rotate(weight.float() if smoothing is None else weight.float() / smoothing, group)

    def _is_quantized_from(self, weight: QuantizedTensor, original: torch.Tensor) -> bool:
        group, scale = _group(weight), weight._params.scale.expand(weight.shape[0], 1)
        return weight.shape == original.shape and all(
            ((self._stored(original[rows], group) / scale[rows]).sub_(weight._qdata[rows]).abs_().amax() <= MAX_STEPS).item()
            for rows in _row_slices(weight))

    def _quantized(self, weight: torch.Tensor) -> QuantizedTensor:
        group = _group(self.weight)
        q = torch.empty(weight.shape, dtype=torch.int8, device=weight.device)
        s = torch.empty((weight.shape[0], 1), dtype=torch.float32, device=weight.device)
        for rows in _row_slices(weight):
            q[rows], s[rows, 0] = reference.quant_rows(self._stored(weight[rows], group))
        params = dataclasses.replace(self.weight._params, scale=s, orig_shape=tuple(weight.shape))
        return QuantizedTensor(q, self.weight._layout_cls, params)


# What lay in an INT8 layer before what was put into it in place, the last one last.
_before: weakref.WeakKeyDictionary[torch.nn.Module, list[torch.nn.Parameter]] = weakref.WeakKeyDictionary()


@functools.cache
def write_back_to_int8() -> None:
    """Makes core give an INT8 layer the very weight of before where it writes back what it has kept of it: its own copy_ writes the values
    alone, as it writes the scales to params of the alias that .data is."""
    copy_to_param = comfy.utils.copy_to_param

    @functools.wraps(copy_to_param)
    def put_back(obj, attr, *args, **kwargs):
        parent, _, name = attr.rpartition(".")
        layer = comfy.utils.get_attr(obj, parent) if name == "weight" and parent else None
        if not isinstance(layer, Int8Lora) or not _before.get(layer):
            return copy_to_param(obj, attr, *args, **kwargs)
        layer._parameters["weight"] = _before[layer].pop()

    comfy.utils.copy_to_param = put_back


def prepare_for_hooks(patcher) -> None:
    """For hook LoRAs on INT8 layers: core caches what they make of a weight in float, which it then cannot write into an INT8 one; without
    its cache they are computed at each change of hooks. And core's float layers in a model that was made for quantized ones refuse them."""
    write_back_to_int8()
    patcher.hook_mode = comfy.hooks.EnumHookMode.MinVram
    for kind in {type(module) for module in patcher.model.modules() if hasattr(module, "set_weight")}:
        for base in kind.__mro__:
            if "set_weight" in vars(base) and base.__qualname__.startswith("mixed_precision_ops.") and is_comfyuis(base.__module__):
                _write_in_place(base)


def _write_in_place(kind: Any) -> None:
    """Makes a class of core's that asserts that weights are replaced write float ones in place, as core does for other float layers."""
    method = kind.set_weight
    if hasattr(method, "of_int8_compile"):  # a wrapper that another pack has put around it has this too
        return

    @functools.wraps(method)
    def set_weight(self, weight, inplace_update=False, seed=None, return_weight=False, *args, **kwargs):
        if not inplace_update or return_weight or isinstance(self.weight, QuantizedTensor):
            return method(self, weight, inplace_update, seed, return_weight, *args, **kwargs)
        self.weight.data.copy_(comfy.float.stochastic_rounding(weight, self.weight.dtype, seed=seed or 0))

    set_weight.of_int8_compile = True  # type: ignore[attr-defined]
    kind.set_weight = set_weight


def patch_as_core(kind: type) -> None:
    """Makes a class of ModelPatchers of another pack (GGUF's), which patches weights in its own way, patch those of INT8 layers in
    ComfyUI's; all others as before."""
    for base in kind.__mro__:
        if "patch_weight_to_device" in vars(base) and not is_comfyuis(base.__module__):
            _patch_by_layer(base)  # type: ignore[arg-type]


@functools.cache
def _patch_by_layer(kind: Any) -> None:
    method = kind.patch_weight_to_device

    @functools.wraps(method)
    def patch_weight_to_device(self, key, *args, **kwargs):
        layer = comfy.utils.get_attr(self.model, key.rpartition(".")[0])
        return (ModelPatcher.patch_weight_to_device if isinstance(layer, Int8Lora) else method)(self, key, *args, **kwargs)

    kind.patch_weight_to_device = patch_weight_to_device


def _group(weight: QuantizedTensor) -> int:
    return weight._params.convrot_groupsize if weight._params.convrot else 0


def _row_slices(weight: torch.Tensor) -> list[slice]:
    return [slice(i, i + ROWS) for i in range(0, weight.shape[0], ROWS)]


def _pinned(weight: QuantizedTensor, owner: LowVramPatch) -> QuantizedTensor:
    """weight in pinned memory while owner lives, as the layer's own is, if ComfyUI pins at all."""
    if comfy.model_management.pin_memory(weight):
        weakref.finalize(owner, comfy.model_management.unpin_memory, weight).atexit = False
    return weight
