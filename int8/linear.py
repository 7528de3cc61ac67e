"""INT8 for plain torch models: modules in the place of torch.nn.Linear.

ComfyUI's models have their own: see compile/comfyui/int8_layer.py.
"""
from __future__ import annotations

import json
import logging

import torch

from .echo import OF_A_PROMPT, echo
from .hadamard import GROUP_SIZES, rotate
from .kernels import ops
from .quantize import quantize_weight

logger = logging.getLogger(__name__)

# ComfyUI's name of the format (comfy.quant_ops.QUANT_ALGOS).
QUANT_FORMAT = "int8_tensorwise"
# A marker is a small JSON object; anything longer is not one.
MAX_MARKER = 4096


def marker(group: int) -> torch.Tensor:
    """ComfyUI's ``comfy_quant`` entry of an INT8 layer, uint8 [bytes]: JSON, as comfy.ops writes it."""
    config: dict[str, object] = {"format": QUANT_FORMAT}
    if group:
        config.update(convrot=True, convrot_groupsize=group)
    return torch.tensor(list(json.dumps(config).encode()), dtype=torch.uint8)


def read_marker(tensor: torch.Tensor) -> int:
    """The ConvRot group, 0 for none, of a ``comfy_quant`` entry. Raises ValueError for any other content than an INT8 layer's."""
    if tensor.dtype is not torch.uint8 or tensor.dim() != 1 or tensor.numel() > MAX_MARKER:
        raise ValueError("its comfy_quant entry is not JSON text")
    try:
        config = json.loads(bytes(tensor.tolist()))
    except (ValueError, RecursionError) as error:
        raise ValueError(f"its comfy_quant entry is not JSON ({error})") from None
    if not isinstance(config, dict) or config.get("format") != QUANT_FORMAT:
        raise ValueError(f"its comfy_quant entry is not {QUANT_FORMAT}")
    group = config.get("convrot_groupsize", GROUP_SIZES[0]) if config.get("convrot") else 0
    if type(group) is not int or group not in (0, *GROUP_SIZES):
        raise ValueError(f"its rotation group {echo(group)} is none of {', '.join(map(str, GROUP_SIZES))}")
    return group


class RotatedLinear(torch.nn.Module):
    """A float Linear whose input is smoothed and rotated, and its weight likewise, so that both quantize well; equal to the Linear it
    was made of up to rounding.

    weight [N, K] stays as it came: it is transformed in fp32 where it is used, so nothing is rounded twice, and the memory is the
    original layer's. pre_quant_scale: [K] fp32 or None. group: of the ConvRot rotation, 0 for none.
    """

    def __init__(self, weight: torch.nn.Parameter, bias: torch.nn.Parameter | None, pre_quant_scale: torch.Tensor | None = None,
                 group: int = 0):
        super().__init__()
        self.out_features, self.in_features = weight.shape
        if group and self.in_features % group:
            raise ValueError(f"a rotation group of {group} does not divide {self.in_features} channels")
        self.group = group
        self.weight, self.bias = weight, bias
        self.register_buffer("pre_quant_scale", pre_quant_scale)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] -> [..., N] in x's dtype."""
        work, weight = x.float(), self.weight.float()
        if self.pre_quant_scale is not None:
            work, weight = work * self.pre_quant_scale, weight / self.pre_quant_scale
        y = rotate(work, self.group) @ rotate(weight, self.group).t()
        return (y if self.bias is None else y + self.bias).to(x.dtype)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, group={self.group}, smoothed={self.pre_quant_scale is not None}"


class Int8Linear(torch.nn.Module):
    """Linear with both operands in INT8, run by ops.int8_linear. Its state_dict is ComfyUI's layout for such a layer.

    weight: int8 [N, K]. weight_scale: fp32 [N, 1]. bias: float [N] or None. group: of the ConvRot rotation that weight has, 0 for none.
    pre_quant_scale: fp32 [K], or None where smoothed is False. float_dtype: of the weight it was made of.
    """

    def __init__(self, in_features: int, out_features: int, bias: bool = True, group: int = 0, smoothed: bool = False,
                 float_dtype: torch.dtype = torch.float32, device: torch.device | None = None):
        super().__init__()
        if group and (group not in GROUP_SIZES or in_features % group):
            raise ValueError(f"a rotation group of {group} does not divide {in_features} channels")
        self.in_features, self.out_features, self.group, self.float_dtype = in_features, out_features, group, float_dtype
        # A parameter, not a buffer: copies of a model share it.
        self.weight = torch.nn.Parameter(torch.zeros((out_features, in_features), dtype=torch.int8, device=device), requires_grad=False)
        self.bias = torch.nn.Parameter(torch.zeros(out_features, dtype=float_dtype, device=device), requires_grad=False) if bias else None
        self.register_buffer("weight_scale", torch.ones((out_features, 1), device=device))
        self.register_buffer("pre_quant_scale", torch.ones(in_features, device=device) if smoothed else None)
        self.register_buffer("comfy_quant", marker(group))

    @classmethod
    def from_float(cls, weight: torch.Tensor, bias: torch.Tensor | None, rotated: bool = False,
                   pre_quant_scale: torch.Tensor | None = None) -> Int8Linear:
        """The INT8 layer of weight [N, K] and bias [N]. Raises ValueError for a weight with NaN or infinity."""
        weight = weight.detach()
        qweight, scale, group = quantize_weight(weight if pre_quant_scale is None else weight.float() / pre_quant_scale, rotated)
        layer = cls(weight.shape[1], weight.shape[0], bias is not None, group, pre_quant_scale is not None, weight.dtype, "meta")
        layer.weight = torch.nn.Parameter(qweight, requires_grad=False)
        layer.weight_scale, layer.pre_quant_scale = scale, pre_quant_scale
        layer.bias = None if bias is None else torch.nn.Parameter(bias.detach().clone(), requires_grad=False)
        return layer

    @property
    def qweight(self) -> torch.Tensor:
        return self.weight

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x [..., K] float -> [..., N] in x's dtype."""
        return ops.int8_linear(x, self.weight, self.weight_scale, self.bias, self.group, pre_quant_scale=self.pre_quant_scale)

    def dequantized(self) -> torch.Tensor:
        """The weight [N, K] in float_dtype that the layer multiplies with, without its rotation and smoothing."""
        weight = rotate(self.weight.float() * self.weight_scale, self.group)
        return (weight if self.pre_quant_scale is None else weight * self.pre_quant_scale).to(self.float_dtype)

    def _apply(self, fn, recurse=True):
        scales = self.weight_scale, self.pre_quant_scale
        super()._apply(fn, recurse)
        if self.weight_scale.dtype is not torch.float32:  # model.half() means the activations: rounded scales would cost 20 dB
            self.weight_scale, self.pre_quant_scale = (None if s is None else s.to(self.weight.device) for s in scales)
        return self

    def _load_from_state_dict(self, state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs):
        found = state_dict.get(f"{prefix}comfy_quant")
        if found is not None:
            try:
                group = read_marker(found)
                if group and self.in_features % group:
                    raise ValueError(f"its rotation group of {group} does not divide {self.in_features} channels")
            except ValueError as error:
                error_msgs.append(f"layer '{echo(prefix[:-1])}': {error}.")
                return
            if group != self.group:
                logger.warning("layer '%s' is rotated in groups of %d by its own entry in the file, of %d by the record of modes: "
                               "the entry holds.", echo(prefix[:-1]), group, self.group, extra={OF_A_PROMPT: True})
            # ComfyUI's JSON may be spelled otherwise than ours, so its length may differ.
            self.group, self.comfy_quant = group, torch.empty_like(found, device=self.comfy_quant.device)
        super()._load_from_state_dict(state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs)

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, group={self.group}, smoothed={self.pre_quant_scale is not None}"
