"""Shipped choices: what was measured for a card by benchmarks/gpu_suite.py, step tune. One JSON file a card in tables/.

{"card": name, "stacks": {stack: {"facts": {...}, "choices": {shape: candidate}}}}. A stack names what decides which kernel is fast beside
the card (see autotune.stack), so that what was measured with another Triton, CUDA or driver is not served.
"""
from __future__ import annotations

import json
import logging
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..files.whole import writing_whole

logger = logging.getLogger(__name__)

FOLDER = Path(__file__).with_name("tables")


def key(card: str, stack: str, shape: str) -> str:
    """Of a choice, in tuning.Choices."""
    return f"{card} | {stack} | {shape}"


def load(folder: Path = FOLDER) -> dict[str, str]:
    """{key(card, stack, shape): candidate} of all files in folder; a file that cannot be read is as good as none."""
    found: dict[str, str] = {}
    for path in sorted(folder.glob("*.json")):
        try:
            table: dict = json.loads(path.read_text(encoding="utf-8"))
            found |= {key(table["card"], stack, shape): name for stack, measured in table["stacks"].items()
                      for shape, name in measured["choices"].items()}
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            logger.warning("INT8: the kernel table %s cannot be read and is left out (%s: %s).", path, type(error).__name__, error)
    return found


def save(folder: Path, card: str, stack: str, facts: Mapping, choices: Mapping[str, str]) -> Path:
    """Adds choices ({shape: candidate}) to card's file, beside those of other stacks. facts: about the measurement."""
    path = folder / (re.sub(r"[^a-z0-9]+", "-", card.lower()).strip("-") + ".json")
    table: dict[str, Any] = {"card": card, "stacks": {}}
    if path.exists():
        table = json.loads(path.read_text(encoding="utf-8"))
    before = table["stacks"].get(stack, {}).get("choices", {})
    table["stacks"][stack] = {"facts": dict(facts), "choices": {**before, **choices}}
    with writing_whole(path) as partial:
        partial.write_text(json.dumps(table, indent=1, sort_keys=True) + "\n", encoding="utf-8")
    return path
