"""What a step of gpu_suite.py gets: where it runs, how long it may take, and where its rows go."""
from __future__ import annotations

import dataclasses
import json
import sys
import time
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent.parent


@dataclasses.dataclass
class Context:
    """device: cuda or cpu. dry: tiny models and few repetitions, to see that all runs; no measurement. cheap: of those only what takes
    seconds. work: a folder for models and caches. rows: the file of what was found, a JSON object a line. deadline: of time.time()."""

    device: str
    dry: bool
    cheap: bool
    comfyui: Path | None
    work: Path
    rows: Path
    deadline: float
    tables: Path

    def to_json(self) -> str:
        return json.dumps({key: str(value) if isinstance(value, Path) else value for key, value in dataclasses.asdict(self).items()})

    @classmethod
    def from_json(cls, text: str) -> Context:
        values = json.loads(text)
        for name in ("work", "rows", "tables", "comfyui"):
            values[name] = Path(values[name]) if values[name] else None
        return cls(**values)

    def left(self) -> float:
        """Seconds."""
        return self.deadline - time.time()

    def add(self, **row) -> dict:
        """Keeps a row, whatever happens to this process afterwards."""
        with self.rows.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row, default=float) + "\n")
        print(", ".join(f"{key} {_short(value)}" for key, value in row.items()), file=sys.stderr, flush=True)
        return row


def _short(value) -> str:
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, dict):
        return "{" + ", ".join(f"{key} {_short(item)}" for key, item in value.items()) + "}"
    return str(value)
