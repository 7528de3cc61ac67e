"""A GPU's day on a machine without one: on each of these cards every step runs, and every decision about CUDA goes both ways."""
from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from . import visits
from .exceptions import EXCEPTIONS

SCRIPT = Path(__file__).with_name("rehearse.py")
# One of each architecture (an L40S runs what a 4090 does). The last two have no Triton, or no INT8: what the pack says and does there.
# ComfyUI runs on one card: its steps do not ask for another.
CARDS = ("NVIDIA GeForce RTX 4090", "NVIDIA H100 80GB HBM3", "NVIDIA A100-SXM4-80GB", "NVIDIA GeForce RTX 5090", "Tesla T4",
         "NVIDIA GeForce GTX 1080")
WITH_COMFYUI = CARDS[0]
PROCESSES = 2
LIMIT = 600  # seconds a card, of a machine that does other things; 20 of an idle one

pytestmark = [pytest.mark.skipif(importlib.util.find_spec("triton") is None, reason="Triton is not installed on this platform"),
              pytest.mark.skipif(sys.platform != "linux", reason="torch has no CUDA build here")]


def run(card: str, folder: Path) -> dict:
    arguments = [sys.executable, SCRIPT, "--card", card, "--work", folder / card, *([] if card == WITH_COMFYUI else ["--no-comfyui"])]
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(list(map(str, arguments)), env=environment, capture_output=True, text=True, timeout=LIMIT)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def rehearsed(tmp_path_factory):
    """{card: what its rehearsal says}"""
    folder = tmp_path_factory.mktemp("rehearsal")
    with ThreadPoolExecutor(PROCESSES) as threads:
        return dict(zip(CARDS, threads.map(lambda card: run(card, folder), CARDS)))


@pytest.mark.parametrize("card", CARDS)
def test_every_step_of_the_pack_runs_on(rehearsed, card):
    failed = {step: text for step, text in rehearsed[card]["steps"].items() if text}
    assert not failed, "\n".join(f"{step}:\n{text}" for step, text in failed.items())
    assert len(rehearsed[card]["steps"]) > 10


def test_every_decision_about_cuda_has_gone_both_ways(rehearsed):
    visited = {tuple(visit) for result in rehearsed.values() for visit in result["visited"]}
    with_comfyui = any(len(result["steps"]) > len(rehearsed[CARDS[1]]["steps"]) for result in rehearsed.values())
    missing, needless = [], dict(EXCEPTIONS)
    for visit in sorted(visits.all_visits() - visited, key=str):
        file, line, text, outcome = visit
        if needless.pop((file, text, outcome), None) or (file, text, outcome) in EXCEPTIONS:
            continue
        if with_comfyui or "comfy" not in file:
            missing.append(f"{file}:{line}: {text[:120]}" + ("" if outcome is None else f" was never {outcome}"))
    remedy = "entered by no rehearsed card: add a step to rehearse.py, or a reason to exceptions.py\n"
    assert not missing, remedy + "\n".join(missing)
    assert not with_comfyui or not needless, f"these exceptions are entered, or gone: {list(needless)}"


def test_what_is_watched_is_all_that_names_cuda():
    """The instrument itself: a condition by each operand, a statement, a comprehension; not a text that a user reads."""
    tree, found = visits.instrument("x.py", (
        "def f(x, y):\n"
        "    if x.is_cuda and y > 1:\n"
        "        return torch.cuda.current_device()\n"
        "    return [z for z in y if z.type == 'cuda'] or 'CUDA is fast'\n"))
    assert {(line, text, outcome) for _, line, text, outcome in found} == {
        (2, "x.is_cuda", True), (2, "x.is_cuda", False), (3, "return torch.cuda.current_device()", None),
        (4, "z.type == 'cuda'", True), (4, "z.type == 'cuda'", False), (4, "[z for z in y if z.type == 'cuda']", True),
        (4, "[z for z in y if z.type == 'cuda']", False), (4, "return [z for z in y if z.type == 'cuda'] or 'CUDA is fast'", None)}
    assert tree.body
