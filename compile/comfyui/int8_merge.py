"""What ComfyUI's merging and saving nodes make of INT8 layers.

An INT8 layer lies in the place of the model's own one for as long as its clone is loaded, and no longer than a merge or a file can tell:
both get the weights that the patcher at hand stands for, whichever clone was sampled last.
"""
from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import NoReturn

import comfy.model_patcher
import comfy.sd
import comfy.utils
import torch
from comfy.model_patcher import ModelPatcher

from . import core as comfy_core
from .int8_lora import Int8Lora, QuantizedTensor


@functools.cache
def patch_merging_and_saving() -> None:
    """Makes ComfyUI's merging and saving right for models with INT8 layers; all others go on as before."""
    if not comfy_core.usable(comfy_core.MERGING):
        return
    get_key_patches, state_dict_for_saving = ModelPatcher.get_key_patches, ModelPatcher.state_dict_for_saving
    save_checkpoint = comfy.sd.save_checkpoint

    @functools.wraps(get_key_patches)
    def float_key_patches(self, *args, **kwargs):
        """The float weights that INT8 layers were made of: merging those loses nothing, and the result may be quantized."""
        with _own_layers(self):
            try:
                return get_key_patches(self, *args, **kwargs)
            except AttributeError as error:
                if not any(isinstance(getattr(m, "weight", None), QuantizedTensor) for m in self.model.modules()):
                    raise
                if self.hook_patches and not (args or kwargs):  # a merge says of which layers, or goes through all
                    return _WeightsOfHooks(self)
                _refuse_to_merge(error)

    @functools.wraps(state_dict_for_saving)
    def native_state_dict(self, *args, **kwargs):
        if any(_is_smoothed(layer) for layer in self.object_patches.values()):
            raise ValueError("ComfyUI's INT8 format has no place for the factors of layers that INT8 Quantize Model smoothed. Use Save "
                             "INT8 Model, or set method to convrot or rowwise.")
        return state_dict_for_saving(self, *args, **kwargs)

    @functools.wraps(save_checkpoint)
    def save_native_checkpoint(output_path, model, *args, **kwargs):
        return save_checkpoint(output_path, _storable(model), *args, **kwargs)

    ModelPatcher.get_key_patches, ModelPatcher.state_dict_for_saving = float_key_patches, native_state_dict
    _let_parts_be_integers()
    comfy.sd.save_checkpoint = save_native_checkpoint
    # CLIPSave, and Save Checkpoint, whose loader knows no INT8 text encoder.
    for name, all_parts in (("state_dict_for_saving", False), ("get_sd", True)):
        if hasattr(comfy.sd.CLIP, name):
            setattr(comfy.sd.CLIP, name, _of_float_parts(getattr(comfy.sd.CLIP, name), all_parts))


def _refuse_to_merge(error: Exception | None = None) -> NoReturn:
    raise ValueError("This model's weights are quantized in its file, so ComfyUI cannot merge them into another model. Load the bf16, fp16 "
                     "or fp32 file, merge, and put INT8 Quantize Model behind the merge.") from error


class _WeightsOfHooks(dict[str, list]):
    """What get_key_patches gives, of the weights that patcher's hook LoRAs change: core looks at these alone, a merge at all there are."""

    def __init__(self, patcher: ModelPatcher):
        super().__init__()
        for key in {key for patches in patcher.hook_patches.values() for key in patches}:
            weight, _, convert = comfy.model_patcher.get_key_weight(patcher.model, key)
            self[key] = [(patcher.hook_backup.get(key, (weight,))[0], convert or (lambda value, **kwargs: value))]

    def _of_all(self) -> NoReturn:
        _refuse_to_merge()

    __iter__ = keys = values = items = copy = _of_all  # type: ignore[assignment]


def _of_float_parts(method: Callable, all_parts: bool) -> Callable:
    """method of CLIP, for the weights that a file of the CLIP can hold."""
    @functools.wraps(method)
    def of_float_parts(self, *args, **kwargs):
        from .int8_encoder import with_float_parts  # it imports the layers, which import this

        storable = self
        if not all_parts and (patcher := _storable(self.patcher)) is not self.patcher:
            storable = self.clone()
            storable.patcher = patcher
        storable = with_float_parts(storable, all_parts)
        if storable is not self:
            comfy.model_management.load_models_gpu([storable.patcher])
        return method(storable, *args, **kwargs)
    return of_float_parts


def _let_parts_be_integers() -> None:
    """Where weights are not in memory as they are saved (dynamic VRAM, low VRAM), core wraps the parts of a quantized one as parameters
    that want gradients, which integers cannot (0.33)."""
    part = getattr(comfy.model_patcher, "LazyCastingParamPiece", None)
    if part is None:
        return

    def new(cls, caster, state_dict_key, tensor):
        return torch.nn.Parameter.__new__(cls, tensor, requires_grad=tensor.is_floating_point())
    part.__new__ = new


def _is_smoothed(layer) -> bool:
    return isinstance(layer, Int8Lora) and getattr(layer, "pre_quant_scale", None) is not None


def _storable(patcher):
    """patcher, or a clone with layers that ComfyUI's format can hold, as Save INT8 Model writes them."""
    from .int8_calibrate import planned_layers  # they import the layers, which import this
    from .int8_checkpoint import native_model
    from .int8_source import holds_packed

    layers = patcher.object_patches.values()
    if planned_layers(patcher) or any(map(_is_smoothed, layers)):
        return native_model(patcher)
    return native_model(patcher) if any(isinstance(layer, Int8Lora) for layer in layers) and holds_packed(patcher) else patcher


@contextlib.contextmanager
def _own_layers(patcher: ModelPatcher) -> Iterator[None]:
    """While it is open the model has its own layers in the place of INT8 ones, unpatched."""
    model = patcher.model
    # Shared by all clones: what lies in the model now, whoever was loaded, and what was there before.
    swapped = {name: comfy.utils.get_attr(model, name) for name in patcher.object_patches_backup}
    swapped = {name: layer for name, layer in swapped.items() if isinstance(layer, Int8Lora)}
    # What a LoRA and hooks keep under these names is of the INT8 layer.
    theirs = [(backup, {key: backup[key] for key in backup if key.rpartition(".")[0] in swapped})
              for backup in (patcher.backup, patcher.hook_backup)]
    try:
        for name in swapped:
            comfy.utils.set_attr(model, name, patcher.object_patches_backup[name])
        for backup, kept in theirs:
            for key in kept:
                del backup[key]
        yield
    finally:
        for backup, kept in theirs:
            backup.update(kept)
        for name, layer in swapped.items():
            comfy.utils.set_attr(model, name, layer)
