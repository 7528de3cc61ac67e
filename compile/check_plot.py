"""A check's table as a picture."""
from __future__ import annotations

import importlib.util

import torch

from .check import Check, pip_install
from .check_table import INT8

FLOATS, ROTATIONS = ("#9aa3ad", "#6d7781", "#c3c9cf"), ("#8fb8de", "#1f6fb4")
INCHES_A_BAR = 0.22


def require_matplotlib():
    """Raises RuntimeError where there is none, with the command that installs it."""
    if importlib.util.find_spec("matplotlib") is None:
        raise RuntimeError(f"The plot needs matplotlib. {pip_install('matplotlib')}")


def plot(check: Check) -> torch.Tensor:
    """Bars of times as fast as the baseline, a group for each shape: [H, W, 3] float in 0..1. Raises RuntimeError without matplotlib."""
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    rows = [(row, row.ratios(check.baseline)) for row in check.rows]
    bars = sum(len(ratios) + 1 for _, ratios in rows)
    figure = Figure(figsize=(9, 1.6 + INCHES_A_BAR * max(bars, 4)), dpi=110, layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    y, ticks, names = 0, [], []
    for row, ratios in rows:
        axes.text(0, y, f"{row.model}: {row.m} x {row.k} → {row.n}", weight="bold", size=9, va="center")
        y += 1
        for name, ratio in ratios.items():
            axes.barh(y, ratio, color=_color(name))
            axes.text(ratio, y, f" {ratio:.2f}x, {row.milliseconds[name]:.3g} ms", size=8, va="center")
            ticks.append(y)
            names.append(name)
            y += 1
    axes.axvline(1, color="#333333", linewidth=0.8, linestyle="--")
    axes.set_yticks(ticks, names, size=8)
    axes.set_ylim(y, -1)
    axes.margins(x=0.18)
    axes.set_xlim(left=0)
    axes.set_xlabel(f"times as fast as {check.baseline}")
    axes.set_title(f"One Linear layer on {check.device}", size=11)
    axes.spines[["top", "right"]].set_visible(False)
    canvas.draw()
    pixels = torch.frombuffer(bytearray(canvas.buffer_rgba()), dtype=torch.uint8)
    width, height = canvas.get_width_height()
    return pixels.view(height, width, 4)[..., :3].float() / 255


def _color(name: str) -> str:
    if name.startswith(INT8):
        return ROTATIONS[name.endswith("rotated")]
    return FLOATS[("bf16", "fp16").index(name)] if name in ("bf16", "fp16") else FLOATS[2]
