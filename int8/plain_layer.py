"""An INT8 layer as plain tensors: what a compiled artifact is made of, in a process that has neither the weights nor ComfyUI's tensors."""
from __future__ import annotations

import torch

from .kernels import ops


class WeightFacts:
    """What models ask of a weight beside multiplying with it, which raises TypeError: the values are known to the layer alone."""

    def __init__(self, dtype: torch.dtype, device: torch.device, shape: torch.Size):
        self.dtype = dtype
        self.device = device
        self.shape = shape
        self.ndim = len(shape)

    def size(self, dim: int | None = None):
        return self.shape if dim is None else self.shape[dim]

    def dim(self) -> int:
        return self.ndim


class ArtifactLinear(torch.nn.Module):
    """Buffers: qweight int8 [N, K], weight_scale fp32 [N, 1], bias float [N] and pre_quant_scale fp32 [K], where there are such."""

    weight_dtype = torch.float32
    # What ComfyUI asks of a Linear before it multiplies past forward: no quantized weight is to be had here.
    weight_function = bias_function = ()
    _full_precision_mm = True
    comfy_cast_weights = comfy_force_cast_weights = False

    def __init__(self, group: int, kernel: str, names: tuple[str, ...], attributes: dict):
        super().__init__()
        self.group = group
        self.kernel = kernel
        for name in ("bias", "pre_quant_scale", *names):
            self.register_buffer(name, torch.empty(0) if name in names else None)  # the real ones come with each call
        self.__dict__.update(attributes)

    @property
    def weight(self) -> WeightFacts:
        return WeightFacts(self.weight_dtype, self.qweight.device, self.qweight.shape)

    def artifact_tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    def artifact_constants(self) -> tuple:
        return self.group, self.kernel

    def forward(self, x: torch.Tensor, act: str = "none") -> torch.Tensor:
        """x [..., K] float ([..., 2K] for swiglu) -> [..., N]."""
        return ops.int8_linear(x, self.qweight, self.weight_scale, self.bias, self.group, act, self.pre_quant_scale, self.kernel)
