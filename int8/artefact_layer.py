"""An INT8 layer as plain tensors: what a compiled artefact is made of, in a process that has neither the weights nor ComfyUI's tensors."""
from __future__ import annotations

import torch

from .kernels import ops


class ArtefactLinear(torch.nn.Module):
    """Buffers: qweight int8 [N, K], weight_scale fp32 [N, 1], bias float [N] and pre_quant_scale fp32 [K], where there are such."""

    def __init__(self, group: int, kernel: str, names: tuple[str, ...], attributes: dict):
        super().__init__()
        self.group = group
        self.kernel = kernel
        for name in ("bias", "pre_quant_scale", *names):
            self.register_buffer(name, torch.empty(0) if name in names else None)  # the real ones come with each call
        self.__dict__.update(attributes)

    def artefact_tensors(self) -> dict[str, torch.Tensor]:
        return {name: tensor for name, tensor in self._buffers.items() if tensor is not None}

    def forward(self, x: torch.Tensor, act: str = "none") -> torch.Tensor:
        """x [..., K] float ([..., 2K] for swiglu) -> [..., N]."""
        return ops.int8_linear(x, self.qweight, self.weight_scale, self.bias, self.group, act, self.pre_quant_scale, self.kernel)
