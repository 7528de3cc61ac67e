"""What happened when a model was compiled."""
from __future__ import annotations

from dataclasses import asdict, dataclass, field

# Part of the cause -> what the user can do about it.
REMEDIES = (
    ("InvalidCxxCompiler", "No working C++ compiler was found: install one (Linux: apt install g++; Windows: Visual Studio Build "
                           "Tools; macOS: xcode-select --install), or set the CXX environment variable to one. "),
    ("CppCompileError", "The C++ compiler failed: check that it works and that Python's headers are installed (Linux: apt install "
                        "g++ python3-dev). "),
    ("TritonMissing", "Triton is not installed: pip install triton (Windows: pip install triton-windows). "),
    ("GPUTooOld", "This GPU is too old for Triton (compute capability 7.0 or later is needed): remove the compile node. "),
)


@dataclass
class CompileReport:
    """regions: (class name, number of blocks). graphs: compiled in all. seconds: of the calls that compiled. failure: why compile
    is off, empty while it works."""

    title: str
    regions: list[tuple[str, int]] = field(default_factory=list)
    graphs: int = 0
    seconds: float = 0.0
    failure: str = ""

    def summary(self) -> str:
        """One line for the log."""
        blocks = ", ".join(f"{name} x{count}" for name, count in self.regions)
        return f"compiled {blocks}: {self.graphs} graphs, {self.seconds:.1f} s"

    def to_dict(self) -> dict:
        return asdict(self)


def remedy(cause: str) -> str:
    """What the user can do about a cause of failure; empty where nothing is known."""
    return next((text for part, text in REMEDIES if part in cause), "")
