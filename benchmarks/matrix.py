"""What of the pack holds in each ComfyUI, with each Python's torch, comfy-kitchen, comfy-aimdo and frontend: a dated table.

The cells are the pack's own tests, run against that ComfyUI by that Python, which needs pytest. `nox -s matrix` calls this.
"""
from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import runpy
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

REPO = Path(__file__).absolute().parent.parent
RESULT = REPO / "benchmarks" / "results" / "matrix.md"
# What is run for a column: pytest's arguments.
COLUMNS = {
    "contract": ["tests/e2e/test_contract.py"],
    "compile": ["tests/e2e/test_sampling.py", "-k", "samples_the_same_compiled and not int8 or every_attention or cpp_compiler"],
    "main job": ["tests/e2e/test_sampling.py", "-k", "almost_the_same_in_int8 or goes_on or unloading"],
    "LoRA": ["tests/nodes/test_quantize.py", "-k", "lora"],
    "INT8": ["tests/nodes/test_quantize.py", "tests/nodes/test_core_functions.py", "-k", "not lora"],
    "restart": ["tests/nodes/test_cache.py", "-k", "a_restart_compiles_nothing"],
}
# Columns whose tests all quantize, and the first ComfyUI that has native INT8.
INT8_COLUMNS, INT8_SINCE = ("main job", "LoRA", "INT8"), (0, 26, 0)
PACKAGES = ("torch", "comfy-kitchen", "comfy-aimdo", "comfyui-frontend-package")
TIMEOUT = 3600  # seconds a cell
NAMED = 3  # failing tests that a cell names
RUN_PYTEST = "import sys; sys.path.append(sys.argv.pop(1)); import pytest; sys.exit(pytest.main())"
VERSIONS = f"""
import importlib.metadata as metadata, json, sys
def version(name):
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return "none"
print(json.dumps(["%d.%d" % sys.version_info[:2], *map(version, {PACKAGES!r})]))
"""


@dataclass
class Row:
    """comfyui: its version. versions: of PACKAGES. cells: {column: what came of it}."""

    comfyui: str
    versions: list[str]
    cells: dict[str, str]


def run_cell(comfyui: Path, python: str, tools: str, column: str, timeout: float = TIMEOUT) -> str:
    """Run one column's tests: "holds (7)", or how many do not and which. tools: a folder with pytest, in case python has none."""
    version = comfyui_version(comfyui)
    if column in INT8_COLUMNS and tuple(map(int, re.findall("[0-9]+", version)[:3])) < INT8_SINCE:
        return "not run: no native INT8 before 0.26.0"
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        env = {**os.environ, "COMFYUI_PATH": str(comfyui), "COMFYUI_PYTHON": python}
        command = [python, "-c", RUN_PYTEST, tools, "-q", "-c", "tests/pytest.ini", "--rootdir=tests", f"--junitxml={report}",
                   *COLUMNS[column]]
        try:
            done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True, timeout=timeout)
        except subprocess.TimeoutExpired:
            return f"not finished in {timeout / 60:.0f} min"
        if not report.exists():
            last = (done.stdout + done.stderr).strip().splitlines()[-1:] or ["no output"]
            return f"not run: {last[0][:100]}"
        return cell(report.read_text())


def cell(report: str) -> str:
    """What a JUnit report says, in a few words."""
    cases = list(ElementTree.fromstring(report).iter("testcase"))
    bad = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skips = [skip.get("message") or "" for case in cases if (skip := case.find("skipped")) is not None]
    ran = len(cases) - len(skips)
    why = "; ".join(dict.fromkeys(filter(None, skips)))
    if bad:
        names = list(dict.fromkeys(name.partition("[")[0] for name in bad))
        more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
        return f"{len(bad)} of {ran} fail: {', '.join(names[:NAMED])}{more}"
    if not ran:
        return f"not run: {why or 'nothing to run'}"
    return f"holds ({ran}" + (f", {len(skips)} skipped{why and ': '}{why})" if skips else ")")


def comfyui_version(comfyui: Path) -> str:
    return runpy.run_path(str(comfyui / "comfyui_version.py"))["__version__"]


def table(rows: list[Row], columns: list[str], today: datetime.date, notes: Sequence[str] = ()) -> str:
    """The page with the table, Markdown. notes: lines below it."""
    head = ["ComfyUI", *PACKAGES, *columns]
    lines = [f"| {' | '.join(head)} |", "|" + "---|" * len(head)]
    lines += [f"| {' | '.join([row.comfyui, *row.versions, *(row.cells[column] for column in columns)])} |" for row in rows]
    return "\n".join([
        "# What of the pack holds where", "",
        f"Run on {today:%Y-%m-%d} on {platform.system()}, CPU, by `benchmarks/matrix.py`. A cell is how many of the pack's tests ran",
        "there, or which failed.", "",
        *lines, "", *(line for note in notes for line in (note, "")),
        *(f"- {column}: `{' '.join(COLUMNS[column])}`" for column in columns), "",
    ])


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--comfyui", type=Path, action="append", required=True,
                        help="a ComfyUI's folder; may be given more than once, the newest first: its classes make the small models")
    parser.add_argument("--python", action="append", required=True, help="a Python that can run it; may be given more than once")
    parser.add_argument("--tools", default="", help="a folder with pytest, for a Python without it; {version} is that Python's: 3.12")
    parser.add_argument("--column", action="append", choices=list(COLUMNS), help="only this one; may be given more than once")
    parser.add_argument("--note", action="append", default=[], help="a line below the table, such as a cell's reason; likewise")
    parser.add_argument("--output", type=Path, default=RESULT, help="the table")
    options = parser.parse_args(arguments)
    columns, rows = options.column or list(COLUMNS), []
    for comfyui in options.comfyui:
        for python in options.python:
            versions = json.loads(subprocess.run([python, "-c", VERSIONS], capture_output=True, text=True, check=True).stdout)
            tools = options.tools.replace("{version}", versions.pop(0))
            row = Row(comfyui_version(comfyui), versions, dict.fromkeys(columns, "not run yet"))
            rows.append(row)
            for column in columns:
                row.cells[column] = run_cell(comfyui, python, tools, column)
                sys.stderr.write(f"{row.comfyui} {' '.join(versions)} {column}: {row.cells[column]}\n")
                options.output.write_text(table(rows, columns, datetime.date.today(), options.note))


if __name__ == "__main__":
    main()
