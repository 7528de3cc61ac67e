"""Blocks whose weights are not on the device (partial offload, dynamic VRAM).

ComfyUI fetches such a weight inside the layer's forward: compiled, that is a graph for every layer that is offloaded, patched, or
moved since. Here the weights of a block are fetched just before it is called, and its layers look as if they had been there all the
time: the same graph serves every block, however the model is split. Costs the memory of one block's weights instead of one layer's.
"""
from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable

import comfy.ops
import torch

from ..int8 import comfy_core
from ..int8.comfy_lora import Int8Lora

# What ComfyUI sets on a layer that it offloads (ModelPatcher.load).
_STATE = ("comfy_cast_weights", "weight_function", "bias_function")
# layer -> two empty lists, the same at each call: what a block depends on is compared by identity first (describe.Watch).
_NO_PATCHES: weakref.WeakKeyDictionary[torch.nn.Module, tuple[list, list]] = weakref.WeakKeyDictionary()


def is_offloaded(model: torch.nn.Module) -> bool:
    """Whether ComfyUI keeps some of a patched model's weights elsewhere: low VRAM or dynamic VRAM."""
    return bool(getattr(model, "model_lowvram", False) or getattr(model, "dynamic_vbars", None))


def around_block(block: Callable) -> Callable:
    """The call of a block (engine._BlockCall) with the block's weights fetched; as it is on a ComfyUI that the pack does not know."""
    if not comfy_core.usable(comfy_core.OFFLOAD):
        return block
    layers = [m for m in block.module.modules() if isinstance(m, comfy.ops.CastWeightBiasOp)]

    def call(*args, **kwargs):
        x = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.is_floating_point())
        with contextlib.ExitStack() as fetched:
            for layer in layers:
                if isinstance(layer, Int8Lora):
                    fetched.enter_context(layer.lora_in_weight(x.device))
                fetched.enter_context(_fetched(layer, x))
            return block(*args, **kwargs)
    return call


@contextlib.contextmanager
def _fetched(layer, x: torch.Tensor):
    """layer with its weight and bias on x's device and its patches (a LoRA) applied, as comfy.ops.cast_bias_weight does it."""
    parameters = {}
    elsewhere = any(p.device != x.device for p in layer._parameters.values() if p is not None)
    patched = bool(layer.weight_function or layer.bias_function)
    if layer._parameters.get("weight") is not None and (elsewhere or patched or hasattr(layer, "_v")):
        # A layer that casts its weights anyway (fp8) is patched in the type it computes in.
        dtype, bias_dtype = ((x.dtype, x.dtype) if patched and type(layer).comfy_cast_weights else
                             (layer.weight.dtype, layer.weight.dtype if layer.bias is None else layer.bias.dtype))
        weight, bias, held = comfy.ops.cast_bias_weight(layer, dtype=dtype, device=x.device, bias_dtype=bias_dtype, offloadable=True,
                                                        compute_dtype=x.dtype, want_requant=isinstance(layer, Int8Lora))
        if held[0] is not None or hasattr(layer, "_v"):
            # These lie in a buffer that the next layer's fetch writes over.
            weight, bias = weight.clone(), None if bias is None else bias.clone()
        comfy.ops.uncast_bias_weight(layer, weight, bias, held)
        parameters = {"weight": weight, "bias": bias}
    state = {name: layer.__dict__.pop(name) for name in _STATE if name in layer.__dict__}
    before = {name: layer._parameters[name] for name in parameters}
    try:
        layer.weight_function, layer.bias_function = _no_patches(layer)  # as on a layer that was loaded whole
        for name, tensor in parameters.items():
            layer._parameters[name] = None if tensor is None else torch.nn.Parameter(tensor, requires_grad=False)
        yield
    finally:
        layer._parameters.update(before)
        for name in _STATE:
            layer.__dict__.pop(name, None)
        layer.__dict__.update(state)


def _no_patches(layer) -> tuple[list, list]:
    lists = _NO_PATCHES.get(layer)
    if lists is None or any(lists):  # somebody has put a patch there
        lists = _NO_PATCHES[layer] = [], []
    return lists
