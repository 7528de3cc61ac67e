"""Run as a program: loads every *.safetensors of a folder onto a model of other weights, and writes what it then is."""
from __future__ import annotations

import sys
from pathlib import Path

import torch

TESTS = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(TESTS), str(TESTS.parent)]
from benchmarks.wrapper_overhead import load_pack  # noqa: E402 (pytest's conftest needs pytest, which other processes need not find)

load_pack()
from int8_compile.compile.modes import mode_state  # noqa: E402
from int8_compile.compile.modes.files import load_model  # noqa: E402
from modes.small_model import Model, typical  # noqa: E402

if __name__ == "__main__":
    torch.set_num_threads(1)
    for path in Path(sys.argv[1]).glob("*.safetensors"):
        model = load_model(Model(seed=5).eval(), path)
        with torch.no_grad():
            torch.save((mode_state(model), model.state_dict(), model(typical())), path.with_suffix(".pt"))
