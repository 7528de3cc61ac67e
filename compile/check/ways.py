"""What INT8 and compile do to a model on its user's own pictures: seconds an image and the difference from eager, as a table and a plot.
Plain torch."""
from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass

import torch

from .plot import BASE, DPI, NODES, PLAIN, WIDTH, pixels, require_matplotlib

METHODS = "rowwise", "convrot", "auto"
FIRST_SEED, LATER = 1, 2  # images after the first, of which the faster counts
NO_LIMIT_DB = 99.0  # of pictures that are equal


@dataclass
class Way:
    """One way to run a model. method: of INT8, empty for its own type. first, later: seconds of an image; decibels: of its picture against
    eager's with the same seed. weights_mb: with the last image. error: why it did not run, or not compiled."""

    method: str = ""
    compiled: bool = False
    first: float | None = None
    later: float | None = None
    decibels: float | None = None
    weights_mb: float | None = None
    error: str = ""

    @property
    def title(self) -> str:
        return " + ".join([f"INT8 {self.method}"] * bool(self.method) + ["compiled"] * self.compiled) or "eager"


def all_ways() -> list[Way]:
    return [Way(method, compiled) for method in ("", *METHODS) for compiled in (False, True)]


def measure_way(way: Way, image: Callable[[int], torch.Tensor], settle: Callable[[], object] = lambda: None) -> torch.Tensor:
    """Fills in its seconds. image(seed): what an image is, on the CPU. settle: called before those that are later. The first image."""
    def seconds(seed: int) -> tuple[float, torch.Tensor]:
        start = time.perf_counter()
        made = image(seed)
        return time.perf_counter() - start, made
    way.first, first = seconds(FIRST_SEED)
    settle()
    way.later = min(seconds(FIRST_SEED + number)[0] for number in range(1, 1 + LATER))
    return first


def psnr_db(picture: torch.Tensor, other: torch.Tensor) -> float:
    """Of two pictures in 0..1, without NaN."""
    error = (picture.double() - other.double()).square().mean().item()
    return min(NO_LIMIT_DB, -10 * math.log10(error)) if error else NO_LIMIT_DB


def table(ways: Iterable[Way], quality: str) -> list[str]:
    """Lines of text. quality: what decibels are of."""
    ways = list(ways)
    lines = [f"  {'':24} {'first s':>9} {'later s':>9} {'speed':>7} {'MB':>8}   {quality}, dB"]
    for way in ways:
        speed = _speed(way, ways)
        cells = [_number(way.first, 9, ".2f"), _number(way.later, 9, ".2f"), _number(speed, 6, ".2f") + ("x" if speed else " "),
                 _number(way.weights_mb, 8, ".0f"), _number(way.decibels, 7, ".1f")]
        lines.append(f"  {way.title:24} {' '.join(cells)}".rstrip())
    return lines + [f"  {way.title}: {way.error}" for way in ways if way.error]


def advice(ways: list[Way], quality: str) -> str:
    """The fastest, and what it costs."""
    known = [(speed, way) for way in ways if (speed := _speed(way, ways)) and not way.error]
    if not known or known[0][1] is not ways[0]:
        return "This model could not be measured."
    speed, best = max(known, key=lambda item: item[0])
    if speed < 1.05:
        return "This model: nothing was faster than eager by 5 %."
    return f"This model: {best.title} is fastest, {speed:.2f}x as fast as eager" + (
        f"; {quality} {best.decibels:.1f} dB." if best.method and best.decibels is not None else ".")


def _speed(way: Way, ways: list[Way]) -> float | None:
    return ways[0].later / way.later if ways[0].later and way.later else None


def _number(value: float | None, width: int, form: str) -> str:
    return f"{'-' if value is None else format(value, form):>{width}}"


def plot_ways(ways: list[Way], quality: str) -> torch.Tensor:
    """Seconds an image against quality: [H, W, 3] float in 0..1, as wide as plot.plot. Raises RuntimeError without matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure

    figure = Figure(figsize=(WIDTH, 4.5), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    axes.set(xlabel="seconds an image", ylabel=f"{quality}, dB")
    if ways[0].later:
        axes.axvline(ways[0].later, linestyle="--", color=BASE, label=ways[0].title)
    for way in ways[1:]:
        if way.later and way.decibels is not None:
            axes.scatter(way.later, way.decibels, marker="o" if way.compiled else "s", color=NODES if way.method else PLAIN)
            axes.annotate(way.title, (way.later, way.decibels), xytext=(6, 4), textcoords="offset points", size=8)
    axes.margins(0.2)
    axes.set_title("Your model: left is faster, up is nearer to eager", size=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return pixels(figure)


def to_dict(ways: Iterable[Way]) -> list[dict]:
    return [{"title": way.title, **asdict(way)} for way in ways]
