"""What happened when a model was compiled."""
from __future__ import annotations

import contextlib
import re
from collections import Counter
from collections.abc import Callable, Hashable, Mapping
from dataclasses import asdict, dataclass, field

from ..int8.echo import without_commands, writable
from .gain import Gain

# Part of the cause -> what the user can do about it.
REMEDIES = (
    ("No space left on device", "The disk is full: free it, or set INT8_COMPILE_CACHE_DIR to another. "),
    ("InvalidCxxCompiler", "No working C++ compiler was found: install one (Linux: apt install g++; Windows: Visual Studio Build "
                           "Tools; macOS: xcode-select --install), or set the CXX environment variable to one. "),
    ("CppCompileError", "The C++ compiler failed: check that it works and that Python's headers are installed (Linux: apt install "
                        "g++ python3-dev). "),
    ("Permission denied: ''", "The environment variable CXX is empty: unset it, or set it to a C++ compiler. "),
    ("TritonMissing", "Triton is not installed: pip install triton (Windows: pip install triton-windows). "),
    ("GPUTooOld", "This GPU is too old for Triton (compute capability 7.0 or later is needed): remove the compile node. "),
    ("fp8e4nv", "This GPU cannot compute in fp8: load the model with weight_dtype fp8_e5m2 or default. "),
    ("RecompileLimit", "A block would need more compiles than dynamo_cache_size_limit allows: raise it, or set fullgraph to false. "),
    ("overwritten by a subsequent run", "A patch keeps a block's output between steps, which CUDA graphs overwrite: set mode to default "
                                        "or max-autotune-no-cudagraphs. "),
)

# Kinds of guards that fail -> what happened.
CAUSES = (
    (r"tensor '(.+)' size mismatch at index (\d+)\. expected (\d+), actual (\d+)", r"\1 has the size \4 in dimension \2, not \3 as before"),
    (r"tensor '(.+)' dtype mismatch\. expected (\w+), actual (\w+)", r"\1 is \3, not \2 as before"),
    (r"tensor '(.+)' (stride|rank|device|requires_grad|dispatch key set) mismatch", r"\1 has another \2 than before"),
    (r"(\S+)\.size\(\)\[(\d+)\]", r"\1 has another size in dimension \2 than before"),
    (r"expected type of '(.+)' to be", r"\1 is of another type than before"),
)
WEIGHTS = "LoRA or strength"  # in a situation: the identity of the model's weights
# A message that begins so is of a fallback that costs this image nothing: only the next start compiles again.
NOT_KEPT = "not kept in the compile cache"


@dataclass
class CompileReport:
    """regions: (class name, number of blocks). graphs: compiled in all. seconds: of the calls that compiled. cache_hits: graphs
    that came from torch's disk cache. artifacts: those of the compile cache that were loaded, as "class entry". building: those that
    another process is to build. built_at_step: the last one when it had built something, 0 for nothing yet. steps: calls of the model so
    far. compiled_from_step: the first that ran compiled, 0 for none yet.
    recompiles: the region and the guard that caused each, in order. breaks: why a block is more than one graph -> how often.
    fallbacks: what was done without, and why. notes: what else the user may want to know. failure: why compile is off, empty while it
    works. calls: of blocks in all, by what ran them: "artifact", "graph" or "eager"; last_calls: in the last step. changes: what was new
    since the first image (a resolution, a batch), and what was compiled for it; the last ones. gain: of a step, where one was timed
    uncompiled too. checked: by region, the largest difference from eager that was seen and accepted, in its dtype's own roundings, with
    the dtype. checks: calls of blocks that were compared so. int8: by region, (dB of a block's results as INT8 against float, dB of its
    least layer's, that layer's name)."""

    title: str
    regions: list[tuple[str, int]] = field(default_factory=list)
    graphs: int = 0
    seconds: float = 0.0
    cache_hits: int = 0
    artifacts: list[str] = field(default_factory=list)
    building: list[str] = field(default_factory=list)
    built_at_step: int = 0
    steps: int = 0
    compiled_from_step: int = 0
    recompiles: list[str] = field(default_factory=list)
    breaks: dict[str, int] = field(default_factory=dict)
    fallbacks: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    failure: str = ""
    calls: dict[str, int] = field(default_factory=dict)
    last_calls: dict[str, int] = field(default_factory=dict)
    changes: list[str] = field(default_factory=list)
    gain: Gain | None = None
    checked: dict[str, tuple[str, float]] = field(default_factory=dict)
    checks: int = 0
    int8: dict[str, tuple[float, float, str]] = field(default_factory=dict)

    def summary(self) -> str:
        """One line for the log."""
        blocks = ", ".join(f"{name} x{count}" for name, count in self.regions)
        parts = [f"{self.graphs} graphs", f"{self.seconds:.1f} s"]
        parts += [f"{count} {what}" for what, count in (("from the cache", self.cache_hits), ("graph breaks", sum(self.breaks.values())),
                                                        ("recompiles", len(self.recompiles))) if count]
        last = f"; last recompile: {self.recompiles[-1]}" if self.recompiles else ""
        return f"compiled {blocks}: {', '.join(parts)}{last}"

    def status(self) -> str:
        """What the model is now, in a line."""
        if self.failure:
            return "running uncompiled: the compile failed"
        if self.building:
            names = dict.fromkeys(building.partition(" ")[0] for building in self.building)
            building = f"building in the background: {', '.join(names)}"
            if not self.compiled_from_step:
                return building
        eager, calls = self.last_calls.get("eager", 0), sum(self.last_calls.values())
        if self.is_built and (not self.compiled_from_step or eager == calls):
            return "compiled, from the next step on"
        if not self.compiled_from_step:
            return "running uncompiled" if self.warnings() or self.steps else "compiles at the first sampling"
        if calls and eager == calls:
            return "running uncompiled" + (f"; {building}" if self.building else "")
        blocks = sum(count for _, count in self.regions)
        ready = f"ready: {len(self.regions)} region{'s' * (len(self.regions) != 1)}, {blocks} block{'s' * (blocks != 1)}"
        how = f", {self.seconds:.0f} s" if self.graphs else " from the compile cache" if self.artifacts else ""
        partly = f"; {eager} of {calls} block calls ran uncompiled" if eager else ""
        return ready + how + partly + (f"; {building}" if self.building else "")

    @property
    def is_built(self) -> bool:
        """Whether another process has compiled since the last step began: nobody has asked for it yet."""
        return not self.building and 0 < self.steps == self.built_at_step

    def warnings(self) -> list[str]:
        """What is done without, and what to do about it."""
        failed = [f"Compile failed; running uncompiled. {remedy(self.failure)}{first_lines(self.failure)}"] if self.failure else []
        return failed + [text for text in self.fallbacks if not text.startswith(NOT_KEPT)]

    def short(self) -> list[str]:
        """What anybody wants to know, a line each: the gain, the state, what is kept; and what is done without."""
        return [*([self.gain.text()] if self.gain else []), self._state(), *self._kept(), *self.warnings()]

    def _state(self) -> str:
        eager, calls = self.last_calls.get("eager", 0), sum(self.last_calls.values())
        if self.failure or not self.compiled_from_step or (calls and eager == calls):
            return self.status()
        in_part = f", {eager} of {calls} block calls uncompiled" if eager else ""
        return f"compiled: {_count(sum(count for _, count in self.regions), 'block')}{in_part}"

    def _kept(self) -> list[str]:
        if self.artifacts and not self.graphs:
            return ["from the compile cache: nothing was compiled"]
        if self.building:
            return ["being kept for the next start"]
        return ["not kept for the next start"] if any(text.startswith(NOT_KEPT) for text in self.fallbacks) else []

    def text(self) -> str:
        """All of it in words, a fact a line."""
        lines = [*([self.gain.text()] if self.gain else []), self.status()]
        if self.regions:
            lines.append("blocks: " + ", ".join(f"{name} x{count}" for name, count in self.regions))
        if self.graphs:
            cached = f", {self.cache_hits} of them from torch's cache" if self.cache_hits else ""
            lines.append(f"compiled: {_count(self.graphs, 'graph')} in {self.seconds:.1f} s{cached}")
        if self.artifacts:
            found = Counter(artifact.partition(" ")[0] for artifact in self.artifacts)
            lines.append("from the compile cache: " + ", ".join(f"{name}" + (f" ({n})" if n > 1 else "") for name, n in found.items()))
        if self.checked:
            dtype, most = max(self.checked.values(), key=lambda found: found[1])
            classes = f"{len(self.checked)} class{'es' * (len(self.checked) != 1)}"
            lines.append(f"checked against eager: {classes}, difference {most:.2g}x of {dtype}'s own rounding")
        if self.int8:
            region, (db, layer_db, layer) = min(self.int8.items(), key=lambda found: found[1])
            lines.append(f"INT8 against float: {db:.1f} dB ({region}); least layer: {layer_db:.1f} dB ({layer})")
        lines += self.changes
        lines += [f"compiled again: {text}" + (f" ({n} times)" if n > 1 else "")
                  for text, n in Counter(map(_recompile_sentence, self.recompiles)).items()]
        lines += [f"graph break ({n} times): {reason}" for reason, n in self.breaks.items()]
        lines += [*self.warnings(), *self.notes]
        return "\n".join(lines + [text for text in self.fallbacks if text.startswith(NOT_KEPT)])

    def to_dict(self) -> dict:
        return {**asdict(self), "gain": self.gain and self.gain.to_dict()}


def _count(count: int, what: str) -> str:
    return f"{count} {what}{'s' * (count != 1)}"


class Changes:
    """Says in a report what each new situation cost."""

    MOST = 6

    def __init__(self):
        self._seen: dict[str, set] = {}
        self._last: Mapping[str, Hashable] = {}
        self._pending: list[str] = []  # new, and not yet said: what is compiled for it comes at its first call
        self._before = (0, 0)

    @property
    def weights(self) -> Hashable:
        """Another object where the model's weights are others than in the last call; None where nobody says."""
        return self._last.get(WEIGHTS)

    def begin(self, situation: Mapping[str, Hashable], report: CompileReport) -> None:
        """Before a call of the model. situation: what may be new for it; numbers and sizes are named."""
        self._pending = []
        if situation == self._last:
            return
        known = bool(self._seen)
        for what, value in situation.items():
            if value not in (seen := self._seen.setdefault(what, set())):
                seen.add(value)
                number = "x".join(map(str, value)) if isinstance(value, tuple) else value if isinstance(value, int) else ""
                self._pending += [f"{what} {number}".strip()] if known else []
        self._last, self._before = situation, (report.graphs, len(report.building))

    def end(self, report: CompileReport) -> None:
        if not self._pending:
            return
        graphs, building = report.graphs - self._before[0], len(report.building) - self._before[1]
        cost = [f"{_count(graphs, 'graph')} compiled"] * (graphs > 0) + [f"{_count(building, 'block')} compiled in the background"] * (
            building > 0 and not graphs)
        report.changes = [*report.changes, f"new {', '.join(self._pending)}: {', '.join(cost) or 'nothing compiled'}"][-self.MOST:]
        self._pending = []


def _recompile_sentence(recompile: str) -> str:
    """'Block: the guard that failed' in words, where it is of a known kind."""
    region, _, cause = recompile.partition(": ")
    for pattern, words in CAUSES:
        if match := re.search(pattern, cause):
            return f"{region}, since {match.expand(words)}"
    return f"{region}, since this no longer held: {cause}"


@contextlib.contextmanager
def on_compile(begins: Callable):
    """begins() is called whenever torch begins to compile something."""
    from torch._dynamo.callback import callback_handler  # compile machinery: at the first compile, not at import

    callback_handler.register_start_callback(begins)
    try:
        yield
    finally:
        callback_handler.remove_start_callback(begins)


def first_lines(text: str, lines: int = 4) -> str:
    """Of what ended a compile, in one line, without the compiler's command line; as a console can show it."""
    return writable(" | ".join(line.strip() for line in without_commands(text).splitlines() if line.strip()).strip()[:200 * lines])


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
        """Whether anything was compiled, or tried. With fullgraph torch counts no frames, only graphs."""
        return any(self._counters[name][key] != self._start[name][key] for name, key in (("frames", "total"), ("stats", "unique_graphs")))

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
