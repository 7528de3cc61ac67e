"""Optimize Model: the chain of modes that pays for a model on this machine, by what is measured at its first sampling."""
from __future__ import annotations

import logging
import threading
from collections import OrderedDict
from dataclasses import asdict, dataclass, replace
from typing import Any

from ...int8.options import Int8Options
from ...int8.report import NOT_TIMED, QuantizeReport
from ..comparison import Comparison
from ..gain import BESIDE, COMPILED, KEPT, NOISE, WITHOUT, CallTimes
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
UNSURE = 0.15  # as NOISE, of times that are minutes apart
MOST_COMPARED = 64  # models
# By key of a decision, and whether layers are INT8: a node that runs again, for another LoRA before it, goes on.
_COMPARISONS: OrderedDict[tuple[str, bool], Comparison] = OrderedDict()
_LOCK = threading.RLock()  # of comparisons and decisions: a model has a thread for each GPU, and is a few branches'


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


def _comparison(key: str, is_int8: bool) -> Comparison:
    found = _COMPARISONS.setdefault((key, is_int8), Comparison())
    _COMPARISONS.move_to_end((key, is_int8))
    if len(_COMPARISONS) > MOST_COMPARED:
        _COMPARISONS.popitem(last=False)
    return found


@dataclass
class _Reports:
    modes: tuple[str, ...] = ()
    quantize: QuantizeReport | None = None
    compile: CompileReport | None = None


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
        self._is_over = False  # nothing more is decided: the node is to run again
        self._is_kept = True  # or is nothing yet; until the first step, before which steps are timed
        self._passing_because = ""
        self._is_turn = False  # the step's, to run uncompiled
        self._in_vain = 0  # steps in a row that were to run compiled and did not
        self._notify()

    def __call__(self, report, doing: str = "", progress: tuple[int, int] | None = None) -> None:
        if isinstance(report, ModesReport):
            self._reports.modes = report.modes
        elif isinstance(report, QuantizeReport):
            self._reports.quantize = report
            if self._has_layers and report.chosen and self.decision.chosen is None:
                self.decision = replace(self.decision, chosen=report.chosen, weights=(report.before, report.after),
                                        shapes=tuple(tuple(asdict(shape).values()) for shape in report.shapes))
                self._passing_because = decisions.SHORT if NOT_TIMED in report.kept else ""
                self._is_kept = False
        elif isinstance(report, CompileReport):
            self._reports.compile = report
        self._notify(doing, progress)

    def runs_eager(self, times: CallTimes, size: str) -> bool:
        """Whether a step of that size is to run uncompiled: since compiling does not pay, or, in turns, to find out whether it does."""
        with _LOCK:
            is_adopted = self.is_open and self._adopt(decisions.known(self._key))
            if self.is_open:
                self._keep_trial(size, times.seconds(size, WITHOUT), times.seconds(size, BESIDE))
                self._is_turn = _comparison(self._key, self.decision.is_int8).is_uncompiled_turn(times.image, size, times.weights)
                return self._is_turn
        if is_adopted:
            self._notify()
        return self.decision.compiled is False

    def timed(self, times: CallTimes, size: str, kind: str) -> None:
        """A step of that size has run; kind: see CallTimes.end. Nothing of it is said before it is decided, since it has nothing to be
        compared with: minutes before, and later, the machine may have other work."""
        with _LOCK:
            if not self.is_open:
                return
            comparison = _comparison(self._key, self.decision.is_int8)
            if kind:
                comparison.count(times.image, size, times.weights, kind)
                self._in_vain = 0 if kind == COMPILED else self._in_vain + (not self._is_turn)
            comparison.add(times.take_new())
            self._adopt_trial(decisions.known(self._key))
            if comparison.is_enough:
                size, eager = comparison.eager(self.decision.trial[0])
                self._decide(size, eager, eager * comparison.ratio, comparison.steps)
            elif self._has_failed and (uncompiled := comparison.uncompiled()):
                size, eager, steps = uncompiled
                self._decide(size, eager, 0.0, steps)
            else:
                return
            comparison.clear()
        self._notify()

    @property
    def _has_failed(self) -> bool:
        """Whether nothing can be compiled, here or by the builder, or another node has its own for all blocks."""
        return self._in_vain >= KEPT or (self._reports.compile is not None and bool(self._reports.compile.failure))

    @property
    def wants_trial(self) -> bool:
        """Whether what a step takes without the node is still to be timed."""
        return self.is_open and self._has_layers and (self.decision.chosen is None or self.decision.is_int8) and not self.decision.trial[1]

    @property
    def is_open(self) -> bool:
        """Whether it is still to be found out."""
        return self.decision.compiled is None and not self._is_over

    def _adopt(self, known: Decision | None) -> bool:
        """What another branch has decided. Whether it has."""
        if known is None:
            return False
        if known.slower[1] and self.decision.is_int8:
            self._is_over = True
        elif known.compiled is None or known.chosen != self.decision.chosen:
            return False
        self.decision, self._is_known = known, False
        return True

    def _adopt_trial(self, known: Decision | None) -> None:
        """Another branch may be the one that was sampled first: only that one has been timed as it came."""
        if known is not None and not self.decision.trial[1] and known.chosen == self.decision.chosen:
            self.decision = replace(self.decision, trial=known.trial)

    def _decide(self, size: str, eager: float, compiled: float, steps: int) -> None:
        """Whether compiling pays, and INT8 all in all. eager, compiled: seconds of a step of that size; compiled is 0 where that failed.
        steps: how many of each were timed."""
        of_size, without, beside = self.decision.trial
        now = min(eager, compiled) or eager
        if not self.decision.is_int8:
            without = eager
        elif beside:
            without *= eager / beside
        elif of_size != size:
            without = 0.0
        logger.info("%s: %.4f s a step as it came, %.4f s uncompiled, %.4f s compiled", TITLE, without, eager, compiled)
        self._is_known = False
        if self.decision.is_int8 and GOALS[self.goal].faster_only and 0 < without < (1 - (NOISE if beside else UNSURE)) * now:
            self._is_over = True  # for this branch: its layers are INT8
            self.decision = self.decision.without_int8(without, now)
            decisions.changed()
        else:
            # INT8 gains something else in another size: nothing is said of it.
            without = without if of_size == size or not self.decision.is_int8 else 0.0
            self.decision = replace(self.decision, compiled=0 < compiled < eager).with_times(size, without, eager, compiled, steps=steps)
        self._passing_because = self._passing_because or ("" if compiled else decisions.FAILED)
        self._keep()

    def trial_broke_off(self) -> None:
        """What a step takes without the node, or in the same moments with it, is not known. Once the layers are INT8 only a node that runs
        again can time it."""
        self._passing_because = decisions.UNTIMED

    def _keep_trial(self, size: str, without: float, beside: float) -> None:
        """Before the first step, with the layers; it is not measured again at the next start."""
        broke_off = self._passing_because == decisions.UNTIMED
        if without and not self.decision.trial[1] and (beside or not broke_off):
            self._passing_because = "" if broke_off else self._passing_because
            self._keep(trial=(size, without, beside))
        elif not self._is_kept:
            self._keep()

    def _keep(self, **changes) -> None:
        if self._passing_because == decisions.UNTIMED and self.decision.compiled is None:
            return
        self._is_kept = True
        self.decision = replace(self.decision, **changes)
        known = decisions.read(self._key)
        self._adopt_trial(known)
        own = self.decision
        if self._passing_because == decisions.FAILED and own.compiled is False:  # a node that runs again tries anew: with another LoRA, say
            own = replace(own, compiled=None, times=())
        if known is not None:  # another branch may know more
            has_found_slower = known.slower[1] and not own.slower[1]
            has_decided = known.compiled is not None and own.compiled is None and known.chosen == own.chosen
            if has_found_slower or has_decided:
                return
        decisions.write(self._key, own, self._passing_because)

    def _notify(self, doing: str = "", progress: tuple[int, int] | None = None) -> None:
        reports = self._reports
        report = OptimizeReport(self.goal, GOALS[self.goal].min_sqnr_db, self.decision, self._is_known, self._reason, self._background,
                                decisions.passing(self._key), reports.modes, reports.quantize, reports.compile, self._is_over)
        if reports.compile is not None:
            reports.compile.gain = report.gain()  # for who asks for the reports of all models
        self._status(report, doing, progress)
