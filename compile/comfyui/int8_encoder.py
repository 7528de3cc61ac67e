"""INT8 text encoders (CLIP): quantized by what the first prompt feeds them, before it is encoded; and their files."""
from __future__ import annotations

import contextlib
import uuid
import weakref
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.sd
import comfy.utils
import folder_paths
import torch

from ...int8.files.whole import writing_whole
from ..options import check_path
from .int8_calibrate import Quantizer, quantizers
from .int8_checkpoint import native_model
from .int8_lora import Int8Lora
from .int8_model import int8_layers, take_off
from .int8_source import unpack_others
from .patched_method import PatchedMethod, put_method

CLIP_PARTS = ("clip_l", "clip_g", "clip_h")  # whose tokenizer is ComfyUI's own
# The parts that Load CLIP was seen to read in INT8. Of others it reads the integers as floats without a word (AuraFlow's T5, one of
# ACE-Step 1.5's), renames the layers at loading (Qwen3.5, Qwen3-VL), or wants what is in no CLIP (NewBie's tokenizers, LTX-2's projection).
READ_IN_INT8 = ("t5xxl", "umt5xxl", "qwen25_3b", "qwen25_7b", "qwen3_4b", "qwen3_8b", "gemma2_2b", "llama", "mistral3_24b")
# What ComfyUI calls on the module of a text encoder (comfy.sd.CLIP), and whether it may be called twice: what generates text draws random
# numbers, and takes long.
METHODS = {"encode_token_weights": True, "generate": False}


class QuantizeEncoder(Quantizer):
    """Of a CLIP: by patches on the methods of its module."""

    def attach(self, patcher) -> None:
        super().attach(patcher)
        for name in METHODS:
            if hasattr(patcher.model, name):
                put_method(patcher, name, QuantizedMethod(patcher, name))


class QuantizedMethod(PatchedMethod):
    """What patcher's nodes wait for is done before the call."""

    rank = 1

    def __init__(self, patcher, name: str):
        self._patcher = weakref.ref(patcher)
        self._name = name

    def of(self, patcher):
        changed = super().of(patcher)
        changed._patcher = weakref.ref(patcher)
        return changed

    def __call__(self, *args, **kwargs):
        patcher = self._patcher()
        # Hooks patch the weights that are there now, for this call.
        if patcher is None or patcher.current_hooks is not None or patcher.forced_hooks is not None:
            return self.original(*args, **kwargs)
        waiting = [quantizer for quantizer in quantizers(patcher) if quantizer.waits(patcher)]
        if waiting:
            result = self._look(patcher, waiting, args, kwargs)
            if not METHODS[self._name]:
                return result
        quantized = [quantizer.quantize(patcher) for quantizer in quantizers(patcher)]
        if any(quantized):
            comfy.model_management.load_models_gpu([patcher])  # its new layers
        return self.original(*args, **kwargs)

    def _look(self, patcher, waiting: list[Quantizer], args: tuple, kwargs: dict) -> Any:
        with contextlib.ExitStack() as stack:
            stats = [stack.enter_context(quantizer.collect(patcher)) for quantizer in waiting]
            for quantizer in waiting:
                quantizer.on_progress(None, "looking at this prompt in high precision")
            result = self.plain(*_copy(args), **_copy(kwargs))
        for quantizer, seen in zip(waiting, stats):
            quantizer.keep(patcher, seen)
        return result


def _copy(tokens: Any) -> Any:
    """tokens, in containers of their own: core takes the images out of those that it encodes."""
    if isinstance(tokens, dict):
        return {key: _copy(value) for key, value in tokens.items()}
    return type(tokens)(map(_copy, tokens)) if type(tokens) in (list, tuple) else tokens


def save_encoder(clip, filename_prefix: str) -> list[Path]:
    """Writes clip's INT8 text encoder, as native_model makes it and with its LoRA, as safetensors files that stock Load CLIP reads: one for
    each of its parts (of Flux clip_l and t5xxl), whose name is in the file's where there are several. Below ComfyUI's output folder. Parts
    that Load CLIP knows in high precision only (CLIP, small T5) are written so.

    Each file appears whole or not at all. Raises ValueError where nothing is INT8, or would be in its file.
    """
    check_path(filename_prefix, "filename_prefix")
    clip = clip.clone()
    clip.patcher = native_model(clip.patcher)
    if not int8_layers(clip.patcher):
        raise ValueError("Save INT8 Model: this text encoder has no INT8 layers. Put INT8 Quantize Model before this node.")
    clip = with_float_parts(clip)
    parts = _parts_for_files(clip)
    if not int8_layers(clip.patcher):
        raise ValueError(f"Save INT8 Model: ComfyUI's Load CLIP reads {', '.join(parts)} in high precision only. Put INT8 Quantize "
                         "Model behind Load CLIP instead of saving.")
    paths = []
    for part, state in parts.items():
        prefix = f"{filename_prefix}_{part}" if len(parts) > 1 else filename_prefix
        folder, filename, counter, _, _ = folder_paths.get_save_image_path(prefix, folder_paths.get_output_directory())
        paths.append(Path(folder) / f"{filename}_{counter:05}_.safetensors")
        with writing_whole(paths[-1]) as partial:
            comfy.utils.save_torch_file(state, str(partial))
    return paths


def _parts_for_files(clip) -> dict[str, dict[str, torch.Tensor]]:
    """{part: tensors as Load CLIP expects them in its file, with what it makes a tokenizer of}."""
    comfy.model_management.load_models_gpu([clip.patcher])
    parts: dict[str, dict[str, torch.Tensor]] = {name: {} for name in _parts(clip)}
    of_tokenizers = {}
    for key, tensor in clip.state_dict_for_saving().items():
        part, _, below = key.partition(".")
        if part in parts:
            parts[part][below.removeprefix("transformer.")] = tensor
        else:
            of_tokenizers[key] = tensor
    for part, state in parts.items():
        state.update({} if part in CLIP_PARTS else of_tokenizers)
    return parts


def with_float_parts(clip, all_parts: bool = False):
    """clip, or a clone without INT8 layers in those parts (all of them) that ComfyUI's loader reads in high precision only."""
    layers = [name for name, layer in clip.patcher.object_patches.items() if isinstance(layer, Int8Lora)]
    parts = {name.partition(".")[0] for name in layers}
    if parts and not all_parts:
        parts -= _read_in_int8(clip)
    if not parts:
        return clip
    clip = clip.clone()
    for name in [name for name in layers if name.partition(".")[0] in parts]:
        take_off(clip.patcher, name)
    clip.patcher.patches_uuid = uuid.uuid4()
    unpack_others(clip.patcher)
    return clip


def _parts(clip) -> dict[str, torch.nn.Module]:
    return {name: part for name, part in clip.cond_stage_model.named_children() if hasattr(part, "transformer")}


def _read_in_int8(clip) -> set[str]:
    """The parts of clip that Load CLIP reads in INT8, where this version of ComfyUI looks for it in their files."""
    states = {name: {**part.transformer.state_dict(), "layer.comfy_quant": torch.zeros(0, dtype=torch.uint8)}
              for name, part in _parts(clip).items()}
    t5, llama = ({name for name, state in states.items() if any("quantization_metadata" in key for key in detect([state]))}
                 for detect in (comfy.sd.t5xxl_detect, comfy.sd.llama_detect))
    # Of two such files (ACE-Step 1.5) it looks into the first.
    return (t5 | (llama if len(llama) == 1 else set())).intersection(READ_IN_INT8)
