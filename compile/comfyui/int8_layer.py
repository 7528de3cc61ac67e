"""INT8 in ComfyUI: its own QuantizedTensor inside its own mixed-precision Linear, run by our kernels.

Core's LoRA, offloading, dynamic VRAM, state_dict and checkpoint format then work as they are. Needs a core with native
INT8 (TensorWiseINT8Layout, 0.26.0 or later).
"""
from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import weakref
from typing import Any

import comfy.model_management
import comfy.ops
import comfy.utils
import torch

from ...int8.kernels import autotune, ops
from ...int8.kernels.reference import activation
from ...int8.plain_layer import ArtifactLinear
from ...int8.plan import LayerPlan
from ...int8.quantize import quantize_weight
from ...int8.shared_input import SharedActivationQuant
from ..artifacts.linear import dense
from . import core as comfy_core
from .allocation_recording import outside_recording
from .int8_lora import Int8Lora
from .object_patches import model_of
from .verification_settings import watch_kernels

try:
    from comfy import quant_ops
except ImportError:  # cores without native quantization: the compile nodes work there, quantizing says what it needs
    quant_ops = None

logger = logging.getLogger(__name__)

LAYER_KEY = "int8_compile"
PREFIX = "diffusion_model."
INT8_LAYOUT = "TensorWiseINT8Layout"
QUANT_FORMAT = "int8_tensorwise"
# Kernels besides those of ops.implementation: core's own, and a float multiplication with the dequantized weight.
KITCHEN, FULL_PRECISION = "comfy_kitchen", "full_precision"
# What a quantizer computes before it quantizes.
FUSED_ACTIVATIONS = ("gelu_tanh", "swiglu")
# BaseModel -> {(layer, method, smoothing, kernel, dtype, what its weight is from): INT8 layer}: nodes that run again (a LoRA changed
# upstream) reuse the layers that are still alive, so that weights are not quantized twice and compiled code keeps serving. For a clone onto
# another model, see own_weights: {(name, layer that it is a copy of): INT8 layer}.
_LAYERS: weakref.WeakKeyDictionary[torch.nn.Module, weakref.WeakValueDictionary] = weakref.WeakKeyDictionary()


def root_of(patcher) -> torch.nn.Module:
    """What of a patcher's model is quantized, as patcher has it (see model_of): the diffusion model of a MODEL, all of a text encoder
    (CLIP)."""
    model = model_of(patcher)
    return getattr(model, "diffusion_model", model)


def is_encoder(patcher) -> bool:
    return not hasattr(patcher.model, "diffusion_model")


def prefix_of(patcher) -> str:
    """What stands in front of names below root_of(patcher)."""
    return "" if is_encoder(patcher) else PREFIX


def compute_dtype_of(patcher) -> torch.dtype:
    """What patcher's model computes in between its layers. Text encoders compute in fp32, whatever their weights are (comfy.sd.CLIP)."""
    return torch.float32 if is_encoder(patcher) else patcher.get_model_object("manual_cast_dtype") or patcher.model.get_dtype()


def require_native_int8(node: str = "INT8 Quantize Model"):
    """Raises RuntimeError where ComfyUI has no native INT8."""
    if QUANT_FORMAT not in getattr(quant_ops, "QUANT_ALGOS", {}):
        raise RuntimeError(f"{node} needs ComfyUI 0.26.0 or later (native INT8 support). "
                           "Update ComfyUI; the compile nodes work on this version too.")


class _Int8Forward(Int8Lora):
    """The multiplication of a mixed-precision Linear through our ops.

    kernel: see Int8Options. A smoothed layer has a pre_quant_scale [K] fp32, which the input is multiplied with; core's own forward does
    so too. shared_input, shares_input: see shared_input.py.
    """

    kernel = "auto"
    shared_input: SharedActivationQuant | None = None
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

    @property
    def comfy_force_cast_weights(self) -> bool:
        """Core sets it where a layer is to multiply in the dtype of its input: in every text encoder, and with ModelComputeDtype. INT8
        layers take and give that dtype."""
        return False

    @comfy_force_cast_weights.setter
    def comfy_force_cast_weights(self, value: bool):
        pass

    def can_use_quantized_matmul(self, disabled_formats):
        """Whether core is to take the layer out of full precision for a while (comfy.ops.use_quantized_matmul)."""
        return self.is_full_precision and super().can_use_quantized_matmul(disabled_formats)

    def _apply(self, fn, recurse=True):
        """Core frees models outside inference mode, where it copies weights that were made in it. On a CPU, whose weights move nowhere,
        the next load would then fail: torch cannot detach a tensor subclass of the one mode in the other."""
        with torch.inference_mode(torch.is_inference_mode_enabled() or self.weight.is_inference()):
            return super()._apply(fn, recurse)

    def forward(self, input, act="none"):
        """Linear(act(input)): x [..., K] float ([..., 2K] for swiglu) -> [..., N]. act: see kernels.reference.activation."""
        with self.lora_in_weight(input.device) if self.weight_function else contextlib.nullcontext():
            return self._multiply(input, act)

    def _multiply(self, input, act):
        if (self.weight_function or comfy.model_management.in_training
                or not isinstance(self.weight, quant_ops.QuantizedTensor)):
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

    def artifact_tensors(self) -> dict[str, torch.Tensor]:
        """The plain tensors that it multiplies with, by their names in ArtifactLinear (int8/plain_layer.py); none while it adds a LoRA
        on the fly, is replaced, or leaves the work to core."""
        if (not isinstance(self.weight, quant_ops.QuantizedTensor) or not _is_row_major(self.weight) or self.kernel == KITCHEN
                or self.is_full_precision or self.weight_function or self.bias_function
                or "forward" in vars(self) or not _is_as_written(type(self)) or self._forward_hooks or self._forward_pre_hooks):
            return {}
        named = {"qweight": self.weight._qdata, "weight_scale": self.weight._params.scale, "bias": self.bias,
                 "pre_quant_scale": getattr(self, "pre_quant_scale", None)}
        return {name: tensor for name, tensor in named.items() if tensor is not None}

    def artifact_constants(self) -> tuple:
        params = getattr(self._parameters["weight"], "_params", None)
        return params and params.convrot and params.convrot_groupsize, self.kernel

    def artifact_replacement(self) -> tuple:
        params = self.weight._params
        # What models ask of a layer beside calling it.
        shape = {"in_features": self.in_features, "out_features": self.out_features, "weight_dtype": self.weight.dtype}
        return ArtifactLinear, (params.convrot_groupsize if params.convrot else 0, self.kernel, tuple(self.artifact_tensors()), shape)


# What a call of a layer runs, as it is here and in torch: another pack may put its own in their place, on our class or on torch's.
_FORWARD = _Int8Forward.forward, _Int8Forward._multiply
_MODULE = torch.nn.Module
_CALL = _MODULE.__call__, _MODULE._call_impl


def _is_as_written(kind: type) -> bool:
    """Whether a call of a layer of kind runs this module's forward."""
    return (kind.forward, kind._multiply) == _FORWARD and (kind.__call__, kind._call_impl) == _CALL


@functools.cache
def _fields_beyond(params_class: Any) -> tuple[dataclasses.Field, ...]:
    """The fields of a layout's parameters that the kernels know nothing of: up to comfy_kitchen 0.2.40, transposed."""
    known = {"scale", "orig_dtype", "orig_shape", "is_weight", "convrot", "convrot_groupsize"}
    return tuple(field for field in dataclasses.fields(params_class) if field.name not in known)


def _is_row_major(weight) -> bool:
    """Whether weight's values lie as the pack's kernels read them: core may reorder them (QuantizedTensor.optimize_for_gemv)."""
    params = weight._params
    beyond = _fields_beyond(type(params))  # type: ignore[arg-type]
    return weight._layout_cls == INT8_LAYOUT and all(getattr(params, field.name) == field.default for field in beyond)


def _linear_of_quantized(x, weight, bias, act, pre_quant_scale, kernel, layer=None):
    params = weight._params
    if kernel == KITCHEN or not _is_row_major(weight):  # its layout multiplies, once it is given a plain input
        return ops.float_linear(x, weight, bias, act, pre_quant_scale)
    if kernel == FULL_PRECISION:
        return ops.float_linear(x, weight.dequantize().to(x.dtype), bias, act, pre_quant_scale)
    group = params.convrot_groupsize if params.convrot else 0
    if layer is None or layer.shared_input is None:
        return ops.int8_linear(dense(x), weight._qdata, params.scale, bias, group, act, pre_quant_scale, kernel)
    rows = layer.shared_input.quant_rows(layer, x, group, act, pre_quant_scale, kernel)
    return ops.int8_linear_prequantized(x, rows, weight._qdata, params.scale, bias, kernel)


@functools.cache
def _connect_kernels():
    """Make the ops take core's tensors, measure outside core's recordings of allocations, and be looked at as users want it."""
    autotune.unrecorded = outside_recording
    watch_kernels()
    quant_ops.register_layout_op(ops.linear.default, quant_ops.TensorWiseINT8Layout)(
        lambda _, args, kwargs: _linear_of_quantized(*args, **kwargs))


@functools.cache
def _linear_class(compute_dtype: torch.dtype) -> type:
    return type("Int8Linear", (_Int8Forward, comfy.ops.mixed_precision_ops(compute_dtype=compute_dtype).Linear), {})


class _ByForward:
    """A layer as one whose weight is not quantized: core's linear_input_act then calls it."""

    _full_precision_mm = True

    def __init__(self, layer: torch.nn.Module):
        self.layer = layer
        weight = getattr(layer, "weight", None)
        self.weight = getattr(weight, "_qdata", weight)  # other packs' wrappers look at its device

    def __call__(self, x):
        return self.layer(x)

    def __getattr__(self, name):
        return getattr(self.layer, name)


def patch_linear_input_act(*_):
    """Put a function of the pack in front of core's linear_input_act (the FFN of Wan, LTX, ...), for the layers of the pack only.

    It hands the activation to the quantizer, which saves a pass over the largest tensor of a block. Everything that it does not know
    goes to core as it came: other layers, other activations, further arguments. Core asks a layer before it takes its INT8 weight
    (_full_precision_mm) from 0.36 on; an older one does not, and would be wrong for smoothed ones: it is given the layer without its
    weight. So it is looked at before each sampling: another pack may have put core's back, or its own, in which this may be called or not.
    """
    core = getattr(comfy.ops, "linear_input_act", None)
    if core is None or getattr(core, "of_int8_compile", None) is core or not comfy_core.usable(comfy_core.FUSED_ACTIVATION):
        return

    @functools.wraps(core)
    def linear_input_act(linear, x, input_act, *args, **kwargs):
        if isinstance(linear, (_Int8Forward, ArtifactLinear)) and linear._full_precision_mm:
            if input_act in ("none", None):
                if not (args or kwargs):
                    return linear(x)
                input_act = None
            # A layer's own forward is that of a bypass LoRA, which adds to what the layer makes of its input.
            elif input_act in FUSED_ACTIVATIONS and not (args or kwargs) and "forward" not in linear.__dict__:  # torch 2.8 traces no vars()
                return linear(x, act=input_act)
            linear = _ByForward(linear)
        return core(linear, x, input_act, *args, **kwargs)

    linear_input_act.of_int8_compile = linear_input_act  # type: ignore[attr-defined]
    comfy.ops.linear_input_act = linear_input_act


def can_multiply_int8(device: torch.device) -> bool:
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
    layer.weight = torch.nn.Parameter(quant_ops.QuantizedTensor(qweight.to(home), INT8_LAYOUT, params), requires_grad=False)
    if bias is not None:
        # Its own copy: the two layers are loaded, patched and moved at different times.
        layer.bias = torch.nn.Parameter(bias.detach().to(home, copy=True), requires_grad=False)
    if pre_quant_scale is not None:
        layer.register_buffer("pre_quant_scale", pre_quant_scale.to(home))
    layer.quant_format, layer.layout_type, layer.kernel = QUANT_FORMAT, INT8_LAYOUT, kernel
    layer.is_full_precision = not can_multiply_int8(device)
    return layer.eval()

