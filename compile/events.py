"""What happens to a compiled module, for its report, for the console and for whoever wants to know."""
from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping

from .report import NOT_KEPT, CompileReport, first_lines, remedy
from .torch_compiler import CompileScope, RegionCode
from .verification.quantization import QuantizationError

logger = logging.getLogger(__name__)

_COSTS, _MOST_FAR = "INT8 costs", 3
_ELSEWHERE = ("another node behind this one compiles the model (torch.compile): it is left to that one. The one that stands last compiles; "
              "remove either.")
# (report, what is under way, how much of it is done; "" and None for nothing)
OnProgress = Callable[[CompileReport, str, tuple[int, int] | None], None]


class Events:
    """Writes report, and calls on_progress with it when something has happened."""

    def __init__(self, title: str, background: bool):
        self.report = CompileReport(title=title)
        self.in_step = False  # on_progress is then called at its end
        self._title = title
        self._background = background
        self._on_progress: OnProgress | None = None
        self._notified = False  # of all that is in the report
        self._unused: dict[str, list[str]] = {}  # why artifacts are not used, by region; until one of it is loaded
        self._passing: list[str] = []  # why blocks ran eager
        self._said: set[str] = set()

    def listen(self, on_progress: OnProgress | None) -> None:
        if on_progress is not self._on_progress:
            self._on_progress, self._notified = on_progress, False

    def notify(self, doing: str = "", progress: tuple[int, int] | None = None) -> None:
        """Calls on_progress where something is under way, or something has happened that it does not know of."""
        if self._on_progress is not None and (doing or not self._notified):
            self._notified = not doing
            self._on_progress(self.report, doing, progress)

    def changed(self) -> None:
        """Something was written into the report."""
        self._notified = False

    def fall_back(self, message: str, passing: bool = False) -> None:
        """Warns, once, that something runs uncompiled, and why. passing: it is in the report only while blocks run so."""
        if passing and message not in self._passing:
            self._passing.append(message)
        if message not in self.report.fallbacks:
            self.report.fallbacks.append(message)
            self._notified = False
        if message not in self._said:
            self._said.add(message)
            logger.warning("%s: %s", self._title, message)

    def uncompiled_step(self, elsewhere: bool, blocks: int) -> None:
        """None of these blocks is compiled here: another node compiles them, or it has failed."""
        if elsewhere:
            self.fall_back(_ELSEWHERE)
            self.count({"artifact": 0, "graph": 0, "eager": blocks})
        self.notify()

    def failed(self, cause: str) -> None:
        """Compile is off from now on, empty: is not off any more, for what the model's blocks are made of."""
        if cause != self.report.failure:
            self.report.failure, self._notified = cause, False

    def count(self, calls: dict[str, int]) -> None:
        """Adds the calls of blocks of a step, by what ran them."""
        if calls != self.report.last_calls:
            self.report.last_calls, self._notified = dict(calls), False
        if _ELSEWHERE in self.report.fallbacks and calls["artifact"] + calls["graph"]:  # that node is gone
            self.report.fallbacks.remove(_ELSEWHERE)
        self._show([reason for reasons in self._unused.values() for reason in reasons], calls["eager"] + calls["graph"] > 0)
        self._show(self._passing, calls["eager"] > 0)
        for kind, number in calls.items():
            self.report.calls[kind] = self.report.calls.get(kind, 0) + number

    def _show(self, reasons: list[str], shown: bool) -> None:
        """They are in the report, or not: a bypass LoRA, a hook may be gone, and back."""
        fallbacks = self.report.fallbacks
        changed = [reason for reason in reasons if (reason in fallbacks) != shown]
        if changed:
            self.report.fallbacks = [*fallbacks, *changed] if shown else [reason for reason in fallbacks if reason not in changed]
            self._notified = False

    def checked(self, region: str, dtype: str, in_roundings: float) -> None:
        """What was compiled of a region was compared with eager. in_roundings: the difference in roundings of dtype."""
        known = self.report.checked.get(region)
        if known is None or known[1] < in_roundings:
            self.report.checked = {**self.report.checked, region: (dtype, in_roundings)}
            self._notified = False

    def quantization(self, found: Mapping[str, QuantizationError]) -> None:
        """What INT8 costs a block of each region with the weights that the model has now; empty: not known."""
        report = self.report
        if found or report.int8:
            report.int8 = {region: (round(error.sqnr, 1), *error.least_layer()) for region, error in found.items()}
            far = [f"{_COSTS} {name} in {region} more than was planned: {db:.1f} dB, not {planned:.1f}. Keep it in high precision "
                   "(keep_layers), or quantize again with this prompt."
                   for region, error in found.items() for name, db, planned in error.far_below_plan()]
            report.notes = [text for text in report.notes if not text.startswith(_COSTS)] + far[:_MOST_FAR]
            self._notified = False

    def compiled(self, scope: CompileScope, codes: Iterable[tuple[str, RegionCode]], log: bool) -> None:
        """Something was compiled during scope. codes: of the regions, with their names. log: say it at later times too."""
        first = not self.report.graphs
        scope.record(self.report)
        if first or log:
            logger.info("%s: %s", self._title, self.report.summary())
        limit = scope.limit()
        for name, code in codes:
            if code.is_at_limit(limit):
                self.fall_back(f"{name} was compiled {limit} times, which is the limit (dynamo_cache_size_limit): "
                               "it runs uncompiled wherever it would need another compile.")

    def on_artifact(self, event: str, name: str, detail: str) -> None:
        """Of the artifacts of the region called name; from the builder's thread too. event: loaded, building, ended (built or
        not), built, refused, not used."""
        report = self.report
        known = remedy(detail)
        detail = known + first_lines(detail, 1 if known else 4)
        text = f"{name} {detail}" if event in ("loaded", "building", "ended", "built") else f"{name}: {detail}"
        if event == "ended":
            report.building = [building for building in report.building if building != text]
        elif event == "loaded":
            over = self._unused.pop(name, ())
            report.fallbacks = [fallback for fallback in report.fallbacks if fallback not in over]
            report.artifacts.append(text)
            report.compiled_from_step = report.compiled_from_step or report.steps
            logger.info("%s: step %d on runs %s from the compile cache", self._title, report.steps, text)
        elif event == "refused" and self._background:
            self.fall_back(f"{text}: running uncompiled. Set background to false to compile it in this process.")
        elif event == "not used":
            if self._background:
                reason = f"{text}: running uncompiled while it is so."
                self.fall_back(reason)
            else:
                reason = f"{NOT_KEPT}: {text}"
                report.fallbacks += [] if reason in report.fallbacks else [reason]
                logger.info("%s: not used: %s", self._title, text)
            self._unused.setdefault(name, []).append(reason)
        elif event == "refused":
            report.fallbacks.append(f"{NOT_KEPT}: {text}")
            logger.info("%s: not kept in the compile cache: %s", self._title, text)
        else:
            if event == "building":
                report.building.append(text)
            else:
                report.built_at_step = report.steps
            logger.info("%s: %s: %s", self._title, event, text)
        self._notified = False
        if not self.in_step:
            self.notify()
