"""Options of the INT8 nodes, made once at the node's edge and passed down whole."""
from __future__ import annotations

from dataclasses import dataclass

METHODS = ("auto", "rowwise", "convrot", "smoothquant")
KERNELS = ("auto", "triton", "comfy_kitchen", "torch")


@dataclass(frozen=True)
class Int8Options:
    """What INT8QuantizeModel was asked for.

    method: one of METHODS. kernel: one of KERNELS. keep_layers: anchored globs over layer names below the
    diffusion model (``double_blocks.0.*``). min_sqnr_db: smallest allowed signal to quantization noise ratio of a
    layer's output in dB, 0 for no limit.

    Raises ValueError for a value that is unknown or out of range.
    """

    method: str = "auto"
    keep_layers: tuple[str, ...] = ()
    min_sqnr_db: float = 0.0
    kernel: str = "auto"

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"Unknown quantization method '{self.method}'. Choose one of: {', '.join(METHODS)}.")
        if self.kernel not in KERNELS:
            raise ValueError(f"Unknown INT8 kernel '{self.kernel}'. Choose one of: {', '.join(KERNELS)}.")
        if not 0 <= self.min_sqnr_db <= 100:
            raise ValueError(f"min_sqnr_db is a ratio in dB from 0 (off) to 100, not {self.min_sqnr_db:g}.")

    @property
    def calibrated(self) -> bool:
        """Whether the model's own activations must be seen first."""
        return self.method in ("auto", "smoothquant") or self.min_sqnr_db > 0

    @staticmethod
    def parse_keep_layers(text: str) -> tuple[str, ...]:
        """One glob a line; blank lines are ignored."""
        return tuple(line.strip() for line in text.splitlines() if line.strip())
