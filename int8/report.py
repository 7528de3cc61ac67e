"""What happened when a model was quantized."""
from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass, field

from .plan import LayerPlan

KEPT_BY_NAME = "by keep_layers"
NOT_TIMED = "not timed"
MOST_DB = 200.0  # of an output that is exact: JSON has no infinity


def as_number(db: float) -> float:
    """dB as JSON can have it."""
    return max(-MOST_DB, min(MOST_DB, db))


@dataclass(frozen=True)
class ShapeDecision:
    """Layers from k to n channels over rows tokens. int8: how many of them are INT8. float_ms, int8_ms: milliseconds of one, 0 where it
    was not timed. least_db: the least SQNR that was measured of one as INT8."""

    k: int = 0
    n: int = 0
    rows: int = 0
    layers: int = 0
    int8: int = 0
    float_ms: float = 0.0
    int8_ms: float = 0.0
    least_db: float = 0.0


def shape_decisions(plans: Iterable[LayerPlan]) -> list[ShapeDecision]:
    """Of the plans that were measured, those first that compute most."""
    groups: dict[tuple, list[LayerPlan]] = {}
    for plan in plans:
        if plan.sqnr and plan.shape:
            groups.setdefault((*plan.shape[::-1], plan.tokens, *(plan.times or (0.0, 0.0))), []).append(plan)
    found = [ShapeDecision(k, n, rows, len(group), sum(plan.method != "float" for plan in group), float_ms, int8_ms,
                           round(min(as_number(max(plan.sqnr.values())) for plan in group), 1))
             for (k, n, rows, float_ms, int8_ms), group in groups.items()]
    return sorted(found, key=lambda shape: -shape.layers * shape.k * shape.n * shape.rows)


@dataclass
class QuantizeReport:
    """methods: of the INT8 layers -> how many. native: INT8 in the file already. waiting: to be decided at the first_use. kept: why
    layers stay in high precision -> their names. before, after: MB (2**20 bytes) of the model's weights. worst: the least SQNR that was
    measured, (dB, layer). refusal: why the model was left as it is. shapes: what was decided of layers of one size, where any were
    measured. encoders: part of a text encoder -> how many of its layers are INT8. source: what their weights were before, where
    that was not float. chosen: (layer, method) of each, for whoever keeps it; in
    no history."""

    methods: dict[str, int] = field(default_factory=dict)
    native: int = 0
    waiting: int = 0
    kept: dict[str, list[str]] = field(default_factory=dict)
    before: float = 0.0
    after: float = 0.0
    worst: tuple[float, str] | None = None
    refusal: str = ""
    shapes: list[ShapeDecision] = field(default_factory=list)
    encoders: dict[str, int] = field(default_factory=dict)
    first_use: str = "sampling"
    source: str = ""
    chosen: tuple[tuple[str, str], ...] = ()

    @classmethod
    def of(cls, plans: Iterable[LayerPlan], before: int, after: int, kept: Iterable[str] = (), is_encoder: bool = False):
        """before, after: bytes. kept: names that keep_layers matched. is_encoder: they are of a text encoder, of several parts."""
        plans = list(plans)
        reasons = {KEPT_BY_NAME: list(kept)} if kept else {}
        for plan in plans:
            if plan.method == "float":
                reasons.setdefault(plan.reason, []).append(plan.name)
        measured = [(plan.sqnr[plan.method], plan.name) for plan in plans if plan.method in plan.sqnr]
        return cls(dict(Counter(plan.method for plan in plans if plan.method != "float")), kept=reasons, before=before / 2**20,
                   after=after / 2**20, worst=min(measured, default=None), shapes=shape_decisions(plans),
                   encoders=dict(Counter(plan.name.partition(".")[0] for plan in plans if is_encoder and plan.method != "float")),
                   chosen=tuple((plan.name, plan.method) for plan in plans))

    def status(self) -> str:
        if self.refusal:
            return "not quantized"
        if self.waiting:
            return f"measures and quantizes {self.waiting} layers at the first {self.first_use}"
        if self.native:
            return f"{self.native} layers are INT8 in the file"
        kept = sum(map(len, self.kept.values()))
        return f"quantized {sum(self.methods.values())} layers" + (f", {kept} kept" if kept else "")

    def warnings(self) -> list[str]:
        return [self.refusal] if self.refusal else []

    def short(self) -> list[str]:
        """What anybody wants to know, a line each."""
        return [self.status(), *self._weights(), *self.warnings()]

    def _weights(self) -> list[str]:
        return [f"weights: {self.before:.1f} -> {self.after:.1f} MB"] if self.after and self.before != self.after else []

    def text(self) -> str:
        """A fact a line."""
        lines = [self.status()]
        if self.methods:
            lines.append("methods: " + ", ".join(f"{count} {method}" for method, count in self.methods.items()))
        if self.encoders:
            lines.append("layers: " + ", ".join(f"{count} of {name}" for name, count in self.encoders.items()))
        if self.source:
            lines.append(f"made of {self.source}")
        lines += self._weights()
        if self.worst:
            lines.append(f"least SQNR: {self.worst[0]:.1f} dB ({self.worst[1]})")
        lines += self.warnings()
        for reason, names in self.kept.items():
            more = f" and {len(names) - 3} more" if len(names) > 3 else ""
            lines.append(f"kept in high precision {reason}: {', '.join(names[:3])}{more}")
        return "\n".join(lines)

    def to_dict(self) -> dict:
        return {key: value for key, value in asdict(self).items() if key not in ("chosen", "first_use")}


ProgressCallback = Callable[..., None]  # tell(report or None, what is under way, "" for the end)


def no_progress(report: QuantizeReport | None, doing: str = "") -> None:
    """Where no node shows what is done."""
