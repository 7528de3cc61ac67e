"""INT8 in ComfyUI: its own QuantizedTensor inside its own mixed-precision Linear, run by our kernels.

Core's LoRA, offloading, dynamic VRAM, state_dict and checkpoint format then work as they are. Needs a core with native
INT8 (TensorWiseINT8Layout, 0.26.0 or later).
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import inspect
import logging
import re
import uuid
import weakref
from collections import Counter
from collections.abc import Callable, Container, Iterable

import comfy.model_management
import comfy.ops
import comfy.utils
import torch
from comfy.patcher_extension import CallbacksMP

from ...int8.echo import echo
from ...int8.hadamard import check_group
from ...int8.kernels import autotune, ops
from ...int8.kernels.reference import activation
from ...int8.options import Int8Options
from ...int8.plain_layer import ArtefactLinear
from ...int8.plan import LayerPlan
from ...int8.quantize import drop_kept, eligible_linears, quantize_weight
from ...int8.report import Tell, tell_nobody
from ...int8.shared_input import SharedInput, share_inputs
from . import core as comfy_core
from .int8_lora import Int8Lora
from .int8_merge import patch_merging_and_saving
from .recording import outside_recording

try:
    from comfy import quant_ops
except ImportError:  # cores without native quantization: the compile nodes work there, quantizing says what it needs
    quant_ops = None

logger = logging.getLogger(__name__)

KEY = "int8_compile"
PREFIX = "diffusion_model."
LAYOUT = "TensorWiseINT8Layout"
FORMAT = "int8_tensorwise"
# Kernels besides those of ops.implementation: core's own, and a float multiplication with the dequantized weight.
KITCHEN, FULL_PRECISION = "comfy_kitchen", "full_precision"
# What a quantizer computes before it quantizes.
FUSED_ACTIVATIONS = ("gelu_tanh", "swiglu")
# BaseModel -> {(layer, method, smoothing, kernel, dtype, what its weight is from): INT8 layer}: nodes that run again (a LoRA changed
# upstream) reuse the layers that are still alive, so that weights are not quantized twice and compiled code keeps serving. For a clone onto
# another model, see own_weights: {(name, layer that it is a copy of): INT8 layer}.
_LAYERS: weakref.WeakKeyDictionary[torch.nn.Module, weakref.WeakValueDictionary] = weakref.WeakKeyDictionary()


def require_native_int8(node: str = "INT8 Quantize Model"):
    """Raises RuntimeError where ComfyUI has no native INT8."""
    if FORMAT not in getattr(quant_ops, "QUANT_ALGOS", {}):
        raise RuntimeError(f"{node} needs ComfyUI 0.26.0 or later (native INT8 support). "
                           "Update ComfyUI; the compile nodes work on this version too.")


class _Int8Forward(Int8Lora):
    """The multiplication of a mixed-precision Linear through our ops.

    kernel: see Int8Options. A smoothed layer has a pre_quant_scale [K] fp32, which the input is multiplied with; core's own forward does
    so too. shared_input, shares_input: see shared_input.py.
    """

    kernel = "auto"
    shared_input: SharedInput | None = None
    shares_input: bool | None = None
    # Core is to multiply in full precision: the file says so, or the device cannot multiply INT8.
    is_full_precision = False

    @property
    def _full_precision_mm(self) -> bool:
        """What core asks before it multiplies with a layer's INT8 weight past the layer's forward (linear_input_act, fused norms and
        FFNs): True, for only forward knows the smoothing and our kernels. Core's own forward asks too: where that runs, the truth."""
        left_to_core = self.kernel == KITCHEN and getattr(self, "pre_quant_scale", None) is None
        return self.is_full_precision or not (left_to_core or comfy.model_management.in_training)

    @_full_precision_mm.setter
    def _full_precision_mm(self, value: bool):
        self.is_full_precision = value

    def can_use_quantized_matmul(self, disabled_formats):
        """Whether core is to take the layer out of full precision for a while (comfy.ops.use_quantized_matmul)."""
        return self.is_full_precision and super().can_use_quantized_matmul(disabled_formats)

    def forward(self, input, act="none"):
        """Linear(act(input)): x [..., K] float ([..., 2K] for swiglu) -> [..., N]. act: see kernels.reference.activation."""
        with self.lora_in_weight(input.device) if self.weight_function else contextlib.nullcontext():
            return self._multiply(input, act)

    def _multiply(self, input, act):
        if (self.weight_function or comfy.model_management.in_training
                or not isinstance(self.weight, quant_ops.QuantizedTensor) or getattr(self, "comfy_force_cast_weights", False)):
            return super().forward(activation(input, act))
        comfy.ops.run_every_op()
        weight, bias, held = comfy.ops.cast_bias_weight(self, dtype=self.weight.dtype, device=input.device, bias_dtype=input.dtype,
                                                        offloadable=True, compute_dtype=input.dtype, want_requant=True)
        try:
            scale = getattr(self, "pre_quant_scale", None)
            if scale is not None:
                scale = scale.to(input.device)
            # A float weight comes back from the cast where dynamic VRAM streams a patched layer.
            if not isinstance(weight, quant_ops.QuantizedTensor):
                return ops.float_linear(input, weight, bias, act, scale)
            kernel = FULL_PRECISION if self.is_full_precision else self.kernel
            if torch.compiler.is_compiling():
                # Dynamo cannot look inside the weight; a traced op reaches _linear_of_quantized when the graph is lowered.
                return ops.linear(input, weight, bias, act, scale, kernel)
            return _linear_of_quantized(input, weight, bias, act, scale, kernel, self)
        finally:
            comfy.ops.uncast_bias_weight(self, weight, bias, held)

    def artefact_tensors(self) -> dict[str, torch.Tensor]:
        """The plain tensors that it multiplies with, by their names in ArtefactLinear (int8/plain_layer.py); none while it adds a LoRA
        on the fly, is replaced, or leaves the work to core."""
        if (not isinstance(self.weight, quant_ops.QuantizedTensor) or not _is_row_major(self.weight) or self.kernel == KITCHEN
                or self.is_full_precision or self.weight_function or self.bias_function
                or getattr(self, "comfy_force_cast_weights", False) or "forward" in vars(self) or not _is_as_written(type(self))
                or self._forward_hooks or self._forward_pre_hooks):
            return {}
        named = {"qweight": self.weight._qdata, "weight_scale": self.weight._params.scale, "bias": self.bias,
                 "pre_quant_scale": getattr(self, "pre_quant_scale", None)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def artefact_replacement(self) -> tuple:
        params = self.weight._params
        # What models ask of a layer beside calling it.
        shape = {"in_features": self.in_features, "out_features": self.out_features, "weight_dtype": self.weight.dtype}
        return ArtefactLinear, (params.convrot_groupsize if params.convrot else 0, self.kernel, tuple(self.artefact_tensors()), shape)


# What a call of a layer runs, as it is here and in torch: another pack may put its own in their place, on our class or on torch's.
_FORWARD = _Int8Forward.forward, _Int8Forward._multiply
_MODULE = torch.nn.Module
_CALL = _MODULE.__call__, _MODULE._call_impl


def _is_as_written(kind: type) -> bool:
    """Whether a call of a layer of kind runs this module's forward."""
    return (kind.forward, kind._multiply) == _FORWARD and (kind.__call__, kind._call_impl) == _CALL


@functools.cache
def _fields_beyond(params_class: type) -> tuple[dataclasses.Field, ...]:
    """The fields of a layout's parameters that the kernels know nothing of: up to comfy_kitchen 0.2.40, transposed."""
    known = {"scale", "orig_dtype", "orig_shape", "is_weight", "convrot", "convrot_groupsize"}
    return tuple(field for field in dataclasses.fields(params_class) if field.name not in known)


def _is_row_major(weight) -> bool:
    """Whether weight's values lie as the pack's kernels read them: core may reorder them (QuantizedTensor.optimize_for_gemv)."""
    params = weight._params
    return weight._layout_cls == LAYOUT and all(getattr(params, field.name) == field.default for field in _fields_beyond(type(params)))


def _linear_of_quantized(x, weight, bias, act, pre_quant_scale, kernel, layer=None):
    params = weight._params
    if kernel == KITCHEN or not _is_row_major(weight):  # its layout multiplies, once it is given a plain input
        return ops.float_linear(x, weight, bias, act, pre_quant_scale)
    if kernel == FULL_PRECISION:
        return ops.float_linear(x, weight.dequantize().to(x.dtype), bias, act, pre_quant_scale)
    group = params.convrot_groupsize if params.convrot else 0
    if layer is None or layer.shared_input is None:
        return ops.int8_linear(x, weight._qdata, params.scale, bias, group, act, pre_quant_scale, kernel)
    rows = layer.shared_input.quant_rows(layer, x, group, act, pre_quant_scale, kernel)
    return ops.linear_of_rows(x, rows, weight._qdata, params.scale, bias, kernel)


@functools.cache
def _connect_kernels():
    """Make the ops take core's tensors, and measure outside core's recordings of allocations."""
    autotune.unrecorded = outside_recording
    quant_ops.register_layout_op(ops.linear.default, quant_ops.TensorWiseINT8Layout)(
        lambda _, args, kwargs: _linear_of_quantized(*args, **kwargs))


@functools.cache
def _linear_class(compute_dtype: torch.dtype) -> type:
    return type("Int8Linear", (_Int8Forward, comfy.ops.mixed_precision_ops(compute_dtype=compute_dtype).Linear), {})


class _ByForward:
    """A layer as one whose weight is not quantized: core's linear_input_act then calls it."""

    weight = None
    _full_precision_mm = True

    def __init__(self, layer: torch.nn.Module):
        self.layer = layer

    def __call__(self, x):
        return self.layer(x)


@functools.cache
def patch_linear_input_act():
    """Put a function of the pack in front of core's linear_input_act (the FFN of Wan, LTX, ...), for the layers of the pack only.

    It hands the activation to the quantizer, which saves a pass over the largest tensor of a block. Everything that it does not know
    goes to core as it came: other layers, other activations, further arguments. Core asks a layer before it takes its INT8 weight
    (_full_precision_mm) from 0.36 on; an older one does not, and is given the layer without its weight.
    """
    core = getattr(comfy.ops, "linear_input_act", None)
    if core is None or not comfy_core.usable(comfy_core.FUSED_ACTIVATION):
        return
    asks_the_layer = "act_weight" in inspect.signature(core).parameters

    @functools.wraps(core)
    def linear_input_act(linear, x, input_act, *args, **kwargs):
        if isinstance(linear, (_Int8Forward, ArtefactLinear)) and linear._full_precision_mm:
            if input_act in ("none", None):
                if not (args or kwargs):
                    return linear(x)
                input_act = None
            # A layer's own forward is that of a bypass LoRA, which adds to what the layer makes of its input.
            elif input_act in FUSED_ACTIVATIONS and not (args or kwargs) and "forward" not in vars(linear):
                return linear(x, act=input_act)
            if not asks_the_layer:
                linear = _ByForward(linear)
        return core(linear, x, input_act, *args, **kwargs)

    comfy.ops.linear_input_act = linear_input_act


def _can_multiply_int8(device: torch.device) -> bool:
    """Whether core multiplies INT8 on device (0.36 or later knows; MPS and XPU may not)."""
    supports = getattr(comfy.model_management, "supports_int8_compute", None)
    return supports is None or supports(device)


def _int8_layer(weight: torch.Tensor, bias: torch.Tensor | None, plan: LayerPlan, kernel: str, device: torch.device,
                home: torch.device, compute_dtype: torch.dtype) -> torch.nn.Module:
    """The layer of weight [N, K] and bias [N], quantized on device, kept on home."""
    n, k = weight.shape
    pre_quant_scale = plan.pre_quant_scale
    work = weight.to(device)
    if pre_quant_scale is not None:
        work = work.float() / pre_quant_scale.to(device)
    qweight, scale, group = quantize_weight(work, plan.rotate)
    layout = quant_ops.TensorWiseINT8Layout
    params = layout.Params(scale=scale.to(home), orig_dtype=weight.dtype, orig_shape=(n, k), convrot=bool(group),
                           convrot_groupsize=group or layout.Params.convrot_groupsize)
    layer = _linear_class(compute_dtype)(k, n, bias=bias is not None, device=home, dtype=compute_dtype)
    layer.weight = torch.nn.Parameter(quant_ops.QuantizedTensor(qweight.to(home), LAYOUT, params), requires_grad=False)
    if bias is not None:
        # Its own copy: the two layers are loaded, patched and moved at different times.
        layer.bias = torch.nn.Parameter(bias.detach().to(home, copy=True), requires_grad=False)
    if pre_quant_scale is not None:
        layer.register_buffer("pre_quant_scale", pre_quant_scale.to(home))
    layer.quant_format, layer.layout_type, layer.kernel = FORMAT, LAYOUT, kernel
    layer.is_full_precision = not _can_multiply_int8(device)
    return layer.eval()


def _weight_of(layer: torch.nn.Module) -> Callable[[], torch.Tensor | None]:
    """Gives layer's weight for as long as the model keeps the layer: its memory and its moves stay the model's."""
    reference = weakref.ref(layer)

    def weight():
        alive = reference()
        return None if alive is None else alive.weight
    return weight


def pristine_parameter(patcher, name: str) -> torch.Tensor | None:
    """A parameter as loaded from the file: without the LoRA, or the swapped layer, of a clone that is active in the shared model."""
    if name in patcher.object_patches or name in patcher.object_patches_backup:
        return patcher.get_model_object(name)
    layer, key = name.rsplit(".", 1)
    if layer not in patcher.object_patches_backup and name in patcher.backup:
        return patcher.backup[name].weight
    return getattr(patcher.get_model_object(layer), key)


def _origin(patcher, name: str) -> torch.nn.Module | torch.Tensor:
    """What the weight of a layer below the diffusion model is from: the layer, or the weight alone where that is patched by itself. Its
    identity stays while weights are moved, patched with a LoRA, and swapped by other clones."""
    weight = f"{PREFIX}{name}.weight"
    return patcher.object_patches[weight] if weight in patcher.object_patches else patcher.get_model_object(PREFIX + name)


def _check_float(name: str, weight: torch.Tensor):
    if type(weight) not in (torch.Tensor, torch.nn.Parameter) or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        kind = type(weight).__name__ if weight.dtype.is_floating_point and weight.element_size() > 1 else weight.dtype
        raise ValueError(f"INT8 Quantize Model: layer '{name}' is already quantized ({kind}). "
                         "Load the model from a bf16, fp16 or fp32 checkpoint, with weight_dtype 'default'.")


def layers_to_quantize(patcher, options: Int8Options, planned: Container[str] = ()) -> list[str]:
    """Names below the diffusion model of the layers that are eligible, float, not planned to be INT8 already and not in keep_layers; none
    for a model that was loaded in INT8.

    Raises ValueError for a model without such layers, a weight that is quantized already, a kernel that cannot run on this device, a
    keep_layers glob that matches nothing; RuntimeError where ComfyUI has no native INT8.
    """
    require_native_int8()
    if options.kernel == "triton" and (reason := ops.triton_unavailable(patcher.load_device)):
        raise ValueError(f"INT8 Quantize Model: {reason}. Set kernel to auto.")
    model = patcher.model
    if native_layers(patcher):
        return []  # what its file left in high precision was left so on purpose
    names = [n for n in eligible_linears(model.diffusion_model)
             if n not in planned and not is_int8(patcher.get_model_object(PREFIX + n).weight)]
    if not names:
        raise ValueError("INT8 Quantize Model: this model has no Linear layers to quantize "
                         f"({type(model.diffusion_model).__name__}: none of float type in its blocks). Connect it without this node.")
    names = drop_kept(names, options.keep_layers)
    for name in names:
        _check_float(name, pristine_parameter(patcher, f"{PREFIX}{name}.weight"))
    return names


def put_int8_layers(patcher, plans: Iterable[LayerPlan], kernel: str, tell: Tell = tell_nobody) -> None:
    """Makes the planned layers of patcher (a clone) INT8, as object patches: the model it was cloned from keeps its weights.

    Raises ValueError for a weight with NaN or infinity.
    """
    _connect_kernels()
    patch_merging_and_saving()
    patch_linear_input_act()
    model = patcher.model
    compute_dtype = patcher.get_model_object("manual_cast_dtype") or model.get_dtype()
    layers = _LAYERS.setdefault(model, weakref.WeakValueDictionary())
    plans = [plan for plan in plans if plan.method != "float"]
    progress = comfy.utils.ProgressBar(len(plans))
    patches, saved = {}, 0
    for number, plan in enumerate(plans):
        tell(None, f"quantizing {number}/{len(plans)}")
        comfy.model_management.throw_exception_if_processing_interrupted()
        weight, bias = (pristine_parameter(patcher, f"{PREFIX}{plan.name}.{key}") for key in ("weight", "bias"))
        key = (plan.name, plan.method, plan.pre_quant_scale, kernel, compute_dtype, weakref.ref(_origin(patcher, plan.name)))
        layer = layers.get(key)
        if layer is None:
            try:
                layer = _int8_layer(weight, bias, plan, kernel, patcher.load_device, patcher.offload_device, compute_dtype)
            except ValueError as error:
                raise ValueError(f"INT8 Quantize Model: layer '{plan.name}': {error}. Check the checkpoint file.") from error
            layer.source = _weight_of(patcher.get_model_object(PREFIX + plan.name))
            layers[key] = layer
        patches[PREFIX + plan.name] = layer
        saved += weight.nbytes - layer.weight.nbytes - layer.weight._params.scale.nbytes
        progress.update(1)
    if not patches:
        return
    _share_inputs(patches)
    size = patcher.model_size()
    for name, layer in patches.items():
        patcher.add_object_patch(name, layer)
    keep_apart(patcher)
    # A new identity of the weights: ComfyUI then reloads when it changes between this model and its other clones.
    patcher.patches_uuid = uuid.uuid4()
    patcher.size = size - saved
    methods = Counter(plan.method for plan in plans)
    logger.info("INT8: %d of %d layers quantized (%s), weights %.1f -> %.1f MB", len(plans), len(eligible_linears(model.diffusion_model)),
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
    object patches hold weights in: ComfyUI loads, moves and patches the weights of two models at different times."""
    if own_weights not in patcher.get_callbacks(CallbacksMP.ON_CLONE, KEY):
        patcher.add_callback_with_key(CallbacksMP.ON_CLONE, KEY, own_weights)


def own_weights(patcher, clone) -> None:
    """Gives clone INT8 layers and parameters of its own in the place of those that patcher's object patches name, if it is of another
    model. The memory of what is not loaded stays shared. Clones of one model get the same layers."""
    if clone.model is patcher.model:
        return
    layers = _LAYERS.setdefault(clone.model, weakref.WeakValueDictionary())
    copies = {}
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
                    copy.source = _weight_of(clone.get_model_object(name))
            clone.object_patches[name] = copies[name] = copy
        elif isinstance(value, torch.nn.Parameter):
            clone.object_patches[name] = torch.nn.Parameter(value.detach(), requires_grad=False)
    _share_inputs(copies)


def _copy_of_layer(patcher, name: str, layer: torch.nn.Module) -> torch.nn.Module:
    """layer, which patcher has in the place name, as it is when nobody has loaded or patched it."""
    copy = object.__new__(type(layer))
    copy.__dict__ = {key: value for key, value in vars(layer).items() if not _NOTES_OF_A_LOAD.match(key)}
    copy._parameters, copy._buffers = {}, dict(layer._buffers)
    copy.weight_function, copy.bias_function = [], []
    is_loaded = comfy.utils.get_attr(patcher.model, name) is layer
    for key, parameter in layer._parameters.items():
        saved = patcher.backup.get(f"{name}.{key}") if is_loaded else None
        parameter = parameter if saved is None else saved.weight
        if parameter is not None and parameter.is_inference() and not torch.is_inference_mode_enabled():
            parameter = parameter.clone()
        copy._parameters[key] = None if parameter is None else torch.nn.Parameter(parameter.detach(), requires_grad=False)
    return copy


def is_int8(weight) -> bool:
    return isinstance(weight, quant_ops.QuantizedTensor) and weight._layout_cls == LAYOUT


def _current_layers(patcher) -> dict[str, torch.nn.Module]:
    """{name below the diffusion model: layer} of those that have a weight, with patcher's object patches."""
    names = [name for name, m in patcher.model.diffusion_model.named_modules() if name and hasattr(m, "weight")]
    current = {name: patcher.get_model_object(PREFIX + name) for name in names}
    return {name: layer for name, layer in current.items() if hasattr(layer, "weight")}


def int8_layers(patcher) -> dict[str, tuple[int, bool]]:
    """{name below the diffusion model: (its ConvRot group or 0, whether it is smoothed)} of patcher's INT8 layers."""
    if FORMAT not in getattr(quant_ops, "QUANT_ALGOS", {}):
        return {}
    params = {name: (layer, layer.weight._params) for name, layer in _current_layers(patcher).items() if is_int8(layer.weight)}
    return {name: (p.convrot_groupsize if p.convrot else 0, getattr(layer, "pre_quant_scale", None) is not None)
            for name, (layer, p) in params.items()}


def native_layers(patcher) -> list[str]:
    """Names below the diffusion model of what ComfyUI's own loader made with an INT8 weight: Linears, expert banks, embeddings."""
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
    _connect_kernels()
    patch_merging_and_saving()
    patch_linear_input_act()
    compute_dtype = patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype()
    adopted = {}
    for name in native_layers(patcher):
        layer = patcher.get_model_object(PREFIX + name)
        if not _is_core_linear(layer):
            continue
        _check_layer(name, layer)
        ours = object.__new__(_linear_class(compute_dtype))
        ours.__dict__ = {**layer.__dict__, "_parameters": dict(layer._parameters), "_buffers": dict(layer._buffers)}
        ours.is_full_precision = ours.__dict__.pop("_full_precision_mm", False)
        ours.kernel = kernel
        adopted[PREFIX + name] = ours
    _share_inputs(adopted)
    for name, ours in adopted.items():
        patcher.add_object_patch(name, ours)
    keep_apart(patcher)
    if adopted:
        patcher.patches_uuid = uuid.uuid4()  # ComfyUI then puts them in place of the layers that it loaded
        logger.info("INT8: %d layers were INT8 in the file; their weights stay, kernel %s runs them", len(adopted), kernel)
    return patcher
