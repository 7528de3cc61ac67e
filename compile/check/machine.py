"""What this machine can do for a model: facts with their remedies, times measured on it, and advice from those times. Plain torch."""
from __future__ import annotations

import datetime
import math
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

import torch

from ...int8.kernels import autotune
from .block import BOTH, COMPILED, EAGER, measure_block
from .facts import Fact, can_compile, checked_fact, device_name, machine_facts
from .linear_table import INT8, ROTATED, Row, Sizes, float_dtypes, measure

# Times closer than this are called the same, and a gain below GAIN is none: other work on the machine moves them as much.
SAME, GAIN = 0.05, 0.10


@dataclass
class Check:
    """baseline: the float type that the others are compared with, such as bf16. rows: of single layers. block: of a whole block."""
    device: str
    baseline: str
    facts: list[Fact]
    rows: list[Row] = field(default_factory=list)
    block: Row | None = None
    advice: str = ""
    date: str = field(default_factory=lambda: datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"))

    def groups(self) -> list[tuple[str, Row, str]]:
        """[(title, row, name of what the others are compared with)] of all that was measured."""
        block = [(f"{self.block.model} block, {self.block.m} tokens x {self.block.k}", self.block, EAGER)] if self.block else []
        return block + [(f"{row.model} layer, {row.m} x {row.k} -> {row.n}", row, self.baseline) for row in self.rows]

    def to_dict(self) -> dict:
        measured = [{**asdict(row), "winner": row.winner, "ratios": row.ratios(base)} for _, row, base in self.groups()]
        block = measured.pop(0) if self.block else None
        return {**asdict(self), "rows": measured, "block": block,
                "tera_ops": {name: round(rate, 3) for name, rate in rates(self.rows).items()}}

    def text(self) -> str:
        lines = [f"INT8 Compile Check: {self.device}", "", self.advice, ""]
        for fact in self.facts:
            lines.append(f"{fact.status:8} {fact.name}: {fact.value}")
            lines += [f"{'':8} -> {fact.remedy}"] if fact.remedy else []
        if self.rows:
            lines += ["", f"Times of one call, and times as fast as {self.baseline}. A layer: rows x inputs -> outputs."]
        for title, row, base in self.groups():
            ratios = row.ratios(base)
            lines += ["", title]
            lines += [f"  {name:32} {ms:9.3f} ms" + (f" {ratios[name]:6.2f}x" if name in ratios else "")
                      for name, ms in sorted(row.milliseconds.items(), key=lambda item: item[1])]
            lines += [f"  {name:32} failed: {why}" for name, why in row.failed.items()]
        if best := rates(self.rows):
            lines += ["", "Best rate of a layer, 10^12 operations a second:"]
            lines += [f"  {name:32} {rate:9.3f}" for name, rate in sorted(best.items(), key=lambda item: -item[1])]
        return "\n".join(lines)


def check(device: torch.device, sizes: Sizes, facts: Iterable[Fact] = (), baseline: torch.dtype | None = None,
          tick: Callable[[int, int], object] = lambda done, total: None) -> Check:
    """The whole check. facts: of the host, listed before the machine's. baseline: the float type that models compute in here (None: the
    best that is native). tick(done, total) is called before each contender of each shape; what it raises ends the check."""
    native = float_dtypes(device)
    baseline = baseline or next(iter(native.values()))
    names = {torch.float32: "fp32", torch.float16: "fp16", torch.bfloat16: "bf16"}
    if baseline not in names:  # ComfyUI was told to compute in fp8 or fp64
        baseline = next(iter(native.values()))
    layers, block = sizes
    total = len(layers) + (block is not None)
    result = Check(device_name(device), names[baseline], [*facts, *machine_facts(device)])
    result.rows = measure(device, layers, {names[baseline]: baseline, **native}, lambda done: tick(done, total))
    autotune.waiting.measure(tick=lambda: tick(len(layers), total))  # what models have run as predicted so far
    compiles = can_compile(result.facts)
    if block:
        result.block = measure_block(device, block, baseline, lambda: tick(len(layers), total))
    tick(total, total)
    result.facts.append(checked_fact())
    result.advice = advice(result, compiles)
    return result


def rates(rows: Iterable[Row]) -> dict[str, float]:
    """{contender: its best tera-operations a second}, a multiplication and an addition being two."""
    best: dict[str, float] = {}
    for row in rows:
        for name, ms in row.milliseconds.items():
            best[name] = max(best.get(name, 0.0), 2 * row.m * row.k * row.n / ms / 1e9)
    return best


def gain(rows: Iterable[Row], name: str, over: str) -> float | None:
    """How many times as fast name is as over: the geometric mean of the rows that have both."""
    ratios = [row.milliseconds[over] / row.milliseconds[name] for row in rows if {name, over} <= row.milliseconds.keys()]
    return math.exp(sum(map(math.log, ratios)) / len(ratios)) if ratios else None


def advice(check: Check, compiles: bool) -> str:
    """A sentence, from the numbers alone. INT8 is what the nodes run by default: rotated, kernel auto."""
    int8 = gain(check.rows, ROTATED, check.baseline)
    if int8 is None:
        return f"INT8 could not be measured on {check.device}, so leave the model as it is: what failed stands below."
    measured = check.block.ratios(EAGER) if check.block else {}
    text = _of_block(check, measured[COMPILED], measured[BOTH]) if {COMPILED, BOTH} <= measured.keys() else _of_layers(check, int8)
    text += _against_floats(check.rows, check.baseline, int8) + _best_kernel(check.rows, check.baseline, int8)
    if not compiles:
        return f"{text}. Compile needs what is missing below."
    if check.block is None:
        return f"{text}. What a step gains with compile, the full check measures."
    return f"{text}." if {COMPILED, BOTH} <= measured.keys() else f"{text}. Compiling failed: the cause stands below."


def _of_block(check: Check, compiled: float, both: float) -> str:
    """compiled, both: times as fast as eager."""
    than = f"{check.baseline} uncompiled on {check.device}, by a block of {check.block.m} tokens x {check.block.k} channels"
    if both >= max(1 + GAIN, compiled * (1 + SAME)):
        return f"INT8 + compile: expect about {both:.1f}x as fast as {than} (compile alone {compiled:.1f}x; a step is more than its blocks)"
    if compiled < 1 + GAIN:
        return (f"Neither compile ({compiled:.2f}x) nor INT8 + compile ({both:.2f}x) is much faster than {than}, so use INT8 only for its "
                "half of the memory")
    if both > compiled * (1 - SAME):
        return f"Compile: expect about {compiled:.1f}x as fast as {than}; INT8 makes it no faster ({both:.1f}x) and takes half the memory"
    return f"Compile: expect about {compiled:.1f}x as fast as {than}; INT8 makes it slower ({both:.1f}x): only where you need the memory"


def _of_layers(check: Check, int8: float) -> str:
    """int8: times as fast as the baseline."""
    rows, baseline, device = check.rows, check.baseline, check.device
    if int8 >= 1 + GAIN:
        by_model = {model: gain([row for row in rows if row.model == model], ROTATED, baseline) for model in {row.model: 0 for row in rows}}
        each = ", ".join(f"{model} {ratio:.1f}x" for model, ratio in by_model.items() if ratio)
        return f"INT8: expect Linear layers about {int8:.1f}x as fast as {baseline} on {device} ({each})"
    if int8 > 1 - SAME:
        return f"INT8: Linear layers are about as fast as {baseline} on {device} ({int8:.2f}x), so use it for its half of the memory"
    return f"INT8 Linear layers are slower than {baseline} on {device} ({int8:.2f}x): leave INT8 out unless you need the memory"


def _against_floats(rows: list[Row], baseline: str, int8: float) -> str:
    others = {name: gain(rows, name, baseline) for row in rows for name in row.milliseconds
              if not name.startswith(INT8) and name != baseline}
    text = ""
    for name, ratio in others.items():
        if ratio / int8 > 1 + SAME:
            text += f"; {name} layers are faster here ({ratio:.1f}x, INT8 {int8:.1f}x)"
        elif ratio / int8 >= 1 - SAME:
            text += f"; {name} layers are as fast here ({ratio:.1f}x)"
        elif ratio > 1 + GAIN:
            text += f"; {name} layers reach {ratio:.1f}x"
    return text


def _best_kernel(rows: list[Row], baseline: str, int8: float) -> str:
    """comfy_kitchen's, where kernel = auto measures slower than it. (torch._int_mm is among what auto chooses from.)"""
    kitchen = {name: gain(rows, name, baseline) for row in rows for name in row.milliseconds
               if name.startswith(f"{INT8} comfy_kitchen") and name.endswith("rotated")}
    best = max(kitchen.values(), default=0.0)
    return f"; set kernel to comfy_kitchen, which reaches {best:.1f}x" if best / int8 > 1 + GAIN else ""
