"""INT8 checkpoints in ComfyUI's native format: written so that the stock loader reads them, and made while a float file is read."""
from __future__ import annotations

import contextlib
import json
import logging
import math
from collections.abc import Iterator
from pathlib import Path

import comfy.model_detection
import comfy.model_management
import comfy.ops
import comfy.sd
import comfy.utils
import torch

from ...int8.echo import echo
from ...int8.files.whole import writing_whole
from ...int8.hadamard import check_group
from ...int8.options import Int8Options
from ...int8.plan import LayerPlan
from ...int8.quantize import drop_kept, eligible_linears, quantize_weight
from ...int8.report import ProgressCallback, QuantizeReport, no_progress
from .checkpoint_file import CheckpointFile
from .int8_calibrate import planned_layers, plans
from .int8_layer import QUANT_FORMAT, prefix_of, require_native_int8
from .int8_model import adopt_native_layers, bytes_saved, int8_layers, is_int8, put_int8_layers, take_off
from .int8_source import FLOATS, unpack_others

logger = logging.getLogger(__name__)

PREFIX = "Load INT8 Model: "  # of this node's own errors
QUANTIZATION = "_quantization_metadata"  # key in a file's metadata, as comfy.utils.convert_old_quants reads it
MAX_ENTRY_BYTES = 4096  # of a layer's comfy_quant, which has about 100
# Endings of keys by which other quantized formats are known.
FOREIGN = {
    ".qweight": "Nunchaku or GPTQ", ".wscales": "Nunchaku", ".scale_weight": "scaled fp8", ".weight_scale_2": "NVFP4",
    ".absmax": "bitsandbytes", ".quant_state.bitsandbytes__nf4": "bitsandbytes NF4",
}


def native_model(patcher):
    """A clone of patcher whose layers are all such as ComfyUI's format can hold: smoothed layers, for whose factors it has no place, become
    convrot, quantized from the float weights; layers that were to be quantized at the first sampling are quantized now, by convrot where
    nothing was measured yet; layers that another pack has packed become float."""
    require_native_int8("Save INT8 Model")
    patcher, prefix = patcher.clone(), prefix_of(patcher)
    measured = {plan.name: plan.method for plan in plans(patcher)}
    waiting = [name for name in planned_layers(patcher) if prefix + name not in patcher.object_patches]
    smoothed = [name.removeprefix(prefix) for name, layer in patcher.object_patches.items()
                if getattr(layer, "pre_quant_scale", None) is not None]
    for name in smoothed:
        layer = take_off(patcher, prefix + name)
        patcher.size = patcher.model_size() + bytes_saved(patcher, name, layer)
    if smoothed or waiting:
        logger.info("INT8: %d smoothed layers and %d that were not measured yet are written as convrot.", len(smoothed),
                    len(waiting))
        methods = {name: measured.get(name, "convrot") for name in (*smoothed, *waiting)}
        put_int8_layers(patcher, [LayerPlan(name, "convrot" if method == "smoothquant" else method) for name, method in methods.items()],
                        "auto")
    unpack_others(patcher)
    return patcher


def save_int8_model(patcher, path: Path, metadata: dict[str, str] | None = None) -> None:
    """Writes patcher's model, as native_model makes it and with its LoRA, as a safetensors file that stock Load Diffusion Model reads.
    metadata: of the file.

    The file appears whole or not at all. Raises ValueError for a model without INT8 layers.
    """
    patcher = native_model(patcher)
    if not any(is_int8(getattr(m, "weight", None)) for m in _modules(patcher)):
        raise ValueError("Save INT8 Model: this model has no INT8 layers. Put INT8 Quantize Model before this node.")
    with writing_whole(path) as partial:
        comfy.sd.save_checkpoint(str(partial), patcher, metadata=metadata or {})


def _modules(patcher) -> Iterator[torch.nn.Module]:
    yield from patcher.model.modules()
    yield from patcher.object_patches.values()


def load_int8_model(path: str, options: Int8Options, disable_dynamic: bool = False, on_progress: ProgressCallback = no_progress):
    """A ModelPatcher of a diffusion model file, with its eligible Linear layers INT8: quantized one by one as they are read, so that the
    float model is never in memory as a whole; a file that is INT8 already (native format) is loaded as it is. Our kernels run both.

    Raises ValueError for a method that must see activations, a damaged file, another quantized format (named), an unknown model, a
    keep_layers glob that matches nothing, weights with NaN; RuntimeError where ComfyUI has no native INT8.
    """
    require_native_int8("Load INT8 Model")
    if options.method == "smoothquant" or options.min_sqnr_db:
        raise ValueError("Load INT8 Model: smoothquant and min_sqnr_db look at the model's activations, which a loader has not seen. Use "
                         "Load Diffusion Model and INT8 Quantize Model, or set method to auto (convrot here) and min_sqnr_db to 0.")
    name = echo(Path(path).name)
    if not path.endswith((".safetensors", ".sft")):
        raise ValueError(f"Load INT8 Model: '{name}' is not a safetensors file. Use Load Diffusion Model and INT8 Quantize Model.")
    checkpoint = CheckpointFile(path)
    native = _check_format(checkpoint, name)
    metadata = dict(checkpoint.metadata) or None
    if native:
        with _explained(name):
            state = checkpoint.by_comfyui()
    else:
        state = _quantized(checkpoint, name, options, on_progress)
    with _explained(name):
        patcher = comfy.sd.load_diffusion_model_state_dict(state, metadata=metadata, disable_dynamic=disable_dynamic)
    if patcher is None:
        raise ValueError(f"Load INT8 Model: the model type of '{name}' is not known to this ComfyUI.")
    patcher.cached_patcher_init = (load_int8_model, (path, options))
    patcher = adopt_native_layers(patcher, options.kernel)
    on_progress(_report(checkpoint, patcher, native, options))
    return patcher


@contextlib.contextmanager
def _explained(name: str) -> Iterator[None]:
    """What ComfyUI makes of a file's keys, shapes and metadata may end in any error."""
    try:
        yield
    except (comfy.model_management.InterruptProcessingException, comfy.model_management.OOM_EXCEPTION):
        raise
    except Exception as error:
        if isinstance(error, ValueError) and str(error).startswith(PREFIX):
            raise
        raise ValueError(f"Load INT8 Model: '{name}' could not be loaded: {echo(str(error)) or type(error).__name__}") from error


def _report(checkpoint: CheckpointFile, patcher, native: bool, options: Int8Options) -> QuantizeReport:
    layers = int8_layers(patcher)
    if native:
        return QuantizeReport(native=len(layers))
    kept = tuple(name for name in eligible_linears(patcher.model.diffusion_model) if name not in layers) if options.keep_layers else ()
    plans = [LayerPlan(name, "convrot" if group else "rowwise") for name, (group, _) in layers.items()]
    return QuantizeReport.of(plans, checkpoint.size(), patcher.model_size(), kept)


def _check_format(checkpoint: CheckpointFile, name: str) -> bool:
    """Whether the file is native INT8 already."""
    formats = set()
    for key in checkpoint:
        for ending, known in FOREIGN.items():
            if key.endswith(ending):
                raise ValueError(f"Load INT8 Model: '{name}' is quantized already ({known}). Load the bf16, fp16 or fp32 file.")
        if key.endswith(".comfy_quant"):
            size = math.prod(checkpoint.shape(key))
            if checkpoint.dtype(key) != torch.uint8 or not 0 < size <= MAX_ENTRY_BYTES:
                raise ValueError(f"Load INT8 Model: '{name}' is damaged: {echo(key)} is no text.")
            formats.add(_format_of(_object(bytes(checkpoint.read(key).flatten().tolist()), name, key), name, key))
            _check_scale(checkpoint, name, key.removesuffix(".comfy_quant"))
    if (text := checkpoint.metadata.get(QUANTIZATION)) is not None:
        layers = _object(text, name, QUANTIZATION).get("layers")
        if not isinstance(layers, dict):
            raise ValueError(f"Load INT8 Model: '{name}' is damaged: {QUANTIZATION} has no layers.")
        formats |= {_format_of(entry, name, layer) for layer, entry in layers.items()}
    if formats - {QUANT_FORMAT}:
        raise ValueError(f"Load INT8 Model: '{name}' is quantized already ({echo(', '.join(sorted(formats - {QUANT_FORMAT})))}). Use Load "
                         "Diffusion Model for it, or load the bf16, fp16 or fp32 file here.")
    return bool(formats)


def _object(text: str | bytes, name: str, key: str) -> dict:
    """The JSON object that the file name has at key."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    if not isinstance(value, dict):
        raise ValueError(f"Load INT8 Model: '{name}' is damaged: {echo(key)} is no JSON object.")
    return value


def _format_of(entry, name: str, key: str) -> str:
    """The format that a layer's entry says, which is one that ComfyUI's loader (comfy.ops) takes as this pack does."""
    if not isinstance(entry, dict) or not isinstance(entry.get("format"), str):
        raise ValueError(f"Load INT8 Model: '{name}' is damaged: the entry {echo(key)} says no format.")
    params = entry.get("params")
    params = params if isinstance(params, dict) else {}
    rotated = entry.get("convrot", params.get("convrot", False))
    if type(rotated) is not bool:
        raise ValueError(f"Load INT8 Model: '{name}' is damaged: convrot of {echo(key)} is neither true nor false.")
    if entry["format"] == QUANT_FORMAT and rotated:
        try:
            check_group(entry.get("convrot_groupsize", params.get("convrot_groupsize", 256)))
        except ValueError as error:
            raise ValueError(f"Load INT8 Model: '{name}' is damaged: convrot_groupsize of {echo(key)}: {error}.") from None
    return entry["format"]


def _check_scale(checkpoint: CheckpointFile, name: str, layer: str):
    weight, scale = checkpoint.shape(f"{layer}.weight"), checkpoint.shape(f"{layer}.weight_scale")
    if len(weight) == 2 and scale not in ([], [1], [weight[0]], [weight[0], 1]) and checkpoint.dtype(f"{layer}.weight") == torch.int8:
        raise ValueError(f"Load INT8 Model: '{name}' is damaged: {echo(layer)}.weight_scale has the shape {echo(scale)}, its weight "
                         f"{echo(weight)}.")


def _quantized(checkpoint: CheckpointFile, name: str, options: Int8Options, on_progress: ProgressCallback) -> dict[str, torch.Tensor]:
    """The state dict in the native format, below the diffusion model's prefix."""
    with _explained(name):
        prefix = comfy.model_detection.unet_prefix_from_state_dict(checkpoint)
    prefix = prefix if any(key.startswith(prefix) for key in checkpoint) else ""
    keys = [key for key in checkpoint if key.startswith(prefix)]
    with _explained(name):
        layers = _eligible(checkpoint, prefix, keys)
    if layers is None:
        raise ValueError(f"Load INT8 Model: the model type of '{name}' is not known to this ComfyUI, or its keys are another tool's "
                         "(diffusers). Use Load Diffusion Model and INT8 Quantize Model.")
    chosen = set(drop_kept(layers, options.keep_layers))
    device = comfy.model_management.get_torch_device()
    progress = comfy.utils.ProgressBar(len(keys))
    # Every layer is read into the same memory: allocated one by one they would leave holes of half the model's size.
    memory = torch.empty(checkpoint.largest(), dtype=torch.uint8)
    state, done = {}, 0
    for key in keys:
        comfy.model_management.throw_exception_if_processing_interrupted()
        below = key[len(prefix):]
        layer = below.removesuffix(".weight")
        if below.endswith(".weight") and layer in chosen:
            on_progress(None, f"quantizing {done}/{len(chosen)}")
            done += 1
            tensor = checkpoint.read(key, memory)
            if tensor.dtype not in FLOATS:
                raise ValueError(f"Load INT8 Model: layer '{echo(layer)}' of '{name}' is quantized already ({tensor.dtype}). "
                                 "Load the bf16, fp16 or fp32 file.")
            try:
                qweight, scale, group = quantize_weight(tensor.to(device), options.method != "rowwise")
            except ValueError as error:
                raise ValueError(f"Load INT8 Model: layer '{echo(layer)}' of '{name}': {error}. The file is damaged.") from error
            conf = {"format": QUANT_FORMAT, **({"convrot": True, "convrot_groupsize": group} if group else {})}
            state[below], state[f"{below}_scale"] = qweight.cpu(), scale.cpu()
            state[f"{layer}.comfy_quant"] = torch.tensor(list(json.dumps(conf).encode()), dtype=torch.uint8)
        else:
            state[below] = checkpoint.read(key)
        progress.update(1)
    logger.info("INT8: %d layers quantized while reading %s", len(chosen), name)
    return state


def _eligible(checkpoint: CheckpointFile, prefix: str, keys: list[str]) -> list[str] | None:
    """Names of the eligible layers, from the model built without its weights; None where ComfyUI does not know it by these keys."""
    shapes = {key[len(prefix):]: checkpoint[key] for key in keys}
    config = comfy.model_detection.model_config_from_unet(shapes, "", metadata=checkpoint.metadata)
    if config is None:
        return None
    config.custom_operations = type("Shapes", (comfy.ops.disable_weight_init,), {
        # Its own constructor may leave the weight out until a checkpoint comes.
        "Linear": type("Linear", (torch.nn.Linear, comfy.ops.CastWeightBiasOp), {})})
    config.set_inference_dtype(torch.bfloat16, None)
    with torch.device("meta"):
        model = config.get_model(shapes, "", device=torch.device("meta"))
    return [name for name in eligible_linears(model.diffusion_model) if f"{name}.weight" in shapes]
