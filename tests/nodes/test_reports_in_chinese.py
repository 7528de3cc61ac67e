"""What nodes say while they work and afterwards, in Chinese: web/reports.zh.json, as web/int8_compile.js applies it."""
from __future__ import annotations

import ast
import json
import re
import shutil
import subprocess
from pathlib import Path

import pytest

REPO = Path(__file__).resolve().parents[2]
RULES = json.loads((REPO / "web" / "reports.zh.json").read_text(encoding="utf-8"))
CHINESE = re.compile("[\u4e00-\u9fff]")
# Names of what is meant, and what torch says.
NAMES = re.compile("|".join((
    "INT8_COMPILE_CACHE_DIR", "dynamo_cache_size_limit", "max-autotune-no-cudagraphs", "--disable-comfy-compiler", r"fp8(_e5m2)?", "INT8",
    "LoRA", "MB", "dB", "float32", "fullgraph", "background", "keep_layers", "max_mb", "mode", "default", "false", "CUDA graphs", r"C\+\+",
    "CXX", "Python", r"apt install g\+\+( python3-dev)?", "xcode-select --install", "Visual Studio Build Tools",
    r"pip install triton(-windows)?", "Triton", "ComfyUI", "Linux", "Windows", "macOS", r"torch(\.compile)?", r"nn\.Module\.compile",
    "weight_dtype", "fastest", "balanced", "smallest", "exact", "convrot", "rowwise", "Compile", r"\w*Block\w*", r"L\[[^ ]*",
    r"layer\.\w+", "Half", "Float", "InvalidCxxCompiler", "CppCompileError", "NAMED")))


def translated(line: str) -> str:
    for pattern, words in RULES:
        if found := re.fullmatch(pattern, line, re.ASCII):
            return re.sub(r"\$(\d)", lambda group, found=found: translated(found[int(group[1])] or ""), words)
    return line


def assert_chinese(line: str) -> None:
    said = translated(line)
    assert CHINESE.search(said), line
    assert not re.search("[A-Za-z]{3,}", NAMES.sub("", said)), (line, said)


def compile_reports():
    from int8_compile.compile.gain import Gain
    from int8_compile.compile.report import NOT_KEPT, REMEDIES, CompileReport

    gain = Gain("latent 1x16x32x32, batch 1, prompt length 20", 3.1, 2.2, (2, 2))
    slower = Gain("latent 1x4x8x8, batch 2", 1.0, 2.0, (2, 3))
    regions = [("DoubleStreamBlock", 2), ("SingleStreamBlock", 3)]
    ready = {"regions": regions, "steps": 3, "compiled_from_step": 1}
    yield from (
        CompileReport("t"), CompileReport("t", steps=1), CompileReport("t", steps=1, built_at_step=1),
        CompileReport("t", building=["DoubleStreamBlock 1", "SingleStreamBlock 2"]),
        CompileReport("t", **ready, graphs=2, seconds=7.1, cache_hits=1, gain=gain, last_calls={"graph": 5}),
        CompileReport("t", **ready, artifacts=["DoubleStreamBlock a", "SingleStreamBlock b"], last_calls={"artifact": 5}, gain=slower),
        CompileReport("t", **ready, graphs=1, seconds=2, last_calls={"graph": 3, "eager": 2}, building=["SingleStreamBlock 2"]),
        CompileReport("t", **ready, graphs=1, last_calls={"eager": 5}, building=["SingleStreamBlock 2"]),
        CompileReport("t", **ready, fallbacks=[f"{NOT_KEPT}: NAMED"], checked={"DoubleStreamBlock": ("float32", 1.5)}, checks=1,
                      int8={"DoubleStreamBlock": (38.1, 30.2, "layer.q")}, changes=[
                          "new batch 2: 2 graphs compiled", "new size of the latent 1x16x32x48: nothing compiled",
                          "new prompt length 33: 2 blocks compiled in the background", "new LoRA or strength: 1 graph compiled"],
                      recompiles=["DoubleStreamBlock: tensor 'L['x']' size mismatch at index 1. expected 3, actual 4",
                                  "DoubleStreamBlock: tensor 'L['x']' dtype mismatch. expected Float, actual Half",
                                  "DoubleStreamBlock: tensor 'L['x']' stride mismatch", "DoubleStreamBlock: L['x'].size()[1] == 4",
                                  "DoubleStreamBlock: expected type of 'L['x']' to be", *["DoubleStreamBlock: NAMED"] * 2],
                      breaks={"NAMED": 2}),
        *(CompileReport("t", failure="NAMED" if " " in part else f"{part} NAMED") for part, _ in REMEDIES[:3]))


def quantize_reports():
    from int8_compile.int8.report import QuantizeReport

    yield from (
        QuantizeReport(waiting=4), QuantizeReport(waiting=4, first_use="prompt"), QuantizeReport(native=7, before=9, after=9),
        QuantizeReport(refusal="Left as it is: NAMED"), QuantizeReport(methods={"rowwise": 2}),
        QuantizeReport(methods={"rowwise": 2, "convrot": 1}, before=37.1, after=15.2, worst=(30.1, "layer.q"), encoders={"NAMED": 3},
                       source="NAMED weights, whose own rounding stays",
                       kept={reason: [f"layer.{n}" for n in range(count)] for reason, count in (
                           ("by keep_layers", 1), ("below 30 dB", 3), ("not needed for max_mb", 5), ("never called", 2),
                           ("no faster as INT8", 2), ("not timed", 1))}))


def optimize_reports():
    from int8_compile.compile.comfyui.decisions import FAILED, OFF, SHORT, UNTIMED, UNWRITTEN, Decision
    from int8_compile.compile.comfyui.optimize_report import OptimizeReport
    from int8_compile.compile.report import CompileReport

    chosen = (("a", "convrot"), ("b", "float"))
    times = (("latent 1x16x32x32, batch 1", 3.0, 2.5, 2.0),)
    shapes = tuple((3072, 9216 + n, 4608, 4, int8, 0.5, 0.3, 38.1) for n, int8 in enumerate((4, 2, 0, 1, 1, 1, 1)))
    for compiled in (None, True, False):
        for goal, known, decision in (
                ("balanced", False, Decision(chosen, compiled=compiled, times=times, weights=(37.0, 15.0), shapes=shapes)),
                ("fastest", True, Decision((("a", "float"),), compiled=compiled, slower=(1.0, 2.0))),
                ("smallest", True, Decision(None, compiled=compiled, times=times))):
            for reason in ("", "NAMED"):
                for later in (False, True):
                    yield OptimizeReport(goal, 30.0, decision, is_known=known, reason=reason, from_next=later)
        yield OptimizeReport("exact", None, Decision(None, compiled=compiled, times=times))
        for goal, decided in (("exact", None), ("balanced", (("a", "float"),))):
            yield OptimizeReport(goal, decided and 30.0, Decision(decided, compiled=compiled), passing=FAILED)
        yield OptimizeReport("balanced", 30.0, Decision(chosen, compiled=compiled), compile=CompileReport("t", steps=1, built_at_step=1))
        for passing in ("", SHORT, FAILED, UNTIMED, OFF, UNWRITTEN):
            yield OptimizeReport("balanced", 30.0, Decision(chosen, compiled=compiled, times=times), is_known=True, passing=passing,
                                 compile=CompileReport("t", steps=2, built_at_step=1, compiled_from_step=2))


def lines_of(reports) -> set[str]:
    return {line for report in reports for text in (report.status(), *report.short(), report.text()) for line in text.splitlines()}


def test_each_line_of_a_compile_and_an_int8_report_is_chinese():
    found = lines_of((*compile_reports(), *quantize_reports()))
    assert len(found) > 50
    for line in found:
        assert_chinese(line)


@pytest.mark.comfy
def test_each_line_of_optimize_model_and_apply_modes_is_chinese(comfy):
    from int8_compile.compile.comfyui.mode_records import ModesReport

    found = lines_of((*optimize_reports(), ModesReport([]), ModesReport(["convrot", "NAMED"])))
    assert len(found) > 25
    for line in found:
        assert_chinese(line)


def warnings_of_the_code() -> list[str]:
    """What is given to fall_back, and remedies; NAMED in the place of what is put in, 7 where it follows a word that counts."""
    from int8_compile.compile.report import REMEDIES

    found = [text + "NAMED" for _, text in REMEDIES]
    for path in (REPO / "compile").rglob("*.py"):
        for call in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(call, ast.Call) and getattr(call.func, "attr", "") == "fall_back":
                message = call.args[0]
                if not isinstance(message, (ast.JoinedStr, ast.Constant)):
                    continue
                parts = message.values if isinstance(message, ast.JoinedStr) else [message]
                texts = [part.value if isinstance(part, ast.Constant) else "NAMED" for part in parts]
                found.append(re.sub("(than |compiled )NAMED( times)", r"\g<1>7\2", "".join(texts)))
    return found


@pytest.mark.parametrize("message", warnings_of_the_code())
def test_each_warning_of_a_compile_node_is_chinese(message):
    assert_chinese(message)


@pytest.mark.parametrize("line", [
    "loading the compiler", "compiling DoubleStreamBlock 1/2, 12 s", "measuring 3/20", "timing 3/20", "quantizing 4/20, 3 s", "Close",
    "looking at this prompt in high precision", "looking at this sampling in high precision; INT8 from the next one on", "Details",
    "looking at 3 steps in high precision", "Interrupted.", "Measuring: some seconds, after what is queued.", "Clear compile cache",
    "DoubleStreamBlock: what was compiled computes something else than the model (difference 1.0e-01, 300 times float32's own rounding; "
    "NAMED). The model's own result was used, and it runs uncompiled from now on. The option NAMED or another backend may help."])
def test_what_is_under_way_and_what_the_page_says_is_chinese(line):
    assert_chinese(line)


def test_other_text_stays_as_it_is():
    assert translated("SGMUniform at 3.0, no rule knows this") == "SGMUniform at 3.0, no rule knows this"


@pytest.mark.skipif(shutil.which("node") is None, reason="needs node, which runs the page's code")
def test_the_page_translates_as_this_does(tmp_path):
    source = (REPO / "web" / "int8_compile.js").read_text(encoding="utf-8")
    begin, end = source.index("function translated("), source.index("async function loadRules")
    lines = sorted(lines_of((*compile_reports(), *quantize_reports()))) + warnings_of_the_code()
    (tmp_path / "lines.json").write_text(json.dumps(lines), encoding="utf-8")
    script = tmp_path / "run.mjs"
    script.write_text(f"""import fs from 'node:fs';
        const read = (path) => JSON.parse(fs.readFileSync(path, 'utf8'));
        const rules = read({json.dumps(str(REPO / 'web' / 'reports.zh.json'))}).map(
            ([pattern, words]) => [new RegExp(`^${{pattern}}$`), words]);
        {source[begin:end]}
        console.log(JSON.stringify(read({json.dumps(str(tmp_path / 'lines.json'))}).map(inUsersLanguage)));""", encoding="utf-8")
    done = subprocess.run(["node", script], capture_output=True, text=True, encoding="utf-8", timeout=60)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == ["\n".join(map(translated, text.split("\n"))) for text in lines]
