"""A check's table as a picture."""
from __future__ import annotations

import importlib.util

import torch

from .block import BOTH
from .facts import pip_install
from .linear_table import INT8, ROTATED
from .machine import Check

BASE, FLOAT, PLAIN, NODES = "#4b5560", "#a9b3bd", "#9cc3e6", "#1f6fb4"
PAPER = dict(facecolor="white", edgecolor="none", pad=0.5)  # behind text
INCHES_A_BAR = 0.22
WIDTH = 9.0  # inches
DPI = 110


def require_matplotlib():
    """Raises RuntimeError where there is none, with the command that installs it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError(f"The plot needs matplotlib. {pip_install('matplotlib')}")


def plot(check: Check) -> torch.Tensor:
    """Bars of times as fast as the baseline, a group for each layer, the fastest first: [H, W, 3] float in 0..1. Raises RuntimeError
    without matplotlib."""
    require_matplotlib()
    from matplotlib.figure import Figure

    groups = [(title, row, base, sorted(row.ratios(base).items(), key=lambda item: -item[1])) for title, row, base in check.groups()]
    bars = sum(len(ratios) + 2 for *_, ratios in groups)
    figure = Figure(figsize=(WIDTH, 1.5 + INCHES_A_BAR * max(bars, 4)), dpi=DPI, layout="constrained")
    axes = figure.subplots()
    longest = max((ratio for *_, ratios in groups for _, ratio in ratios), default=1.0)
    y, ticks, names = 0.0, [], []
    for title, row, base, ratios in groups:
        axes.text(0.01 * longest, y, f"{title.replace('->', '→')}   (1x is {base})", weight="bold", size=9, va="center", bbox=PAPER)
        for name, ratio in ratios:
            y += 1
            axes.barh(y, ratio, color=_color(name, base))
            axes.text(ratio + 0.01 * longest, y, f"{ratio:.2f}x, {_number(row.milliseconds[name])} ms", size=8, va="center", bbox=PAPER)
            ticks.append(y)
            names.append(name)
        y += 1.6
    axes.axvline(1, color=BASE, linewidth=0.8, linestyle="--", zorder=0)
    axes.set_yticks(ticks, names, size=8)
    axes.set_ylim(y - 0.8, -0.8)
    axes.set_xlim(0, 1.25 * longest)
    axes.set_xlabel(f"times as fast as {check.baseline}; milliseconds of one call. Dark blue: what the nodes run by default")
    axes.set_title(f"INT8 Compile Check: {check.device}, {check.date[:10]}", size=11, loc="left")
    axes.spines[["top", "right"]].set_visible(False)
    return pixels(figure)


def pixels(figure) -> torch.Tensor:
    """[H, W, 3] float in 0..1, of a matplotlib Figure."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    canvas = FigureCanvasAgg(figure)
    canvas.draw()
    width, height = canvas.get_width_height()
    return torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8).view(height, width, 4)[..., :3].float() / 255


def _number(ms: float) -> str:
    return f"{ms:.0f}" if ms >= 100 else f"{ms:.3g}"


def _color(name: str, base: str) -> str:
    if name == base:
        return BASE
    if not name.lower().startswith(INT8):
        return FLOAT
    return NODES if name in (ROTATED, BOTH) else PLAIN
