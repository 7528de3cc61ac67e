"""What artifacts and checks ask of a layer of this pack whose parameters are tensor subclasses.

What such a layer computes is known by these methods and by the version of the pack, so its attributes and methods are not looked at.
"""
from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Protocol, TypeGuard

import torch

# An attribute of another pack's layers that are an operation of compiled code (compile/artifacts/foreign_layer.py).
FOREIGN = "int8_compile_tag"


class HasArtifactTensors(Protocol):
    def artifact_tensors(self) -> Mapping[str, torch.Tensor | None]:
        """Its plain tensors by name; none while it computes otherwise."""
        ...

    def artifact_constants(self) -> tuple:
        """What else its result depends on, and may be changed while it lives."""
        ...


class HasArtifactReplacement(HasArtifactTensors, Protocol):
    def artifact_replacement(self) -> tuple[Callable[..., torch.nn.Module], tuple]:
        """(class, arguments) that make a module with buffers of these names that computes the same. Raises AttributeError while its
        weight is a float tensor."""
        ...


class HasFloatWeight(Protocol):
    """planned_sqnr: dB of its output that were measured when its quantization was chosen, 0 where none were."""

    planned_sqnr: float
    bias: torch.Tensor | None

    def float_weight(self, device: torch.device) -> torch.Tensor | None:
        """The weight [N, K] that it was quantized from, fp32, on device; None where that is gone, or it has changed since (a LoRA)."""
        ...

    def forward(self, input: torch.Tensor, act: str = "none") -> torch.Tensor: ...


def has_float_weight(module: object) -> TypeGuard[HasFloatWeight]:
    return hasattr(module, "float_weight")


def has_artifact_tensors(module: object) -> TypeGuard[HasArtifactTensors]:
    return hasattr(module, "artifact_tensors")


def has_artifact_replacement(module: object) -> TypeGuard[HasArtifactReplacement]:
    return hasattr(module, "artifact_replacement")
