"""What Optimize Model says: what it gained, what it did, and each decision with its numbers."""
from __future__ import annotations

from dataclasses import asdict, dataclass

from ...int8.report import QuantizeReport, ShapeDecision
from ..gain import Gain, number
from ..report import CompileReport
from .decisions import FAILED, Decision

MOST_LINES = 6  # of the table


@dataclass(frozen=True)
class OptimizeReport:
    """goal, min_sqnr_db: what was asked for. decision: what is decided so far. is_known: since an earlier start. reason: why no layer may
    be INT8. background: whether steps run uncompiled meanwhile. passing: why the next start does not know it. modes: of the model, in
    order. quantize, compile: what these modes reported last. from_next: what is decided now holds from the next prompt on."""

    goal: str
    min_sqnr_db: float | None
    decision: Decision
    is_known: bool = False
    reason: str = ""
    background: bool = True
    passing: str = ""
    modes: tuple[str, ...] = ()
    quantize: QuantizeReport | None = None
    compile: CompileReport | None = None
    from_next: bool = False

    def status(self) -> str:
        """What the model is now, in a line."""
        decision = self.decision
        if decision.compiled is False and not decision.is_int8:
            why = "nothing is compiled" if self.passing == FAILED else "since compiling does not pay"
            return f"{self.goal}: passed on as it came, {self._why_no_int8()}{why}"
        if decision.compiled is False:
            return f"{self.goal}: {self._int8()}uncompiled" + ("" if self.passing == FAILED else ", since compiling does not pay")
        return f"{self.goal}: {self._int8()}{self._compiled()}"

    def _int8(self) -> str:
        chosen = self.decision.chosen
        if self.min_sqnr_db is not None and not self.reason and chosen is None:
            return "measures at the first sampling which layers gain as INT8, "
        count = sum(method != "float" for _, method in chosen or ())
        return f"INT8 in {count} of {len(chosen)} layers, " if count else self._why_no_int8()

    def _why_no_int8(self) -> str:
        if self.min_sqnr_db is None:
            return ""
        if self.reason:
            return f"no INT8 ({self.reason}), "
        before, now = self.decision.slower
        when = " from the next prompt on" if self.from_next else ""
        return f"no INT8{when} ({number(before)} -> {number(now)} s a step with it), " if now else "INT8 pays for no layer, "

    def _compiled(self) -> str:
        report = self.compile
        if report is None:
            return "compiles at the first sampling"
        if report.building and self.background:
            return "compiling in the background" + (", in part compiled already" if report.compiled_from_step else "")
        if report.status().startswith("running uncompiled"):
            return "uncompiled"
        if report.compiled_from_step:
            return "compiled"
        if report.is_built:
            return "compiled, from the next step on"
        return "uncompiled" if report.warnings() else "compiles at the first sampling"

    def warnings(self) -> list[str]:
        return [text for report in (self.quantize, self.compile) if report is not None for text in report.warnings()]

    def short(self) -> list[str]:
        return [*self._gained(), self.status(), *self._kept(), *self.warnings()]

    def text(self) -> str:
        """The gain, the state, what is kept; of what the gain was measured; then the table, and what there is to warn of."""
        return "\n".join([*self._gained(), self.status(), *self._kept(), *self._measured(), *self.table(), *self.warnings()])

    def _gained(self) -> list[str]:
        parts = []
        if gain := self.gain():
            parts.append(gain.text())
        before, after = self.decision.weights
        if self.decision.is_int8 and before:
            parts.append(f"{'' if parts else 'weights: '}{before:.0f} -> {after:.0f} MB")
        return ["; ".join(parts)] if parts else []

    def _measured(self) -> list[str]:
        gain = self.gain()
        return [f"measured: {gain.size}"] if gain is not None and gain.then else []

    def gain(self) -> Gain | None:
        """That of the decision, once there is one: steps of other minutes have nothing to be compared with."""
        if self.decision.compiled is None or (self.decision.compiled is False and not self.decision.is_int8):
            return None
        for size, without, eager, compiled in reversed(self.decision.times):
            if (now := eager if self.decision.compiled is False else compiled) and without:
                return Gain(size, without, now, (self.decision.steps_timed,) * 2, then=self.is_known)
        return None

    def _kept(self) -> list[str]:
        done = self.decision.compiled is not None
        if not done and self.compile is not None and self.compile.compiled_from_step:
            return ["measuring whether compiling pays"]
        if done and self.passing:
            return [f"decided, until ComfyUI ends: {self.passing}"]
        if self.is_known and (done or self.decision.chosen is not None):
            return ["decided earlier: nothing is measured again" if done else "layers decided earlier"]
        return ["decided, and kept for the next start"] if done else []

    def table(self) -> list[str]:
        """A line for layers of one size, the most costly first, then one for compiling; MOST_LINES at most."""
        shapes = self.decision.shape_decisions()
        room = MOST_LINES - 1
        shown = shapes if len(shapes) <= room else shapes[:room - 1]
        lines = [_line(shape) for shape in shown]
        if more := shapes[len(shown):]:
            lines.append(f"{len(more)} more sizes: INT8 in {sum(s.int8 for s in more)} of {sum(s.layers for s in more)} layers")
        if self.decision.times and self.decision.compiled is not None:
            _, _, eager, compiled = self.decision.times[-1]
            if eager and compiled:
                lines.append(f"compile: {'yes' if self.decision.compiled else 'no'}, {number(eager)} -> {number(compiled)} s a step")
        return lines

    def to_dict(self) -> dict:
        """With what the modes reported."""
        gain, decision = self.gain(), self.decision
        own = {"goal": self.goal, "min_sqnr_db": self.min_sqnr_db, "modes": list(self.modes), "known": self.is_known, "reason": self.reason,
               "int8_layers": sum(method != "float" for _, method in decision.chosen or ()), "layers": len(decision.chosen or ()),
               "compiled": decision.compiled, "table": self.table(),
               "slower_with_int8": list(decision.slower) if decision.slower[1] else None,
               "shapes": [asdict(shape) for shape in decision.shape_decisions()],
               "trial": dict(zip(("size", "without", "eager"), decision.trial)) if decision.trial[1] else None,
               "times": [dict(zip(("size", "without", "eager", "compiled"), times)) for times in decision.times]}
        reports = [report.to_dict() for report in (self.quantize, self.compile) if report is not None]
        return {"optimize": own, "gain": gain and gain.to_dict(), **{key: value for report in reports for key, value in report.items()
                                                                     if key != "gain"}}


def _line(shape: ShapeDecision) -> str:
    """'38 layers 3072 -> 9216, 4608 rows: INT8, 0.51 -> 0.32 ms, 38.1 dB'"""
    what = "INT8" if shape.int8 == shape.layers else f"{shape.int8} INT8" if shape.int8 else "as they were"
    times = f", {shape.float_ms:.3g} -> {shape.int8_ms:.3g} ms" if shape.float_ms else ""
    return f"{shape.layers} layers {shape.k} -> {shape.n}, {shape.rows} rows: {what}{times}, {shape.least_db:.1f} dB"
