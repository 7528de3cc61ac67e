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
    layer's output in dB, 0 for no limit. max_mb: largest size of the model's weights in MiB, 0 for no limit; above 0
    as few layers as that takes become INT8, those that add the least noise.

    Raises ValueError for a value that is unknown or out of range.
    """

    method: str = "auto"
    keep_layers: tuple[str, ...] = ()
    min_sqnr_db: float = 0.0
    kernel: str = "auto"
    max_mb: float = 0.0

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"Unknown quantization method '{self.method}'. Choose one of: {', '.join(METHODS)}.")
        if self.kernel not in KERNELS:
            raise ValueError(f"Unknown INT8 kernel '{self.kernel}'. Choose one of: {', '.join(KERNELS)}.")
        if not 0 <= self.min_sqnr_db <= 100:
            raise ValueError(f"min_sqnr_db is a ratio in dB from 0 (off) to 100, not {self.min_sqnr_db:g}.")
        if self.max_mb < 0:
            raise ValueError(f"max_mb is a size in MiB from 0 (off) on, not {self.max_mb:g}.")

    @property
    def calibrated(self) -> bool:
        """Whether the model's own activations must be seen first."""
        return self.method in ("auto", "smoothquant") or self.min_sqnr_db > 0 or self.max_mb > 0

    @staticmethod
    def parse_keep_layers(text: str) -> tuple[str, ...]:
        """One glob a line; blank lines are ignored."""
        return tuple(line.strip() for line in text.splitlines() if line.strip())
