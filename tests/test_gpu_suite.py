"""benchmarks/gpu_suite.py: its checks find what is wrong, its JSON grows step by step, and its cheap part runs without a GPU."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import gpu_suite
from benchmarks.gpu import cards, kernels, linear, report
from benchmarks.gpu.server import families
from benchmarks.gpu_suite import STEPS, add_to, selected

REPO = Path(__file__).resolve().parent.parent
SUITE = REPO / "benchmarks" / "gpu_suite.py"


def suite(*arguments) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, SUITE, *map(str, arguments)], capture_output=True, text=True)


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU, and this is the dry run of one without")
def test_a_cheap_dry_run_of_the_steps_without_a_server(tmp_path):
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    out = tmp_path / "results.json"
    done = suite("--dry-run", "--cheap", "--steps", "kernels,linear,tune", "--out", out)
    assert done.returncode == 0, done.stdout + done.stderr
    whole = json.loads(out.read_text())
    assert whole["facts"]["dry_run"] and "no measurement" in whole["facts"]["note"] and whole["facts"]["device"] == "cpu"
    assert {name: step["status"] for name, step in whole["steps"].items()} == dict.fromkeys(("kernels", "linear", "tune"), "ok")
    checked = {row["kernel"] for row in whole["steps"]["kernels"]["rows"] if "kernel" in row}
    assert {"torch._int_mm", "quantizer swiglu smooth"} <= checked and any(name.startswith("tma") for name in checked)
    text = suite("--report", out).stdout
    assert "no measurement" in text and "| 256, 128 | 32 |" in text


@pytest.mark.skipif(torch.cuda.is_available(), reason="this machine has a GPU")
def test_without_a_gpu_nothing_is_measured(tmp_path):
    done = suite("--steps", "kernels", "--out", tmp_path / "results.json")
    assert done.returncode and "--dry-run" in done.stderr and not (tmp_path / "results.json").exists()


def test_steps_are_named_singly_or_in_groups_and_stay_below_eight_minutes():
    assert selected("tune,comfyui") == ["tune", "flux", "flux_full", "memory", "wan", "sdxl"]
    assert selected("all") == list(STEPS) and max(limit for _, _, limit, _ in STEPS.values()) < 480
    with pytest.raises(SystemExit, match="no step speed"):
        selected("speed")


def test_a_step_that_runs_again_takes_its_place_in_the_results(tmp_path):
    path = tmp_path / "results.json"
    for name, status in (("tune", "failed"), ("kernels", "ok"), ("tune", "ok")):
        add_to(path, {"device": "x"}, name, {"status": status, "rows": []})
    assert {name: step["status"] for name, step in json.loads(path.read_text())["steps"].items()} == {"kernels": "ok", "tune": "ok"}


def test_outputs_are_born_as_nan_between_canaries_that_show_a_write_outside():
    with kernels.Guarded() as guard:
        y = torch.empty((3, 5), dtype=torch.bfloat16)
        z = torch.empty(7, dtype=torch.int8)
    assert y.isnan().all() and (z == -1).all() and guard.written_outside() == 0
    y.fill_(0)
    assert guard.written_outside() == 0
    torch.as_strided(y, (1,), (1,), y.storage_offset() + y.numel()).fill_(1)
    assert guard.written_outside() == 2


@pytest.mark.parametrize("broken", ["value", "unwritten", "outside"])
def test_the_check_finds_a_wrong_kernel(broken, monkeypatch):
    from int8_compile.int8.kernels import torch_mm

    real = torch_mm.int8_gemm

    def wrong(*args):
        y = real(*args)
        if broken == "value":
            y[0, 0] += 0.01
        if broken == "unwritten":
            y[1, 1] = float("nan")
        if broken == "outside":
            torch.as_strided(y, (1,), (1,), y.storage_offset() + y.numel()).fill_(1)
        return y
    generator = torch.Generator().manual_seed(1)
    arguments = None, (5, 64, 33), torch.float32, False, True, 1, generator
    assert kernels.check_gemm(*arguments)["ok"]
    monkeypatch.setattr(torch_mm, "int8_gemm", wrong)
    assert not kernels.check_gemm(*arguments)["ok"]


def test_a_machine_without_git_names_the_sources(monkeypatch, tmp_path):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_suite.commit().startswith("sources ")


def test_ours_failing_fails_the_row_and_anothers_does_not(monkeypatch):
    pytest.importorskip("triton", reason="Triton is not installed on this platform")
    real, failed = linear.interleaved, {}
    monkeypatch.setattr(linear, "interleaved", lambda *a: (real(*a)[0], failed))
    for name, ok in (("fp8", True), ("ours ConvRot", False), ("gemm ours", False)):
        failed.clear()
        failed[name] = "RuntimeError: no kernel"
        with kernels.interpreter_of_today():
            assert linear.layer(17, 64, 32, torch.device("cpu"), None, True)["ok"] == ok


def test_floors_of_an_h200_say_what_int8_can_gain():
    card = cards.CARDS["NVIDIA H200"]
    wide, one_row = (cards.floors(card, m, 3072, 12288) for m in (16384, 1))
    assert 1.9 < wide["expected_ratio"] < 2.0 and 1.9 < one_row["expected_ratio"] < 2.0
    assert cards.floors(card, 4608, 3072, 3072)["expected_ratio"] < 1.8  # the quantizer's pass weighs more where N is small
    assert wide["bf16"] == 2 * 16384 * 3072 * 12288 / 989e12


def test_a_step_of_flux_is_predicted_from_its_layers_and_attention():
    full = families(dry=False)["flux_full"]
    found = cards.predicted_step(cards.CARDS["NVIDIA H200"], full.spec, full.sizes[0], full.cond[0], 1, 0)
    # Of the 12 billion weights 6.5 act on each of 4608 tokens: text and picture have double blocks of their own, modulation is one row.
    assert 55 < found["bf16_linear"] < 75 and found["int8_linear"] < 0.6 * found["bf16_linear"]
    assert 1.4 < found["expected_ratio"] < 1.9
    assert cards.predicted_step(cards.CARDS["NVIDIA H200"], families(dry=False)["sdxl"].spec, (1024, 1024), 77, 2, 0) is None


def test_the_report_takes_results_of_any_steps(tmp_path):
    path = tmp_path / "results.json"
    facts = {"device": "NVIDIA Test", "driver": "1", "torch": "2", "triton": "3", "commit": "abc"}
    model = {"contender": "eager bf16", "first_image": 3.0, "seconds_a_step": 0.1, "memory_steps": {"torch_peak": 2 << 30},
             "recompiles_changes": 0, "difference": {"first": 0.0}}
    layer = {"model": "Flux", "M": 4608, "K": 3072, "N": 3072, "milliseconds": {"bf16": 0.2}, "ratio_to_bf16": {"bf16": 1.0, "ours": 1.7},
             "quantizer_gb_s": {"quantize ConvRot": 3000.0}, "gemm_tops": {"gemm ours": 1000.0}, "expected_ratio": 1.77}
    soak = [{"prompt": 0, "recompiles": 1, "first_of_its_kind": True}, {"total": 1, "wrong": [], "worst": 0.001}]
    failed = {"contender": "b", "ok": False, "why": "x"}
    for name, rows in {"linear": [layer], "flux": [model, failed], "soak": soak, "kernels": []}.items():
        add_to(path, facts, name, {"status": "ok", "rows": rows, "date": "2026-11-21"})
    text = report.write(path)
    for part in ("| 3072, 3072 | 4608 | 0.200 | 1.70x | 1.77x | 1000 | 3000 |", "eager bf16 | 3.0 | - | 0.1000 | 1.00x | 2.0 | 0",
                 "1 mixed prompts, 0 wrong", "0 recompiles after", "| flux | ok | 0 | 2 | b |"):
        assert part in text
    assert path.with_suffix(".md").exists()
