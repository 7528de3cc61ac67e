"""What happened when a model was compiled."""
from __future__ import annotations

import re
from collections import Counter
from dataclasses import asdict, dataclass, field

# Part of the cause -> what the user can do about it.
REMEDIES = (
    ("InvalidCxxCompiler", "No working C++ compiler was found: install one (Linux: apt install g++; Windows: Visual Studio Build "
                           "Tools; macOS: xcode-select --install), or set the CXX environment variable to one. "),
    ("CppCompileError", "The C++ compiler failed: check that it works and that Python's headers are installed (Linux: apt install "
                        "g++ python3-dev). "),
    ("TritonMissing", "Triton is not installed: pip install triton (Windows: pip install triton-windows). "),
    ("GPUTooOld", "This GPU is too old for Triton (compute capability 7.0 or later is needed): remove the compile node. "),
    ("fp8e4nv", "This GPU cannot compute in fp8: load the model with weight_dtype fp8_e5m2 or default. "),
    ("RecompileLimit", "A block would need more compiles than dynamo_cache_size_limit allows: raise it, or set fullgraph to false. "),
    ("overwritten by a subsequent run", "A patch keeps a block's output between steps, which CUDA graphs overwrite: set mode to default "
                                        "or max-autotune-no-cudagraphs. "),
)


@dataclass
class CompileReport:
    """regions: (class name, number of blocks). graphs: compiled in all. seconds: of the calls that compiled. cache_hits: graphs
    that came from torch's disk cache. artefacts: those of the compile cache that were loaded, as "class entry". building: those that
    another process is to build. steps: calls of the model so far. compiled_from_step: the first that ran compiled, 0 for none yet.
    recompiles: the region and the guard that caused each, in order. breaks: why a block is more than one graph -> how often.
    fallbacks: what was done without, and why. failure: why compile is off, empty while it works."""

    title: str
    regions: list[tuple[str, int]] = field(default_factory=list)
    graphs: int = 0
    seconds: float = 0.0
    cache_hits: int = 0
    artefacts: list[str] = field(default_factory=list)
    building: list[str] = field(default_factory=list)
    steps: int = 0
    compiled_from_step: int = 0
    recompiles: list[str] = field(default_factory=list)
    breaks: dict[str, int] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)
    failure: str = ""

    def summary(self) -> str:
        """One line for the log."""
        blocks = ", ".join(f"{name} x{count}" for name, count in self.regions)
        parts = [f"{self.graphs} graphs", f"{self.seconds:.1f} s"]
        parts += [f"{count} {what}" for what, count in (("from the cache", self.cache_hits), ("graph breaks", sum(self.breaks.values())),
                                                        ("recompiles", len(self.recompiles))) if count]
        last = f"; last recompile: {self.recompiles[-1]}" if self.recompiles else ""
        return f"compiled {blocks}: {', '.join(parts)}{last}"

    def to_dict(self) -> dict:
        return asdict(self)


def remedy(cause: str) -> str:
    """What the user can do about a cause of failure; empty where nothing is known."""
    return next((text for part, text in REMEDIES if part in cause), "")


class Counters:
    """torch's own counters since this was made."""

    def __init__(self):
        from torch._dynamo import utils  # compile machinery: at the first compile, not at import

        self._counters = utils.counters
        self._metrics = utils.get_compilation_metrics
        self._start = {name: Counter(self._counters[name]) for name in ("stats", "frames", "graph_break", "inductor", "aot_autograd")}
        metrics = self._metrics()
        self._last = metrics[-1] if metrics else None

    def _new(self, name: str) -> Counter:
        return Counter(self._counters[name]) - self._start[name]

    def new_frames(self) -> bool:
        """Whether anything was compiled, or tried."""
        return self._counters["frames"]["total"] != self._start["frames"]["total"]

    def add_to(self, report: CompileReport):
        report.graphs += self._new("stats")["unique_graphs"]
        report.cache_hits += self._new("inductor")["fxgraph_cache_hit"] + self._new("aot_autograd")["autograd_cache_hit"]
        for reason, count in self._new("graph_break").items():
            reason = reason.strip().splitlines()[0]
            report.breaks[reason] = report.breaks.get(reason, 0) + count
        metrics = self._metrics()
        first = next((i + 1 for i in reversed(range(len(metrics))) if metrics[i] is self._last), 0)
        report.recompiles += [f"{re.sub(r'_[0-9]+$', '', m.co_name)}: {_cause(m.recompile_reason)}" for m in metrics[first:]
                              if m.co_name and getattr(m, "recompile_reason", None)]


def _cause(reason: str) -> str:
    """The guard that failed, of dynamo's '0/1: tensor 'x' size mismatch at index 0. expected 1, actual 2'."""
    return re.sub(r"^[0-9/]+: ", "", reason.strip().splitlines()[0]).split("  # ")[0].strip()
