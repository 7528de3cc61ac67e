"""The float values that INT8 layers are made of: a layer's own weights, of whatever type they are loaded in."""
from __future__ import annotations

import contextlib
import hashlib
import uuid
import weakref
from collections.abc import Callable, Iterable

import comfy.ops
import comfy.utils
import torch

from ...int8.echo import echo
from ..errors import is_out_of_memory
from .foreign_layers import is_of_a_pack, unpacking
from .int8_layer import compute_dtype_of, prefix_of
from .object_patches import model_of, object_of

try:
    from comfy.quant_ops import QuantizedTensor
except ImportError:  # cores without native quantization have no INT8 layers
    QuantizedTensor = None

FLOATS = (torch.float32, torch.float16, torch.bfloat16)
# What the rounding of a format costs against the weights that it was made of, as SQNR in dB (of normally distributed values).
FP8_DB = {torch.float8_e4m3fn: 31, torch.float8_e5m2: 25}
FOUR_BITS_DB = {"NVFP4": 20, "W4A8": 23, "W4A4": 17}
# The same of GGUF's types, measured with the package gguf; K and I types, which it does not write, without a figure.
GGUF_DB = {"Q4_0": 21, "Q4_1": 22, "Q5_0": 27, "Q5_1": 28, "Q8_0": 45}
GGUF_FLOATS = ("F32", "F16", "BF16")
# Core's layouts whose values dequantize() gives, as they are before any rotation, and the type that these were rounded to.
LAYOUTS = {"TensorCoreFP8Layout": torch.float8_e4m3fn, "TensorCoreFP8E4M3Layout": torch.float8_e4m3fn,
           "TensorCoreFP8E5M2Layout": torch.float8_e5m2, "TensorCoreMXFP8Layout": torch.float8_e4m3fn,
           "TensorCoreNVFP4Layout": "NVFP4", "AsymW4A8Int8Layout": "W4A8", "TensorCoreConvRotW4A4Layout": "W4A4"}
BLOCKS = {"TensorCoreMXFP8Layout": 32, "TensorCoreNVFP4Layout": 16}
ONE_SCALE = ("TensorCoreFP8Layout", "TensorCoreFP8E4M3Layout", "TensorCoreFP8E5M2Layout")


def pristine_parameter(patcher, name: str) -> torch.Tensor | None:
    """A parameter as loaded from the file: without the LoRA, the hooks, or the swapped layer of a clone that is active in the shared
    model."""
    found = object_of(patcher, name)
    is_patched = name in patcher.backup or name in patcher.hook_backup
    return unpatched(patcher, name, found) if is_patched and comfy.utils.get_attr(patcher.model, name) is found else found


def unpatched(patcher, name: str, parameter: torch.Tensor | None) -> torch.Tensor | None:
    """parameter, which is in the shared model under that name, as it was before core patched it."""
    if name in patcher.backup:
        return patcher.backup[name].weight
    hooked = patcher.hook_backup.get(name)
    return parameter if hooked is None else hooked[0]


def pristine_weight(patcher, name: str) -> torch.Tensor:
    """pristine_parameter of the weight, in its own type, of the layer of that name below the root."""
    return pristine_parameter(patcher, f"{prefix_of(patcher)}{name}.weight")


def rounded_as(weight: torch.Tensor) -> torch.dtype | str | None:
    """The type that weight's values were rounded to before they are quantized to INT8, by name where it is none of torch's; None for floats
    of 16 bits and more.

    Raises ValueError, with what it is, for a weight whose float values are not known here.
    """
    if QuantizedTensor is not None and isinstance(weight, QuantizedTensor):
        if weight._layout_cls not in LAYOUTS:
            raise ValueError(weight._layout_cls)
        return LAYOUTS[weight._layout_cls]
    if is_of_a_pack(weight) and unpacking(type(weight)) is not None:  # type: ignore[arg-type]
        kind = getattr(weight, "tensor_type", None)
        name = getattr(kind, "name", str(kind))
        return None if kind is None or name in GGUF_FLOATS else name
    if type(weight) in (torch.Tensor, torch.nn.Parameter):
        if weight.dtype in FLOATS:
            return None
        if weight.dtype in FP8_DB:
            return weight.dtype
    raise ValueError(type(weight).__name__ if weight.dtype.is_floating_point and weight.element_size() > 1 else weight.dtype)


def float_values(layer: torch.nn.Module, weight: torch.Tensor) -> torch.Tensor:
    """The weight [N, K], or bias [N], of layer in float, as layer multiplies with it; fp8 in bf16, which holds it exactly, what another
    pack has packed in fp32, without the LoRA that it carries."""
    if QuantizedTensor is not None and isinstance(weight, QuantizedTensor):
        values, smoothing = _unpacked(weight), getattr(layer, "pre_quant_scale", None)
        if smoothing is None:
            return values
        if smoothing.numel() != values.shape[1] or smoothing.shape[-1:] != values.shape[1:]:
            raise ValueError(f"its pre_quant_scale has the shape {list(smoothing.shape)}, and it has {values.shape[1]} channels")
        return (values.float() * smoothing.reshape(-1).to(values.device)).to(values.dtype)
    if is_of_a_pack(weight) and (pack := unpacking(type(weight))) is not None:  # type: ignore[arg-type]
        return pack.dequantize_tensor(weight, torch.float32, torch.float32).as_subclass(torch.Tensor)
    return weight.to(torch.bfloat16) if weight.dtype in FP8_DB else weight


def _unpacked(weight: QuantizedTensor) -> torch.Tensor:
    """Raises ValueError for one of a damaged file: core's loader takes its parts unseen, and unpacking cuts what is too large."""
    rows, columns = weight.shape
    packed = 2 if LAYOUTS.get(weight._layout_cls) in FOUR_BITS_DB else 1
    block = BLOCKS.get(weight._layout_cls, 1)  # to whose multiples the layout fills up
    held = [-(-rows // block) * block, -(-columns // block) * block // packed]
    reordered = getattr(weight._params, "mma_packed", False)
    if weight._qdata.numel() != held[0] * held[1] or (not reordered and list(weight._qdata.shape) != held):
        raise ValueError(f"its weight is stored as {list(weight._qdata.shape)}, which is none of {rows} x {columns}")
    if weight._layout_cls in ONE_SCALE and weight._params.scale.numel() != 1:  # core takes it for one of rows here, of columns there
        raise ValueError(f"its weight_scale has the shape {list(weight._params.scale.shape)}, and its format has one number")
    try:
        values = weight.dequantize()
    except (RuntimeError, ValueError, TypeError, AttributeError, IndexError) as error:
        if is_out_of_memory(error):
            raise
        raise ValueError(f"its weight cannot be unpacked ({type(error).__name__}: {echo(str(error))})") from error
    if not torch.isfinite(values).all():
        raise ValueError("the weight has NaN or infinite values")
    return values


def source_of(patcher, name: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(weight, bias) in float of the layer of that name below the root, as loaded from the file."""
    full = prefix_of(patcher) + name
    layer = object_of(patcher, full)
    weight, bias = (pristine_parameter(patcher, f"{full}.{key}") for key in ("weight", "bias"))
    return float_values(layer, weight), None if bias is None else float_values(layer, bias)


def values_of(patcher, name: str) -> bytes:
    """A digest of what source_of is computed from: another when somebody has written into it. Of large weights 32 runs of a kB are read:
    those of a big model may have to come from its file."""
    digest = hashlib.blake2b(digest_size=16)
    for key in ("weight", "bias"):
        tensor = pristine_parameter(patcher, f"{prefix_of(patcher)}{name}.{key}")
        packed = QuantizedTensor is not None and isinstance(tensor, QuantizedTensor)
        for part in (tensor._qdata, *vars(tensor._params).values()) if packed else (tensor,):
            if isinstance(part, torch.Tensor):
                digest.update(f"{part.dtype} {list(part.shape)}".encode())
                digest.update(_some(part.detach().as_subclass(torch.Tensor).reshape(-1).view(torch.uint8)).cpu().numpy().tobytes())
    return digest.digest()


def _some(values: torch.Tensor, runs: int = 32, length: int = 1024) -> torch.Tensor:
    """[N] -> all of few, else runs of length."""
    if values.numel() <= 4 * runs * length:
        return values
    starts = torch.linspace(0, values.numel() - length, runs, dtype=torch.float64).long()
    return values[(starts[:, None] + torch.arange(length)).to(values.device)].reshape(-1)


def source_of_layers(patcher, names: Iterable[str]) -> str:
    """In words: what the layers of these names were rounded to before; empty for nothing."""
    found: set[torch.dtype | str] = set()
    for name in names:
        with contextlib.suppress(ValueError):  # of a kind that is not known: another's to refuse
            found |= {rounded_as(pristine_weight(patcher, name))} - {None}
    return ", ".join(f"{_name(kind)} weights, whose own rounding{_noise(kind)} stays" for kind in sorted(found, key=_name))


def _name(kind: torch.dtype | str) -> str:
    return str(kind).removeprefix("torch.")


def _noise(kind: torch.dtype | str) -> str:
    figure = {**GGUF_DB, **FOUR_BITS_DB}.get(kind) if isinstance(kind, str) else FP8_DB[kind]
    return f" (about {figure} dB)" if figure else ""


def unpack_others(patcher) -> None:
    """Puts Linear layers of float weights, as object patches on patcher, in the place of those whose weights another pack has packed: a
    state_dict of these has no values. Raises ValueError for packed weights of another kind of layer."""
    for name, _ in list(model_of(patcher).named_modules()):
        layer = object_of(patcher, name)
        packed = [key for key, tensor in layer._parameters.items() if tensor is not None and is_of_a_pack(tensor)]
        if packed and not (isinstance(layer, torch.nn.Linear) and unpacking(type(layer._parameters[packed[0]]))):  # type: ignore[arg-type]
            raise ValueError(f"Save INT8 Model: '{name}' is a {type(layer).__name__} with weights of another pack's loader, which "
                             "ComfyUI's format has no place for. Make the INT8 file from the bf16, fp16, fp32 or fp8 checkpoint.")
        if packed:
            weight, bias = source_of(patcher, name.removeprefix(prefix_of(patcher)))
            dtype = compute_dtype_of(patcher)
            floats = comfy.ops.manual_cast.Linear(*weight.shape[::-1], bias=bias is not None, device="meta", dtype=dtype)
            for key, values in (("weight", weight), ("bias", bias)):
                if values is not None:
                    setattr(floats, key, torch.nn.Parameter(values.to(dtype), requires_grad=False))
            patcher.add_object_patch(name, floats)
            patcher.patches_uuid = uuid.uuid4()


def holds_packed(patcher) -> bool:
    """Whether some of its layers have weights that another pack has packed."""
    return any(is_of_a_pack(tensor) for tensor in patcher.model.parameters())


def weight_of(layer: torch.nn.Module) -> Callable[[], torch.Tensor | None]:
    """Gives layer's weight in float for as long as the model keeps the layer: its memory and its moves stay the model's."""
    reference = weakref.ref(layer)

    def weight():
        alive = reference()
        return None if alive is None else float_values(alive, alive.weight)
    return weight
