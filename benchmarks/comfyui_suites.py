"""ComfyUI's own test-suites without this pack and with it: the same tests must have the same results.

    python benchmarks/comfyui_suites.py [--suites tests-unit tests/execution] [--json FILE]

Runs in a copy of ComfyUI (the one that the tests find), without models. In the servers that tests/execution starts the pack is one of
custom_nodes; in the process of tests-unit it is imported, with everything that it puts into ComfyUI. Prints the sums and each test whose
result differs twice, and exits with 1 when there is one.
"""
from __future__ import annotations

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).absolute().parent.parent
sys.path.insert(0, str(ROOT))
from benchmarks.comfy_server import _place, _remove, find_comfyui, find_python  # noqa: E402
from benchmarks.tiny_models import cache_dir  # noqa: E402

SUITES = "tests-unit", "tests/execution"
OWN_FOLDERS = "models", "input", "output", "custom_nodes"
LEFT = {".git", ".venv", "venv", "temp", "user", *OWN_FOLDERS}  # of ComfyUI's folder
PLUGIN = '''
import asyncio, importlib, sys
import torch
from comfy.cli_args import args
args.cpu = args.cpu or not torch.cuda.is_available()

def pytest_collection_finish(session):
    folder = {pack!r}
    if folder:
        spec = importlib.util.spec_from_file_location("int8_compile", folder + "/__init__.py", submodule_search_locations=[folder])
        sys.modules["int8_compile"] = pack = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(pack)
        async def nodes():
            return await (await pack.comfy_entrypoint()).get_node_list()
        assert asyncio.run(nodes())
        from int8_compile.compile.comfyui import attention, int8_layer, int8_merge
        attention.add_functions()
        int8_layer._connect_kernels()
        int8_layer.patch_linear_input_act()
        int8_merge.patch_merging_and_saving()
'''


def tools(python: str) -> Path:
    """What ComfyUI's tests need beside ComfyUI, in a folder of its own."""
    folder = cache_dir() / "comfyui-suite-tools"
    if not folder.is_dir():
        wanted = ["pytest", "pytest-aiohttp", "pytest-asyncio", "websocket-client"]
        subprocess.run([python, "-m", "pip", "install", "-q", "--target", str(folder), *wanted], check=True)
    return folder


def results(suite: str, comfyui: Path, python: str, plugin: Path, own: bool) -> dict[str, str]:
    """{test: passed, skipped, failed or error}. own: with a module in which the pack is loaded."""
    report = comfyui / "report.xml"
    report.unlink(missing_ok=True)
    paths = [str(tools(python)), str(plugin), os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths)),
                   "PATH": os.pathsep.join([str(Path(python).parent), os.environ["PATH"]])}
    command = [python, "-m", "pytest", suite, "-q", "-p", "no:cacheprovider", "--capture=fd", f"--junitxml={report}"]
    done = subprocess.run([*command, *(["-p", "pack_plugin"] if own else [])], cwd=comfyui, env=environment, capture_output=True, text=True)
    if done.returncode not in (0, 1):  # passed, or some failed
        raise SystemExit(f"{suite} did not run:\n{done.stdout[-3000:]}{done.stderr[-3000:]}")
    found = {}
    for case in ElementTree.parse(report).iter("testcase"):
        kind = next((child.tag for child in case if child.tag in ("failure", "error", "skipped")), "passed")
        found[f"{case.get('classname')}::{case.get('name')}"] = kind
    return found


def compare(suite: str, comfyui: Path, python: str, plugin: Path, sums: dict[str, dict]) -> list[str]:
    """The tests that differ: twice, since some wait a fixed time for a server. sums: gets the numbers of the last time."""
    place, differing = comfyui / "custom_nodes" / "int8-compile", None
    while True:
        found = []
        for way, pack in (("without", ""), ("with", str(ROOT))):
            (plugin / "pack_plugin.py").write_text(PLUGIN.replace("{pack!r}", repr(pack)))
            if pack:
                _place(ROOT, place)
            try:
                found.append(results(suite, comfyui, python, plugin, own=not suite.startswith("tests/")))
            finally:
                if pack:
                    _remove(place)
            sums[f"{suite} {way}"] = dict(Counter(found[-1].values()))
            sys.stdout.write(f"{suite} {way} the pack: {sums[f'{suite} {way}']}\n")
            sys.stdout.flush()
        before, now = found
        found_now = {f"{test}: {before.get(test)} -> {now.get(test)}" for test in {*before, *now} if before.get(test) != now.get(test)}
        if not found_now or differing is not None:
            return sorted(found_now & (differing or set()))
        differing = found_now


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--suites", nargs="+", default=SUITES)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    source = find_comfyui()
    if source is None:
        raise SystemExit("ComfyUI was not found: set COMFYUI_PATH to its folder")
    python, sums, differing = find_python(source), {}, []
    with tempfile.TemporaryDirectory() as folder:
        comfyui = Path(folder) / "ComfyUI"
        shutil.copytree(source, comfyui, ignore=lambda at, names: LEFT.intersection(names) if Path(at) == source else (), symlinks=True)
        for name in OWN_FOLDERS:
            (comfyui / name).mkdir(exist_ok=True)
        plugin = Path(folder) / "plugin"
        plugin.mkdir()
        for suite in options.suites:
            differing += compare(suite, comfyui, python, plugin, sums)
    sys.stdout.write("\n".join([*differing, f"{len(differing)} tests differ\n"]))
    if options.json:
        options.json.write_text(json.dumps({"comfyui": source.name, "sums": sums, "differing": differing}, indent=1) + "\n")
    raise SystemExit(bool(differing))


if __name__ == "__main__":
    main()
