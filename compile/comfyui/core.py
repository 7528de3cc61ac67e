"""What of ComfyUI's internals the pack calls, replaces or derives from, and whether this ComfyUI still has it in that form.

A use that is missing or takes other arguments switches one feature off: one line in the log, and the pack does without it.
"""
from __future__ import annotations

import functools
import importlib
import inspect
import logging
import re
from dataclasses import dataclass

logger = logging.getLogger(__name__)

# Features, as the log names them.
INT8 = "INT8 layers"
COMPILE = "compiling"
FUSED_ACTIVATION = "activations inside the INT8 quantizer"
OFFLOAD = "compiled blocks with weights that are not on the device"
PREFETCH = "weights of dynamic VRAM that stay where they are"
ATTENTION = "attention as one operation of compiled blocks"
BYPASS = "bypass LoRAs on INT8 layers"
MERGING = "merging and saving models with INT8 layers by ComfyUI's nodes"
COMPILER = "leaving ComfyUI's memory compiler while compiled code runs"
# What happens without one.
WITHOUT = {
    INT8: "models stay as they were loaded",
    COMPILE: "models run uncompiled",
    FUSED_ACTIVATION: "the activation is computed before the layer, which is slower",
    OFFLOAD: "such blocks are compiled layer by layer, which is slower",
    PREFETCH: "they are copied before each block, which is slower",
    ATTENTION: "attention that is no plain torch breaks graphs, and such blocks are not kept",
    BYPASS: "connect Load LoRA (Bypass) before INT8 Quantize Model, or use Load LoRA",
    MERGING: "use Save INT8 Model, and merge before INT8 Quantize Model",
    COMPILER: "start ComfyUI with --disable-comfy-compiler if compiled models fail or run out of memory",
}


@dataclass(frozen=True)
class Use:
    """One place of ComfyUI that the pack depends on.

    name: dotted, module first.
    feature: what is off without it.
    seen: the newest ComfyUI in which it was seen in this form.
    arguments: how many the pack passes by position; None where it is no function, or is not called.
    keywords: the names of those that it passes by name.
    parameters: the names that its first parameters must have, for a function that the pack replaces or is called in place of.
    since: the first ComfyUI in which it was seen; an older one is not asked for it.
    """

    name: str
    feature: str
    seen: str
    arguments: int | None = None
    keywords: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()
    since: str = ""


# ComfyUI 0.8.0 does not know the last two, which are for INT8 weights and dynamic VRAM.
_CAST = ("dtype", "device", "bias_dtype", "offloadable", "compute_dtype", "want_requant")
USES = (
    # compile/comfyui/int8_layer.py: the Linear that INT8 layers derive from, and how it gets its weight.
    Use("comfy.ops.mixed_precision_ops", INT8, "0.38.1", 0, ("compute_dtype",), since="0.26.0"),
    Use("comfy.ops.cast_bias_weight", INT8, "0.38.1", 1, _CAST, since="0.26.0"),
    Use("comfy.ops.uncast_bias_weight", INT8, "0.38.1", 4, since="0.26.0"),
    Use("comfy.ops.run_every_op", INT8, "0.38.1", 0, since="0.26.0"),
    Use("comfy.quant_ops.QuantizedTensor", INT8, "0.38.1", 3, since="0.26.0"),
    Use("comfy.quant_ops.TensorWiseINT8Layout.Params", INT8, "0.38.1", 0,
        ("scale", "orig_dtype", "orig_shape", "convrot", "convrot_groupsize"), since="0.26.0"),
    Use("comfy.quant_ops.register_layout_op", INT8, "0.38.1", 2, since="0.26.0"),
    Use("comfy.model_management.supports_int8_compute", INT8, "0.38.1", 1, since="0.36.0"),
    # compile/comfyui/int8_lora.py: a LoRA that a layer gets while it is partly loaded.
    Use("comfy.model_patcher.LowVramPatch.__call__", INT8, "0.38.1", 2, since="0.26.0"),
    Use("comfy.model_management.pin_memory", INT8, "0.38.1", 1, since="0.26.0"),
    Use("comfy.model_management.unpin_memory", INT8, "0.38.1", 1, since="0.26.0"),
    # A function that the pack puts its own in front of, for hook LoRAs.
    Use("comfy.utils.copy_to_param", INT8, "0.38.1", parameters=("obj", "attr", "value"), since="0.26.0"),
    # compile/comfyui/int8_calibrate.py: measured inside the first sampling.
    Use("comfy.patcher_extension.WrappersMP.OUTER_SAMPLE", INT8, "0.38.1", since="0.26.0"),
    Use("comfy.samplers.CFGGuider.outer_sample", INT8, "0.38.1", parameters=(
        "self", "noise", "latent_image", "sampler", "sigmas", "denoise_mask", "callback", "disable_pbar", "seed"), since="0.26.0"),
    # compile/comfyui/int8_layer.py: a function that the pack puts its own in front of.
    Use("comfy.ops.linear_input_act", FUSED_ACTIVATION, "0.38.1", parameters=("linear", "x", "input_act"), since="0.33.0"),
    # compile/comfyui/int8_merge.py: three more.
    Use("comfy.model_patcher.ModelPatcher.get_key_patches", MERGING, "0.38.1", 1),
    Use("comfy.model_patcher.ModelPatcher.state_dict_for_saving", MERGING, "0.38.1", 1),
    Use("comfy.sd.save_checkpoint", MERGING, "0.38.1", 2),
    # compile/comfyui/bypass_lora.py: which layers it takes hold of.
    Use("comfy.weight_adapter.BypassInjectionManager.create_injections", BYPASS, "0.38.1", parameters=("self", "model"), since="0.33.0"),
    Use("comfy.weight_adapter.bypass.BypassForwardHook.inject", BYPASS, "0.38.1", 1, since="0.33.0"),
    Use("comfy.weight_adapter.bypass.BypassForwardHook.eject", BYPASS, "0.38.1", 1, since="0.33.0"),
    # compile/comfyui/compile_model.py: around a model's call, and what tells a failure of compile from the model's own.
    Use("comfy.patcher_extension.WrappersMP.APPLY_MODEL", COMPILE, "0.38.1"),
    Use("comfy.model_base.BaseModel.apply_model", COMPILE, "0.38.1", parameters=(
        "self", "x", "t", "c_concat", "c_crossattn", "control", "transformer_options")),
    Use("comfy.model_patcher.ModelPatcher.clone", COMPILE, "0.38.1", 1),
    Use("comfy.model_patcher.ModelPatcher.add_wrapper_with_key", COMPILE, "0.38.1", 4),
    Use("comfy.model_patcher.ModelPatcher.remove_wrappers_with_key", COMPILE, "0.38.1", 3),
    Use("comfy.model_patcher.ModelPatcher.add_object_patch", COMPILE, "0.38.1", 3),
    Use("comfy.model_patcher.ModelPatcher.get_model_object", COMPILE, "0.38.1", 2),
    Use("comfy.model_management.OOM_EXCEPTION", COMPILE, "0.38.1"),
    Use("comfy.model_management.InterruptProcessingException", COMPILE, "0.38.1"),
    Use("comfy.model_management.processing_interrupted", COMPILE, "0.38.1", 0),
    Use("comfy.model_management.interrupt_current_processing", COMPILE, "0.38.1", 1),
    # compile/comfyui/offload.py: a block's weights, fetched before it is called.
    Use("comfy.ops.CastWeightBiasOp", OFFLOAD, "0.38.1"),
    Use("comfy.ops.cast_bias_weight", OFFLOAD, "0.38.1", 1, _CAST[:4]),
    Use("comfy.ops.uncast_bias_weight", OFFLOAD, "0.38.1", 4),
    # The same with dynamic VRAM, as comfy.model_prefetch does it.
    Use("comfy.ops.cast_modules_with_vbar", PREFETCH, "0.38.1", 5, since="0.33.0"),
    Use("comfy.ops.resolve_cast_module_with_vbar", PREFETCH, "0.38.1", 6, since="0.33.0"),
    # compile/comfyui/attention.py: what its attention functions are called by.
    Use("comfy.ldm.modules.attention.wrap_attn", ATTENTION, "0.38.1", 1),
    Use("comfy.ldm.modules.attention.optimized_attention", ATTENTION, "0.38.1", 4, ("mask", "skip_reshape"), since="0.3.64"),
    # compile/comfyui/memory_compiler.py, compile/comfyui/allocation_recording.py: recordings of allocations.
    Use("comfy.cli_args.args.disable_comfy_compiler", COMPILER, "0.38.1", since="0.34.0"),
    Use("comfy.model_prefetch.malloc_graph_enabled", COMPILER, "0.38.1", 1, since="0.34.0"),
    Use("comfy.model_prefetch.MALLOC_GRAPHS", COMPILER, "0.38.1", since="0.36.0"),
    Use("comfy.model_prefetch.cleanup_malloc_graph", COMPILER, "0.38.1", 0, since="0.36.0"),
    Use("comfy.model_prefetch.cleanup_prefetch_queues", COMPILER, "0.38.1", 0, since="0.34.0"),
)


def changes(feature: str) -> list[str]:
    """Say what of ComfyUI that the feature needs is gone or takes other arguments; nothing where all is as it was."""
    return [f"{use.name} {problem}" for use in USES if use.feature == feature and (problem := _problem(use))]


def _problem(use: Use) -> str:
    if _version(comfyui_version()) < _version(use.since):
        return ""
    value = find(use.name)
    if value is None:
        return "is gone"
    if use.arguments is None and not use.parameters:
        return ""
    try:
        signature = inspect.signature(value)
        if use.arguments is not None:
            signature.bind(*range(use.arguments), **dict.fromkeys(use.keywords))
    except (TypeError, ValueError):
        return "takes other arguments"
    names = tuple(signature.parameters)[:len(use.parameters)]
    # Another pack's wrapper passes on what it is given, whatever it calls that; unless it has the same in another order.
    is_open = any(p.kind is p.VAR_POSITIONAL for p in signature.parameters.values())
    is_others = (not str(getattr(value, "__module__", "comfy")).startswith("comfy.") and len(names) == len(use.parameters)
                 and all(name == known or name not in use.parameters for name, known in zip(names, use.parameters)))
    return "" if names == use.parameters or is_open or is_others else "takes other arguments"


def comfyui_version() -> str:
    """Return the running ComfyUI's version, "" where it does not say."""
    return find("comfyui_version.__version__") or ""


def _version(text: str) -> tuple[int, ...]:
    return tuple(map(int, re.findall("[0-9]+", text)[:3]))


def find(name: str):
    """Return what a dotted name (module first) leads to, None where it leads nowhere."""
    module, _, attribute = name.rpartition(".")
    attributes = [attribute]
    while module:
        try:
            value = importlib.import_module(module)
        except ImportError:
            module, _, attribute = module.rpartition(".")
            attributes.insert(0, attribute)
            continue
        for attribute in attributes:
            value = getattr(value, attribute, None)
        return value
    return None


@functools.cache
def usable(feature: str) -> bool:
    """Whether the feature works on this ComfyUI; says so once where it does not."""
    found = changes(feature)
    if found:
        version, seen = comfyui_version(), max(use.seen for use in USES if use.feature == feature)
        logger.warning("INT8 Compile: ComfyUI %s is not like %s, the newest that the pack knows: %s. Off: %s (%s). Update %s.", version,
                       seen, "; ".join(found), feature, WITHOUT[feature],
                       "ComfyUI" if _version(version) < _version(seen) else "the pack")
    return not found


def check_all() -> None:
    """At startup: one line for each feature that this ComfyUI does not allow."""
    for feature in WITHOUT:
        usable(feature)
