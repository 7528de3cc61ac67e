"""Blocks whose weights are not on the device (partial offload, dynamic VRAM).

ComfyUI fetches such a weight inside the layer's forward: compiled, that is a graph for every layer that is offloaded, patched, or
moved since. Here the weights of a block are fetched just before it is called, and its layers look as if they had been there all the
time: the same graph serves every block, however the model is split. Costs the memory of one block's weights instead of one layer's.

With dynamic VRAM what is resident is pinned where it lies and used there; the rest of the block is fetched at once, as core's own prefetch
of a block does. Nothing is copied from there.
"""
from __future__ import annotations

import contextlib
import inspect
import weakref
from collections.abc import Callable

import comfy.model_management
import comfy.ops
import torch

from ..artifacts.foreign_layer import ForeignLayer
from . import core as comfy_core
from .int8_lora import Int8Lora

# What ComfyUI sets on a layer that it offloads (ModelPatcher.load), and of its place in dynamic VRAM (ModelPatcherDynamic.load).
_STATE = ("comfy_cast_weights", "weight_function", "bias_function", "_v", "_v_signature", "_v_weight", "_v_bias", "_prefetch")
# Core's own prefetch of a block (comfy.model_prefetch).
_PREFETCH = ("cast_modules_with_vbar", "resolve_cast_module_with_vbar")
# layer -> two empty lists, the same at each call: what a block depends on is compared by identity first (artifacts.watch.Watch).
_NO_PATCHES: weakref.WeakKeyDictionary[torch.nn.Module, tuple[list, list]] = weakref.WeakKeyDictionary()


def is_offloaded(model: torch.nn.Module) -> bool:
    """Whether ComfyUI keeps some of a patched model's weights elsewhere: low VRAM or dynamic VRAM."""
    return bool(getattr(model, "model_lowvram", False) or getattr(model, "dynamic_vbars", None))


def around_block(block: Callable) -> Callable:
    """The call of a block (block_calls.py) with the block's weights fetched; as it is on a ComfyUI that the pack does not know."""
    if not comfy_core.usable(comfy_core.OFFLOAD):
        return block
    layers = [m for m in block.module.modules() if isinstance(m, comfy.ops.CastWeightBiasOp) and not isinstance(m, ForeignLayer)]

    def call(*args, **kwargs):
        x = next(v for v in (*args, *kwargs.values()) if isinstance(v, torch.Tensor) and v.is_floating_point())
        with contextlib.ExitStack() as fetched:
            fetched.enter_context(_pinned(layers, x.device))
            for layer in layers:
                if isinstance(layer, Int8Lora):
                    fetched.enter_context(layer.lora_in_weight(x.device))
                fetched.enter_context(_fetched(layer, x))
            return block(*args, **kwargs)
    return call


@contextlib.contextmanager
def _pinned(layers: list, device: torch.device):
    """What layers, of one block, have in dynamic VRAM stays there until the block is done; what is not there is fetched, each to a place of
    its own. Where core has done so before the block was called, it is left to core."""
    own = [layer for layer in layers if hasattr(layer, "_v") and not hasattr(layer, "_prefetch")]
    if (not own or comfy.model_management.is_device_cpu(device) or not comfy_core.usable(comfy_core.PREFETCH)
            or not all(hasattr(comfy.ops, name) for name in _PREFETCH)):
        yield
        return
    stream = None
    try:
        stream = comfy.ops.cast_modules_with_vbar(own, None, device, None, comfy.model_management.device_supports_non_blocking(device))
        comfy.model_management.sync_stream(device, stream)
        yield
    finally:
        for layer in own:
            prefetch = layer.__dict__.pop("_prefetch", None)
            for key in ("weight", "bias"):
                if prefetch is not None and (patch := getattr(layer, f"{key}_lowvram_function", None)) is not None:
                    patch.clear_prepared()
            if prefetch is not None and prefetch["signature"] is not None:
                comfy.ops.uncast_bias_weight(layer, None, None, (None, device, None))  # unpins
        if stream is not None:
            stream.wait_stream(comfy.model_management.current_stream(device))


@contextlib.contextmanager
def _fetched(layer, x: torch.Tensor):
    """layer with its weight and bias on x's device and its patches (a LoRA) applied, as comfy.ops.cast_bias_weight does it."""
    parameters = {}
    elsewhere = any(p.device != x.device for p in layer._parameters.values() if p is not None)
    patched = bool(layer.weight_function or layer.bias_function)
    if layer._parameters.get("weight") is not None and (elsewhere or patched or hasattr(layer, "_v")):
        # A layer that casts its weights anyway (fp8) is patched in the type it computes in.
        dtype, bias_dtype = ((x.dtype, x.dtype) if patched and type(layer).comfy_cast_weights else
                             (_dtype_of(layer.weight), _dtype_of(layer.weight if layer.bias is None else layer.bias)))
        if hasattr(layer, "_prefetch"):
            weight, bias = comfy.ops.resolve_cast_module_with_vbar(layer, dtype, x.device, bias_dtype, x.dtype, isinstance(layer, Int8Lora))
        else:
            weight, bias, held = comfy.ops.cast_bias_weight(layer, dtype=dtype, device=x.device, bias_dtype=bias_dtype, offloadable=True,
                                                            **_known(compute_dtype=x.dtype, want_requant=isinstance(layer, Int8Lora)))
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


def _known(**arguments) -> dict:
    """Those of arguments that this ComfyUI's cast_bias_weight takes: 0.8.0's has neither INT8 weights nor dynamic VRAM to ask for."""
    parameters = inspect.signature(comfy.ops.cast_bias_weight).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):  # another pack's wrapper
        return arguments
    return {name: value for name, value in arguments.items() if name in parameters}


def _dtype_of(weight: torch.Tensor) -> torch.dtype:
    """In dynamic VRAM, which has it as the model wants it, whatever the file has."""
    return getattr(weight, "_model_dtype", weight.dtype)


def _no_patches(layer) -> tuple[list, list]:
    lists = _NO_PATCHES.get(layer)
    if lists is None or any(lists):  # somebody has put a patch there
        lists = _NO_PATCHES[layer] = [], []
    return lists
