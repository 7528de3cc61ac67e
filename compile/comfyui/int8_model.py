"""The INT8 layers of a model: put in, adopted from a file, and kept apart from those of other models."""
from __future__ import annotations

import logging
import re
import uuid
import weakref
from collections import Counter
from collections.abc import Container, Iterable
from typing import Any

import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP

from ...int8.echo import echo
from ...int8.hadamard import check_group
from ...int8.kernels.registry import BY_NAME
from ...int8.options import Int8Options
from ...int8.plan import LayerPlan
from ...int8.quantize import drop_kept, eligible_linears
from ...int8.report import ProgressCallback, no_progress
from ...int8.shared_input import share_inputs
from . import core as comfy_core
from .bypass_lora import patch_bypass_loras, state_without_bypass
from .foreign_layers import is_of_a_pack
from .int8_layer import (
    _LAYERS,
    INT8_LAYOUT,
    LAYER_KEY,
    QUANT_FORMAT,
    _connect_kernels,
    _int8_layer,
    _Int8Forward,
    _linear_class,
    can_multiply_int8,
    compute_dtype_of,
    is_encoder,
    patch_linear_input_act,
    prefix_of,
    require_native_int8,
    root_of,
)
from .int8_lora import patch_as_core, prepare_for_hooks
from .int8_merge import patch_merging_and_saving
from .int8_source import pristine_weight, rounded_as, source_of, unpatched, values_of, weight_of
from .object_patches import object_of, undo_in_reverse

try:
    from comfy import quant_ops
except ImportError:  # cores without native quantization: the compile nodes work there, quantizing says what it needs
    quant_ops = None


logger = logging.getLogger(__name__)


def _origin(patcher, name: str) -> torch.nn.Module | torch.Tensor:
    """What the weight of a layer below the root is from: the layer, or the weight alone where that is patched by itself. Its
    identity stays while weights are moved, patched with a LoRA, and swapped by other clones."""
    layer = prefix_of(patcher) + name
    weight = f"{layer}.weight"
    return patcher.object_patches[weight] if weight in patcher.object_patches else object_of(patcher, layer)


def _check_float(name: str, weight: torch.Tensor):
    try:
        rounded_as(weight)
    except ValueError as kind:
        if is_of_a_pack(weight):
            raise ValueError(f"INT8 Quantize Model: layer '{name}' is one of another pack's loader ({type(weight).__name__}), which keeps "
                             "its values to itself. Load the model from a bf16, fp16, fp32 or fp8 checkpoint.") from None
        raise ValueError(f"INT8 Quantize Model: layer '{name}' is already quantized ({kind}). "
                         "Load the model from a bf16, fp16, fp32 or fp8 checkpoint.") from None


def layers_to_quantize(patcher, options: Int8Options, planned: Container[str] = ()) -> list[str]:
    """Names below the root (see root_of) of the layers that are eligible, float, not planned to be INT8 already and not in keep_layers;
    none for a model that was loaded in INT8.

    Raises ValueError for a model without such layers, a weight that is quantized already, a kernel that cannot run on this device, a
    keep_layers glob that matches nothing; RuntimeError where ComfyUI has no native INT8.
    """
    require_native_int8()
    if options.kernel in BY_NAME and (reason := BY_NAME[options.kernel].refusal(patcher.load_device)):
        raise ValueError(f"INT8 Quantize Model: {reason}. Set kernel to auto.")
    root, prefix = root_of(patcher), prefix_of(patcher)
    if native_layers(patcher):
        return []  # what its file left in high precision was left so on purpose
    eligible = eligible_linears(root)
    names = [n for n in eligible if n not in planned and not is_int8(object_of(patcher, f"{prefix}{n}.weight"))]
    if not names:
        why = "all of its layers are INT8 already, or wait for it" if eligible else "none of float type in its blocks"
        raise ValueError(f"INT8 Quantize Model: this model has no Linear layers to quantize ({type(root).__name__}: {why}). "
                         "Connect it without this node.")
    names = drop_kept(names, options.keep_layers, prefix)
    for name in names:
        _check_float(name, pristine_weight(patcher, name))
    return names


def bytes_saved(patcher, name: str, layer: torch.nn.Module) -> int:
    """By layer, of INT8, in the place of the float layer of that name below the root."""
    return pristine_weight(patcher, name).nbytes - layer.weight.nbytes - layer.weight._params.scale.nbytes


def take_off(patcher, name: str) -> torch.nn.Module:
    """Takes the INT8 layer of that name off patcher (a clone), and puts back what other packs had put into the float layer. Returns it."""
    layer = patcher.object_patches.pop(name)
    patcher.object_patches.update(getattr(layer, "taken", ()))
    return layer


def _prepare_core() -> None:
    """What ComfyUI is taught of INT8 layers before there are any."""
    _connect_kernels()
    patch_merging_and_saving()
    patch_bypass_loras()
    patch_linear_input_act()


def put_int8_layers(patcher, plans: Iterable[LayerPlan], kernel: str, on_progress: ProgressCallback = no_progress) -> None:
    """Makes the planned layers of patcher (a clone) INT8, as object patches: the model it was cloned from keeps its weights.

    Raises ValueError for a weight with NaN or infinity.
    """
    _prepare_core()
    patch_as_core(type(patcher))
    prepare_for_hooks(patcher)
    prefix, compute_dtype = prefix_of(patcher), compute_dtype_of(patcher)
    layers = _LAYERS.setdefault(patcher.model, weakref.WeakValueDictionary())
    plans = [plan for plan in plans if plan.method != "float"]
    progress = comfy.utils.ProgressBar(len(plans))
    patches, saved = {}, 0
    for number, plan in enumerate(plans):
        on_progress(None, f"quantizing {number}/{len(plans)}")
        comfy.model_management.throw_exception_if_processing_interrupted()
        key = (plan.name, plan.method, plan.pre_quant_scale, kernel, compute_dtype, weakref.ref(_origin(patcher, plan.name)))
        layer, values = layers.get(key), values_of(patcher, plan.name)
        if layer is None or layer.source_values != values or not is_int8(layer.weight):  # another pack has put or written others there
            try:
                layer = _int8_layer(*source_of(patcher, plan.name), plan, kernel, patcher.load_device, patcher.offload_device,
                                    compute_dtype)
            except ValueError as error:
                raise ValueError(f"INT8 Quantize Model: layer '{plan.name}': {error}. Check the checkpoint file.") from error
            layer.source = weight_of(object_of(patcher, prefix + plan.name))
            layer.source_values = values
            layer.planned_sqnr = plan.sqnr.get(plan.method, 0.0)
            layers[key] = layer
        patches[prefix + plan.name] = layer
        saved += bytes_saved(patcher, plan.name, layer)
        progress.update(1)
    if not patches:
        return
    _share_inputs(patches)
    size = patcher.model_size()
    for name, layer in patches.items():
        # What another pack has put into the float layer, and this one is made of: in its place in the order, a later one of that name would
        # be put into the float layer, too.
        layer.taken = tuple((key, patcher.object_patches.pop(key)) for key in (f"{name}.weight", f"{name}.bias")
                            if key in patcher.object_patches)
        patcher.add_object_patch(name, layer)
    keep_apart(patcher)
    # A new identity of the weights: ComfyUI then reloads when it changes between this model and its other clones.
    patcher.patches_uuid = uuid.uuid4()
    patcher.size = size - saved
    methods = Counter(plan.method for plan in plans)
    logger.info("INT8: %d of %d layers quantized (%s), weights %.1f -> %.1f MB", len(plans), len(eligible_linears(root_of(patcher))),
                ", ".join(f"{count} {method}" for method, count in methods.items()), size / 2**20, patcher.size / 2**20)


def _share_inputs(layers: dict[str, torch.nn.Module]):
    def alike(layer):
        params, smoothing = layer.weight._params, getattr(layer, "pre_quant_scale", None)
        return layer.in_features, params.convrot and params.convrot_groupsize, smoothing is not None and id(smoothing)
    share_inputs((name, layer, alike(layer)) for name, layer in layers.items())


# What ComfyUI notes on a layer that it has loaded, for the model that the layer is then part of: its place in the memory of dynamic VRAM,
# what of it is there, how it is cast, the LoRA that is added on the way.
_NOTES_OF_A_LOAD = re.compile(r"_v(_|$)|_pin|_prefetch$|_patched_weights$|(.*_)?(lowvram|cast|patched)_|(weight|bias)_function$"
                              r"|shared_input$|shares_input$")


def keep_apart(patcher) -> None:
    """From now on each clone of patcher that is of another model (without dynamic VRAM, on another GPU) gets its own of what patcher's
    object patches hold weights in: ComfyUI loads, moves and patches the weights of two models at different times. And what other packs
    patch in these layers is taken off them."""
    undo_in_reverse()
    if own_weights not in patcher.get_callbacks(CallbacksMP.ON_CLONE, LAYER_KEY):
        patcher.add_callback_with_key(CallbacksMP.ON_CLONE, LAYER_KEY, own_weights)
        patcher.add_callback_with_key(CallbacksMP.ON_PRE_RUN, LAYER_KEY, patch_linear_input_act)


def own_weights(patcher, clone) -> None:
    """Gives clone INT8 layers and parameters of its own in the place of those that patcher's object patches name, if it is of another
    model. The memory of what is not loaded stays shared. Clones of one model get the same layers."""
    if clone.model is patcher.model:
        return
    layers = _LAYERS.setdefault(clone.model, weakref.WeakValueDictionary())
    copies, order = {}, list(clone.object_patches)
    for name, value in patcher.object_patches.items():
        if clone.object_patches.get(name) is not value:
            continue
        if isinstance(value, _Int8Forward):
            key = (name, weakref.ref(value))
            copy = layers.get(key)
            if copy is None:
                copy = layers[key] = _copy_of_layer(patcher, name, value)
                if "source" in vars(value):
                    del clone.object_patches[name]
                    copy.source = weight_of(object_of(clone, name))
            clone.object_patches[name] = copies[name] = copy
        elif isinstance(value, torch.nn.Parameter):
            clone.object_patches[name] = torch.nn.Parameter(value.detach(), requires_grad=False)
    clone.object_patches = {name: clone.object_patches[name] for name in order}
    _share_inputs(copies)


def _copy_of_layer(patcher, name: str, layer: torch.nn.Module) -> torch.nn.Module:
    """layer, which patcher has in the place name, as it is when nobody has loaded or patched it."""
    copy = object.__new__(type(layer))
    copy.__dict__ = {key: value for key, value in state_without_bypass(layer).items() if not _NOTES_OF_A_LOAD.match(key)}
    copy._parameters, copy._buffers = {}, dict(layer._buffers)
    copy.weight_function, copy.bias_function = [], []
    is_loaded = comfy.utils.get_attr(patcher.model, name) is layer
    for key, parameter in layer._parameters.items():
        parameter = unpatched(patcher, f"{name}.{key}", parameter) if is_loaded else parameter
        if parameter is not None and parameter.is_inference() and not torch.is_inference_mode_enabled():
            parameter = parameter.clone()
        copy._parameters[key] = None if parameter is None else torch.nn.Parameter(parameter.detach(), requires_grad=False)
    return copy


def is_int8(weight) -> bool:
    return isinstance(weight, quant_ops.QuantizedTensor) and weight._layout_cls == INT8_LAYOUT


def _current_layers(patcher) -> dict[str, torch.nn.Module]:
    """{name below the root: layer} of those that have a weight, with patcher's object patches."""
    return {name: layer for name, layer in root_of(patcher).named_modules() if name and hasattr(layer, "weight")}


def int8_layers(patcher) -> dict[str, tuple[int, bool]]:
    """{name below the root: (its ConvRot group or 0, whether it is smoothed)} of patcher's INT8 layers."""
    if QUANT_FORMAT not in getattr(quant_ops, "QUANT_ALGOS", {}):
        return {}
    params = {name: (layer, layer.weight._params) for name, layer in _current_layers(patcher).items() if is_int8(layer.weight)}
    return {name: (p.convrot_groupsize if p.convrot else 0, getattr(layer, "pre_quant_scale", None) is not None)
            for name, (layer, p) in params.items()}


def native_layers(patcher) -> list[str]:
    """Names below the root of what ComfyUI's own loader made with an INT8 weight: Linears, expert banks, embeddings."""
    return [n for n, layer in _current_layers(patcher).items() if is_int8(layer.weight) and not isinstance(layer, _Int8Forward)]


def _check_layer(name: str, layer: torch.nn.Module):
    """What core's loader takes over from a file unseen, and kernels would read past the end of."""
    params, shape = layer.weight._params, (layer.out_features, layer.in_features)
    found, scale, bias = layer.weight._qdata, params.scale, layer.bias
    if found.dtype != torch.int8 or tuple(found.shape) != shape:
        raise ValueError(f"INT8 Quantize Model: layer '{echo(name)}' has a weight of {echo(list(found.shape))} ({found.dtype}), not int8 "
                         f"of {list(shape)}. The file is damaged.")
    for what, tensor, sizes in (("weight_scale", scale, (1, shape[0])), ("bias", bias, shape[:1])):
        if tensor is not None and not (tensor.is_floating_point() and tensor.numel() in sizes):
            raise ValueError(f"INT8 Quantize Model: layer '{echo(name)}' has a {what} of {echo(list(tensor.shape))} ({tensor.dtype}), "
                             f"which is none of {shape[0]} rows. The file is damaged.")
    if params.convrot:
        try:
            check_group(params.convrot_groupsize)
        except ValueError as error:
            raise ValueError(f"INT8 Quantize Model: layer '{echo(name)}': {error}. The file is damaged.") from None
        if layer.weight.shape[-1] % params.convrot_groupsize:
            raise ValueError(f"INT8 Quantize Model: layer '{echo(name)}' is rotated in groups of {params.convrot_groupsize}, which do not "
                             f"divide its {layer.weight.shape[-1]} channels. The file is damaged.")


def _is_core_linear(layer: torch.nn.Module) -> bool:
    """Whether layer is core's mixed-precision Linear and nothing derived from it. (Core makes a new class of it for every model.)"""
    linear = comfy.ops.mixed_precision_ops().Linear
    return (type(layer).__module__, type(layer).__qualname__) == (linear.__module__, linear.__qualname__)


def adopt_native_layers(patcher, kernel: str):
    """Gives the INT8 Linear layers of a model that was loaded from a native INT8 file our kernels, as object patches on patcher, which is
    returned: the same weights, nothing is quantized again. Expert banks and embeddings stay core's, as do all layers on a ComfyUI that
    the pack does not know."""
    if not comfy_core.usable(comfy_core.INT8):
        return patcher
    _prepare_core()
    prefix, compute_dtype = prefix_of(patcher), compute_dtype_of(patcher)
    adopted = {}
    for name in native_layers(patcher):
        layer = object_of(patcher, prefix + name)
        if not _is_core_linear(layer):
            continue
        _check_layer(name, layer)
        ours: Any = object.__new__(_linear_class(compute_dtype))
        ours.__dict__ = {**state_without_bypass(layer), "_parameters": dict(layer._parameters), "_buffers": dict(layer._buffers)}
        ours.is_full_precision = ours.__dict__.pop("_full_precision_mm", False)
        if is_encoder(patcher):  # core makes it so of every text encoder, whatever its file says
            ours.is_full_precision = bool(getattr(layer, "_full_precision_mm_config", False)) or not can_multiply_int8(patcher.load_device)
        ours.kernel = kernel
        adopted[prefix + name] = ours
    _share_inputs(adopted)
    for name, ours in adopted.items():
        patcher.add_object_patch(name, ours)
    keep_apart(patcher)
    if adopted:
        prepare_for_hooks(patcher)
        patcher.patches_uuid = uuid.uuid4()  # ComfyUI then puts them in place of the layers that it loaded
        logger.info("INT8: %d layers were INT8 in the file; their weights stay, kernel %s runs them", len(adopted), kernel)
    return patcher
