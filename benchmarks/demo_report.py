"""What the two demos share: the variants, their table, pictures and machine-readable results. Standard library and Pillow."""
from __future__ import annotations

import json
import platform
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

TITLES = {"eager": "eager", "compiled": "compiled", "int8_compiled": "INT8 + compiled", "int8_background": "the same, background",
          "int8_next": "the same, next start"}
# Relative difference from eager of the same seed. INT8 that does not differ at all has not run.
INT8_LIMITS = (1e-6, 0.05)
COMPILED_LIMIT = {"float32": 1e-3, "bfloat16": 2e-2}  # fused kernels round to bfloat16 less often than eager's
CAPTION_HEIGHT = 44
GAP = 8


@dataclass
class Variant:
    """One way of running the model. The images' seconds are of whole prompts, with the files read before. difference: from eager, same
    seed (the worst of the seeds). error: why it did not run, or not as it should; empty if all went well."""

    name: str
    seconds_per_step: float | None = None
    first_image_seconds: float | None = None
    second_image_seconds: float | None = None
    weights_mb: float | None = None
    difference: float | None = None
    limits: tuple[float, float] | None = None
    error: str = ""

    @property
    def passed(self) -> bool:
        if self.error or self.seconds_per_step is None:
            return False
        return self.limits is None or self.limits[0] <= self.difference < self.limits[1]

    def verdict(self) -> str:
        if self.error:
            return "FAIL (see below)"
        if self.limits is None:
            return "reference"
        low, high = self.limits
        return f"{'PASS' if self.passed else 'FAIL'} ({f'{low:g} to ' if low else '< '}{high:g})"


def limits(name: str, dtype: str) -> tuple[float, float] | None:
    """The differences from eager that a variant may have when the model computes in dtype (float32 or bfloat16)."""
    return {"eager": None, "compiled": (0.0, COMPILED_LIMIT[dtype])}.get(name, INT8_LIMITS)


def table(variants: Sequence[Variant]) -> str:
    """The results as text; below it, what failed."""
    rows = [("", "first image s", "second s", "seconds a step", "speed", "weights MB", "difference", "verdict")]
    for v in variants:
        rows.append((TITLES[v.name], number(v.first_image_seconds, ".1f"), number(v.second_image_seconds, ".1f"),
                     number(v.seconds_per_step, ".4f"), _speed(variants[0], v), number(v.weights_mb, ".1f"), number(v.difference, ".1e"),
                     v.verdict()))
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    lines = ["  ".join(cell.ljust(width) if i in (0, len(row) - 1) else cell.rjust(width)
                       for i, (cell, width) in enumerate(zip(row, widths))).rstrip() for row in rows]
    lines.insert(1, "-" * sum(widths, 2 * (len(widths) - 1)))
    lines += [f"\n{TITLES[v.name]}: {v.error}" for v in variants if v.error]
    return "\n".join(lines)


def beside_check(variants: Sequence[Variant], expected: dict[str, float]) -> str:
    """The variants' speeds beside those that INT8 Compile Check measured for one block (times as fast as eager, by a variant's title)."""
    eager, *others = variants
    return "\n".join(f"{TITLES[v.name]}: {_speed(eager, v)} a step; check.py's block {number(expected.get(TITLES[v.name]), '.2f', 'x')}"
                     for v in others if TITLES[v.name] in expected)


def _speed(base: Variant, v: Variant) -> str:
    return number(base.seconds_per_step / v.seconds_per_step if base.seconds_per_step and v.seconds_per_step else None, ".2f", "x")


def number(value: float | None, form: str, unit: str = "") -> str:
    return "-" if value is None else f"{value:{form}}{unit}"


def comparison(variants: Sequence[Variant], out: Path) -> None:
    """comparison.png: the variants' pictures (<name>.png in out) side by side, captioned. None where no variant made one."""
    sheet([(out / f"{v.name}.png", f"{TITLES[v.name]}\n{number(v.seconds_per_step, '.4f')} s/step, {number(v.weights_mb, '.1f')} MB")
           for v in variants], out / "comparison.png", len(variants))


def sheet(pictures: Sequence[tuple[Path, str]], path: Path, columns: int) -> None:
    """Writes the pictures that there are, (file, caption of two lines) each, as one into path; nothing where there are none."""
    from PIL import Image, ImageDraw

    shown = [(Image.open(file).convert("RGB"), caption) for file, caption in pictures if file.exists()]
    if not shown:
        return
    columns = min(columns, len(shown))
    width, height = max(image.width for image, _ in shown) + GAP, max(image.height for image, _ in shown) + CAPTION_HEIGHT + GAP
    whole = Image.new("RGB", (columns * width - GAP, -(-len(shown) // columns) * height - GAP), "white")
    draw = ImageDraw.Draw(whole)
    for number, (image, caption) in enumerate(shown):
        left, top = number % columns * width, number // columns * height
        whole.paste(image, (left, top + CAPTION_HEIGHT))
        draw.multiline_text((left + 4, top + 6), caption, fill="black", spacing=6)
    whole.save(path)


def write_json(path: Path, variants: Sequence[Variant], **facts) -> None:
    """demo.json: facts about the run, and every variant."""
    results = [{**asdict(v), "passed": v.passed} for v in variants]
    path.write_text(json.dumps({**facts, "passed": all(v.passed for v in variants), "variants": results}, indent=2) + "\n")


def cpu_name() -> str:
    """The processor as people call it."""
    info = Path("/proc/cpuinfo")
    if info.exists():
        for line in info.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
