"""Linear layers of other packs whose weights are tensors of a class of their own (GGUF): made ready to be an operation of compiled code."""
from __future__ import annotations

import functools
import logging
import sys
import threading
import types
import weakref
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
from torch.utils._python_dispatch import is_traceable_wrapper_subclass

from ...int8.plan import LayerPlan
from ..artifacts.foreign_layer import ForeignLayer, beside
from ..artifacts.origins import is_comfyuis
from ..errors import is_out_of_memory
from ..options import CompileOptions
from ..regions import find_regions
from ..report import first_lines
from .bypass_lora import is_own_forward
from .int8_layer import prefix_of
from .object_patches import model_of, object_of, undo_in_reverse

logger = logging.getLogger(__name__)
CHANGED = "where another pack has changed how they compute"

# Where unpacking a weight is many small kernels, which inductor makes one of.
COMPILES_UNPACKING = {"cuda"}
# layer of another pack -> what stands in its place: clones share it, and what was compiled for it.
_ADAPTED: weakref.WeakKeyDictionary[torch.nn.Module, ForeignLayer] = weakref.WeakKeyDictionary()
_calls = threading.local()
_COMPILES: dict[tuple, bool] = {}  # (pack, type, dtype, device) -> false where torch has failed to
_UNPACKS = "int8_compile_unpacks"  # an attribute of layers: whether an image may wait for that


def adapt_layers(patcher, target: str, options: CompileOptions) -> None:
    """Puts object patches on patcher (a clone): layers that compute as those that they stand for, with the same parameters. Not with CUDA
    graphs, which would replay the LoRA of the call that was recorded; nor with convolutions of such weights in what is compiled, as torch
    2.11 cannot compile a graph that has both these and operations."""
    root = model_of(patcher).get_submodule(target)
    compiled = (module for region in find_regions(root, options.blocks_only) for block in region.modules for module in block.modules())
    if options.on_device(patcher.load_device)[0].cuda_graphs or any(
            _has_foreign_tensors(module) and not isinstance(module, torch.nn.Linear) for module in compiled):
        return
    prefix = f"{target}." if target else ""
    for name, _ in root.named_modules():
        name = (prefix + name).removesuffix(".")
        layer = object_of(patcher, name)
        if name in patcher.object_patches or isinstance(layer, ForeignLayer) or not _is_foreign(layer):
            continue
        if layer not in _ADAPTED or not _ADAPTED[layer].is_on(patcher.load_device):
            kind = _class_for(type(layer))  # type: ignore[arg-type]
            _ADAPTED[layer] = beside(layer, kind, patcher.load_device)
        vars(layer)[_UNPACKS] = not options.background
        patcher.add_object_patch(name, _ADAPTED[layer])
        undo_in_reverse()


def _is_foreign(layer: torch.nn.Module) -> bool:
    return isinstance(layer, torch.nn.Linear) and not is_comfyuis(type(layer).__module__) and _has_foreign_tensors(layer)


def _has_foreign_tensors(layer: torch.nn.Module) -> bool:
    return any(is_of_a_pack(tensor) for tensor in layer._parameters.values() if tensor is not None)


def as_it_computes(patcher, plan: LayerPlan) -> LayerPlan:
    """plan, float where another pack has put something around the layer, or its own in the place of its forward: an INT8 layer has its
    weights and nothing else of it."""
    name = prefix_of(patcher) + plan.name
    layer, forward = object_of(patcher, name), object_of(patcher, f"{name}.forward")
    below = {key.removeprefix(f"{name}.") for key in patcher.object_patches if key.startswith(f"{name}.")}
    changed = below - {"weight", "bias"} or not is_own_forward(layer, forward) or computes_as_a_pack_says(layer)
    if plan.method != "float" and (changed or layer._forward_hooks or layer._forward_pre_hooks):
        return replace(plan, method="float", pre_quant_scale=None, reason=CHANGED)
    return plan


def computes_as_a_pack_says(layer: torch.nn.Module) -> bool:
    """Whether its class is neither torch's nor ComfyUI's, nor one that multiplies with what unpacking() knows."""
    return _is_class_of_a_pack(type(layer)) and not _has_foreign_tensors(layer)


def is_of_a_pack(tensor: torch.Tensor) -> bool:
    """Whether its class is neither torch's, nor ComfyUI's, nor one that torch can trace."""
    return _is_class_of_a_pack(type(tensor)) and not is_traceable_wrapper_subclass(tensor)


def _is_class_of_a_pack(kind: type) -> bool:
    return not (f"{kind.__module__}.".startswith("torch.") or is_comfyuis(kind.__module__))


@functools.cache
def _class_for(kind: Any) -> type:
    bases = (_GgufLayer, kind) if hasattr(kind, "get_weight") else (ForeignLayer, kind)
    return type(kind.__name__, bases, {"__module__": __name__})


class _GgufLayer(ForeignLayer):
    """One of ComfyUI-GGUF, which asks get_weight(tensor, dtype) for its weight with the LoRA."""

    def run(self, x: torch.Tensor) -> torch.Tensor:
        before = getattr(_calls, "unpacks", False)
        _calls.unpacks = x.device.type in COMPILES_UNPACKING and vars(self)[_UNPACKS]
        try:
            return super().run(x)
        finally:
            _calls.unpacks = before

    def get_weight(self, tensor, dtype):
        unpacked = _unpacked(self, tensor, dtype) if getattr(_calls, "unpacks", False) and tensor is not None else None
        return super().get_weight(tensor if unpacked is None else _Unpacked(unpacked, tensor), dtype)


class _Unpacked:
    """A weight of ComfyUI-GGUF as float values, as far as get_weight asks."""

    tensor_type = None  # not packed

    def __init__(self, values: torch.Tensor, packed):
        self.values = values
        self.device, self.shape = values.device, values.shape
        self.tensor_shape = values.shape
        self.patches = getattr(packed, "patches", [])

    def to(self, dtype: torch.dtype) -> torch.Tensor:
        return self.values.to(dtype)


def _unpacked(layer, tensor, dtype: torch.dtype) -> torch.Tensor | None:
    """None where it is not packed, or not by a type that torch can compile the unpacking of. Compiled in the thread that samples: where
    one thread has compiled a function and another compiles it again, torch 2.11 crashes."""
    pack = unpacking(type(layer))  # type: ignore[arg-type]
    if pack is None or pack.is_torch_compatible(tensor) or tensor.tensor_type not in pack.dequantize_functions:
        return None
    wanted = dtype if layer.dequant_dtype == "target" else layer.dequant_dtype
    key = pack, tensor.tensor_type, wanted, tensor.device.type
    if not _COMPILES.get(key, True):
        return None
    try:
        return _compiled(key)(tensor.data.as_subclass(torch.Tensor), tensor.tensor_type, tuple(tensor.tensor_shape), wanted)
    except Exception as error:
        if is_out_of_memory(error):
            raise
        _COMPILES[key] = False
        logger.warning("INT8 Compile: unpacking %s weights cannot be compiled, and stays slower: %s",
                       getattr(tensor.tensor_type, "name", tensor.tensor_type), first_lines(str(error)))
        return None


@functools.cache
def unpacking(kind: Any) -> Any:
    """The module with dequantize(data, type, shape, dtype) of the pack that a class of layers or of tensors is from; None where its pack
    has none."""
    for base in kind.__mro__:
        function = getattr(sys.modules.get(base.__module__), "dequantize_tensor", None)
        module = sys.modules.get(getattr(function, "__module__", None) or "")
        if all(hasattr(module, name) for name in ("dequantize", "dequantize_functions", "is_torch_compatible")):
            return module
    return None


@functools.cache
def _compiled(key: tuple) -> Callable:
    """The pack's dequantize for one type of weight, for any size, as a function of its own: torch allows one so many types. On CUDA each
    step is rounded as eager rounds it."""
    function = key[0].dequantize
    own = types.FunctionType(function.__code__.replace(co_name="dequantize_compiled"), function.__globals__, function.__name__,
                             function.__defaults__, function.__closure__)
    return torch.compile(own, dynamic=True, fullgraph=True, options={"emulate_precision_casts": True})
