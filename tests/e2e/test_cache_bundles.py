"""A fleet: one ComfyUI compiles, another with its own key loads the bundle over HTTP and compiles nothing."""
from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from toys import difference

from benchmarks.workflows import flux_prompt, with_small_models

from .conftest import latent

pytestmark = pytest.mark.e2e
REPO = Path(__file__).resolve().parents[2]
EXAMPLE = REPO / "example_workflows" / "api" / "export_compile_cache.json"


def node(class_type, **inputs):
    return {"node": {"class_type": class_type, "inputs": inputs}}


def text_of(result) -> str:
    assert result.status == "success", result.error
    (text,) = (output["text"][0] for output in result.outputs.values() if "text" in output)
    return text


@pytest.mark.rotating
def test_a_second_worker_runs_what_the_first_has_compiled(serve, tmp_path):
    def worker(name):
        environment = {"INT8_COMPILE_CACHE": "1", "INT8_COMPILE_CACHE_KEY_FILE": str(tmp_path / f"{name}.key")}
        return serve(env=environment)

    with worker("first") as first:
        prompt = with_small_models(json.loads(EXAMPLE.read_text()))
        compiled = []
        for node_type, inputs in (("INT8QuantizeModel", {"method": "rowwise"}), ("INT8LazyTorchCompile", {"background": True})):
            (found,) = (node for node in prompt.values() if node["class_type"] == node_type)
            found["inputs"].update(inputs)
            compiled.append((node_type, {name: value for name, value in found["inputs"].items() if name != "model"}))
        (save,) = (node for node in prompt.values() if node["class_type"] == "SaveCompileCache")
        save["inputs"]["filename_prefix"] = "fleet"
        path, _, *classes, digest = text_of(first.run(prompt)).splitlines()
        digest = digest.removeprefix("digest: ")
        assert path == str(first.base_dir / "user" / "__int8_compile" / "bundles" / "fleet_00001_.zip")
        assert sorted(line.partition(" for ")[0] for line in classes) == ["DoubleStreamBlock", "SingleStreamBlock"]
        assert "runs DoubleStreamBlock" not in first.log_text()
        want = latent(first, first.run(flux_prompt(model_nodes=compiled, seed=2)))
        assert "runs DoubleStreamBlock" in first.log_text()
        assert "Deleted 2 compiled" in text_of(first.run(node("ClearCompileCache")))
    with worker("second") as second:
        refused = second.run(node("LoadCompileCache", bundle="fleet_00001_.zip", trust=digest))
        assert refused.status == "error" and "there is no fleet_00001_.zip in" in refused.error["exception_message"]
        assert str(second.base_dir) not in refused.error["exception_message"]
        shutil.copy(path, second.base_dir / "user" / "__int8_compile" / "bundles")
        refused = second.run(node("LoadCompileCache", bundle="fleet_00001_.zip", trust=""))
        assert refused.status == "error" and "DoubleStreamBlock for " in refused.error["exception_message"]
        refused = second.run(node("LoadCompileCache", bundle="fleet_00001_.zip", trust=digest))
        assert refused.status == "error" and "not on this server's list of trusted bundles" in refused.error["exception_message"]
        command = [sys.executable, "-I", REPO / "trust.py", second.base_dir / "user" / "__int8_compile" / "bundles" / "fleet_00001_.zip"]
        environment = {**os.environ, "INT8_COMPILE_CACHE_KEY_FILE": str(tmp_path / "second.key")}
        said = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout
        assert f"{digest} is trusted" in said and "DoubleStreamBlock for " in said
        loaded = text_of(second.run(node("LoadCompileCache", bundle="fleet_00001_.zip", trust=digest)))
        assert "2 compiled added" in loaded
        got = latent(second, second.run(flux_prompt(model_nodes=compiled, seed=2)))
        assert "step 1 on runs DoubleStreamBlock" in second.log_text() and "step 1 on runs SingleStreamBlock" in second.log_text()
        assert "building" not in second.log_text()
    assert difference(got, want) < 1e-6
