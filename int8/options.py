"""Options of the INT8 nodes, made once at the node's edge and passed down whole."""
from __future__ import annotations

from dataclasses import dataclass

from .echo import echo
from .kernels import registry

METHODS = ("auto", "rowwise", "convrot", "smoothquant")
KERNELS = ("auto", *(kernel.name for kernel in registry.KERNELS if kernel.is_option))
# Of keep_layers: a model has some hundred layers, whose names have some ten characters.
MAX_GLOBS, MAX_GLOB = 500, 200
TOO_MANY_GLOBS = f"keep_layers: at most {MAX_GLOBS} globs of {MAX_GLOB} characters. Write one for several layers, such as blocks.*.mlp.*"


def check_globs(globs: tuple[str, ...]) -> None:
    """Raises ValueError for more or longer globs than can be matched at once."""
    if len(globs) > MAX_GLOBS or any(len(glob) > MAX_GLOB for glob in globs):
        raise ValueError(TOO_MANY_GLOBS)


def _number(value) -> str:
    return f"{value:g}" if isinstance(value, float) else echo(value)


@dataclass(frozen=True)
class Int8Options:
    """What INT8QuantizeModel was asked for.

    method: one of METHODS. kernel: one of KERNELS. keep_layers: anchored globs over layer names below the
    diffusion model (``double_blocks.0.*``). min_sqnr_db: smallest allowed signal to quantization noise ratio of a
    layer's output in dB, 0 for no limit. max_mb: largest size of the model's weights in MiB, 0 for no limit; above 0
    as few layers as that takes become INT8, those that add the least noise. faster_only: layers that run no faster as
    INT8, measured on this device with as many rows as the model feeds them, stay in high precision.

    Raises ValueError for a value that is unknown or out of range.
    """

    method: str = "auto"
    keep_layers: tuple[str, ...] = ()
    min_sqnr_db: float = 0.0
    kernel: str = "auto"
    max_mb: float = 0.0
    faster_only: bool = False

    def __post_init__(self):
        if self.method not in METHODS:
            raise ValueError(f"Unknown quantization method '{echo(self.method)}'. Choose one of: {', '.join(METHODS)}.")
        if self.kernel not in KERNELS:
            raise ValueError(f"Unknown INT8 kernel '{echo(self.kernel)}'. Choose one of: {', '.join(KERNELS)}.")
        if type(self.min_sqnr_db) not in (int, float) or not 0 <= self.min_sqnr_db <= 100:
            raise ValueError(f"min_sqnr_db is a ratio in dB from 0 (off) to 100, not {_number(self.min_sqnr_db)}.")
        if type(self.max_mb) not in (int, float) or not self.max_mb >= 0:
            raise ValueError(f"max_mb is a size in MiB from 0 (off) on, not {_number(self.max_mb)}.")
        check_globs(self.keep_layers)

    @property
    def calibrated(self) -> bool:
        """Whether the model's own activations must be seen first."""
        return self.method in ("auto", "smoothquant") or self.min_sqnr_db > 0 or self.max_mb > 0 or self.faster_only

    @staticmethod
    def parse_keep_layers(text: str) -> tuple[str, ...]:
        """One glob a line; blank lines are ignored. Raises ValueError, at once, for a text that is too long."""
        if len(text) > MAX_GLOBS * MAX_GLOB:
            raise ValueError(TOO_MANY_GLOBS)
        return tuple(line.strip() for line in text.splitlines() if line.strip())
