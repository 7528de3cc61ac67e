"""The example workflows: the files users open and queue."""
from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.comfy_server import find_comfyui
from benchmarks.workflows import with_small_models

pytestmark = [pytest.mark.e2e, pytest.mark.rotating(2)]
REPO = Path(__file__).resolve().parents[2]
EXAMPLES = REPO / "example_workflows"
# Inputs of our nodes that an example sets to another value than the default.
CHOSEN = {"method", "is_patcher", "filename_prefix"}
# Its run takes a builder process: see test_cache_bundles.py.
EXPORT = "export_compile_cache"


def frontend_only(node):
    return node["type"] in ("Note", "MarkdownNote")


@pytest.mark.parametrize("path", sorted(p for p in (EXAMPLES / "api").glob("*.json") if p.stem != EXPORT), ids=lambda p: p.stem)
def test_api_workflows_run_with_small_models_in_place_of_real_ones(server, path):
    prompt = with_small_models(json.loads(path.read_text()))
    result = server.run(prompt)
    assert result.status == "success", result.error
    kinds = {node["class_type"] for node in prompt.values()}
    assert [p.suffix for p in result.files(server)] == [".png"] * ("SaveImage" in kinds)
    for node in prompt.values():
        if node["class_type"] == "SaveINT8Model":
            assert (server.base_dir / "output" / f"{node['inputs']['filename_prefix']}_00001_.safetensors").exists()


@pytest.mark.parametrize("path", sorted(EXAMPLES.glob("*.json")), ids=lambda p: p.stem)
def test_ui_workflows_use_nodes_and_values_that_exist(server, path):
    workflow = json.loads(path.read_text())
    links = {link[0] for link in workflow["links"]}
    for node in workflow["nodes"]:
        if frontend_only(node):
            continue
        required = server.object_info(node["type"])["input"]["required"]
        widgets = [(name, spec) for name, spec in required.items() if spec[0] in ("INT", "FLOAT", "STRING", "BOOLEAN", "COMBO")
                   or isinstance(spec[0], list)]
        values = [v for v in node.get("widgets_values", []) if v not in ("randomize", "fixed")]
        assert len(values) >= len(widgets), node["type"]
        if "INT8" in node["type"] or node["type"] == "CompileModel":
            for (name, spec), value in zip(widgets, values):
                if "default" in spec[1] and name not in CHOSEN:
                    assert value == spec[1]["default"], (node["type"], name)
        assert all(i["link"] is None or i["link"] in links for i in node.get("inputs", []))


def test_comfyui_lists_them_as_templates(server):
    import urllib.request

    templates = json.loads(urllib.request.urlopen(f"{server.url}/api/workflow_templates").read())
    assert sorted(templates["int8-compile"]) == sorted(path.stem for path in EXAMPLES.glob("*.json"))


@pytest.mark.rotating
def test_the_demo_runs_and_judges_itself(tmp_path):
    run = subprocess.run([sys.executable, str(REPO / "benchmarks" / "demo.py"), "--out", str(tmp_path), "--steps", "2", "--warm",
                          "--comfyui", str(find_comfyui())], capture_output=True, text=True)
    assert run.returncode == 0, run.stdout + run.stderr
    result = json.loads((tmp_path / "demo.json").read_text())
    assert result["mode"] == "comfyui" and result["passed"]
    assert [v["name"] for v in result["variants"]] == ["eager", "compiled", "int8_compiled", "int8_background", "int8_next"]
    assert all(v["first_image_seconds"] and v["second_image_seconds"] for v in result["variants"])
    assert all((tmp_path / f"{v['name']}.png").exists() for v in result["variants"])
    assert (tmp_path / "comparison.png").exists() and "PASS" in run.stdout
    # The check of a block of the same sizes is set beside it.
    assert result["check"]["advice"] in run.stdout and result["check"]["block"].keys() >= {"compiled", "INT8 + compiled"}
