"""INT8 in ComfyUI: its own QuantizedTensor inside its own mixed-precision Linear, run by our kernels.

Core's LoRA, offloading, dynamic VRAM, state_dict and checkpoint format then work as they are. Needs a core with native
INT8 (TensorWiseINT8Layout, 0.26.0 or later).
"""
from __future__ import annotations

import functools
import logging
import uuid
import weakref

import comfy.model_management
import comfy.ops
import comfy.utils
import torch

from .kernels import ops
from .kernels.reference import activation
from .options import Int8Options
from .quantize import drop_kept, eligible_linears, quantize_weight

try:
    from comfy import quant_ops
except ImportError:  # cores without native quantization: the compile nodes work there, quantizing says what it needs
    quant_ops = None

logger = logging.getLogger(__name__)

PREFIX = "diffusion_model."
LAYOUT = "TensorWiseINT8Layout"
FORMAT = "int8_tensorwise"
# BaseModel -> {(layer, rotate, kernel, dtype): INT8 layer}: nodes that run again (a LoRA changed upstream) reuse the layers that are
# still alive, so that weights are not quantized twice and compiled code keeps serving.
_LAYERS: weakref.WeakKeyDictionary[torch.nn.Module, weakref.WeakValueDictionary] = weakref.WeakKeyDictionary()


def _require_native_int8():
    if FORMAT not in getattr(quant_ops, "QUANT_ALGOS", {}):
        raise RuntimeError("INT8 Quantize Model needs ComfyUI 0.26.0 or later (native INT8 support). "
                           "Update ComfyUI; the compile nodes work on this version too.")


class _Int8Forward:
    """The multiplication of a mixed-precision Linear through our ops.

    kernel: see Int8Options. pre_quant_scale: [K] fp32 that the input is multiplied with, or None; an attribute that core's forward knows.
    """

    kernel = "auto"
    pre_quant_scale = None

    def forward(self, input, act="none"):
        """Linear(act(input)): x [..., K] float ([..., 2K] for swiglu) -> [..., N]. act: see kernels.reference.activation."""
        if (self.kernel == "comfy_kitchen" or self.weight_function or self.bias_function or comfy.model_management.in_training
                or not isinstance(self.weight, quant_ops.QuantizedTensor) or getattr(self, "comfy_force_cast_weights", False)):
            return super().forward(activation(input, act))
        comfy.ops.run_every_op()
        weight, bias, held = comfy.ops.cast_bias_weight(self, dtype=self.weight.dtype, device=input.device, bias_dtype=input.dtype,
                                                        offloadable=True, compute_dtype=input.dtype, want_requant=True)
        try:
            scale = self.pre_quant_scale
            if scale is not None:
                scale = scale.to(input.device)
            # A float weight comes back from the cast where dynamic VRAM streams a patched layer.
            if not isinstance(weight, quant_ops.QuantizedTensor):
                return ops.float_linear(input, weight, bias, act, scale)
            # Dynamo cannot look inside the weight; a traced op reaches _linear_of_quantized when the graph is lowered.
            linear = ops.linear if torch.compiler.is_compiling() else _linear_of_quantized
            return linear(input, weight, bias, act, scale, self.kernel)
        finally:
            comfy.ops.uncast_bias_weight(self, weight, bias, held)


def _linear_of_quantized(x, weight, bias, act, pre_quant_scale, kernel):
    params = weight._params
    return ops.int8_linear(x, weight._qdata, params.scale, bias, params.convrot_groupsize if params.convrot else 0, act,
                           pre_quant_scale, kernel)


@functools.cache
def _register_layout_op():
    quant_ops.register_layout_op(ops.linear.default, quant_ops.TensorWiseINT8Layout)(
        lambda _, args, kwargs: _linear_of_quantized(*args, **kwargs))


@functools.cache
def _linear_class(compute_dtype: torch.dtype) -> type:
    return type("Int8Linear", (_Int8Forward, comfy.ops.mixed_precision_ops(compute_dtype=compute_dtype).Linear), {})


@functools.cache
def _patch_linear_input_act():
    """core's linear_input_act (the FFN of Wan, LTX, ...) hands every INT8 weight to comfy_kitchen, past the layer's own
    forward, and breaks compiled graphs there. Our layers take their own forward; all others go on as before."""
    core = comfy.ops.linear_input_act

    @functools.wraps(core)
    def linear_input_act(linear, x, input_act):
        if isinstance(linear, _Int8Forward):
            return linear(x, act=input_act)
        return core(linear, x, input_act)

    comfy.ops.linear_input_act = linear_input_act


def _int8_layer(weight: torch.Tensor, bias: torch.Tensor | None, options: Int8Options, device: torch.device,
                compute_dtype: torch.dtype) -> torch.nn.Module:
    n, k = weight.shape
    qweight, scale, group = quantize_weight(weight.to(device), options.rotate)
    home = weight.device
    layout = quant_ops.TensorWiseINT8Layout
    params = layout.Params(scale=scale.to(home), orig_dtype=weight.dtype, orig_shape=(n, k), convrot=bool(group),
                           convrot_groupsize=group or layout.Params.convrot_groupsize)
    layer = _linear_class(compute_dtype)(k, n, bias=bias is not None, device=home, dtype=compute_dtype)
    layer.weight = torch.nn.Parameter(quant_ops.QuantizedTensor(qweight.to(home), LAYOUT, params), requires_grad=False)
    if bias is not None:
        # Its own copy: the two layers are loaded, patched and moved at different times.
        layer.bias = torch.nn.Parameter(bias.detach().clone(), requires_grad=False)
    layer.quant_format, layer.layout_type, layer.kernel = FORMAT, LAYOUT, options.kernel
    return layer.eval()


def pristine_parameter(patcher, name: str) -> torch.Tensor | None:
    """A parameter as loaded from the file: without the LoRA, or the swapped layer, of a clone that is active in the shared model."""
    if name in patcher.object_patches or name in patcher.object_patches_backup:
        return patcher.get_model_object(name)
    layer, key = name.rsplit(".", 1)
    if layer not in patcher.object_patches_backup and name in patcher.backup:
        return patcher.backup[name].weight
    return getattr(patcher.get_model_object(layer), key)


def _check_float(name: str, weight: torch.Tensor):
    if type(weight) not in (torch.Tensor, torch.nn.Parameter) or weight.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        kind = type(weight).__name__ if weight.dtype.is_floating_point and weight.element_size() > 1 else weight.dtype
        raise ValueError(f"INT8 Quantize Model: layer '{name}' is already quantized ({kind}). "
                         "Load the model from a bf16, fp16 or fp32 checkpoint, with weight_dtype 'default'.")


def quantize_model(patcher, options: Int8Options):
    """A clone of patcher (ModelPatcher) whose eligible Linear layers are INT8, as object patches: the model that came in
    keeps its weights. Layers that are INT8 already stay as they are.

    Raises ValueError for a model without such layers, a weight that is quantized already or has NaN, a kernel that cannot run
    on this device, a keep_layers glob that matches nothing; RuntimeError where ComfyUI has no native INT8.
    """
    _require_native_int8()
    if options.kernel == "triton" and (reason := ops.triton_unavailable(patcher.load_device)):
        raise ValueError(f"INT8 Quantize Model: {reason}. Set kernel to auto.")
    model = patcher.model
    names = [n for n in eligible_linears(model.diffusion_model) if not _is_int8(patcher.get_model_object(PREFIX + n).weight)]
    if not names:
        raise ValueError("INT8 Quantize Model: this model has no Linear layers to quantize "
                         f"({type(model.diffusion_model).__name__}: none of float type in its blocks). Connect it without this node.")
    names = drop_kept(names, options.keep_layers)
    if options.method == "auto":
        logger.info("INT8: method auto does not measure yet, it uses convrot")
    compute_dtype = patcher.get_model_object("manual_cast_dtype") or model.get_dtype()

    _register_layout_op()
    if hasattr(comfy.ops, "linear_input_act"):
        _patch_linear_input_act()
    clone = patcher.clone()
    layers = _LAYERS.setdefault(model, weakref.WeakValueDictionary())
    progress = comfy.utils.ProgressBar(len(names))
    saved = 0
    for name in names:
        comfy.model_management.throw_exception_if_processing_interrupted()
        weight, bias = (pristine_parameter(patcher, f"{PREFIX}{name}.{key}") for key in ("weight", "bias"))
        _check_float(name, weight)
        key = (name, options.rotate, options.kernel, compute_dtype)
        layer = layers.get(key)
        if layer is None:
            try:
                layer = _int8_layer(weight, bias, options, patcher.load_device, compute_dtype)
            except ValueError as error:
                raise ValueError(f"INT8 Quantize Model: layer '{name}': {error}. Check the checkpoint file.") from error
            layers[key] = layer
        clone.add_object_patch(PREFIX + name, layer)
        saved += weight.nbytes - layer.weight.nbytes - layer.weight._params.scale.nbytes
        progress.update(1)
    # A new identity of the weights: ComfyUI then reloads when it changes between this model and its other clones.
    clone.patches_uuid = uuid.uuid4()
    clone.size = patcher.model_size() - saved
    logger.info("INT8: %d of %d layers quantized (%s), weights %.1f -> %.1f MB", len(names),
                len(eligible_linears(model.diffusion_model)), options.method, patcher.model_size() / 2**20, clone.size / 2**20)
    return clone


def _is_int8(weight) -> bool:
    return isinstance(weight, quant_ops.QuantizedTensor) and weight._layout_cls == LAYOUT
