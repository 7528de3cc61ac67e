"""Optimize Model: the chain of modes that pays for a model on this machine, by what is measured at its first sampling."""
from __future__ import annotations

import logging
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from ...int8.options import Int8Options
from ...int8.report import NOT_TIMED, QuantizeReport
from ..gain import BESIDE, COMPILED, EAGER, NOISE, WITHOUT, CallTimes, Gain
from ..modes.compile import Compile
from ..modes.convrot import ConvRot
from ..modes.int8 import Int8
from ..report import CompileReport
from . import decisions
from .decisions import Decision
from .int8_calibrate import planned_layers
from .int8_model import int8_layers, layers_to_quantize
from .int8_source import source_of_layers
from .mode_records import ModesReport, apply_to_patcher, recorded
from .modes import PATCHER_MODES
from .node_status import NodeStatus
from .optimize_report import OptimizeReport

logger = logging.getLogger(__name__)

TITLE = "Optimize Model"
TURN = 5  # steps of a kind in a row, that are compared with others: a machine's other work comes and goes


@dataclass(frozen=True)
class Goal:
    """min_sqnr_db: of the output of a layer that is INT8, at least; None: no layer is. faster_only: see Int8Options."""

    min_sqnr_db: float | None = None
    faster_only: bool = True


GOALS = {"fastest": Goal(25.0), "balanced": Goal(30.0), "smallest": Goal(25.0, faster_only=False), "exact": Goal()}


def optimize(patcher, goal: str, background: bool, status: NodeStatus):
    """A clone of patcher (ModelPatcher) with the modes that serve goal (a name in GOALS); what is not known yet is measured at the first
    sampling. patcher itself stays as it is. status: gets the report of it, now and later.

    Raises ValueError for a model that is compiled already, and what apply_to_patcher raises.
    """
    patcher = recorded(patcher)
    if Compile.name in PATCHER_MODES.host.get_state(patcher).names:
        raise ValueError("Optimize Model: this model is compiled already. Connect Optimize Model to what is before the compile node, and "
                         "remove that node.")
    names, reason = _candidates(patcher, GOALS[goal])
    key = decisions.key_of(patcher, goal, names)
    optimizer = Optimizer(goal, key, decisions.read(key), bool(names), reason, background, status)
    chain = _chain(GOALS[goal], optimizer.decision, bool(names), background)
    return apply_to_patcher(patcher, chain, optimizer, {"title": TITLE, "judge": optimizer})


def _candidates(patcher, goal: Goal) -> tuple[list[str], str]:
    """(layers that may become INT8, why there are none)."""
    if goal.min_sqnr_db is None:
        return [], ""
    if planned_layers(patcher) or int8_layers(patcher):
        return [], "its layers are INT8 already"
    try:
        names = layers_to_quantize(patcher, Int8Options("convrot"))
        if source_of_layers(patcher, names):
            return [], "its weights are of 8 bits or less already: INT8 would be no smaller"
        return names, ""
    except (ValueError, RuntimeError) as error:  # another quantization, no Linear layers, a ComfyUI without native INT8
        return [], str(error).removeprefix("INT8 Quantize Model: ").partition(". ")[0]


def _chain(goal: Goal, decision: Decision, has_layers: bool, background: bool) -> list[dict[str, Any]]:
    """Modes for apply_to_patcher."""
    chain: list[dict[str, Any]] = []
    if has_layers and (decision.chosen is None or decision.is_int8):
        config = {"min_sqnr_db": goal.min_sqnr_db, "faster_only": goal.faster_only,
                  **({} if decision.chosen is None else {"chosen": dict(decision.chosen)})}
        chain += [{"name": ConvRot.name}, {"name": Int8.name, "config": config}]
    if decision.compiled is not False:
        chain.append({"name": Compile.name, "config": {"background": background}})
    return chain


@dataclass
class _Reports:
    modes: tuple[str, ...] = ()
    quantize: QuantizeReport | None = None
    compile: CompileReport | None = None
    other: dict = field(default_factory=dict)


class Optimizer:
    """What is known of one model while it is optimized: is told what its modes find (as their on_progress), asked what a step runs as (as
    LazyCompile's judge), keeps what was decided, and reports all of it to the node."""

    def __init__(self, goal: str, key: str, known: Decision | None, has_layers: bool, reason: str, background: bool,
                 status: NodeStatus):
        self.goal = goal
        self.decision = known or Decision()
        self._is_known = known is not None
        self._key = key
        self._has_layers = has_layers
        self._reason = reason
        self._background = background
        self._status = status
        self._reports = _Reports()
        self._gain: Gain | None = None
        self._is_over = False  # nothing more is decided: the node is to run again
        self._notify()

    def __call__(self, report, doing: str = "", progress: tuple[int, int] | None = None) -> None:
        if isinstance(report, ModesReport):
            self._reports.modes = report.modes
        elif isinstance(report, QuantizeReport):
            self._reports.quantize = report
            if self._has_layers and report.chosen and self.decision.chosen is None:
                self._keep(chosen=report.chosen, shapes=tuple(tuple(asdict(shape).values()) for shape in report.shapes),
                           weights=(report.before, report.after), short=NOT_TIMED in report.kept)
        elif isinstance(report, CompileReport):
            self._reports.compile = report
        self._notify(doing, progress)

    def runs_eager(self, times: CallTimes, size: str) -> bool:
        """Whether a step of that size is to run uncompiled: since compiling does not pay, or, in turns, to find out whether it does."""
        if self.decision.compiled is not None:
            return not self.decision.compiled
        if self._is_over or times.is_enough(size, EAGER):
            return False
        count = times.count(size, COMPILED)
        return times.is_enough(size, COMPILED) or times.count(size, EAGER) < count - count % TURN

    def timed(self, times: CallTimes, size: str) -> None:
        """A step of that size has been timed."""
        if self._is_over:
            return
        without = times.seconds(size, WITHOUT)
        if without and not self.decision.times_of(size)[0]:  # is not measured again at the next start
            self.decision = self.decision.with_times(size, without, times.seconds(size, BESIDE), 0.0)
            self._keep()
        if self.decision.compiled is None and times.is_enough(size, EAGER) and times.is_enough(size, COMPILED):
            self._decide(times, size)
        elif self.decision.compiled is None:
            self._gained(times, size)

    def _gained(self, times: CallTimes, size: str) -> None:
        """Says what the steps so far gained, unless it is a loss, of which is still to be decided what follows. Once it is decided the
        decision's own numbers are said, of the same minutes: steps of others, when the machine may have other work, have nothing to be
        compared with."""
        before = WITHOUT if self.decision.is_int8 or not times.is_enough(size, EAGER) else EAGER
        counts = times.count(size, before), times.count(size, COMPILED)
        if not all(counts):
            return
        seconds = times.without(size) if before == WITHOUT else times.seconds(size, before)
        gain = Gain(size, seconds, times.seconds(size, COMPILED), counts)
        if gain.ratio >= 1 - NOISE and gain.differs_from(self._gain):
            self._gain = gain
            self._notify()

    def _decide(self, times: CallTimes, size: str) -> None:
        """Whether compiling pays, and INT8 all in all."""
        eager, compiled = times.seconds(size, EAGER), times.seconds(size, COMPILED)
        without, beside, _ = self.decision.times_of(size)  # of an earlier start, if of another
        without = times.without(size) or without * (eager / beside if beside else 1.0)
        logger.info("%s: %.4f s a step as it came, %.4f s uncompiled, %.4f s compiled", TITLE, without, eager, compiled)
        now = min(eager, compiled)
        self._is_known = False
        if self.decision.is_int8 and GOALS[self.goal].faster_only and 0 < without < (1 - NOISE) * now:
            self._is_over = True  # for this branch: its layers are INT8
            self.decision = self.decision.without_int8(without, now)
            decisions.changed()
        else:
            # INT8's own uncompiled time says nothing of the model as it came. Without INT8 it is that model's, of the same minutes.
            without = without if self.decision.is_int8 else eager
            self.decision = replace(self.decision, compiled=compiled < eager).with_times(size, without, eager, compiled)
        self._gain = None
        self._keep()
        self._notify()

    def _keep(self, short: bool = False, **changes) -> None:
        self.decision = replace(self.decision, **changes)
        known, own = decisions.read(self._key), self.decision
        if known is not None:  # another branch may know more
            has_found_slower = known.slower[1] and not own.slower[1]
            has_decided = known.compiled is not None and own.compiled is None and known.chosen == own.chosen
            if has_found_slower or has_decided:
                return
        decisions.write(self._key, own, short)

    def _notify(self, doing: str = "", progress: tuple[int, int] | None = None) -> None:
        reports = self._reports
        report = OptimizeReport(self.goal, GOALS[self.goal].min_sqnr_db, self.decision, self._is_known, self._reason, self._background,
                                decisions.passing(self._key), reports.modes, reports.quantize, reports.compile, self._gain, self._is_over)
        self._status(report, doing, progress)
