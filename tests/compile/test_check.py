"""The check: what is missing is named with its remedy, what is there is measured, and the advice follows from the numbers."""
from __future__ import annotations

import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from int8_compile.compile.check import facts as check_facts
from int8_compile.compile.check import linear_table, machine
from int8_compile.compile.check.block import measure_block
from int8_compile.compile.check.linear_table import FULL, QUICK, Row, Shape, Sizes, measure, sizes, sizes_of
from int8_compile.compile.check.plot import plot
from int8_compile.compile.check.ways import advice, all_ways, measure_way, plot_ways, psnr_db, table

REPO = Path(__file__).resolve().parents[2]
CPU = torch.device("cpu")
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
TINY = [Shape("Tiny", 32, 64, 128), Shape("Tiny odd", 17, 72, 40)]


@pytest.mark.parametrize("compiler, says", [("/bin/false", "/bin/false fails"), ("no-such-compiler -O2", "no-such-compiler was not found")])
def test_a_compiler_that_does_not_work_is_missing_and_the_remedy_names_the_package(monkeypatch, compiler, says):
    monkeypatch.setenv("CXX", compiler)
    fact = check_facts.compiler_fact(CPU)
    assert fact.status == check_facts.MISSING and says in fact.value and "apt install g++" in fact.remedy
    assert not check_facts.can_compile([fact])


def test_an_empty_path_has_no_compiler(monkeypatch, tmp_path):
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.setenv("PATH", str(tmp_path))
    fact = check_facts.compiler_fact(CPU)
    assert fact.status == check_facts.MISSING and "was not found" in fact.value


@pytest.mark.skipif(shutil.which("g++") is None, reason="this machine has no g++")
def test_a_compiler_that_works_is_ok(monkeypatch):
    monkeypatch.setenv("CXX", "g++ -O1")
    assert check_facts.compiler_fact(CPU) == check_facts.Fact("C++ compiler", "g++ -O1")


def test_every_fact_that_is_not_ok_says_what_to_do(monkeypatch, tmp_path):
    monkeypatch.setenv("CXX", "/bin/false")
    facts = list(check_facts.machine_facts(CPU))
    assert {"torch", "Triton", "C++ compiler", "Python headers", "GPU", "CPU"} <= {fact.name for fact in facts}
    statuses = (check_facts.OK, check_facts.WARNING, check_facts.MISSING)
    assert all(fact.status in statuses and (fact.status == check_facts.OK or fact.remedy) for fact in facts)


def test_windows_portables_own_python_is_what_installs(monkeypatch):
    monkeypatch.setattr(sys, "executable", "/ComfyUI_windows_portable/python_embeded/python.exe")
    assert r".\python_embeded\python.exe -s -m pip install triton-windows" in check_facts.pip_install("triton-windows")


def test_every_contender_is_timed_in_the_same_run():
    ticks = []
    first, odd = measure(CPU, TINY, DTYPES, ticks.append)
    wanted = {"fp32", "bf16", "int8", "int8 rotated", "int8 torch._int_mm", "int8 torch._int_mm rotated"}
    if importlib.util.find_spec("comfy_kitchen"):
        wanted |= {"int8 comfy_kitchen eager", "int8 comfy_kitchen eager rotated"}
    assert not first.failed and set(first.milliseconds) == wanted
    assert all(ms > 0 for ms in first.milliseconds.values()) and first.milliseconds[first.winner] == min(first.milliseconds.values())
    assert first.ratios("fp32")["fp32"] == 1.0
    assert "int8" in odd.milliseconds and "int8 rotated" not in odd.milliseconds  # no group of channels divides 72
    assert set(ticks) == {0, 1} and ticks == sorted(ticks)


def test_what_cannot_run_or_computes_something_else_is_named_and_the_rest_is_timed():
    x = torch.randn(8, 64)

    def broken():
        raise RuntimeError("no kernel image\nand more")
    row = Row("Tiny", 8, 64, 64)
    linear_table.time_in_turn({"fp32": lambda: x, "broken": broken, "wrong": lambda: -x, "nan": lambda: x / 0}, row, CPU, lambda: None)
    assert set(row.milliseconds) == {"fp32"} and row.failed["broken"] == "RuntimeError: no kernel image"
    assert "200%" in row.failed["wrong"] and "off by" in row.failed["nan"]


def test_an_interrupt_ends_the_measuring_at_once():
    class Interrupted(Exception):  # ComfyUI's own was an Exception before 0.19.3
        pass

    def interrupt(done):
        raise Interrupted
    with pytest.raises(Interrupted):
        measure(CPU, TINY, DTYPES, interrupt)


@pytest.mark.parametrize("name, count, block", [("quick", len(QUICK), False), ("full", len(FULL), True)])
def test_sizes_are_those_of_models_and_a_cpu_gets_fewer_rows(name, count, block):
    on_gpu, on_cpu = sizes(name, torch.device("cuda")), sizes(name, CPU)
    assert len(on_gpu.layers) == count and (on_gpu.block is not None) == (on_cpu.block is not None) == block
    assert max(shape.m for shape in on_cpu.layers) == linear_table.CPU_ROWS[name] < max(shape.m for shape in on_gpu.layers)


def test_sizes_that_cannot_be_are_refused_with_what_can_be():
    with pytest.raises(ValueError, match="Choose one of: quick, full"):
        sizes("huge", CPU)
    with pytest.raises(ValueError, match="a width that 64 divides"):
        sizes_of(100, 16)


def test_a_block_is_timed_uncompiled_and_compiled_and_both_compute_the_same():
    row = measure_block(CPU, Shape("Tiny", 33, 64, 64), torch.float32, backend="aot_eager")
    assert not row.failed and set(row.milliseconds) == {"eager", "INT8", "compiled", "INT8 + compiled"}


def test_a_block_that_cannot_be_compiled_is_named_with_its_cause():
    row = measure_block(CPU, Shape("Tiny", 33, 64, 64), torch.float32, backend="tvm")
    assert set(row.milliseconds) == {"eager", "INT8"} and set(row.failed) == {"compiled", "INT8 + compiled"}


def rows(**milliseconds):
    named = {name.replace("_rotated", " rotated").replace("_kitchen", " comfy_kitchen"): ms for name, ms in milliseconds.items()}
    return [Row("Flux", 16, 64, 64, dict(named)), Row("SDXL", 16, 64, 64, dict(named))]


def advise(measured, block=None, compiles=True):
    names = dict(zip(("eager", "compiled", "INT8 + compiled"), block or ()))
    row = Row("Flux", 16, 64, 64, names) if block else None
    return machine.advice(machine.Check("this card", next(iter(measured)), [], rows(**measured), row), compiles)


@pytest.mark.parametrize("measured, says, not_says", [
    (dict(bf16=1.8, int8_rotated=1.0, fp8=1.0), ["INT8: expect", "1.8x as fast as bf16", "fp8 layers are as fast here (1.8x)"], []),
    (dict(bf16=3.0, int8_rotated=1.0, fp8=2.0), ["3.0x as fast as bf16", "Flux 3.0x, SDXL 3.0x", "fp8 layers reach 1.5x"], []),
    (dict(bf16=2.0, int8_rotated=1.5, fp8=1.0), ["fp8 layers are faster here (2.0x, INT8 1.3x)"], []),
    (dict(bf16=1.0, int8_rotated=1.0), ["about as fast as bf16", "half of the memory"], ["expect"]),
    (dict(fp16=1.0, int8_rotated=2.0), ["slower than fp16", "(0.50x)", "leave INT8 out"], ["expect"]),
    (dict(bf16=2.0, int8_rotated=1.0, int8_kitchen_rotated=0.5), ["set kernel to comfy_kitchen, which reaches 4.0x"], []),
    (dict(bf16=2.0), ["INT8 could not be measured"], ["expect"]),
])
def test_the_advice_follows_from_the_numbers(measured, says, not_says):
    text = advise(measured)
    assert all(part in text for part in says) and not any(part in text for part in not_says), text


@pytest.mark.parametrize("eager, compiled, both, says", [
    (1.8, 1.5, 1.0, "INT8 + compile: expect about 1.8x as fast as bf16 uncompiled"),
    (1.8, 1.2, 1.2, "INT8 makes it no faster (1.5x)"),
    (1.8, 1.2, 1.6, "INT8 makes it slower (1.1x)"),
    (1.0, 1.0, 1.0, "Neither compile (1.00x) nor INT8 + compile (1.00x)"),
    (1.0, 2.0, 1.5, "Neither compile (0.50x) nor INT8 + compile (0.67x)"),
])
def test_with_a_block_the_advice_is_about_compiled_blocks(eager, compiled, both, says):
    assert says in advise(dict(bf16=2.0, int8_rotated=1.0), (eager, compiled, both))


def test_a_block_that_did_not_compile_is_not_advised_from():
    block = Row("Flux", 16, 64, 64, {"eager": 1.0})
    text = machine.advice(machine.Check("this card", "bf16", [], rows(bf16=2.0, int8_rotated=1.0), block), True)
    assert text.startswith("INT8: expect") and text.endswith("Compiling failed: the cause stands below.")


def test_without_a_compiler_the_advice_says_so():
    assert advise(dict(bf16=2.0, int8_rotated=1.0), compiles=False).endswith("Compile needs what is missing below.")


def test_text_json_and_picture_hold_the_table():
    result = machine.check(CPU, Sizes(TINY[:1]), [check_facts.Fact("host", "none", check_facts.WARNING, "get one")], torch.float32)
    text, data = result.text(), json.loads(json.dumps(result.to_dict()))
    assert "warning  host: none" in text and "-> get one" in text and result.advice and result.advice in text
    assert "Tiny layer, 32 x 64 -> 128" in text and data["rows"][0]["winner"] in text and data["block"] is None
    assert data["baseline"] == "fp32" and data["rows"][0]["ratios"]["fp32"] == 1.0 and data["tera_ops"]["int8"] > 0
    if importlib.util.find_spec("matplotlib") is None:
        with pytest.raises(RuntimeError, match="pip install matplotlib"):
            plot(result)
        return
    picture = plot(result)
    assert picture.dim() == 3 and picture.shape[2] == 3 and picture.dtype is torch.float32
    assert 0 <= picture.min() < 0.5 < picture.max() <= 1  # ink on paper


def run_command(folder, *arguments, **environment):
    env = {**os.environ, **environment}
    return subprocess.run([sys.executable, *arguments], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


@pytest.mark.parametrize("way", ["file", "module"])
def test_the_command_runs_in_a_folder_of_any_name(tmp_path, way):
    """--help: read before the pack is loaded; the next test measures."""
    folder = tmp_path / "custom_nodes" / "int8-compile v0.1"
    shutil.copytree(REPO, folder, ignore=shutil.ignore_patterns(".git", ".nox", "tests", "benchmarks", "__pycache__"))
    arguments = [str(folder / "check.py")] if way == "file" else ["-m", "check"]
    done = run_command(tmp_path if way == "file" else folder, *arguments, "--help")
    assert done.returncode == 0 and "--json" in done.stdout, done.stderr


def test_the_command_refuses_what_it_cannot_measure(tmp_path):
    done = run_command(tmp_path, str(REPO / "check.py"), "--width", "100")
    assert done.returncode == 2 and "a width that 64 divides" in done.stderr and "Traceback" not in done.stderr


def test_the_command_measures_and_writes_json_without_comfyui(tmp_path):
    folder = tmp_path / "int8-compile"
    shutil.copytree(REPO, folder, ignore=shutil.ignore_patterns(".git", ".nox", "tests", "benchmarks", "__pycache__"))
    done = run_command(folder, "-m", "check", "--width", "64", "--tokens", "32", "--device", "cpu", "--json", str(tmp_path / "out.json"),
                       COMFYUI_PATH=str(tmp_path), CXX="/bin/false")
    assert done.returncode == 0, done.stderr
    data = json.loads((tmp_path / "out.json").read_text())
    assert {fact["name"]: fact["status"] for fact in data["facts"]}["C++ compiler"] == "missing"
    assert len(data["rows"]) == 4 and all("int8 rotated" in row["milliseconds"] for row in data["rows"])
    assert data["block"]["failed"].keys() == {"compiled", "INT8 + compiled"}
    assert data["advice"] in done.stdout and "Compile needs what is missing below" in data["advice"]
    assert "COMFYUI_PATH" in done.stdout


def test_ways_to_run_a_model_are_timed_compared_and_advised_on():
    ways, images = all_ways()[:3], []

    def image(seed):
        images.append(seed)
        return torch.full((1, 4, 4, 3), 0.5)
    for way in ways[:2]:
        measure_way(way, image, lambda: images.append("settled"))
        assert way.first > 0 and way.later > 0
    assert images == [1, "settled", 2, 3] * 2
    eager, compiled, failed = ways
    eager.later, compiled.later, compiled.decibels, failed.error = 3.0, 2.0, psnr_db(image(1), image(1) + 0.01), "no memory"
    assert abs(compiled.decibels - 40) < 0.1 and psnr_db(image(1), image(1)) == 99
    lines = table(ways, "PSNR")
    assert lines[0].endswith("PSNR, dB") and "1.50x" in lines[2] and lines[2].endswith("40.0") and lines[-1] == "  INT8 rowwise: no memory"
    assert advice(ways, "PSNR") == "This model: compiled is fastest, 1.50x as fast as eager."
    compiled.later = 2.95
    assert advice(ways, "PSNR") == "This model: nothing was faster than eager by 5 %."
    eager.later = None
    assert advice(ways, "PSNR") == "This model could not be measured."
    assert plot_ways(ways, "PSNR").shape[-1] == 3


def test_a_contender_that_would_take_minutes_is_named_and_not_run():
    ran = []

    def slow(x):
        ran.append(len(x))
        time.sleep(0.2)
        return x
    x, row = torch.ones(1024, 4), linear_table.Row("", 1024, 4, 4)
    functions = {"fp32": lambda: x, "slow": linear_table._unless_slow(slow, x), "quick": linear_table._unless_slow(lambda x: x, x)}
    linear_table.time_in_turn(functions, row, torch.device("cpu"), lambda: None, 0.01)
    assert ran == 2 * [linear_table.FEW_ROWS] and row.failed.keys() == {"slow"} and row.milliseconds.keys() == {"fp32", "quick"}
    seconds = int(re.fullmatch(r"TooSlow: about (\d+) s a call", row.failed["slow"]).group(1))
    assert 0.2 * 1024 / linear_table.FEW_ROWS <= seconds < 200
